"""From parameters to an order: filled in and checked against what the model can do, by the engine's own rules."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from frameloom.errors import RequestError
from frameloom.request import check_request, resolve
from frameloom.serve.api.errors import ApiError, bad
from frameloom.serve.config import ServeConfig
from frameloom.types import GenerateRequest, Pictures, ResolvedRequest, SizeRules
from frameloom.wire import Card

FIELD_OF: Final[Mapping[str, str]] = {
    "input_reference": "image", "last_image": "last_image", "video": "video", "control_video": "control_video",
    "mask": "mask", "references": "references",
}  # fmt: skip
"""By the parameter of a picture: the field of types.GenerateRequest."""
_PLAIN: Final = (
    "prompt", "negative_prompt", "width", "height", "num_frames", "steps", "guidance_scale", "guidance_scale_2",
    "flow_shift", "fps", "seed", "strength", "control_strength", "windows", "window_frames", "window_overlap",
)  # fmt: skip
_BLAME: Final = (
    (re.compile("width"), "width"), (re.compile("height"), "height"), (re.compile("strength"), "strength"),
    (re.compile("windows are"), "windows"), (re.compile("windows of"), "window_overlap"),
    (re.compile(".*frames in a window"), "window_frames"), (re.compile(".*last image|one frame"), "last_image"),
    (re.compile("a mask"), "mask"), (re.compile("a strength"), "strength"), (re.compile(".*frames"), "num_frames"),
    (re.compile("the prompt"), "prompt"),
)  # fmt: skip
"""How sentences of request.py begin, and the parameter that each is about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is known of a picture or video that was given: pixels, frames, rate; `name` of its file in `inputs/`."""

    name: str
    width: int
    height: int
    num_frames: int = 1
    fps: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """`request` and `resolved` as jobs.Ask has them. `work`: as `resolved`, of the frames that are made."""

    request: Mapping[str, Any]
    resolved: Mapping[str, Any] = field(default_factory=dict)
    work: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class CardDefaults:
    """request.GenerationDefaults of a card."""

    width: int
    height: int
    num_frames: int
    fps: float
    steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    negative_prompt: str = ""


def needs_card(found: Mapping[str, Any]) -> bool:
    """Whether an order cannot be made before the model is known."""
    return any(name in found for name in ("seconds", "control_strength", "guidance_scale_2", *FIELD_OF))


def check_model(found: Mapping[str, Any], config: ServeConfig) -> None:
    """Raise ApiError 404 for another model than the one that is served."""
    asked = found.get("model", config.name)
    if asked != config.name:
        what = f"there is no model {asked[:60]!r} here; use {config.name!r}, or leave model out"
        raise ApiError(404, "model_not_found", what, param="model")


def _same_size(request: Mapping[str, Any], video: Shape, card: Card, *, is_own: bool) -> dict[str, int]:
    """An edit keeps the size of its video, if the model makes it; not of one that is larger than usual, and foreign."""
    fits = video.width % card.width_multiple == 0 and video.height % card.height_multiple == 0
    is_usual = video.width * video.height <= card.defaults["width"] * card.defaults["height"]
    if "width" in request or "height" in request or not fits or not (is_own or is_usual):
        return {}
    return {"width": video.width, "height": video.height}


def check_takes(found: Mapping[str, Any], kind: str, card: Card | None) -> None:
    """Raise ApiError 400 where the model takes no picture of a kind that is given, or needs one that is not."""
    if card is None:
        return
    takes = [param for param, name in FIELD_OF.items() if name in card.takes]
    if kind == "extension":
        if "input_reference" not in takes:
            raise bad("video", f"{card.model} starts from no image, so it cannot go on from a last frame")
        return
    for param in FIELD_OF:
        if param in found and param not in takes:
            raise bad(param, f"{card.model} takes no {param}; it takes {', '.join(takes) or 'prompts alone'}")
    if card.needs_image and "input_reference" not in found:
        raise bad("input_reference", f"{card.model} starts from an image; give input_reference")


def check_effect(found: Mapping[str, Any], card: Card | None) -> None:
    """Raise ApiError 400 for a number that would change nothing in a video of this model."""
    if card is None:
        return
    if "control_strength" in found and "control_video" not in card.takes:
        raise bad(
            "control_strength",
            f"it counts beside a control video, and {card.model} takes none; leave control_strength out",
        )
    if "guidance_scale_2" in found and card.experts == 1:
        raise bad(
            "guidance_scale_2",
            f"it is of the second of two experts, and {card.model} has one; leave guidance_scale_2 out",
        )


def remixed(
    source: Mapping[str, Any], resolved: Mapping[str, Any], prompt: str, config: ServeConfig, card: Card | None
) -> Order:
    """The order of a job once more, with another prompt. Raises ApiError 400 where that is not made any more."""
    request = {**source, "prompt": prompt}
    _check({name: value for name, value in request.items() if name != "extends"})
    _check_limits({**request, **resolved}, {}, config)
    work = _resolved(request, {}, None, card) if "extends" in source else resolved
    return Order(request=request, resolved=resolved, work=work)


def order_of(
    found: Mapping[str, Any],
    kind: str,
    *,
    card: Card | None,
    config: ServeConfig,
    shapes: Mapping[str, list[Shape]],
    is_own: bool = False,
) -> Order:
    """What is to be made of the parameters of a create, edit, extension or estimate. Raises ApiError 400.

    `shapes`: by parameter, the pictures and videos that were given. `is_own`: the video was made here.
    """
    request = _request(found, card, _rate(shapes))
    request |= _named(shapes, kind)
    extended = shapes["video"][0] if kind == "extension" else None
    if extended is not None:
        request |= {"width": extended.width, "height": extended.height, "fps": extended.fps}
    if kind == "edit" and card is not None:
        request |= _same_size(request, shapes["video"][0], card, is_own=is_own)
    try:
        work = _resolved(request, shapes, extended, card)
    except ApiError as error:
        error.param = _given_as(error.param, found, extended)
        raise
    resolved = dict(work)
    if extended is not None and work:
        resolved["num_frames"] += extended.num_frames - 1
    _check_limits({**request, **resolved}, found, config)
    return Order(request=request, resolved=resolved, work=work)


def _given_as(param: str | None, found: Mapping[str, Any], extended: Shape | None) -> str | None:
    """The parameter by which the client gave a number."""
    if param in ("width", "height", "fps") and extended is not None:
        return "video"
    if param in ("width", "height") and "size" in found:
        return "size"
    return "seconds" if param == "num_frames" and "seconds" in found else param


def with_seed(order: Order) -> Order:
    """A video of no seed would be another one in a second attempt."""
    return replace(order, request={"seed": secrets.randbelow(2**31), **order.request})


def _rate(shapes: Mapping[str, list[Shape]]) -> float | None:
    """Frames per second of the video that is followed, if one is."""
    videos = [*shapes.get("video", ()), *shapes.get("control_video", ())]
    return videos[0].fps if videos else None


def _request(found: Mapping[str, Any], card: Card | None, rate: float | None) -> dict[str, Any]:
    request = {name: found[name] for name in _PLAIN if name in found}
    if "size" in found:
        _no_conflict(found, "size", ("width", "height"))
        request["width"], request["height"] = found["size"]
    if "seconds" in found:
        _no_conflict(found, "seconds", ("num_frames",))
        request["num_frames"] = _frames(found["seconds"], found.get("fps", rate), card)
    return request


def _no_conflict(found: Mapping[str, Any], name: str, others: tuple[str, ...]) -> None:
    for other in others:
        if other in found:
            raise bad(name, f"{name} and {other} say the same thing twice; give one of them")


def _frames(seconds: float, fps: float | None, card: Card | None) -> int:
    """1 + temporal x k frames, of which the last is shown so many seconds after the first, as nearly as can be."""
    if card is None:
        raise ApiError(503, "starting", "the model is not known yet; come again soon", retry_s=2)
    rate = card.defaults["fps"] if fps is None else fps
    return 1 + card.temporal * max(1, round(seconds * rate / card.temporal))


def _named(shapes: Mapping[str, list[Shape]], kind: str) -> dict[str, Any]:
    """The fields of a request that name files."""
    named: dict[str, Any] = {}
    for param, given in shapes.items():
        files = [f"inputs/{shape.name}" for shape in given]
        name = "extends" if kind == "extension" else FIELD_OF[param]
        named[name] = files if param == "references" else files[0]
    return named


def _resolved(
    request: Mapping[str, Any], shapes: Mapping[str, list[Shape]], extended: Shape | None, card: Card | None
) -> dict[str, Any]:
    """The numbers of the video, as the engine will work them out; nothing before the model is known."""
    told = {name: value for name, value in request.items() if name in _PLAIN}
    if extended is None:
        stand_ins = {FIELD_OF[param]: [_stand_in(param, one) for one in given] for param, given in shapes.items()}
        told |= {name: given if name == "references" else given[0] for name, given in stand_ins.items()}
    if card is None:
        _check(told)
        return {}
    rules = SizeRules(
        width_multiple=card.width_multiple, height_multiple=card.height_multiple, temporal=card.temporal,
        reason="as this model needs it",
    )  # fmt: skip
    try:
        made = resolve(GenerateRequest(**told), CardDefaults(**card.defaults), rules)
    except RequestError as error:
        raise bad(_blamed(str(error)), str(error)) from None
    return _numbers(made)


def _check(told: Mapping[str, Any]) -> None:
    """What can be checked before a model is known."""
    try:
        check_request(GenerateRequest(**told))
    except RequestError as error:
        raise bad(_blamed(str(error)), str(error)) from None


def _numbers(made: ResolvedRequest) -> dict[str, Any]:
    return {name: getattr(made, name) for name in ("width", "height", "num_frames", "steps", "fps", "guidance_scale")}


def _stand_in(param: str, shape: Shape) -> Pictures:
    """Of the shape of what was given, without its pixels: one byte, seen again and again."""
    frames = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (shape.num_frames, shape.height, shape.width, 3))
    return Pictures(name=f"the {param}", frames=frames, fps=shape.fps)


def _blamed(message: str) -> str | None:
    return next((param for pattern, param in _BLAME if pattern.match(message)), None)


def _check_limits(numbers: Mapping[str, Any], found: Mapping[str, Any], config: ServeConfig) -> None:
    limits = config.limits
    if (steps := numbers.get("steps")) is not None and steps > limits.steps:
        raise bad("steps", f"{steps} steps are more than the {limits.steps} that this server makes; ask for fewer")
    sides = [numbers.get(name) for name in ("width", "height", "num_frames")]
    volume = int(np.prod([side or 1 for side in sides], dtype=object))
    if volume > limits.pixels_frames:
        asked = " x ".join("?" if side is None else str(side) for side in sides)
        param = next((name for name in ("size", "width", "height", "seconds", "num_frames") if name in found), "size")
        most = f"{limits.pixels_frames:,} pixels in all"
        raise bad(param, f"{asked} frames are more than the {most} that this server makes; ask for less")
