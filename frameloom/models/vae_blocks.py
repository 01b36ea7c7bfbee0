"""The parts of the causal WanVAE: convolutions that look back in time only, and what they remember between chunks.

Shapes: B batch, C channels, T frames, H height, W width. Parameter names equal those of Diffusers' AutoencoderKLWan.
Source: Wan technical report (arXiv:2503.20314, section 4.1); reference file autoencoder_kl_wan.py.
"""

import functools
from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.attention.core import Attend, sdpa
from frameloom.models.vae_state import CausalState, Prepare, Reach, RowPadding

Resampling = Literal["upsample2d", "upsample3d", "downsample2d", "downsample3d"]


class Kernel(Protocol):
    """A prepared convolution; `tile_rows` rows of its result are computed together."""

    @property
    def tile_rows(self) -> int:
        """1 where each row is computed as if it were alone."""
        ...

    def __call__(self, x_BCTHW: Tensor, pad_rows: int, /) -> Tensor:
        """Convolve x with its past in front (and, in a band, its rows around it), `pad_rows` zero rows added."""
        ...


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that reaches back in time.

    The state that is handed in owns the padding: it puts the past in front, and in a band the neighbouring rows around;
    columns, and rows where there is no neighbour, are padded by the convolution itself. `kernel` computes the same in
    another way; None is torch's own convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int]) -> None:
        size = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        super().__init__(in_channels, out_channels, size, padding=(0, size[1] // 2, size[2] // 2))
        self.kernel: Kernel | None = None

    def forward(  # type: ignore[override]  # state is the point
        self, x_BCTHW: Tensor, state: CausalState, *, prepare: Prepare | None = None
    ) -> Tensor:
        """Convolve a chunk (B, C, T, H, W) -> (B, C', T, H, W), after `prepare` if there is one."""
        depth, height, _ = self.kernel_size
        reach = Reach.same(height, tile=self.kernel.tile_rows if self.kernel else 1)
        return state.convolve(self, x_BCTHW, self._run, history=depth - 1, reach=reach, prepare=prepare)

    def _run(self, x_BCTHW: Tensor, pad: RowPadding) -> Tensor:
        depth, height, width = self.kernel_size
        if _is_incomplete(x_BCTHW, pad, height):
            return _no_rows(x_BCTHW, self.out_channels, frames=x_BCTHW.shape[2] - depth + 1, width=x_BCTHW.shape[4])
        if self.kernel is not None:
            return self.kernel(x_BCTHW, pad.above)
        return F.conv3d(x_BCTHW, self.weight, self.bias, padding=(0, pad.above, width // 2))


class RMSNorm(nn.Module):
    """x / rms(x) over channels, times gamma; computed in float32 for half precisions, as the reference does."""

    def __init__(self, dim: int, *, spatial_dims: int = 3) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))
        self.fused: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...) over C."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        out: Tensor = F.normalize(wide, dim=1).to(x.dtype) * self.scale * self.gamma
        return out

    def then_silu(self, x: Tensor, /, *, out: Tensor | None = None) -> Tensor:
        """silu(norm(x)), what stands before every convolution of a residual block; written to `out` if given."""
        if self.fused is not None:
            return self.fused(x, self.gamma.flatten(), out)
        y = F.silu(self(x))
        return y if out is None else out.copy_(y)


class ResidualBlock(nn.Module):
    """Two causal 3x3x3 convolutions with RMSNorm and SiLU, added to the input."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """Map a chunk (B, C, T, H, W) -> (B, C', T, H, W)."""
        h: Tensor = self.conv1(x_BCTHW, state, prepare=self.norm1.then_silu)
        h = self.conv2(h, state, prepare=self.norm2.then_silu)
        skip = state.align(self, x_BCTHW, h.shape[3])
        return h.add_(skip if self.conv_shortcut is None else self.conv_shortcut(skip, state))


class AttentionBlock(nn.Module):
    """Single-head self-attention within each frame; `attend` is the seam every attention of the engine has."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.attend: Attend = sdpa

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """Mix the cells of each frame; shape unchanged."""
        b, c, t, h, w = x_BCTHW.shape
        all_three = _of_cells(self.to_qkv, x_BCTHW, state, prepare=self.norm)
        qkv = _frames_as_batch(all_three).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (part.unsqueeze(2) for part in qkv.chunk(3, dim=-1))  # (B*T, H*W, 3C) -> one head: (B*T, H*W, 1, C)
        mixed = state.attend(self.attend, q, k, v).squeeze(2).transpose(1, 2).reshape(b * t, c, h, w)
        return x_BCTHW + _of_cells(self.proj, _batch_as_frames(mixed, b), state)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """Shape unchanged."""
        x_BCTHW = self.resnets[0](x_BCTHW, state)
        x_BCTHW = self.attentions[0](x_BCTHW, state)
        out: Tensor = self.resnets[1](x_BCTHW, state)
        return out


class Resample(nn.Module):
    """Halve or double height and width, and in the 3d modes time too.

    The first frame of a video stands alone: it is neither paired with another (down) nor doubled (up).
    """

    def __init__(self, dim: int, mode: Resampling, *, out_dim: int | None = None) -> None:
        super().__init__()
        self.mode = mode
        if mode.startswith("upsample"):
            self.resample = nn.Sequential(
                nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                nn.Conv2d(dim, out_dim or dim // 2, 3, padding=1),
            )
        else:  # zeros below and to the right only, as the reference pads before its strided convolution
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if mode == "upsample3d":
            self.time_conv: CausalConv3d | StridedTimeConv = CausalConv3d(dim, dim * 2, (3, 1, 1))
        elif mode == "downsample3d":
            self.time_conv = StridedTimeConv(dim)
        self.kernel: Kernel | None = None  # computes upsampling and convolution at once

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution behind the resampling."""
        conv = self.resample[1]
        assert isinstance(conv, nn.Conv2d)
        return conv

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W')."""
        if self.mode == "upsample3d":
            x_BCTHW = self._double_time(x_BCTHW, state)
        if self.mode.startswith("upsample"):
            return self._double_picture(x_BCTHW, state)
        x_BCTHW = self._halve_picture(x_BCTHW, state)
        return self.time_conv(x_BCTHW, state) if self.mode == "downsample3d" else x_BCTHW

    def _double_time(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        first, rest = (x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]) if state.at_start else (None, x_BCTHW)
        if first is not None and rest.shape[2] == 0:
            return first  # the time convolution has seen nothing: it will start from zeros
        pairs = self.time_conv(rest, state)
        b, c, t, h, w = rest.shape
        doubled = torch.empty((b, c, 2 * t, h, w), dtype=pairs.dtype, device=pairs.device, memory_format=_order(pairs))
        doubled[:, :, 0::2], doubled[:, :, 1::2] = pairs[:, :c], pairs[:, c:]
        return doubled if first is None else torch.cat([first, doubled], dim=2)

    def _double_picture(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        reach = Reach.same(3, tile=self.kernel.tile_rows if self.kernel else 1)
        large = functools.partial(_upsampled, x_BCTHW, self.resample[0])  # no name here: it is let go while it is used
        return state.convolve(self, x_BCTHW if self.kernel else large(), self._run_upsampled, history=0, reach=reach)

    def _run_upsampled(self, x_BCTHW: Tensor, pad: RowPadding) -> Tensor:
        conv = self.conv
        if _is_incomplete(x_BCTHW, pad, 3):
            scale = 1 if self.kernel is None else 2
            return _no_rows(x_BCTHW, conv.out_channels, frames=x_BCTHW.shape[2], width=scale * x_BCTHW.shape[4])
        if self.kernel is not None:
            return self.kernel(x_BCTHW, pad.above)
        y = F.conv2d(_frames_as_batch(x_BCTHW), conv.weight, conv.bias, padding=(pad.above, 1))
        return _batch_as_frames(y, x_BCTHW.shape[0])

    def _halve_picture(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        return state.convolve(self, x_BCTHW, self._run_strided, history=0, reach=Reach(3, stride=2, below=1))

    def _run_strided(self, x_BCTHW: Tensor, pad: RowPadding) -> Tensor:
        conv = self.conv
        if _is_incomplete(x_BCTHW, pad, 3):
            return _no_rows(x_BCTHW, conv.out_channels, frames=x_BCTHW.shape[2], width=x_BCTHW.shape[4] // 2)
        x_NCHW = F.pad(_frames_as_batch(x_BCTHW), (0, 1, pad.above, pad.below))
        return _batch_as_frames(F.conv2d(x_NCHW, conv.weight, conv.bias, stride=2), x_BCTHW.shape[0])


class StridedTimeConv(nn.Conv3d):
    """Causal convolution over time with stride 2; the video's first frame passes unchanged."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:  # type: ignore[override]  # state is the point
        """First chunk: T = 1 + 2k -> 1 + k. Later chunks: T = 2k -> k."""
        if not state.at_start:
            return state.convolve(self, x_BCTHW, self._halve, history=1, reach=Reach(1))
        first = x_BCTHW[:, :, :1]
        rest = state.convolve(self, x_BCTHW, self._halve_after_first, history=1, reach=Reach(1))
        return torch.cat([first, rest], dim=2) if rest.shape[2] else first

    def _halve_after_first(self, x_BCTHW: Tensor, pad: RowPadding) -> Tensor:
        """Nothing lies before the first frame: what was put in front of it is not looked at."""
        if x_BCTHW.shape[2] == 2:
            return x_BCTHW[:, :, :0]
        return self._halve(x_BCTHW[:, :, 1:], pad)

    def _halve(self, x_BCTHW: Tensor, _: RowPadding) -> Tensor:
        if x_BCTHW.shape[3] == 0:
            return _no_rows(x_BCTHW, self.out_channels, frames=x_BCTHW.shape[2] // 2, width=x_BCTHW.shape[4])
        return F.conv3d(x_BCTHW, self.weight, self.bias, stride=self.stride)


class AverageDown(nn.Module):
    """Wan 2.2 shortcut: space and time folded into channels, then averaged in groups down to `out_dim`."""

    def __init__(self, in_dim: int, out_dim: int, *, time: int, space: int) -> None:
        super().__init__()
        self.out_dim, self.time, self.space = out_dim, time, space
        self.group = in_dim * time * space * space // out_dim

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, out_dim, ceil(T/time), H/space, W/space)."""
        order = _order(x_BCTHW)
        b, c, t, h, w = x_BCTHW.shape
        missing = -t % self.time  # the first frame stands alone: zeros before it complete its group
        x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, missing, 0))
        time, space = self.time, self.space
        size = ((t + missing) // time, h // space, w // space)
        cells = x_BCTHW.reshape(b, c, size[0], time, size[1], space, size[2], space)
        folded = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, self.out_dim, self.group, *size)
        first, *rest = folded.unbind(2)
        total = first.float() if first.dtype.itemsize < 4 else first.clone()
        for one in rest:  # torch's mean adds in another order where a picture is larger
            total += one
        return (total / self.group).to(x_BCTHW.dtype).contiguous(memory_format=order)


class DuplicateUp(nn.Module):
    """Wan 2.2 shortcut: channels repeated, then unfolded into space and time."""

    def __init__(self, in_dim: int, out_dim: int, *, time: int, space: int) -> None:
        super().__init__()
        self.out_dim, self.time, self.space = out_dim, time, space
        self.repeats = out_dim * time * space * space // in_dim

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """(B, C, T, H, W) -> (B, out_dim, T*time, H*space, W*space), less what lies before the first frame."""
        b, _, t, h, w = x_BCTHW.shape
        time, space = self.time, self.space
        wide = x_BCTHW.repeat_interleave(self.repeats, dim=1).reshape(b, self.out_dim, time, space, space, t, h, w)
        up = wide.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, self.out_dim, t * time, h * space, w * space)
        return (up[:, :, time - 1 :] if state.at_start else up).contiguous(memory_format=_order(x_BCTHW))


def _of_cells(conv: nn.Conv2d, x_BCTHW: Tensor, state: CausalState, *, prepare: nn.Module | None = None) -> Tensor:
    """A convolution that sees one cell, of frames that are prepared for it.

    As a matrix product: a library's convolution adds up wide pictures in another order for another number of threads.
    """

    def run(x_BCTHW: Tensor, _: RowPadding) -> Tensor:
        frames = _frames_as_batch(x_BCTHW)
        frames = frames if prepare is None else prepare(frames)
        y_NHWC = F.linear(frames.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)
        return _batch_as_frames(y_NHWC.permute(0, 3, 1, 2), x_BCTHW.shape[0])

    return state.convolve(conv, x_BCTHW, run, history=0, reach=Reach(1))


def _frames_as_batch(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def _batch_as_frames(x_NCHW: Tensor, batch: int) -> Tensor:
    return x_NCHW.reshape(batch, -1, *x_NCHW.shape[1:]).transpose(1, 2)


def _upsampled(x_BCTHW: Tensor, upsample: nn.Module) -> Tensor:
    if x_BCTHW.shape[3] == 0:  # torch refuses to interpolate nothing
        return _no_rows(x_BCTHW, x_BCTHW.shape[1], frames=x_BCTHW.shape[2], width=2 * x_BCTHW.shape[4])
    return _batch_as_frames(upsample(_frames_as_batch(x_BCTHW)), x_BCTHW.shape[0])


def _order(x_BCTHW: Tensor) -> torch.memory_format:
    """The memory order of x, for what is made from it."""
    last = x_BCTHW.is_contiguous(memory_format=torch.channels_last_3d) and not x_BCTHW.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format


def _is_incomplete(x_BCTHW: Tensor, pad: RowPadding, kernel_rows: int) -> bool:
    """Whether a band is so narrow that the convolution cannot give a row yet."""
    return x_BCTHW.shape[3] + pad.above + pad.below < kernel_rows


def _no_rows(x_BCTHW: Tensor, channels: int, *, frames: int, width: int) -> Tensor:
    return x_BCTHW.new_empty(x_BCTHW.shape[0], channels, frames, 0, width)
