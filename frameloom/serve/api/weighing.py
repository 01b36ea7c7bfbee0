"""What a request will take, asked before it is kept: of a large one the planner of a worker, else what was learned."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from frameloom.serve.api.asking import Order
from frameloom.serve.api.errors import bad
from frameloom.serve.api.site import Site
from frameloom.wire import Card, Foreseen

_PLAN_S: Final = 5.0
"""A client waits no longer for the plan of its request; without one the request is taken as it is."""
_PLANNED: Final = (
    "width", "height", "num_frames", "steps", "guidance_scale", "windows", "window_frames", "window_overlap",
)  # fmt: skip


async def work_of(order: Order, found: Mapping[str, Any], site: Site) -> float:
    """The seconds that an order takes; 0 where nothing is known. Raises ApiError 400 where the memory will not do."""
    service, card = site.service, site.service.card
    if card is not None and order.work and service.is_ready and _is_large(order.work, card):
        foreseen = await _planned(order, site)
        if foreseen is not None and foreseen.refusal:
            param = next((name for name in ("size", "width", "height", "seconds", "num_frames") if name in found), None)
            raise bad(param, foreseen.refusal)
        if foreseen is not None and foreseen.seconds:
            return foreseen.seconds
    return service.work_s({**order.request, **order.work})


async def _planned(order: Order, site: Site) -> Foreseen | None:
    """By its numbers alone: the pictures of a request are not there yet, and take little beside it."""
    numbers = {**order.request, **order.work}
    with suppress(TimeoutError):
        async with asyncio.timeout(_PLAN_S):
            return await site.service.foresee({name: numbers[name] for name in _PLANNED if name in numbers})
    return None


def _is_large(numbers: Mapping[str, Any], card: Card) -> bool:
    """Whether there are more pixels in it than in a video as the model is documented for, which fits."""
    return _pixels(numbers) > _pixels(card.defaults)


def _pixels(numbers: Mapping[str, Any]) -> int:
    return int(numbers["width"] * numbers["height"] * numbers["num_frames"])
