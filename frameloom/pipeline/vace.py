"""What VACE is controlled by, prepared once per request: a control video, a mask of it, and reference images.

Shapes: T frames, H height, W width, in pixels (in THW) or in cells of the VAE (in BCTHW); B prompts, C channels.
Reference: Diffusers' WanVACEPipeline, in its order of operations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.errors import InternalError, RequestError
from frameloom.models.dit_fast import LoopChoices
from frameloom.models.spec import VaceSpec, VaeSpec
from frameloom.models.vace import VaceDiT, strengths_for
from frameloom.models.wan_dit import Control, FrameTimes, Prompt, WanDiT
from frameloom.pipeline.conditions import GREY
from frameloom.pipeline.images import fitted
from frameloom.pipeline.stages import MakePredictor, Predict
from frameloom.types import Pictures, ResolvedRequest

Encode = Callable[[Tensor], Tensor]
"""Frames (T, H, W, 3), levels of 255, to normalised latents (1, C, T', H', W')."""

WHITE = 255.0  # what surrounds a reference image of another shape
_REFERENCE_MULTIPLE = 8  # pixels; the reference cuts reference images to whole multiples before it fits them


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VaceInputs:
    """What a video is controlled by; nothing of it: a video from text.

    `mask`: white where the video is made anew, black where the control video is kept (its red channel counts); None:
    all is new. `strengths`: how much the control counts, one number or one for each VACE layer.
    """

    video: Pictures | None = None
    mask: Pictures | None = None
    references: tuple[Pictures, ...] = ()
    strengths: float | Sequence[float] = 1.0

    @staticmethod
    def of(request: ResolvedRequest) -> "VaceInputs":
        """Those of a request."""
        return VaceInputs(
            video=request.control_video,
            mask=request.mask,
            references=request.references,
            strengths=request.control_strength,
        )

    def check(self, num_frames: int) -> None:
        """Raise RequestError where the parts do not go together, or not with so many frames."""
        if self.mask is not None and self.video is None:
            raise RequestError(f"{self.mask.name} is a mask of nothing; give the control video, too")
        for picture in self.references:
            _whole_sides(picture)
        if self.video is None:
            return
        there = len(self.video.frames)
        if there < num_frames:
            raise RequestError(
                f"{self.video.name} has {there} frames, {num_frames} were asked for; ask for fewer, or give more"
            )
        if self.mask is not None and self.mask.frames.shape != self.video.frames.shape:
            raise RequestError(
                f"the mask is {_size(self.mask)}, the control video {_size(self.video)}; give both in one size"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VaceConditions:
    """Inputs as the transformer gets them; without a control nothing changes.

    The latents of a video begin with a frame for each reference image.
    """

    control: Control | None = None
    num_references: int = 0

    def lengthened(self, shape_BCTHW: Sequence[int]) -> tuple[int, ...]:
        """The shape to denoise for latents of a shape."""
        batch, channels, frames, height, width = shape_BCTHW
        return batch, channels, frames + self.num_references, height, width

    def cut(self, latents_BCTHW: Tensor) -> Tensor:
        """The latents of the video, without those of the reference images."""
        return latents_BCTHW[:, :, self.num_references :]

    def predictor(self, make: MakePredictor) -> MakePredictor:
        """Who predicts as those that `make` makes, but under this control; every expert must be a `VaceDiT`."""
        control = self.control
        if control is None:
            return make

        def made(texts: Sequence[Tensor], choices: LoopChoices, image_BNE: Tensor | None = None, /) -> Predict:
            predict = make(texts, choices, image_BNE)
            controlled: dict[VaceDiT, _Controlled] = {}

            def under_control(expert: WanDiT, x_BCTHW: Tensor, timestep: Tensor | FrameTimes, /) -> list[Tensor]:
                if not isinstance(expert, VaceDiT):
                    raise InternalError("a control was prepared for a network without VACE blocks")
                view = controlled.setdefault(expert, _Controlled(expert, control))
                return predict(cast(WanDiT, view), x_BCTHW, timestep)

            return under_control

        return made


class _Controlled:
    """A network that shows its control to itself: what a predictor asks of a WanDiT, and no more."""

    def __init__(self, dit: VaceDiT, control: Control) -> None:
        self._dit, self._control = dit, control

    def __call__(
        self, x_BCTHW: Tensor, timestep: Tensor | FrameTimes, text_BSE: Tensor, image_BNE: Tensor | None = None
    ) -> Tensor:
        velocity_BCTHW: Tensor = self._dit(x_BCTHW, timestep, text_BSE, image_BNE, self._control)
        return velocity_BCTHW

    def read_prompt(self, text_BSE: Tensor, image_BNE: Tensor | None = None) -> Prompt:
        return self._dit.read_prompt(text_BSE, image_BNE)._replace(control=self._control)

    def velocities(self, x_BCTHW: Tensor, timestep: Tensor | FrameTimes, prompts: Sequence[Prompt]) -> list[Tensor]:
        return self._dit.velocities(x_BCTHW, timestep, prompts)


def control_channels(vae: VaeSpec) -> int:
    """Of what is kept, of what is new, and of the mask, where each pixel of a cell has one."""
    return 2 * vae.z_dim + vae.spatial_scale**2


UNCONTROLLED = VaceConditions()


@torch.inference_mode()
def prepare_control(
    inputs: VaceInputs,
    size_THW: tuple[int, int, int],
    *,
    spec: VaceSpec,
    vae: VaeSpec,
    encode: Encode,
    keeps_aspect: bool = False,
) -> VaceConditions:
    """The control of a video of so many frames, rows and columns of pixels; longer control videos are cut off.

    Its channels: latents of what is kept, latents of what is new, the mask. `keeps_aspect`: pictures of another shape
    are cut to that of the video, and not squeezed. Raises RequestError for inputs that do not fit.
    """
    inputs.check(size_THW[0])
    strengths = strengths_for(spec, inputs.strengths)
    channels = control_channels(vae)
    if channels != spec.vace_in_channels:
        raise RequestError(
            f"this VAE makes a control of {channels} channels, the transformer takes {spec.vace_in_channels}; "
            "use the VAE of its own checkpoint"
        )
    levels_THWC, mask_THW = video_and_mask(inputs, size_THW, keeps_aspect=keeps_aspect)
    kept, new = map(encode, _kept_and_new(levels_THWC, mask_THW))
    folded = fold_mask(mask_THW, time=vae.temporal_scale, space=vae.spatial_scale)
    control = torch.cat((kept, new, folded.to(new)), dim=1)
    for picture in inputs.references:  # the last one comes first, as in the reference
        front = encode(on_canvas(picture, *size_THW[1:]))
        control = torch.cat((F.pad(front, (0, 0) * 3 + (0, channels - front.shape[1])), control), dim=2)
    return VaceConditions(control=Control(control, strengths), num_references=len(inputs.references))


def video_and_mask(
    inputs: VaceInputs, size_THW: tuple[int, int, int], *, keeps_aspect: bool = False
) -> tuple[Tensor, Tensor]:
    """The control video as levels_THWC float16, grey without one; the mask as uint8 levels_THW, white without one."""
    num_frames, height, width = size_THW

    def levels(pictures: Pictures) -> Tensor:
        first = Pictures(name=pictures.name, frames=pictures.frames[:num_frames])
        return torch.from_numpy(fitted(first, width=width, height=height, keeps_aspect=keeps_aspect))

    video, mask = inputs.video, inputs.mask
    levels_THWC = torch.full((*size_THW, 3), GREY).half() if video is None else levels(video).half()
    return levels_THWC, torch.full(size_THW, 255, dtype=torch.uint8) if mask is None else levels(mask)[..., 0]


def _kept_and_new(levels_THWC: Tensor, mask_THW: Tensor) -> Iterator[Tensor]:
    """The part of the video that is kept, then the part that is made anew; the rest is grey."""
    is_new_THW1, grey = (mask_THW >= 128)[..., None], levels_THWC.new_full((), GREY)
    yield levels_THWC.where(~is_new_THW1, grey)
    yield levels_THWC.where(is_new_THW1, grey)


def fold_mask(mask_THW: Tensor, *, time: int, space: int) -> Tensor:
    """uint8 levels to float32 (1, C, T', H / space, W / space) in [0, 1], with a channel for each pixel of a cell.

    Of every `time` frames one counts.
    """
    num_frames = mask_THW.shape[0]
    nearest = F.interpolate(
        torch.arange(num_frames, dtype=torch.float32)[None, None], size=-(-num_frames // time), mode="nearest-exact"
    )
    kept = mask_THW[nearest[0, 0].long()].float()
    kept = ((2.0 * (kept / 255.0) - 1.0 + 1.0) / 2.0).clamp(0, 1)  # the roundings of the reference
    frames, height, width = kept.shape
    cells = kept.reshape(frames, height // space, space, width // space, space)
    return cells.permute(2, 4, 0, 1, 3).flatten(0, 1)[None]


def on_canvas(picture: Pictures, height: int, width: int) -> Tensor:
    """A reference image as one frame, levels (1, height, width, 3) float32: as large as fits, in the middle of white.

    Raises RequestError for one that is too small.
    """
    own_height, own_width = _whole_sides(picture)
    frame = fitted(picture, width=own_width, height=own_height, keeps_aspect=False)
    scale = min(height / own_height, width / own_width)
    high, wide = max(1, int(own_height * scale)), max(1, int(own_width * scale))
    levels = F.interpolate(
        torch.from_numpy(frame.astype(np.float32)).permute(0, 3, 1, 2), (high, wide), mode="bilinear"
    )
    top, left = (height - high) // 2, (width - wide) // 2
    around = (left, width - wide - left, top, height - high - top)
    return F.pad(levels, around, value=WHITE).permute(0, 2, 3, 1)


def _whole_sides(picture: Pictures) -> tuple[int, int]:
    """Height and width of what is taken of a reference image."""
    height, width = (side - side % _REFERENCE_MULTIPLE for side in (picture.height, picture.width))
    if 0 in (height, width):
        raise RequestError(
            f"{picture.name} is {picture.width}x{picture.height}, too small for a reference image; "
            f"give {_REFERENCE_MULTIPLE} pixels or more each way"
        )
    return height, width


def _size(pictures: Pictures) -> str:
    return f"{len(pictures.frames)} frames of {pictures.width}x{pictures.height}"
