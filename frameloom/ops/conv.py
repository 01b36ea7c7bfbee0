"""Convolutions of the WanVAE, each prepared once from its weights and called with (x, zero rows to add).

Shapes: x (B, C, T, H, W) with its past in front already; columns are padded by half the kernel's width, rows by what
the call says; time is never padded. Every class computes the same function as `DirectConv` or `UpsampledConv`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.platform.allocator import empty

Bias = Tensor | None
_UNFOLDED_BYTES = 64 << 20  # the copy that an unfolded convolution works on; more is done in turns


class DirectConv:
    """Torch's own convolution, its weight in channels-last order so that nothing is reordered per call."""

    tile_rows = 1

    def __init__(self, weight_OCTHW: Tensor, bias_O: Bias) -> None:
        self.weight = weight_OCTHW.detach().contiguous(memory_format=torch.channels_last_3d)
        self.bias = None if bias_O is None else bias_O.detach()

    def __call__(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        """(B, C, T, H, W) -> (B, O, T', H', W)."""
        return F.conv3d(x_BCTHW, self.weight, self.bias, padding=(0, pad_rows, self.weight.shape[4] // 2))


class PointwiseConv:
    """A (Kt, 1, 1) convolution as a matrix product over the channels of all time taps, for channels-last x."""

    tile_rows = 1

    def __init__(self, weight_OCTHW: Tensor, bias_O: Bias) -> None:
        self.taps = weight_OCTHW.shape[2]
        self.weight = weight_OCTHW.detach()[..., 0, 0].transpose(1, 2).flatten(1)  # (O, taps * C)
        self.bias = None if bias_O is None else bias_O.detach()

    def __call__(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        """(B, C, T, H, W) -> (B, O, T - Kt + 1, H, W)."""
        last = x_BCTHW.permute(0, 2, 3, 4, 1)
        frames = last.shape[1] - self.taps + 1
        if self.taps > 1:
            last = torch.cat([last[:, k : k + frames] for k in range(self.taps)], dim=-1)
        elif not last.is_contiguous():
            return self._by_frames(last).permute(0, 4, 1, 2, 3)
        return F.linear(last, self.weight, self.bias).permute(0, 4, 1, 2, 3)

    def _by_frames(self, last_BTHWC: Tensor) -> Tensor:
        """Frame by frame: for what lies apart in memory torch takes another way, which copies, and has other bits."""
        out = empty(last_BTHWC, *last_BTHWC.shape[:-1], self.weight.shape[0])
        for video, result in zip(last_BTHWC, out, strict=True):
            for frame, target in zip(video, result, strict=True):
                target.copy_(F.linear(frame.contiguous(), self.weight, self.bias))
        return out


class UnfoldedConv:
    """A 3D convolution as one 2D convolution over frames whose channels are those of all time taps side by side.

    The copy that this needs is made for a few frames at a time. Where 2D convolutions are faster than 3D ones.
    """

    tile_rows = 1

    def __init__(self, weight_OCTHW: Tensor, bias_O: Bias) -> None:
        self.taps = weight_OCTHW.shape[2]
        flat = weight_OCTHW.detach().transpose(1, 2).flatten(1, 2)  # (O, taps * C, H, W)
        self.weight = flat.contiguous(memory_format=torch.channels_last)
        self.bias = None if bias_O is None else bias_O.detach()

    def __call__(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        """(B, C, T, H, W) -> (B, O, T', H', W)."""
        frames = x_BCTHW.shape[2] - self.taps + 1
        per_frame = self.taps * x_BCTHW[:, :, 0].numel() * x_BCTHW.element_size()
        at_once = max(1, _UNFOLDED_BYTES // max(1, per_frame))
        parts = [
            self._some(x_BCTHW[:, :, i : i + at_once + self.taps - 1], pad_rows) for i in range(0, frames, at_once)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _some(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        batch, _, length, _, _ = x_BCTHW.shape
        frames = length - self.taps + 1
        last = x_BCTHW.permute(0, 2, 3, 4, 1)
        wide = torch.cat([last[:, k : k + frames] for k in range(self.taps)], dim=-1).flatten(0, 1)
        y = F.conv2d(wide.permute(0, 3, 1, 2), self.weight, self.bias, padding=(pad_rows, self.weight.shape[3] // 2))
        return y.permute(0, 2, 3, 1).reshape(batch, frames, *y.shape[2:], -1).permute(0, 4, 1, 2, 3)


class UpsampledConv:
    """Nearest-neighbour doubling of rows and columns, then a 3x3 convolution, frame by frame."""

    tile_rows = 1

    def __init__(self, weight_OCHW: Tensor, bias_O: Bias) -> None:
        self.weight = weight_OCHW.detach().contiguous(memory_format=torch.channels_last)
        self.bias = None if bias_O is None else bias_O.detach()

    def __call__(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        """(B, C, T, H, W) -> (B, O, T, 2H, 2W); with pad_rows 0 the first and last row of x are neighbours only."""
        frames = x_BCTHW.transpose(1, 2).flatten(0, 1)
        large = F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
        y = F.conv2d(large, self.weight, self.bias, padding=1)
        if pad_rows == 0:
            y = y[:, :, 2:-2]
        return y.reshape(x_BCTHW.shape[0], -1, *y.shape[1:]).transpose(1, 2)


class PhaseUpsampledConv:
    """The same on the small picture: each of the four pixels that come of one sees only 2x2 of its neighbours.

    9 taps become 4 with added weights (Shi et al., arXiv:1609.07009, for the phases). One matrix product computes all
    four phases at every corner between pixels, and each phase takes the corner it needs.
    """

    tile_rows = 1

    def __init__(self, weight_OCHW: Tensor, bias_O: Bias) -> None:
        wide = weight_OCHW.detach().double()
        phases = torch.stack([_fold(_fold(wide, -2, i), -1, j) for i in (0, 1) for j in (0, 1)])  # (4, O, C, 2, 2)
        self.channels = weight_OCHW.shape[0]
        self.weight = phases.flatten(0, 1).permute(0, 2, 3, 1).flatten(1).to(weight_OCHW.dtype)  # (4 * O, 4 * C)
        self.bias = None if bias_O is None else bias_O.detach().repeat(4)

    def __call__(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        """(B, C, T, H, W) -> (B, O, T, 2H, 2W); with pad_rows 0 the first and last row of x are neighbours only."""
        batch, _, frames, _, width = x_BCTHW.shape
        padded = F.pad(x_BCTHW.permute(0, 2, 3, 4, 1).flatten(0, 1), (0, 0, 1, 1, pad_rows, pad_rows))
        height = padded.shape[1] - 2
        around = [padded[:, i : i + height + 1, j : j + width + 1] for i in (0, 1) for j in (0, 1)]
        corners = F.linear(torch.cat(around, dim=-1), self.weight, self.bias)
        corners = corners.view(-1, height + 1, width + 1, 2, 2, self.channels)
        out = empty(corners, batch, frames, height, 2, width, 2, self.channels)
        flat = out.flatten(0, 1)
        for i in (0, 1):
            for j in (0, 1):
                flat[:, :, i, :, j] = corners[:, i : i + height, j : j + width, i, j]
        picture: Tensor = out.flatten(4, 5).flatten(2, 3)
        return picture.permute(0, 4, 1, 2, 3)


def _fold(weight: Tensor, dim: int, phase: int) -> Tensor:
    """Three taps on doubled pixels as two taps on the pixels: taps that fall on one pixel are added."""
    a, b, c = weight.unbind(dim)
    return torch.stack((a, b + c) if phase == 0 else (a + b, c), dim)
