"""Checks a request at the door and fills in what it leaves open. Torch-free."""

import math
from typing import Any, Protocol

from frameloom.errors import RequestError
from frameloom.types import GenerateRequest, ResolvedRequest, SizeRules

MAX_PIXELS = 8192  # per side: past it a mistyped digit is likelier than a wish
MAX_FRAMES = 10_001
MAX_STEPS = 1000  # the schedule has as many distinct timesteps


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


def resolve(request: GenerateRequest, defaults: GenerationDefaults, rules: SizeRules) -> ResolvedRequest:
    """Fill in and check a request. Raises RequestError: one sentence with the value, what is possible, what to do."""
    prompts = _prompts(request.prompt)
    scale = _or(request.guidance_scale, defaults.guidance_scale)
    own_scale_2 = defaults.guidance_scale_2 if request.guidance_scale is None else None
    scale_2 = _or(request.guidance_scale_2, own_scale_2)
    shift = _or(request.flow_shift, defaults.flow_shift)
    return ResolvedRequest(
        prompts=prompts,
        negative_prompts=_negatives(_or(request.negative_prompt, defaults.negative_prompt), len(prompts)),
        width=_side("width", _or(request.width, defaults.width), rules.width_multiple, rules.reason),
        height=_side("height", _or(request.height, defaults.height), rules.height_multiple, rules.reason),
        num_frames=_frames(_or(request.num_frames, defaults.num_frames), rules.temporal),
        steps=_whole("steps", _or(request.steps, defaults.steps), low=1, high=MAX_STEPS),
        guidance_scale=_number("guidance scale", scale, low=0, high=1000),
        guidance_scale_2=None if scale_2 is None else _number("guidance scale 2", scale_2, low=0, high=1000),
        flow_shift=None if shift is None else _number("flow shift", shift, low=1e-3, high=1000),
        fps=_number("fps", _or(request.fps, defaults.fps), low=0.1, high=240),
        seed=_whole("seed", request.seed, low=0, high=2**63 - 1),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _prompts(prompt: object) -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt) if isinstance(prompt, (list, tuple)) else None
    if prompts is None or not all(isinstance(text, str) for text in prompts):
        raise RequestError(f"the prompt is {type(prompt).__name__}; give a text, or a list of texts")
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
    size = _whole(name, value, low=1, high=MAX_PIXELS)
    if size % multiple == 0:
        return size
    below, above = size // multiple * multiple, (size // multiple + 1) * multiple
    choices = f"{below} or {above}" if below else f"{above}"
    raise RequestError(f"{name} {size} is not a multiple of {multiple} ({reason}); use {choices}")


def _frames(value: object, temporal: int) -> int:
    frames = _whole("frames", value, low=1, high=MAX_FRAMES)
    if (frames - 1) % temporal == 0:
        return frames
    below = 1 + (frames - 1) // temporal * temporal
    raise RequestError(
        f"{frames} frames are not possible: the model makes {temporal}k+1; use {below} or {below + temporal}"
    )


def _whole(name: str, value: object, *, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        top = f"up to {high}" if high < 2**32 else "below 2^63"
        raise RequestError(f"{name} {value!r} is not possible; use a whole number from {low} {top}")
    return value


def _number(name: str, value: object, *, low: float, high: float) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        raise RequestError(f"{name} {value!r} is not possible; use a number from {low} to {high}")
    return float(value)  # type: ignore[arg-type]
