"""The parameters of a video: how each is written, what it takes, and what is said of one that cannot be read."""

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from frameloom.config import MAX_LORA_STRENGTH
from frameloom.errors import RequestError
from frameloom.request import LIMITS, MAX_REFERENCES, check_request
from frameloom.serve.api.errors import ApiError, bad
from frameloom.serve.api.forms import Fields, Several
from frameloom.serve.config import Limits
from frameloom.serve.keys import MAX_PRIORITY
from frameloom.types import GenerateRequest

Form = Literal[
    "text", "seconds", "size", "whole", "number", "numbers", "flag", "quality", "priority", "deadline", "image",
    "images", "video", "loras",
]  # fmt: skip

MAX_SECONDS: Final = 3600.0
MIN_DEADLINE_S: Final = 0.001
MAX_DEADLINE_S: Final = 30 * 86_400.0
MAX_LORAS: Final = 16
MAX_QUALITY: Final = 100
HARMLESS: Final = ("user", "safety_identifier")
"""Of OpenAI's own: they change nothing in a video, and are let pass."""
_NUMBER: Final = re.compile(
    r"[+-]?(\d{1,30}(\.\d{0,60})?|\.\d{1,60})([eE][+-]?\d{1,6})?|[+-]?(nan|inf|infinity)", re.I | re.A
)
_LISTS: Final = ("numbers", "images", "loras")
"""Forms of parameters that may be given several times."""
_ALIKE: Final = 0.65
"""How alike two names are (difflib), from 0 to 1, for one to be meant by the other: `id` does not mean `width`."""
_SIZE: Final = re.compile(r"(\d{1,5})\s*[x×X*]\s*(\d{1,5})", re.A)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """`form`: how it is written. `says`: what it does. `alias`: another name that clients know it by."""

    form: Form
    says: str
    alias: str = ""


PARAMETERS: Final[Mapping[str, Parameter]] = {
    "prompt": Parameter(form="text", says="What the video shows."),
    "negative_prompt": Parameter(form="text", says="What it is to keep away from."),
    "model": Parameter(form="text", says="The name of the model, as GET /v1/models lists it."),
    "seconds": Parameter(form="seconds", says="Length, such as 4; rounded to what the model makes. Or num_frames."),
    "size": Parameter(form="size", says="Width x height in pixels, such as 832x480. Or width and height."),
    "width": Parameter(form="whole", says="Pixels."),
    "height": Parameter(form="whole", says="Pixels."),
    "num_frames": Parameter(form="whole", says="Frames; of an extension those that are made, the old last one too."),
    "fps": Parameter(form="number", says="Frames per second."),
    "steps": Parameter(form="whole", says="Denoising steps.", alias="num_inference_steps"),
    "seed": Parameter(form="whole", says="Of the noise; the same seed gives the same video. By default a new one."),
    "guidance_scale": Parameter(form="number", says="How closely the prompt is followed; up to 1 is off, and faster."),
    "guidance_scale_2": Parameter(form="number", says="The same for the second of two experts."),
    "flow_shift": Parameter(form="number", says="Shift of the noise schedule."),
    "input_reference": Parameter(form="image", says="The first frame: PNG, JPEG or WebP."),
    "last_image": Parameter(form="image", says="The last frame, beside the first."),
    "video": Parameter(form="video", says='Where to start: a file (MP4, WebM, GIF, MOV) or {"id": "video_..."}.'),
    "strength": Parameter(form="number", says="How much of the video is made anew, 0 to 1."),
    "control_video": Parameter(form="video", says="What guides the video, for models that take it."),
    "mask": Parameter(form="video", says="White where the control video is made anew."),
    "references": Parameter(form="images", says="Pictures of what the video shows, for models that take them."),
    "control_strength": Parameter(form="numbers", says="How much control and references count: one or one per layer."),
    "windows": Parameter(form="flag", says="Denoise a long video in windows."),
    "window_frames": Parameter(form="whole", says="Frames in a window."),
    "window_overlap": Parameter(form="whole", says="Frames that windows share."),
    "quality": Parameter(form="quality", says="Of the file, 0 (small) to 100 (best)."),
    "loras": Parameter(form="loras", says="By registered names: [{name, scale}], as GET /v1/loras lists them."),
    "priority": Parameter(form="priority", says="Higher goes first, as far as the key may."),
    "deadline": Parameter(form="deadline", says="Seconds from now after which the video is not wanted any more."),
}  # fmt: skip

_PICTURES: Final = ("input_reference", "last_image", "control_video", "mask", "references", "control_strength")
_ALL: Final = tuple(PARAMETERS)
TAKEN: Final[Mapping[str, tuple[str, ...]]] = {
    "create": tuple(name for name in _ALL if name not in ("video", "strength")),
    "edit": tuple(name for name in _ALL if name not in _PICTURES),
    "extension": tuple(
        name for name in _ALL if name not in (*_PICTURES, "strength", "size", "width", "height", "fps")
    ),
    "remix": ("prompt", "model", "priority", "deadline"),
    "estimate": tuple(
        name for name in _ALL
        if PARAMETERS[name].form not in ("image", "images", "video", "loras") and name != "strength"
    ),
}  # fmt: skip
"""By what is asked for: the parameters that it takes."""


def read_parameters(fields: Fields, kind: str, *, limits: Limits) -> dict[str, Any]:
    """The fields of a body by parameter, numbers as numbers; None and what is harmless left out. Raises ApiError 400.

    Pictures are as they came: an upload, a text or a mapping.
    """
    taken = TAKEN[kind]
    aliases = {alias: name for name in taken if (alias := PARAMETERS[name].alias)}
    found: dict[str, Any] = {}
    for given, value in fields.items():
        name = aliases.get(given, given)
        if value is None or name in HARMLESS:
            continue
        if name not in taken:
            raise _unknown(given, (*taken, *aliases))
        if name in found:
            raise bad(given, f"{name} and {PARAMETERS[name].alias} are the same; give one of them")
        form = PARAMETERS[name].form
        if isinstance(value, Several) and form not in _LISTS:
            raise bad(name, f"{name} is given {len(value)} times; give it once")
        found[name] = _steps(name, value, limits) if name == "steps" else _READERS[form](name, value)
    _check_texts(found, limits.prompt_chars)
    return found


def _check_texts(found: Mapping[str, Any], most: int) -> None:
    for name in ("prompt", "negative_prompt"):
        if len(found.get(name, "")) > most:
            raise bad(name, f"the {name} has {len(found[name])} characters, and {most} are the most; shorten it")
    if "prompt" in found:
        _checked("prompt", GenerateRequest(prompt=found["prompt"]))


def _unknown(given: str, taken: Sequence[str]) -> ApiError:
    if given in PARAMETERS:
        return bad(given, f"{given} cannot be given here; this takes {', '.join(taken)}")
    near = difflib.get_close_matches(given, taken, n=1, cutoff=_ALIKE)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(taken)}"
    if given == "id" and "video" in taken:
        hint = 'a video is named as {"video": {"id": "video_..."}}'
    shown = given if len(given) <= 64 else given[:61] + "..."
    return ApiError(400, "unknown_parameter", f"there is no parameter {shown!r}; {hint}", param=shown)


def shown(value: Any) -> str:
    """A value in an error: not more of it than helps."""
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 40 else text[:37] + "...") if isinstance(value, str) else text[:40]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad(name, f"the {name} is {_noun(value)}; give a text")
    return value


def _noun(value: Any) -> str:
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "true or false"), (int, "a number"), (float, "a number"), (list, "a list"), (dict, "an object"),
        (str, "a text"),
    )  # fmt: skip
    return next((noun for kind, noun in kinds if isinstance(value, kind)), "a file")


def _plain(name: str, value: Any) -> int | float:
    """A number, of text too; whole ones as int."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        text = value.strip()
        value = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad(name, f"{name} {shown(value) if isinstance(value, str) else _noun(value)} is no number; give one")
    if abs(value) >= 2**64:
        return math.inf if value > 0 else -math.inf  # past all ranges, and nobody wants to read its digits
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _limited(name: str, value: Any) -> int | float:
    """A number in the range that the engine takes, in the engine's own words."""
    number = _plain(name, value)
    asked: dict[str, Any] = {"prompt": "-", "video": "-", name: number}
    _checked(name, GenerateRequest(**asked))
    return LIMITS[name][0](number)


def _checked(name: str, request: GenerateRequest) -> None:
    try:
        check_request(request)
    except RequestError as error:
        raise bad(name, str(error)) from None


def _steps(name: str, value: Any, limits: Limits) -> int:
    """As many as this server makes, which are fewer than an engine could."""
    number = _plain(name, value)
    if number > limits.steps:
        raise bad(name, f"{shown(value)} steps are more than the {limits.steps} that this server makes; ask for fewer")
    return _whole_between(name, value, 1, limits.steps)


def _between(name: str, value: Any, low: float, high: float, unit: str = "") -> float:
    number = _plain(name, value)
    if not low <= number <= high:
        raise bad(name, f"{name} {shown(value)} is not possible; give a number from {low:g} to {high:g}{unit}")
    return number


def _whole_between(name: str, value: Any, low: int, high: int) -> int:
    number = _plain(name, value)
    if not isinstance(number, int) or not low <= number <= high:
        raise bad(name, f"{name} {shown(value)} is not possible; give a whole number from {low} to {high}")
    return number


def _seconds(name: str, value: Any) -> float:
    return float(_between(name, value, 0.01, MAX_SECONDS))


def _size(name: str, value: Any) -> tuple[int, int]:
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        given = shown(value) if isinstance(value, str) else _noun(value)
        raise bad(name, f"size {given} is none; give width x height, such as 832x480")
    width, height = int(match[1]), int(match[2])
    for side, number in (("width", width), ("height", height)):
        try:
            _limited(side, number)
        except ApiError as error:
            raise bad(name, error.message) from None
    return width, height


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise bad(name, f"{name} {shown(value)} is neither true nor false; give one of them")
    return value


def _numbers(name: str, value: Any) -> float | list[float]:
    if not isinstance(value, list):
        return float(_limited(name, value))
    if not 0 < len(value) <= 128:
        raise bad(name, f"{name} has {len(value)} numbers; give one, or one for each layer")
    return [float(_limited(name, one)) for one in value]


def _list(name: str, value: Any, most: int) -> list[Any]:
    listed = value if isinstance(value, list) else [value]
    if len(listed) > most:
        raise bad(name, f"{len(listed)} {name} are too many; give up to {most}")
    return listed


def _loras(name: str, value: Any) -> list[tuple[str, float]]:
    found = []
    for one in _list(name, value, MAX_LORAS):
        told = {"name": one} if isinstance(one, str) else one
        if not isinstance(told, dict) or not isinstance(told.get("name"), str):
            raise bad(name, "each of the loras has a name; give [{'name': ..., 'scale': 1.0}] in JSON")
        odd = sorted(set(told) - {"name", "scale", "strength"})
        if odd or {"scale", "strength"} <= set(told):
            raise bad(name, f"a LoRA has a name and a scale, and not {odd[0] if odd else 'scale and strength at once'}")
        strength = told.get("scale", told.get("strength"))
        number = 1.0 if strength is None else _between(name, strength, -MAX_LORA_STRENGTH, MAX_LORA_STRENGTH)
        found.append((told["name"], float(number)))
    return found


def _as_it_came(name: str, value: Any) -> Any:
    if isinstance(value, list):
        raise bad(name, f"{name} is given {len(value)} times, or as a list; give one")
    return value


_READERS: Final[Mapping[Form, Callable[[str, Any], Any]]] = {
    "text": _text,
    "seconds": _seconds,
    "size": _size,
    "whole": _limited,
    "number": _limited,
    "numbers": _numbers,
    "flag": _flag,
    "quality": lambda name, value: _whole_between(name, value, 0, MAX_QUALITY),
    "priority": lambda name, value: _whole_between(name, value, -MAX_PRIORITY, MAX_PRIORITY),
    "deadline": lambda name, value: float(_between(name, value, MIN_DEADLINE_S, MAX_DEADLINE_S, " seconds")),
    "image": _as_it_came,
    "images": lambda name, value: _list(name, value, MAX_REFERENCES),
    "video": _as_it_came,
    "loras": _loras,
}


def missing(found: Collection[str], name: str, example: str) -> None:
    """Raise ApiError unless a parameter is there."""
    if name not in found:
        raise ApiError(400, "missing_parameter", f"{name} is missing; give {example}", param=name)
