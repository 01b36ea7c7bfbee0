"""What crosses the engine's doors: the request, its resolved form, and news of progress. Torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

Stage = Literal["text", "denoise", "decode", "encode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """What a user asks for; None leaves the choice to the checkpoint.

    Sizes in pixels. Several prompts make one batch: they start from one draw of noise, as in the reference pipeline.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    fps: float | None = None
    seed: int | None = None


class GenerateOptions(TypedDict, total=False):
    """The fields of a GenerateRequest besides the prompt, as keyword arguments."""

    negative_prompt: str | Sequence[str] | None
    width: int | None
    height: int | None
    num_frames: int | None
    steps: int | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    flow_shift: float | None
    fps: float | None
    seed: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRequest:
    """A request with every choice made and every value checked."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    width: int
    height: int
    num_frames: int
    steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    flow_shift: float | None
    fps: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeRules:
    """What a model can compute: the multiples of width and height in pixels, frames = 1 + temporal x k."""

    width_multiple: int
    height_multiple: int
    temporal: int
    reason: str  # where the multiples come from, for error messages


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """`step` of `total` steps of a stage are done; the first news of a stage has step 0."""

    stage: Stage
    step: int
    total: int


ProgressCallback = Callable[[Progress], None]
