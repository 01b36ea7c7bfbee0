"""Says what requests would take while a video is made: a thread of its own, which answers one question at a time."""

import functools
import json
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from frameloom.engine.asked import request_of
from frameloom.engine.plan import Planner, compare
from frameloom.engine.workload import SizedRequest
from frameloom.errors import InputError
from frameloom.memory.plan import Plan
from frameloom.settings import LOGGER_NAME
from frameloom.types import GenerateRequest
from frameloom.wire import Foreseen

log = logging.getLogger(LOGGER_NAME)

_MAX_WAITING: Final = 16
_MAX_KEPT: Final = 256


class Forecast:
    """Answers with the plans of `planner`; what it has answered it knows until a run has shown how fast things are."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._known: OrderedDict[str, Foreseen] = OrderedDict()
        self._asked: queue.Queue[Callable[[], None]] = queue.Queue(_MAX_WAITING)

    def start(self) -> None:
        """Answer from now on."""
        threading.Thread(target=self._serve, name="forecast", daemon=True).start()

    def ask(self, number: int, request: Mapping[str, Any], tell: Callable[[Foreseen], object]) -> None:
        """Answer a question when it is its turn; at once, and with nothing, where too many wait."""
        try:
            self._asked.put_nowait(functools.partial(self._tell, number, request, tell))
        except queue.Full:
            tell(Foreseen(number=number))

    def learn(self, request: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """A request has become a video: the next answers are the better for it."""
        try:
            self._asked.put_nowait(functools.partial(self._learn, request, made))
        except queue.Full:
            log.debug("how long a video took is not learned from: too many questions wait")

    def _serve(self) -> None:
        while True:
            answer = self._asked.get()
            try:
                answer()
            except Exception:  # a plan that fails must not end the worker: nothing is known then
                log.warning("a forecast failed", exc_info=True)

    def _tell(self, number: int, request: Mapping[str, Any], tell: Callable[[Foreseen], object]) -> None:
        key = json.dumps(request, sort_keys=True)
        if key not in self._known:
            self._known[key] = self._answer(request)
            if len(self._known) > _MAX_KEPT:
                self._known.popitem(last=False)
        found = self._known[key]
        tell(
            Foreseen(
                number=number, seconds=found.seconds, memory_bytes=found.memory_bytes, resolved=found.resolved,
                refusal=found.refusal,
            )
        )  # fmt: skip

    def _answer(self, request: Mapping[str, Any]) -> Foreseen:
        try:
            asked, sized, plan = self._planned(request)
        except InputError as error:
            return Foreseen(number=0, refusal=str(error))
        except Exception:
            log.warning("a forecast failed", exc_info=True)
            return Foreseen(number=0)
        fps = asked.fps or self._planner.blueprint.defaults.fps
        resolved = {name: getattr(sized, name) for name in ("width", "height", "num_frames", "steps")}
        return Foreseen(
            number=0,
            seconds=plan.arranged.seconds,
            memory_bytes=plan.arranged.device_bytes,
            resolved={**resolved, "fps": float(fps)},
            refusal=plan.refusal or "",
        )

    def _planned(self, request: Mapping[str, Any]) -> tuple[GenerateRequest, SizedRequest, Plan]:
        options = dict(request)
        asked = request_of(options.pop("prompt", "a video"), options)
        sized = SizedRequest.of(asked, self._planner.blueprint)
        return asked, sized, self._planner.plan(sized)

    def _learn(self, request: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        *_, plan = self._planned(request)
        compare(plan, made, self._planner.book.tuner)
        self._known.clear()
