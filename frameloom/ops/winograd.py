"""3x3 convolutions over rows and columns with a quarter of the multiplications: Winograd F(4x4, 3x3).

The picture is cut into tiles of 4x4 outputs; each tile's 6x6 inputs and the kernel are evaluated at 36 points,
multiplied there, and the products brought back (arXiv:1509.09308). Time taps are accumulated at the points. The points
are 0, ±5/8, ±3/2 and infinity in each direction: half the rounding error of the usual 0, ±1, ±2, and exact in binary.
The way there and back is compiled where there is a compiler (`WinogradConv`), else torch's (`PlainWinogradConv`).

Shapes as in ops/conv.py, plus L frames with their past, N tiles, P = 36 points; x without B is one video.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from frameloom.ops.layout import dense_frames, empty_frames
from frameloom.ops.native import address, kernels, native

TILE = 4
_A, _B = 0.625, 1.5
_A2, _B2 = _A * _A, _B * _B
_POINTS = (0.0, _A, -_A, _B, -_B)


class _Tiles(NamedTuple):
    """Some rows of tiles of a picture."""

    first: int
    rows: int
    columns: int


class _Winograd(ABC):
    """A (Kt, 3, 3) convolution of stride 1 on a CPU, computed in float32; subclasses go to the points and back."""

    block_bytes: int  # points of inputs and outputs worked on at a time

    def __init__(self, weight_OCTHW: Tensor, bias_O: Tensor | None) -> None:
        self.points = kernel_at_points(weight_OCTHW.detach())  # (Kt, P, C, O)
        bias = weight_OCTHW.new_zeros(weight_OCTHW.shape[0]) if bias_O is None else bias_O.detach()
        self.bias = bias.float()

    def __call__(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        """(B, C, T, H, W) -> (B, O, T - Kt + 1, H + 2 pad_rows - 2, W)."""
        batch, _, length, rows, width = x_BCTHW.shape
        taps, _, _, channels = self.points.shape
        dtype, x_BCTHW = x_BCTHW.dtype, dense_frames(x_BCTHW.float())
        out = empty_frames(x_BCTHW, (batch, channels, length - taps + 1, rows + 2 * pad_rows - 2, width))
        for x_CTHW, out_CTHW in zip(x_BCTHW, out, strict=True):
            self._one(x_CTHW, out_CTHW, pad_rows)
        return out.to(dtype)

    def _one(self, x_CTHW: Tensor, out_CTHW: Tensor, pad_rows: int) -> None:
        taps, _, in_channels, channels = self.points.shape
        length, (frames, height, width) = x_CTHW.shape[1], out_CTHW.shape[1:]
        columns, last = -(-width // TILE), -(-height // TILE)
        per_row = 36 * 4 * columns * (length * in_channels + frames * channels)
        at_once = max(1, min(last, self.block_bytes // max(1, per_row)))
        for first in range(0, last, at_once):
            tiles = _Tiles(first, min(at_once, last - first), columns)
            count = tiles.rows * columns
            points = x_CTHW.new_empty(36, length, count, in_channels)
            product = x_CTHW.new_empty(36, frames * count, channels)
            if x_CTHW.is_meta:  # memory is being planned
                continue
            self._to_points(x_CTHW, points, pad_rows, tiles)
            for k in range(taps):
                shifted = points[:, k : k + frames].flatten(1, 2)
                product.baddbmm_(shifted, self.points[k], beta=min(k, 1))
            self._from_points(product, out_CTHW, tiles)

    @abstractmethod
    def _to_points(self, x_CTHW: Tensor, points_PLNC: Tensor, pad_rows: int, tiles: _Tiles) -> None:
        """Evaluate the inputs of some tiles; pixels outside of the picture are zero."""

    @abstractmethod
    def _from_points(self, points_PNO: Tensor, out_CTHW: Tensor, tiles: _Tiles) -> None:
        """Interpolate the outputs of some tiles and add the bias."""


class WinogradConv(_Winograd):
    """With compiled ways to the points and back."""

    block_bytes = 24 << 20

    def _to_points(self, x_CTHW: Tensor, points_PLNC: Tensor, pad_rows: int, tiles: _Tiles) -> None:
        channels, length, height, width = x_CTHW.shape
        kernels().frameloom_winograd_input(
            address(x_CTHW), x_CTHW.stride(1), height, width, channels, pad_rows, tiles.first, length, tiles.rows,
            tiles.columns, address(points_PLNC),
        )  # fmt: skip

    def _from_points(self, points_PNO: Tensor, out_CTHW: Tensor, tiles: _Tiles) -> None:
        channels, frames, height, width = out_CTHW.shape
        kernels().frameloom_winograd_output(
            address(points_PNO), address(self.bias), frames, tiles.rows, tiles.columns, channels, tiles.first,
            address(out_CTHW), out_CTHW.stride(1), height, width,
        )  # fmt: skip


class PlainWinogradConv(_Winograd):
    """With torch's own operations, in blocks that fit the cache."""

    block_bytes = 8 << 20

    def _to_points(self, x_CTHW: Tensor, points_PLNC: Tensor, pad_rows: int, tiles: _Tiles) -> None:
        channels, length, height, width = x_CTHW.shape
        top = TILE * tiles.first - pad_rows
        inputs = x_CTHW.new_zeros(length, TILE * tiles.rows + 2, TILE * tiles.columns + 2, channels)
        begin, end = max(0, top), min(height, top + inputs.shape[1])
        inputs[:, begin - top : end - top, 1 : width + 1] = x_CTHW[:, :, begin:end].permute(1, 2, 3, 0)
        points = points_PLNC.view(6, 6, length, tiles.rows, tiles.columns, channels)
        by_rows = inputs.new_empty(6, length, tiles.rows, inputs.shape[2], channels)
        _evaluate(_every_fourth(inputs, tiles.rows, dim=1), by_rows)
        for row, out in zip(by_rows, points, strict=True):
            _evaluate(_every_fourth(row, tiles.columns, dim=2), out)

    def _from_points(self, points_PNO: Tensor, out_CTHW: Tensor, tiles: _Tiles) -> None:
        channels, frames, height, width = out_CTHW.shape
        points = points_PNO.view(6, 6, frames, tiles.rows, tiles.columns, channels)
        by_rows = points.new_empty(4, 6, *points.shape[2:])
        for column in range(6):
            _interpolate(points[:, column], by_rows[:, column])
        pixels = points.new_empty(frames, tiles.rows, TILE, tiles.columns, TILE, channels)
        for row in range(TILE):
            _interpolate(by_rows[row], pixels[:, :, row].permute(3, 0, 1, 2, 4))
        top = TILE * tiles.first
        end = min(height, top + TILE * tiles.rows)
        picture = pixels.flatten(3, 4).flatten(1, 2)[:, : end - top, :width]
        torch.add(picture, self.bias, out=out_CTHW.permute(1, 2, 3, 0)[:, top:end])


def _every_fourth(x: Tensor, count: int, *, dim: int) -> list[Tensor]:
    """The six inputs of each of `count` tiles along `dim`, as six views."""
    size = TILE * (count - 1) + 1
    return [x.narrow(dim, i, size)[(slice(None),) * dim + (slice(None, None, TILE),)] for i in range(6)]


def _evaluate(d: list[Tensor], out: Tensor) -> None:
    """B^T d: six inputs at six points."""
    even_a, odd_a = torch.sub(d[4], d[2], alpha=_B2), torch.sub(d[3], d[1], alpha=_B2)
    even_b, odd_b = torch.sub(d[4], d[2], alpha=_A2), torch.sub(d[3], d[1], alpha=_A2)
    torch.sub(d[4], d[2], alpha=_A2 + _B2, out=out[0]).add_(d[0], alpha=_A2 * _B2)
    torch.add(even_a, odd_a, alpha=_A, out=out[1])
    torch.sub(even_a, odd_a, alpha=_A, out=out[2])
    torch.add(even_b, odd_b, alpha=_B, out=out[3])
    torch.sub(even_b, odd_b, alpha=_B, out=out[4])
    torch.sub(d[5], d[3], alpha=_A2 + _B2, out=out[5]).add_(d[1], alpha=_A2 * _B2)


def _interpolate(m: Tensor, out: Tensor) -> None:
    """A^T m: products at six points to four outputs."""
    sum_a, difference_a = m[1] + m[2], (m[1] - m[2]).mul_(_A)
    sum_b, difference_b = m[3] + m[4], (m[3] - m[4]).mul_(_B)
    torch.add(m[0], sum_a, out=out[0]).add_(sum_b)
    torch.add(difference_a, difference_b, out=out[1])
    torch.mul(sum_a, _A2, out=out[2]).add_(sum_b, alpha=_B2)
    torch.add(m[5], difference_a, alpha=_A2, out=out[3]).add_(difference_b, alpha=_B2)


def kernel_at_points(weight_OCTHW: Tensor) -> Tensor:
    """Weights (O, C, Kt, 3, 3) evaluated at the 36 points, in float64 and rounded once to float32: (Kt, P, C, O)."""
    g = evaluation_matrix().to(weight_OCTHW.device)
    points = torch.einsum("ih,jw,octhw->tijco", g, g, weight_OCTHW.double())
    return points.flatten(1, 2).float().contiguous()


def evaluation_matrix() -> Tensor:
    """G (6, 3), float64: a kernel of three taps at the six points."""
    rows = []
    for p in _POINTS:
        scale = 1.0
        for q in _POINTS:
            scale *= p - q if q != p else 1.0
        rows.append([1 / scale, p / scale, p * p / scale])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def refuses_plain(weight_OCTHW: Tensor) -> str | None:
    """Why `PlainWinogradConv` cannot compute a convolution; None where it can."""
    if weight_OCTHW.ndim != 5 or tuple(weight_OCTHW.shape[3:]) != (3, 3):
        return "it is for 3x3 kernels"
    if weight_OCTHW.dtype == torch.float64 or weight_OCTHW.device.type not in ("cpu", "meta"):
        return f"it computes in float32 on a CPU, not in {weight_OCTHW.dtype} on {weight_OCTHW.device.type}"
    return None


def refuses(weight_OCTHW: Tensor) -> str | None:
    """Why `WinogradConv` cannot compute a convolution; None where it can."""
    return refuses_plain(weight_OCTHW) or (None if native().library else native().reason)
