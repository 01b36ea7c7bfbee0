"""What a video is conditioned on besides its prompt: given frames beside or among the latents, and CLIP's features.

Shapes: B prompts, C latent channels, T frames, H height, W width, in cells of the VAE (in BCTHW); N image tokens, E
their features. Reference: Diffusers' WanImageToVideoPipeline and WanVideoToVideoPipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from frameloom.errors import RequestError
from frameloom.models.spec import TransformerSpec, VaceSpec, VaeSpec
from frameloom.models.wan_dit import FrameTimes
from frameloom.pipeline.images import fitted
from frameloom.pipeline.sinks import Frames
from frameloom.sampling.flow import FlowSchedule
from frameloom.sampling.guidance import expand_timesteps
from frameloom.types import GenerateRequest, Pictures, ResolvedRequest, SizeRules

GREY = 127.5  # of 255: what the frames that are not given look like to the VAE, exactly 0 in [-1, 1]
CONTROLS = ("control_video", "mask", "references", "control_strength")  # what VACE takes
_NAMES = {
    "image": "an image",
    "last_image": "a last image",
    "control_video": "a control video",
    "mask": "a mask",
    "references": "reference images",
    "control_strength": "a control strength",
}


class EncodesImages(Protocol):
    """An image encoder."""

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as features (B, N, E)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Takes:
    """Which pictures a checkpoint needs, and which it can take: fields of a request."""

    needed: tuple[str, ...] = ()
    possible: tuple[str, ...] = ()

    def check(self, request: GenerateRequest, name: str) -> None:
        """Raise RequestError unless the checkpoint `name` can start from what is given."""
        given = [field for field in _NAMES if getattr(request, field) is not None]
        for field in self.needed:
            if field not in given:
                raise RequestError(f"'{name}' starts from {_listed(self.needed)}; give {_NAMES[field]}")
        for field in given:
            if field not in self.possible:
                possible = _listed(self.possible) or "the prompt alone"
                raise RequestError(
                    f"'{name}' cannot take {_NAMES[field]}, it starts from {possible}; leave it out, or use another "
                    "checkpoint"
                )
        if request.video is not None and "control_video" in self.possible:
            raise RequestError(f"'{name}' follows a video, and does not start from one; give it as control video")


def _listed(fields: Sequence[str]) -> str:
    *others, last = [_NAMES[field] for field in fields] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def pictures_taken(spec: TransformerSpec, vae: VaeSpec, *, expand_timesteps: bool) -> Takes:
    """What a transformer starts from, told by its channels and its parts."""
    if isinstance(spec, VaceSpec):
        return Takes(possible=CONTROLS)
    if spec.in_channels != channels_beside_image(vae):
        return Takes(possible=("image",) if expand_timesteps else ())
    if spec.image_dim is None:
        return Takes(needed=("image",), possible=("image", "last_image"))
    fields = ("image",) if spec.pos_embed_seq_len is None else ("image", "last_image")
    return Takes(needed=fields, possible=fields)


def size_rules(spec: TransformerSpec, vae: VaeSpec) -> SizeRules:
    """The sizes that a transformer and a VAE can compute."""
    _, patch_h, patch_w = spec.patch_size
    space = vae.spatial_scale
    return SizeRules(
        width_multiple=space * patch_w,
        height_multiple=space * patch_h,
        temporal=vae.temporal_scale,
        reason=f"VAE {space} x patch {patch_w}" if patch_h == patch_w else "VAE x patch",
    )


def channels_beside_image(vae: VaeSpec) -> int:
    """Input channels of a transformer that gets noise, a mask of what is given, and latents of that."""
    return 2 * vae.z_dim + vae.temporal_scale


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Condition:
    """Given pictures as the transformer gets them; without any, a video from text.

    `beside_BCTHW`: channels that follow those of the latents. `first_BCTHW`: latents of the first frames, which stay as
    they are and have timestep 0. `image_BNE`: CLIP's features.
    """

    beside_BCTHW: Tensor | None = None
    first_BCTHW: Tensor | None = None
    image_BNE: Tensor | None = None

    def kept(self, latents_BCTHW: Tensor) -> Tensor:
        """The latents, those of given first frames in their place."""
        if self.first_BCTHW is None:
            return latents_BCTHW
        first = self.first_BCTHW.expand(latents_BCTHW.shape[0], -1, -1, -1, -1)
        return torch.cat((first, latents_BCTHW[:, :, first.shape[2] :]), dim=2)

    def shown(self, latents_BCTHW: Tensor) -> Tensor:
        """What the transformer gets in a step."""
        latents_BCTHW = self.kept(latents_BCTHW)
        if self.beside_BCTHW is None:
            return latents_BCTHW
        return torch.cat((latents_BCTHW, self.beside_BCTHW.expand(latents_BCTHW.shape[0], -1, -1, -1, -1)), dim=1)

    def frame_times(self, time: Tensor, shape_BCTHW: Sequence[int], *, patch: int) -> Tensor | FrameTimes:
        """The timestep () of every frame of tokens: (B,) where all have it."""
        batch, _, frames, _, _ = shape_BCTHW
        if self.first_BCTHW is None:
            return time.expand(batch)
        values = torch.stack((torch.zeros_like(time), time)).expand(batch, -1)
        return FrameTimes(values, (~self._given(frames, time.device))[::patch].long())

    def token_times(self, time: Tensor, shape_BCTHW: Sequence[int], *, patch: tuple[int, int, int]) -> Tensor:
        """The same as one number per token, (B, L)."""
        batch, _, frames, height, width = shape_BCTHW
        given = None if self.first_BCTHW is None else self._given(frames, time.device)
        return expand_timesteps(time, (frames, height, width), patch_size=patch, conditioned=given, batch_size=batch)

    def _given(self, frames: int, device: torch.device) -> Tensor:
        count = 0 if self.first_BCTHW is None else self.first_BCTHW.shape[2]
        return torch.arange(frames, device=device) < count


def clip_images(request: ResolvedRequest) -> list[Image.Image]:
    """The given images as CLIP gets them: as they came, whatever the size of the video."""
    return [Image.fromarray(shown.frames[0]) for shown in (request.image, request.last_image) if shown is not None]


def fitted_to(request: ResolvedRequest, pictures: Pictures) -> Frames:
    """Given pictures in the size of the video, no more of them than it has frames: uint8 (T, H, W, 3)."""
    frames = fitted(pictures, width=request.width, height=request.height, keeps_aspect=request.keeps_aspect)
    return frames[: request.num_frames]


def video_of_ends(request: ResolvedRequest, first: Pictures, last: Pictures | None) -> Tensor:
    """The given first and last frame with grey between them: levels (T, H, W, 3) of 255.

    float16 holds all levels and the middle of grey exactly, in half the memory of float32.
    """
    video_THWC = torch.full((request.num_frames, request.height, request.width, 3), GREY, dtype=torch.float16)
    video_THWC[:1] = torch.from_numpy(fitted_to(request, first))
    if last is not None:
        video_THWC[-1:] = torch.from_numpy(fitted_to(request, last))
    return video_THWC


def beside(latents_BCTHW: Tensor, temporal: int, *, has_last: bool) -> Tensor:
    """The channels that tell of given frames: a mask, one channel for each frame of a latent frame; then the latents.

    The first latent frame is of one frame, which has all channels of the mask.
    """
    batch, _, *cells = latents_BCTHW.shape
    mask_BCTHW = latents_BCTHW.new_zeros(batch, temporal, *cells)
    mask_BCTHW[:, :, 0] = 1
    if has_last:
        mask_BCTHW[:, -1, -1] = 1
    return torch.cat((mask_BCTHW, latents_BCTHW), dim=1)


def noised(latents_BCTHW: Tensor, noise_BCTHW: Tensor, schedule: FlowSchedule) -> Tensor:
    """A video to start from at the first noise level of a schedule, for each of the noises."""
    sigma = schedule.sigmas[0].to(noise_BCTHW.device)
    return (1 - sigma) * latents_BCTHW + sigma * noise_BCTHW
