"""The 3D causal WanVAE (2.1 and 2.2): video to latents and back, in one piece or in chunks of frames.

Shapes: B batch, C colour channels, T frames, H height, W width; z has Z latent channels. Frames are in [-1, 1].
Source: Wan technical report (arXiv:2503.20314, section 4.1); reference file autoencoder_kl_wan.py (Diffusers).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from frameloom.errors import RequestError
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_blocks import (
    AverageDown,
    CausalConv3d,
    DuplicateUp,
    MidBlock,
    Resample,
    ResidualBlock,
    RMSNorm,
)
from frameloom.models.vae_state import CausalState, Passage

_PLAINLY = Passage(buffers=False)
_FEWEST_STILL = 6  # chunks that repeat: with fewer the parts of the encoder that settle have passed most of them
_SAMPLED = 32  # every so many columns are compared first


class WanVAE(nn.Module):
    """Encoder and decoder with their causal state handed in from outside.

    `encode` and `decode` work on whole videos, in the plain way or as a Passage says; `encode_chunk` and `decode_chunk`
    on the next frames of a video whose past is in a CausalState. Any way of cutting a video into chunks, and its
    pictures into bands, computes the same function.
    """

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.quant_conv = CausalConv3d(spec.z_dim * 2, spec.z_dim * 2, 1)
        self.post_quant_conv = CausalConv3d(spec.z_dim, spec.z_dim, 1)
        self.decoder = Decoder(spec)

    def encode(self, x_BCTHW: Tensor, passage: Passage | None = None) -> Tensor:
        """Posterior moments (B, 2Z, T', H', W'), mean then log-variance, of frames (B, 3, T, H, W) in [-1, 1].

        T is 1 + temporal_scale * k. The mode of the posterior is the first Z channels. Raises RequestError on a shape
        that the compression does not divide.
        """
        passage = passage or _PLAINLY
        return passage.join(torch.cat(list(self.encode_stream(x_BCTHW, passage)), dim=2))

    def encode_stream(
        self, x_BCTHW: Tensor, passage: Passage | None = None, *, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Yield the moments chunk by chunk. `prepare` makes frames as above of what is given, such as bytes."""
        self.check_frames(*x_BCTHW.shape[2:])
        passage = passage or _PLAINLY
        x_BCTHW = passage.part(x_BCTHW, self.spec.spatial_scale)
        if passage.buffers and passage.repeats:
            # One latent frame at a time: then few frames pass before what does not change is known.
            still = num_still(x_BCTHW, self.spec.temporal_scale) >= _FEWEST_STILL
            passage = replace(passage, repeats=still, steps=1 if still else passage.steps)
        state, last, given = passage.state(), None, None
        for x in _chunks(x_BCTHW, passage.steps * self.spec.temporal_scale):
            if given is None or not (state.repeats and _are_equal(x, last)):
                given = x if prepare is None else prepare(x)
            last = x
            yield self.encode_chunk(given, state)

    def decode(self, z_BZTHW: Tensor, passage: Passage | None = None) -> Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1] of latents (B, Z, T', H', W'); T = 1 + temporal_scale * (T' - 1)."""
        passage = passage or _PLAINLY
        return passage.join(torch.cat(list(self.decode_stream(z_BZTHW, passage)), dim=2))

    def decode_stream(
        self, z_BZTHW: Tensor, passage: Passage | None = None, *, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Yield the decoded frames (B, 3, t, H, W) chunk by chunk, so that the whole video need never be in memory.

        Of a passage that takes part of the picture, that part. `prepare` makes latents as above of what is given.
        """
        passage = passage or _PLAINLY
        state, z_BZTHW = passage.state(), passage.part(z_BZTHW)
        for z in _chunks(z_BZTHW, passage.steps):
            yield self.decode_chunk(z if prepare is None else prepare(z), state)

    def encode_chunk(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """Moments of the next frames: 1 + k * temporal_scale at the start of a video, k * temporal_scale later."""
        if x_BCTHW.numel() == 0:
            return self._of_no_cells(x_BCTHW, 2 * self.spec.z_dim, -(-x_BCTHW.shape[2] // self.spec.temporal_scale))
        if self.spec.patch_size is not None:
            x_BCTHW = state.repeated(patchify, x_BCTHW, functools.partial(patchify, patch=self.spec.patch_size))
        h = self.encoder(x_BCTHW, state)
        moments = state.repeated(self.quant_conv, h, functools.partial(self.quant_conv, state=state))
        state.at_start = False
        return moments

    def decode_chunk(self, z_BZTHW: Tensor, state: CausalState) -> Tensor:
        """Frames in [-1, 1] of the next latent frames, any number of them."""
        if z_BZTHW.numel() == 0:
            first = (self.spec.temporal_scale - 1) * state.at_start
            state.at_start = False
            return self._of_no_cells(
                z_BZTHW, self.spec.made_channels, self.spec.temporal_scale * z_BZTHW.shape[2] - first
            )
        x_BCTHW: Tensor = self.decoder(self.post_quant_conv(z_BZTHW, state), state)
        state.at_start = False
        if self.spec.patch_size is not None:
            x_BCTHW = unpatchify(x_BCTHW, self.spec.patch_size)
        return x_BCTHW.clamp_(-1.0, 1.0)

    def normalise(self, z_BZTHW: Tensor) -> Tensor:
        """Latents as the sampler sees them: (z - mean) / std, per channel, in z's dtype."""
        mean, std = self._statistics(z_BZTHW)
        return (z_BZTHW - mean) * (1.0 / std)

    def denormalise(self, z_BZTHW: Tensor) -> Tensor:
        """The inverse of `normalise`, in the order of operations of the reference pipeline."""
        mean, std = self._statistics(z_BZTHW)
        return z_BZTHW / (1.0 / std) + mean

    def check_frames(self, num_frames: int, height: int, width: int) -> None:
        """Raise RequestError unless the compression divides the video."""
        time, space = self.spec.temporal_scale, self.spec.spatial_scale
        if num_frames < 1 or (num_frames - 1) % time:
            near = 1 + time * max(0, round((num_frames - 1) / time))
            raise RequestError(f"{num_frames} frames cannot be encoded: the VAE needs 1 + {time}k frames; use {near}")
        for name, size in (("height", height), ("width", width)):
            if size < space or size % space:
                near = space * max(1, round(size / space))
                raise RequestError(f"{name} {size} is not a multiple of {space} (VAE compression); use {near}")

    @staticmethod
    def _of_no_cells(x_BCTHW: Tensor, channels: int, frames: int) -> Tensor:
        """What comes of a part of the picture in which there is nothing."""
        return x_BCTHW.new_empty(x_BCTHW.shape[0], channels, frames, 0, 0)

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, self.spec.z_dim, 1, 1, 1)
        mean = torch.tensor(self.spec.latents_mean, device=z.device, dtype=z.dtype).view(shape)
        return mean, torch.tensor(self.spec.latents_std, device=z.device, dtype=z.dtype).view(shape)


class Encoder(nn.Module):
    """Frames to moments: conv, stages that each halve the picture, middle, conv."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        dims = [spec.base_dim * m for m in (1, *spec.dim_mult)]
        self.conv_in = CausalConv3d(spec.in_channels, dims[0], 3)
        self.down_blocks = nn.ModuleList()
        for stage, (in_dim, out_dim) in enumerate(pairwise(dims)):
            halve_time = spec.temperal_downsample[stage] if stage < len(spec.temperal_downsample) else None
            if spec.is_residual:
                self.down_blocks.append(ResidualDownStage(in_dim, out_dim, spec.num_res_blocks, halve_time))
            else:  # Wan 2.1 keeps its stages in one flat list
                self.down_blocks.extend(_residual_blocks(in_dim, out_dim, spec.num_res_blocks))
                if halve_time is not None:
                    self.down_blocks.append(Resample(out_dim, "downsample3d" if halve_time else "downsample2d"))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], spec.z_dim * 2, 3)

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """(B, C, T, H, W) -> (B, 2Z, T', H', W')."""
        for segment in self._segments(apart=state.repeats):
            stages = [functools.partial(stage, state=state) for stage in segment]
            x_BCTHW = state.repeated(segment[0], x_BCTHW, functools.partial(state.by_rows, stages=stages))
        return state.repeated(self.mid_block, x_BCTHW, functools.partial(self._end, state=state))

    def _segments(self, *, apart: bool) -> Iterator[list[nn.Module]]:
        """The stages before the middle; `apart`: those of each size of the picture by themselves.

        Cut behind each halving, as little as can be is kept of what lies between them.
        """
        segment: list[nn.Module] = [self.conv_in]
        for stage in self.down_blocks:
            segment.append(stage)
            if apart and (isinstance(stage, Resample) or getattr(stage, "downsampler", None) is not None):
                yield segment
                segment = []
        if segment:
            yield segment

    def _end(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        h = self.mid_block(x_BCTHW, state)
        out: Tensor = self.conv_out(h, state, prepare=self.norm_out.then_silu)
        return out


class Decoder(nn.Module):
    """Latents to frames: conv, middle, stages that each double the picture, conv."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        base = spec.decoder_base_dim or spec.base_dim
        dims = [base * m for m in (spec.dim_mult[-1], *reversed(spec.dim_mult))]
        double_time = tuple(reversed(spec.temperal_downsample))
        stage_type = ResidualUpStage if spec.is_residual else UpStage
        self.conv_in = CausalConv3d(spec.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for stage, (in_dim, out_dim) in enumerate(pairwise(dims)):
            halved = stage > 0 and not spec.is_residual  # the 2.1 upsampler before this stage halved its channels
            double = double_time[stage] if stage < len(double_time) else None
            block_in = in_dim // 2 if halved else in_dim
            self.up_blocks.append(stage_type(block_in, out_dim, spec.num_res_blocks + 1, double))
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], spec.out_channels, 3)

    def forward(self, z_BZTHW: Tensor, state: CausalState) -> Tensor:
        """(B, Z, T', H', W') -> (B, C, T, H, W), not clamped."""
        h = self.mid_block(self.conv_in(z_BZTHW, state), state)
        stages = [functools.partial(stage, state=state) for stage in self.up_blocks]
        out = functools.partial(self.conv_out, state=state, prepare=self.norm_out.then_silu)
        return state.by_rows(h, [*stages, out])


class UpStage(nn.Module):
    """Wan 2.1: residual blocks, then an upsampler that halves the channels (none where `double_time` is None)."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, double_time: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_residual_blocks(in_dim, out_dim, num_blocks))
        self.upsamplers = nn.ModuleList()
        if double_time is not None:
            self.upsamplers.append(Resample(out_dim, "upsample3d" if double_time else "upsample2d"))

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', 2H, 2W)."""
        for block in (*self.resnets, *self.upsamplers):
            x_BCTHW = block(x_BCTHW, state)
        return x_BCTHW


class ResidualDownStage(nn.Module):
    """Wan 2.2: residual blocks and a downsampler, beside a shortcut that averages."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, halve_time: bool | None) -> None:
        super().__init__()
        self.avg_shortcut = AverageDown(
            in_dim, out_dim, time=2 if halve_time else 1, space=1 if halve_time is None else 2
        )
        self.resnets = nn.ModuleList(_residual_blocks(in_dim, out_dim, num_blocks))
        self.downsampler = None
        if halve_time is not None:
            self.downsampler = Resample(out_dim, "downsample3d" if halve_time else "downsample2d")

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H/2, W/2)."""
        h = x_BCTHW
        for block in self.resnets:
            h = block(h, state)
        if self.downsampler is not None:
            h = self.downsampler(h, state)
        skip = self.avg_shortcut(state.whole_groups(self, x_BCTHW, self.avg_shortcut.space))
        return h.add_(state.align(self, skip, h.shape[3]))


class ResidualUpStage(nn.Module):
    """Wan 2.2: residual blocks and an upsampler, beside a shortcut that duplicates."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, double_time: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_residual_blocks(in_dim, out_dim, num_blocks))
        self.upsampler, self.avg_shortcut = None, None
        if double_time is not None:
            self.avg_shortcut = DuplicateUp(in_dim, out_dim, time=2 if double_time else 1, space=2)
            self.upsampler = Resample(out_dim, "upsample3d" if double_time else "upsample2d", out_dim=out_dim)

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', 2H, 2W)."""
        h = x_BCTHW
        for block in self.resnets:
            h = block(h, state)
        if self.upsampler is None or self.avg_shortcut is None:
            return h
        h = self.upsampler(h, state)
        out: Tensor = h.add_(state.align(self, self.avg_shortcut(x_BCTHW, state), h.shape[3]))
        return out


def patchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C*patch*patch, T, H/patch, W/patch), columns before rows as the 2.2 checkpoints expect."""
    b, c, t, h, w = x_BCTHW.shape
    cells = x_BCTHW.reshape(b, c, t, h // patch, patch, w // patch, patch)
    return cells.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, c * patch * patch, t, h // patch, w // patch)


def unpatchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    b, c, t, h, w = x_BCTHW.shape
    cells = x_BCTHW.reshape(b, c // (patch * patch), patch, patch, t, h, w)
    return cells.permute(0, 1, 4, 5, 3, 6, 2).reshape(b, c // (patch * patch), t, h * patch, w * patch)


def num_still(x_BCTHW: Tensor, size: int) -> int:
    """How many of the chunks of `size` frames after the first frame are equal to the chunk before."""
    whole = list(_chunks(x_BCTHW, size))[1:]
    return sum(_are_equal(chunk, before) for before, chunk in pairwise(whole))


def _are_equal(x: Tensor, y: Tensor | None) -> bool:
    """A few numbers of each tell of most that are not."""
    if y is None or x.shape != y.shape:
        return False
    return torch.equal(x[..., ::_SAMPLED], y[..., ::_SAMPLED]) and torch.equal(x, y)


def _residual_blocks(in_dim: int, out_dim: int, count: int) -> list[ResidualBlock]:
    return [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(count)]


def _chunks(x: Tensor, size: int) -> Iterator[Tensor]:
    """The first frame, then `size` frames at a time."""
    yield x[:, :, :1]
    for start in range(1, x.shape[2], size):
        yield x[:, :, start : start + size]
