"""What crosses the engine's doors: the request, its resolved form, and news of progress. Torch-free."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

Stage = Literal["text", "image", "denoise", "decode", "encode"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pictures:
    """An image, or the frames of a video: upright, uint8 RGB (T, H, W, 3). `name`: what to call it.

    `fps`: of a video whose file tells. Equal pictures have equal `repr`s.
    """

    name: str
    frames: "NDArray[np.uint8]"
    fps: float | None = None

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.frames.shape[2])

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.frames.tobytes()).hexdigest()
        return f"Pictures({self.name!r}, {self.frames.shape}, fps={self.fps}, sha256={digest})"


ImageInput: TypeAlias = "str | os.PathLike[str] | Image | NDArray[np.uint8] | Pictures"
VideoInput: TypeAlias = "str | os.PathLike[str] | NDArray[np.uint8] | Pictures"

PICTURES: Final = ("image", "last_image", "video", "control_video", "mask")
"""Fields of a request that hold one picture or one video; `references` holds several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """What a user asks for; None leaves the choice to the checkpoint.

    Sizes in pixels. Several prompts make one batch: with one `seed` they start from one draw of noise, as in the
    reference pipeline; with as many seeds as prompts each from its own, as if it were made alone.
    `image`, `last_image`: the first and the last frame, each a path, a Pillow image or uint8 (H, W, 3). `video`: a path
    or uint8 (T, H, W, 3), redone from `strength` (0 to 1) of the noise on. The pictures decide the shape of the video
    where the width or the height is left open.

    For VACE: `control_video`, likewise; `mask`, a video of its size, white where it is made anew; `references`, images
    of what the video shows; `control_strength`: how much all this counts, one number or one for each VACE layer.

    `windows`: denoise a video that is longer than the model was trained on in windows of `window_frames` frames, of
    which neighbours share `window_overlap` or more; naming either asks for windows, too.
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
    seed: int | Sequence[int] | None = None
    image: "ImageInput | None" = None
    last_image: "ImageInput | None" = None
    video: "VideoInput | None" = None
    strength: float | None = None
    control_video: "VideoInput | None" = None
    mask: "VideoInput | None" = None
    references: "Sequence[ImageInput] | None" = None
    control_strength: float | Sequence[float] | None = None
    windows: bool | None = None
    window_frames: int | None = None
    window_overlap: int | None = None


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
    seed: int | Sequence[int] | None
    image: "ImageInput | None"
    last_image: "ImageInput | None"
    video: "VideoInput | None"
    strength: float | None
    control_video: "VideoInput | None"
    mask: "VideoInput | None"
    references: "Sequence[ImageInput] | None"
    control_strength: float | Sequence[float] | None
    windows: bool | None
    window_frames: int | None
    window_overlap: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRequest:
    """A request with every choice made and every value checked.

    `keeps_aspect`: pictures are cut to the size of the video, and not squeezed. `strength` None: there is no video to
    start from. `control_video` and `mask` are cut to the frames that count. `window_frames` None: denoised whole.
    `seed`: one draw of noise for all prompts, or a draw for each.
    """

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
    seed: int | tuple[int, ...]
    image: Pictures | None = None
    last_image: Pictures | None = None
    video: Pictures | None = None
    strength: float | None = None
    control_video: Pictures | None = None
    mask: Pictures | None = None
    references: tuple[Pictures, ...] = ()
    control_strength: float | tuple[float, ...] = 1.0
    keeps_aspect: bool = False
    window_frames: int | None = None
    window_overlap: int = 0

    def seed_of(self, index: int) -> int:
        """The seed of a prompt."""
        return self.seed if isinstance(self.seed, int) else self.seed[index]

    def alone(self, index: int) -> "ResolvedRequest":
        """What is asked for one of the prompts that have a seed each."""
        prompts, negatives = (self.prompts[index],), (self.negative_prompts[index],)
        return replace(self, prompts=prompts, negative_prompts=negatives, seed=self.seed_of(index))

    @property
    def skipped_steps(self) -> int:
        """The first steps, which a video to start from makes needless."""
        return 0 if self.strength is None else self.steps - int(self.steps * self.strength)


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeRules:
    """What a model can compute: the multiples of width and height in pixels, frames = 1 + temporal x k."""

    width_multiple: int
    height_multiple: int
    temporal: int
    reason: str  # where the multiples come from, for error messages


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPlan:
    """Over how many ranks each thing is divided.

    `cfg`: the predictions with and without the prompt (1 or 2). `ring` and `ulysses`: the tokens, by the two ways to
    attend to those of others. `tp`: every matrix product. Their product is the number of ranks. `fsdp`: the weights at
    rest, 1 or all ranks. `vae`: the pictures, in the VAE.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    fsdp: int = 1
    vae: int = 1

    @property
    def num_ranks(self) -> int:
        """Ranks that denoise."""
        return self.cfg * self.ring * self.ulysses * self.tp

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


class Residence(StrEnum):
    """Where the weights of a component are: in memory always; for its stage; or block by block as they compute."""

    RESIDENT = "resident"
    MOVED = "moved"
    STREAMED = "streamed"


Expert = Literal["high", "low"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """A file or folder of adapters, how strongly it applies, and to which of two experts.

    `expert` None: as the file says itself, else both.
    """

    path: str
    strength: float = 1.0
    expert: Expert | None = None

    def __str__(self) -> str:
        return f"{f'{self.expert}:' if self.expert else ''}{self.path}:{self.strength:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How an engine is built; equal on all ranks that build one together.

    `device`: auto, cpu, cuda, rocm, npu, musa, xpu or mps, one of several by its number (cuda:1). `dtype`: auto,
    float32, bfloat16, float16; auto takes the dtype the checkpoint is meant for and keeps the VAE in float32, as the
    reference documents it. `exactness` (bitwise, rounding, lossy) and `rewrites` ("NAME=on", "NAME=off"): what may be
    computed in another way, see docs/rewrites.md. `compilation`: auto, on or off, whether torch.compile is used.
    `attention`: auto, or the name of a backend. `vae_memory`: auto, or what the VAE may take besides its weights, bytes
    or a text such as "6GB". `parallel`: auto, or a plan such as "cfg=2,ulysses=2", over the ranks that torchrun or
    --gpus started. `quantized`: keep leaves quantized weights as they are stored, expand makes them plain when they are
    read: faster, in more memory, and the same bits where `exactness` is bitwise. `loras`: Lora, or texts such as
    "high:FILE:0.8"; merged into weights as they are read, computed beside those that stay quantized. `preset`: a recipe
    of models/defaults.py that replaces the checkpoint's scheduler and defaults. `memory`: auto, or what everything may
    take, bytes or a text such as "24GB". `residence`: auto, or where the weights are, such as
    "text=streamed,transformer=moved", see docs/memory.md. `prompt_cache`: whether what the text encoder made of prompts
    is kept in the cache folder.
    """

    device: str = "auto"
    dtype: str = "auto"
    exactness: str = "rounding"
    rewrites: Sequence[str] = ()
    compilation: str = "auto"
    attention: str = "auto"
    vae_memory: int | str = "auto"
    parallel: str = "auto"
    quantized: str = "keep"
    loras: "Sequence[Lora | str]" = ()
    preset: str | None = None
    memory: int | str = "auto"
    residence: str = "auto"
    prompt_cache: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """`step` of `total` steps of a stage are done; the first news of a stage has step 0."""

    stage: Stage
    step: int
    total: int


ProgressCallback = Callable[[Progress], None]
