"""The parts of the causal WanVAE: convolutions that look back in time only, and what they remember between chunks.

Shapes: B batch, C channels, T frames, H height, W width. Parameter names equal those of Diffusers' AutoencoderKLWan.
Source: Wan technical report (arXiv:2503.20314, section 4.1); reference file autoencoder_kl_wan.py.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.attention.core import Attend, sdpa

Resampling = Literal["upsample2d", "upsample3d", "downsample2d", "downsample3d"]


class CausalState:
    """What one pass over a video remembers between chunks of frames: the tail of every time convolution's input.

    A fresh state is the beginning of a video. Encoding or decoding a video in chunks of any length, handing the same
    state along, equals doing it in one piece.
    """

    def __init__(self) -> None:
        self.at_start = True  # True until the first chunk has passed
        self._tails: dict[nn.Module, Tensor] = {}

    def extend(self, owner: nn.Module, x_BCTHW: Tensor, history: int) -> Tensor:
        """Return x with the `history` frames before it in front (zeros before the beginning), and remember its tail."""
        tail = self._tails.get(owner)
        if tail is None:
            b, c, _, h, w = x_BCTHW.shape
            tail = x_BCTHW.new_zeros(b, c, history, h, w)
        extended = torch.cat([tail, x_BCTHW], dim=2)
        self._tails[owner] = extended[:, :, -history:].clone()  # a view would keep the whole chunk alive
        return extended


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that reaches back in time; the convolution itself zero-pads height and width."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int]) -> None:
        kernel = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:  # type: ignore[override]  # state is the point
        """Convolve a chunk (B, C, T, H, W) -> (B, C', T, H, W)."""
        history = self.kernel_size[0] - 1
        if history:
            x_BCTHW = state.extend(self, x_BCTHW, history)
        out: Tensor = self._conv_forward(x_BCTHW, self.weight, self.bias)
        return out


class RMSNorm(nn.Module):
    """x / rms(x) over channels, times gamma; computed in float32 for half precisions, as the reference does."""

    def __init__(self, dim: int, *, spatial_dims: int = 3) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...) over C."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        out: Tensor = F.normalize(wide, dim=1).to(x.dtype) * self.scale * self.gamma
        return out


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
        skip: Tensor = x_BCTHW if self.conv_shortcut is None else self.conv_shortcut(x_BCTHW, state)
        h: Tensor = self.conv1(F.silu(self.norm1(x_BCTHW)), state)
        h = self.conv2(F.silu(self.norm2(h)), state)
        return skip + h


class AttentionBlock(nn.Module):
    """Single-head self-attention within each frame; `attend` is the seam every attention of the engine has."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.attend: Attend = sdpa

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Mix the cells of each frame; shape unchanged."""
        b, c, t, h, w = x_BCTHW.shape
        frames = _frames_as_batch(x_BCTHW)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # (B*T, H*W, 3C)
        q, k, v = (part.unsqueeze(2) for part in qkv.chunk(3, dim=-1))  # one head: (B*T, H*W, 1, C)
        mixed = self.attend(q, k, v).squeeze(2).transpose(1, 2).reshape(b * t, c, h, w)
        return x_BCTHW + _batch_as_frames(self.proj(mixed), b)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """Shape unchanged."""
        x_BCTHW = self.resnets[0](x_BCTHW, state)
        x_BCTHW = self.attentions[0](x_BCTHW)
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

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W')."""
        if self.mode == "upsample3d":
            x_BCTHW = self._double_time(x_BCTHW, state)
        x_BCTHW = _batch_as_frames(self.resample(_frames_as_batch(x_BCTHW)), x_BCTHW.shape[0])
        if self.mode == "downsample3d":
            x_BCTHW = self.time_conv(x_BCTHW, state)
        return x_BCTHW

    def _double_time(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:
        first, rest = (x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]) if state.at_start else (None, x_BCTHW)
        if first is not None and rest.shape[2] == 0:
            return first  # the time convolution has seen nothing: it will start from zeros
        b, c, t, h, w = rest.shape
        pairs = self.time_conv(rest, state).reshape(b, 2, c, t, h, w)
        doubled: Tensor = pairs.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)
        return doubled if first is None else torch.cat([first, doubled], dim=2)


class StridedTimeConv(nn.Conv3d):
    """Causal convolution over time with stride 2; the video's first frame passes unchanged."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x_BCTHW: Tensor, state: CausalState) -> Tensor:  # type: ignore[override]  # state is the point
        """First chunk: T = 1 + 2k -> 1 + k. Later chunks: T = 2k -> k."""
        extended = state.extend(self, x_BCTHW, 1)
        if not state.at_start:
            return self._halve(extended)
        first = x_BCTHW[:, :, :1]  # nothing lies before it: what was put in front is not looked at
        return torch.cat([first, self._halve(x_BCTHW)], dim=2) if x_BCTHW.shape[2] > 1 else first

    def _halve(self, x_BCTHW: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x_BCTHW, self.weight, self.bias)
        return out


class AverageDown(nn.Module):
    """Wan 2.2 shortcut: space and time folded into channels, then averaged in groups down to `out_dim`."""

    def __init__(self, in_dim: int, out_dim: int, *, time: int, space: int) -> None:
        super().__init__()
        self.out_dim, self.time, self.space = out_dim, time, space
        self.group = in_dim * time * space * space // out_dim

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, out_dim, ceil(T/time), H/space, W/space)."""
        b, c, t, h, w = x_BCTHW.shape
        missing = -t % self.time  # the first frame stands alone: zeros before it complete its group
        x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, missing, 0))
        time, space = self.time, self.space
        cells = x_BCTHW.reshape(b, c, (t + missing) // time, time, h // space, space, w // space, space)
        folded = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, self.out_dim, self.group, -1, h // space, w // space)
        return folded.mean(dim=2)


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
        return up[:, :, time - 1 :] if state.at_start else up


def _frames_as_batch(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def _batch_as_frames(x_NCHW: Tensor, batch: int) -> Tensor:
    return x_NCHW.reshape(batch, -1, *x_NCHW.shape[1:]).transpose(1, 2)
