"""Checks a request at the door and fills in what it leaves open. Torch-free."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Protocol

from frameloom.errors import InternalError, RequestError
from frameloom.types import PICTURES, GenerateRequest, Pictures, ResolvedRequest, SizeRules

log = logging.getLogger(__name__)
DEFAULT_STRENGTH = 0.8  # of the reference, WanVideoToVideoPipeline
MAX_PIXELS = 8192  # per side: past it a mistyped digit is likelier than a wish
MAX_FRAMES = 10_001
MAX_STEPS = 1000  # the schedule has as many distinct timesteps
MAX_REFERENCES = 64  # each costs as much as a latent frame
_SHARE_OF_WINDOW = 0.2  # that the next one shares unless told otherwise: 16 frames of 81, 24 of 121

LIMITS: Mapping[str, tuple[type[int] | type[float], float, float]] = {
    "width": (int, 1, MAX_PIXELS),
    "height": (int, 1, MAX_PIXELS),
    "num_frames": (int, 1, MAX_FRAMES),
    "steps": (int, 1, MAX_STEPS),
    "guidance_scale": (float, 0, 1000),
    "guidance_scale_2": (float, 0, 1000),
    "flow_shift": (float, 1e-3, 1000),
    "fps": (float, 0.1, 240),
    "seed": (int, 0, 2**63 - 1),
    "strength": (float, 0, 1),
    "control_strength": (float, 0, 20),
    "window_frames": (int, 1, MAX_FRAMES),
    "window_overlap": (int, 1, MAX_FRAMES),
}
"""Per number of a request: its kind, the lowest and the highest value that any checkpoint could compute."""


class GenerationDefaults(Protocol):
    """What a checkpoint answers where the request is silent."""

    @property
    def width(self) -> int:
        """Pixels."""
        ...

    @property
    def height(self) -> int:
        """Pixels."""
        ...

    @property
    def num_frames(self) -> int:
        """Frames."""
        ...

    @property
    def fps(self) -> float:
        """Frames per second."""
        ...

    @property
    def steps(self) -> int:
        """Denoising steps."""
        ...

    @property
    def guidance_scale(self) -> float:
        """Guidance scale."""
        ...

    @property
    def guidance_scale_2(self) -> float | None:
        """Guidance scale of the low-noise expert."""
        ...

    @property
    def flow_shift(self) -> float | None:
        """Shift of the noise schedule."""
        ...

    @property
    def negative_prompt(self) -> str:
        """Negative prompt."""
        ...


def check_request(request: GenerateRequest) -> None:
    """Refuse what no checkpoint could compute, before one is opened. Raises RequestError as `resolve` does."""
    prompts = _prompts(request.prompt)
    for name in LIMITS:
        if name not in ("control_strength", "seed"):
            _limited(name, getattr(request, name))
    _seeds(request.seed, len(prompts))
    _control_strength(request.control_strength)
    _references(request.references)
    if request.last_image is not None and request.image is None:
        raise RequestError("a last image was given, and no image; give the first frame, too")
    if request.mask is not None and request.control_video is None:
        raise RequestError("a mask was given, and no control video; give the video that it is the mask of, too")
    if request.strength is not None and request.video is None:
        raise RequestError("a strength was given, and no video; give the video to start from, or leave it out")
    if request.windows is False and (request.window_frames, request.window_overlap) != (None, None):
        raise RequestError("windows are switched off, and their frames are given; leave one of them out")


def resolve(request: GenerateRequest, defaults: GenerationDefaults, rules: SizeRules) -> ResolvedRequest:
    """Fill in and check a request whose pictures are read: each is None or `Pictures`.

    Raises RequestError: one sentence with the value, what is possible, what to do.
    """
    check_request(request)
    prompts = _prompts(request.prompt)
    guidance_scale = _limited("guidance_scale", _or(request.guidance_scale, defaults.guidance_scale))
    image, last_image, video, control_video, mask = (
        None if (given := getattr(request, name)) is None else _pictures(given) for name in PICTURES
    )
    followed = video or control_video
    width, height = _size(request, image or followed, defaults, rules)
    num_frames = _frames(_num_frames(request, followed, defaults, rules), rules.temporal)
    resolved = ResolvedRequest(
        prompts=prompts,
        negative_prompts=_negatives(_or(request.negative_prompt, defaults.negative_prompt), len(prompts)),
        width=_side("width", width, rules.width_multiple, rules.reason),
        height=_side("height", height, rules.height_multiple, rules.reason),
        num_frames=num_frames,
        steps=_limited("steps", _or(request.steps, defaults.steps)),
        guidance_scale=guidance_scale,
        guidance_scale_2=_second_scale(request, guidance_scale, defaults),
        flow_shift=_limited("flow_shift", _or(request.flow_shift, defaults.flow_shift)),
        fps=_limited("fps", _or(request.fps, _or(followed and followed.fps, defaults.fps))),
        seed=_seeds(request.seed, len(prompts)),
        image=image,
        last_image=last_image,
        video=_beginning(video, num_frames),
        strength=_limited("strength", _or(request.strength, DEFAULT_STRENGTH)) if video else None,
        control_video=_beginning(control_video, num_frames),
        mask=_beginning(mask, num_frames),
        references=tuple(map(_pictures, _references(request.references))),
        control_strength=_control_strength(request.control_strength),
        keeps_aspect=request.width is None or request.height is None,
        **_windows(request, num_frames, defaults, rules),
    )
    _check_pictures(resolved)
    return resolved


def _second_scale(request: GenerateRequest, first: float, defaults: GenerationDefaults) -> float | None:
    """The low-noise expert's scale; None where it is the first one's, which also decides whether there is guidance."""
    own = defaults.guidance_scale_2 if request.guidance_scale is None else None
    scale: float | None = _limited("guidance_scale_2", _or(request.guidance_scale_2, own))
    if first > 1 or scale is None:
        return scale
    if request.guidance_scale_2 is not None:
        log.warning("guidance scale 2 (%g) is not used: with a guidance scale of %g there is no guidance", scale, first)
    return None


def _pictures(pictures: object) -> Pictures:
    if not isinstance(pictures, Pictures):
        raise InternalError(f"a request came with {type(pictures).__name__} where pictures should have been read")
    return pictures


def _beginning(video: Pictures | None, num_frames: int) -> Pictures | None:
    return None if video is None else replace(video, frames=video.frames[:num_frames])


def _references(references: object) -> tuple[Any, ...]:
    """As many images as were given. Raises RequestError."""
    if references is None:
        return ()
    if not isinstance(references, (list, tuple)):
        raise RequestError(f"the reference images are {type(references).__name__}; give a list of images")
    if len(references) > MAX_REFERENCES:
        raise RequestError(f"{len(references)} reference images are too many; give up to {MAX_REFERENCES}")
    return tuple(references)


def _seeds(given: object, count: int) -> int | tuple[int, ...]:
    """One for all prompts, 0 without any; or one for each. Raises RequestError."""
    if isinstance(given, (list, tuple)):
        if len(given) != count:
            raise RequestError(f"{len(given)} seeds for {count} prompts; give one for all, or one for each")
        return tuple(_limited("seed", _or(seed, "None")) for seed in given)  # none may be left out
    seed: int = _limited("seed", _or(given, 0))
    return seed


def _control_strength(given: object) -> float | tuple[float, ...]:
    """One number for all VACE layers, or one for each; 1 without any. Raises RequestError."""
    if isinstance(given, (list, tuple)):
        return tuple(_limited("control_strength", _or(strength, "None")) for strength in given)  # none may be left out
    strength: float = _limited("control_strength", _or(given, 1.0))
    return strength


def _check_pictures(request: ResolvedRequest) -> None:
    if request.last_image is not None and request.num_frames == 1:
        raise RequestError("one frame cannot be the first and the last; ask for 5 frames or more")
    if request.skipped_steps == request.steps:
        raise RequestError(
            f"strength {request.strength} leaves none of {request.steps} steps; use "
            f"{math.ceil(1000 / request.steps) / 1000} or more"
        )


def _size(
    request: GenerateRequest, shown: Pictures | None, defaults: GenerationDefaults, rules: SizeRules
) -> tuple[Any, Any]:
    """Width and height: as asked, or in the shape of what is shown, with the area of the defaults.

    Down to whole multiples, as the original code does; where one side is asked for the other follows.
    """
    if shown is None or None not in (request.width, request.height):
        return _or(request.width, defaults.width), _or(request.height, defaults.height)
    aspect, area = shown.width / shown.height, defaults.width * defaults.height
    if request.height is not None:
        return _whole(_limited("height", request.height) * aspect, rules.width_multiple), request.height
    if request.width is not None:
        return request.width, _whole(_limited("width", request.width) / aspect, rules.height_multiple)
    width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    return _whole(width, rules.width_multiple), _whole(height, rules.height_multiple)


def _whole(size: float, multiple: int) -> int:
    return max(1, round(size) // multiple) * multiple


def _num_frames(
    request: GenerateRequest, video: Pictures | None, defaults: GenerationDefaults, rules: SizeRules
) -> Any:
    """As asked; else the checkpoint's number, or what a video to follow has for it."""
    if video is None:
        return _or(request.num_frames, defaults.num_frames)
    there = len(video.frames)
    if request.num_frames is None:
        return 1 + (min(there, defaults.num_frames) - 1) // rules.temporal * rules.temporal
    if _limited("num_frames", request.num_frames) > there:
        raise RequestError(f"{video.name} has {there} frames, {request.num_frames} were asked for; ask for fewer")
    return request.num_frames


def _windows(
    request: GenerateRequest, num_frames: int, defaults: GenerationDefaults, rules: SizeRules
) -> dict[str, Any]:
    """The frames of a window, and how many neighbours share at least; nothing where the video is denoised whole."""
    if not (request.windows or request.window_frames or request.window_overlap):
        return {}
    step = rules.temporal
    frames = _frames(_or(request.window_frames, defaults.num_frames), step, what="frames in a window")
    most = frames - 1 - step  # every window sees the first frame of the video, and has something new
    if most < step:
        raise RequestError(f"windows of {frames} frames cannot share any; use {1 + 2 * step} or more")
    usual = min(most, max(2, round(frames * _SHARE_OF_WINDOW / step)) * step)
    overlap: int = _limited("window_overlap", _or(request.window_overlap, usual))
    if overlap % step or overlap > most:
        nearest = min(most, max(1, round(overlap / step)) * step)
        raise RequestError(
            f"windows of {frames} frames cannot share {overlap}: it is a multiple of {step} up to {most}; use {nearest}"
        )
    return {} if num_frames <= frames else {"window_frames": frames, "window_overlap": overlap}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _prompts(prompt: object) -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt) if isinstance(prompt, (list, tuple)) else None
    if prompts is None or not all(isinstance(text, str) for text in prompts):
        odd = prompt if prompts is None else next(text for text in prompts if not isinstance(text, str))
        raise RequestError(f"the prompt is {odd!r}; give a text, or a list of texts")
    if not prompts or not all(text.strip() for text in prompts):
        raise RequestError("the prompt is empty; say what the video should show, such as 'a red circle moving left'")
    return prompts


def _negatives(negative: object, count: int) -> tuple[str, ...]:
    if isinstance(negative, str):
        return (negative,) * count
    if not isinstance(negative, (list, tuple)) or not all(isinstance(text, str) for text in negative):
        raise RequestError(f"the negative prompt is {type(negative).__name__}; give a text, or one per prompt")
    if len(negative) != count:
        raise RequestError(f"{len(negative)} negative prompts for {count} prompts; give one for all, or one for each")
    return tuple(negative)


def _side(name: str, value: object, multiple: int, reason: str) -> int:
    size: int = _limited(name, value)
    if size % multiple == 0:
        return size
    below, above = size // multiple * multiple, (size // multiple + 1) * multiple
    choices = f"{below} or {above}" if below else f"{above}"
    raise RequestError(f"{name} {size} is not a multiple of {multiple} ({reason}); use {choices}")


def _frames(value: object, temporal: int, *, what: str = "frames") -> int:
    frames: int = _limited("num_frames", value)
    if (frames - 1) % temporal == 0:
        return frames
    below = 1 + (frames - 1) // temporal * temporal
    raise RequestError(
        f"{frames} {what} are not possible: the model makes {temporal}k+1; use {below} or {below + temporal}"
    )


def _limited(name: str, value: Any) -> Any:
    """`value` as the plain number its place in LIMITS asks for (numpy's numbers too), or None for None."""
    if value is None:
        return None
    kind, low, high = LIMITS[name]
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        noun = "whole number" if kind is int else "number"
        top = f"up to {high}" if high < 2**32 else "below 2^63"
        said = {"num_frames": "frames"}.get(name, name.replace("_", " "))
        given = value if isinstance(value, Real) else repr(value)
        raise RequestError(f"{said} {given} is not possible; use a {noun} from {low} {top}")
    return kind(value)
