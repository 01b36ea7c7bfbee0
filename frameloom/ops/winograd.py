"""3x3 convolutions over rows and columns with a quarter of the multiplications: Winograd F(4x4, 3x3).

The picture is cut into tiles of 4x4 outputs; each tile's 6x6 inputs and the kernel are evaluated at 36 points,
multiplied there, and the products brought back (arXiv:1509.09308). The points are 0, ±5/8, ±3/2 and infinity in each
direction: half the rounding error of the usual 0, ±1, ±2, and exact in binary. The way there and back is compiled where
there is a compiler (`WinogradConv`, which does the same over time, too: a sixth of the multiplications), else torch's
(`PlainWinogradConv`, which adds up the time taps at the points).

Shapes as in ops/conv.py, plus L frames with their past, N tiles, P = 36 points; x without B is one video.
"""

import functools
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.ops.layout import dense_frames, empty_frames
from frameloom.ops.native import address, kernels, native
from frameloom.platform.allocator import empty

TILE = 4
_A, _B = 0.625, 1.5
_A2, _B2 = _A * _A, _B * _B
_FEWEST_ROWS = 16  # of a matrix product: MKL sums fewer in another order, and a band's bits would depend on its height
_CHANNELS_AT_ONCE = 16  # of a kernel on its way to the points, in float64
_POINTS = (0.0, _A, -_A, _B, -_B)


class _Tiles(NamedTuple):
    """Some rows of tiles of a picture."""

    first: int
    rows: int
    columns: int


class _Winograd(ABC):
    """A (Kt, 3, 3) convolution of stride 1 on a CPU, computed in float32; subclasses go to the points and back.

    The weight is brought to the points when it is first needed, and then let go.
    """

    tile_rows = TILE
    least_block_bytes: int  # points of inputs and outputs worked on at a time

    def __init__(self, weight_OCTHW: Tensor, bias_O: Tensor | None) -> None:
        self._weight: Tensor | None = weight_OCTHW.detach()
        self.channels, _, self.taps = weight_OCTHW.shape[:3]
        bias = weight_OCTHW.new_zeros(self.channels) if bias_O is None else bias_O.detach()
        self.bias = bias.float().contiguous()
        # The weights are read once per block.
        self.block_bytes = max(self.least_block_bytes, bytes_at_points(weight_OCTHW) // 2)

    @staticmethod
    def time_matrix(taps: int) -> Tensor:
        """(K, taps), float64: what is multiplied for the time taps, each tap by itself here."""
        return torch.eye(taps, dtype=torch.float64)

    def __call__(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        """(B, C, T, H, W) -> (B, O, T - Kt + 1, H + 2 pad_rows - 2, W)."""
        return self._videos(x_BCTHW, pad_rows, height=x_BCTHW.shape[3] + 2 * pad_rows - 2, width=x_BCTHW.shape[4])

    def _videos(self, x_BCTHW: Tensor, pad_rows: int, *, height: int, width: int) -> Tensor:
        batch, _, length = x_BCTHW.shape[:3]
        dtype, x_BCTHW = x_BCTHW.dtype, dense_frames(x_BCTHW.float())
        out = empty_frames(x_BCTHW, (batch, self.channels, length - self.taps + 1, height, width))
        for x_CTHW, out_CTHW in zip(x_BCTHW, out, strict=True):
            self._one(x_CTHW, out_CTHW, pad_rows)
        return out.to(dtype)

    @functools.cached_property
    def points(self) -> Tensor:
        """The weight at the points, (K, P, C, O), float32."""
        weight, self._weight = self._weight, None
        assert weight is not None, "the points of a kernel were thrown away"
        return kernel_at_points(weight, self.time_matrix(self.taps))

    @property
    def is_prepared(self) -> bool:
        """Whether the weight is at the points, and was let go."""
        return self._weight is None

    def prepare(self) -> None:
        """Bring the weight to the points now."""
        self.points  # noqa: B018  # computed when it is first read

    def _one(self, x_CTHW: Tensor, out_CTHW: Tensor, pad_rows: int) -> None:
        height, width = out_CTHW.shape[2:]
        columns, last = -(-width // TILE), -(-height // TILE)
        per_row = 4 * columns * self._numbers_per_tile(x_CTHW.shape[0], out_CTHW.shape[0], out_CTHW.shape[1])
        at_once = max(1, min(last, self.block_bytes // max(1, per_row)))
        for first in range(0, last, at_once):
            self._some(x_CTHW, out_CTHW, pad_rows, _Tiles(first, min(at_once, last - first), columns))

    @abstractmethod
    def _numbers_per_tile(self, in_channels: int, channels: int, frames: int) -> int:
        """How many numbers inputs and outputs have at the points, per tile."""

    @abstractmethod
    def _some(self, x_CTHW: Tensor, out_CTHW: Tensor, pad_rows: int, tiles: _Tiles) -> None:
        """Compute the outputs of some tiles; pixels outside of the picture are zero."""


class WinogradConv(_Winograd):
    """3x3x3 with compiled ways to the points and back, and F(2, 3) over time: pairs of frames at four points of time.

    An odd last frame needs three of them, which cost what three time taps cost.
    """

    least_block_bytes = 24 << 20

    @staticmethod
    def time_matrix(taps: int) -> Tensor:
        """Three taps at the points 0, 1, -1 and infinity."""
        assert taps == 3, "chosen without asking `refuses`"
        return torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)

    def _some(self, x_CTHW: Tensor, out_CTHW: Tensor, pad_rows: int, tiles: _Tiles) -> None:
        in_channels, _, in_height, _ = x_CTHW.shape
        channels, frames, height, width = out_CTHW.shape
        count = tiles.rows * tiles.columns
        three, fourth = 3 * 36 * -(-frames // 2) * count, 36 * (frames // 2) * count
        points, product = empty(x_CTHW, three + fourth, in_channels), empty(x_CTHW, three + fourth, channels)
        if x_CTHW.is_meta:  # memory is being planned
            return
        kernels().frameloom_winograd_input(
            address(x_CTHW, torch.float32), x_CTHW.stride(1), in_height, width, in_channels, pad_rows, tiles.first,
            frames, tiles.rows, tiles.columns, address(points),
        )  # fmt: skip
        weights, result = self.points.flatten(0, 1), product[:three].view(3 * 36, -1, channels)
        _multiply(points[:three].view(3 * 36, -1, in_channels), weights[: 3 * 36], out=result)
        if fourth:
            result = product[three:].view(36, -1, channels)
            _multiply(points[three:].view(36, -1, in_channels), weights[3 * 36 :], out=result)
        kernels().frameloom_winograd_output(
            address(product), address(self.bias), frames, tiles.rows, tiles.columns, channels, tiles.first,
            address(out_CTHW, torch.float32), out_CTHW.stride(1), height, width,
        )  # fmt: skip

    def _numbers_per_tile(self, in_channels: int, channels: int, frames: int) -> int:
        return 36 * (3 * -(-frames // 2) + frames // 2) * (in_channels + channels)


class UpsampledWinogradConv(_Winograd):
    """Nearest-neighbour doubling of rows and columns, then a 3x3 convolution, compiled as `WinogradConv` is.

    The doubled picture is never written: the way to the points reads every pixel of the small one twice.
    """

    tile_rows = TILE // 2
    least_block_bytes = 24 << 20

    def __init__(self, weight_OCHW: Tensor, bias_O: Tensor | None) -> None:
        super().__init__(weight_OCHW.unsqueeze(2), bias_O)

    def __call__(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        """(B, C, T, H, W) -> (B, O, T, 2H, 2W); with pad_rows 0 the first and last row of x are neighbours only."""
        height, width = x_BCTHW.shape[3:]
        return self._videos(x_BCTHW, pad_rows, height=2 * (height if pad_rows else height - 2), width=2 * width)

    def _some(self, x_CTHW: Tensor, out_CTHW: Tensor, pad_rows: int, tiles: _Tiles) -> None:
        in_channels, frames, in_height, in_width = x_CTHW.shape
        channels, _, height, width = out_CTHW.shape
        count = frames * tiles.rows * tiles.columns
        points, product = empty(x_CTHW, 36, count, in_channels), empty(x_CTHW, 36, count, channels)
        if x_CTHW.is_meta:  # memory is being planned
            return
        kernels().frameloom_upsample_input(
            address(x_CTHW, torch.float32), x_CTHW.stride(1), in_height, in_width, in_channels, pad_rows, tiles.first,
            frames, tiles.rows, tiles.columns, address(points),
        )  # fmt: skip
        _multiply(points, self.points[0], out=product)
        kernels().frameloom_upsample_output(
            address(product), address(self.bias), frames, tiles.rows, tiles.columns, channels, tiles.first,
            address(out_CTHW, torch.float32), out_CTHW.stride(1), height, width,
        )  # fmt: skip

    def _numbers_per_tile(self, in_channels: int, channels: int, frames: int) -> int:
        return 36 * frames * (in_channels + channels)


class PlainWinogradConv(_Winograd):
    """With torch's own operations, in blocks that fit the cache."""

    least_block_bytes = 8 << 20

    def _some(self, x_CTHW: Tensor, out_CTHW: Tensor, pad_rows: int, tiles: _Tiles) -> None:
        in_channels, length, _, _ = x_CTHW.shape
        channels, frames, _, _ = out_CTHW.shape
        count = tiles.rows * tiles.columns
        points = empty(x_CTHW, 36, length, count, in_channels)
        product = empty(x_CTHW, 36, frames * count, channels)
        if x_CTHW.is_meta:  # memory is being planned
            return
        self._to_points(x_CTHW, points, pad_rows, tiles)
        for k in range(self.taps):
            _multiply(points[:, k : k + frames].flatten(1, 2), self.points[k], out=product, adds=k > 0)
        self._from_points(product, out_CTHW, tiles)

    def _numbers_per_tile(self, in_channels: int, channels: int, frames: int) -> int:
        return 36 * ((frames + self.taps - 1) * in_channels + frames * channels)

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


def kernel_at_points(weight_OCTHW: Tensor, time: Tensor) -> Tensor:
    """Weights (O, C, Kt, 3, 3) at the 36 points, their time taps by `time` (K, Kt); rounded once: (K, P, C, O)."""
    g = evaluation_matrix()
    matrix = torch.einsum("kt,ih,jw->kijthw", time, g, g).flatten(0, 2).flatten(1)  # (K * P, taps)
    matrix = matrix.to(weight_OCTHW.device)
    taps_TCO = weight_OCTHW.flatten(2).permute(2, 1, 0)
    taps, in_channels, channels = taps_TCO.shape
    points = weight_OCTHW.new_empty(matrix.shape[0], in_channels, channels, dtype=torch.float32)
    for first in range(0, in_channels, _CHANNELS_AT_ONCE):
        some, out = (tensor[:, first : first + _CHANNELS_AT_ONCE] for tensor in (taps_TCO, points))
        out.copy_((matrix @ some.double().reshape(taps, -1)).view(out.shape))
    return points.view(time.shape[0], -1, in_channels, channels)


def _multiply(x_PNC: Tensor, weight_PCO: Tensor, *, out: Tensor, adds: bool = False) -> None:
    """The product of each point, into `out` (P, N, O) or on top of it."""
    missing = _FEWEST_ROWS - x_PNC.shape[1]
    if missing <= 0:
        out.baddbmm_(x_PNC, weight_PCO, beta=int(adds))
        return
    x_PNC, wide = F.pad(x_PNC, (0, 0, 0, missing)), F.pad(out, (0, 0, 0, missing))
    out.copy_(wide.baddbmm_(x_PNC, weight_PCO, beta=int(adds))[:, :-missing])


def bytes_at_points(weight_OCTHW: Tensor) -> int:
    """Memory that a kernel (O, C, Kt, 3, 3) or (O, C, 3, 3) takes at the points, at most."""
    channels, in_channels, *taps, _, _ = weight_OCTHW.shape
    return 4 * 36 * channels * in_channels * (taps[0] + 1 if taps else 1)


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


def refuses_upsampled(weight_OCHW: Tensor) -> str | None:
    """Why `UpsampledWinogradConv` cannot compute a convolution; None where it can."""
    if weight_OCHW.ndim != 4:
        return "it is for 3x3 kernels behind a doubling"
    return refuses_plain(weight_OCHW.unsqueeze(2)) or (None if native().library else native().reason)


def refuses(weight_OCTHW: Tensor) -> str | None:
    """Why `WinogradConv` cannot compute a convolution; None where it can."""
    if reason := refuses_plain(weight_OCTHW):
        return reason
    if weight_OCTHW.shape[2] != 3:
        return "it is for 3x3x3 kernels"
    return None if native().library else native().reason
