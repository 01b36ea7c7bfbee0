"""Rotary position embedding over (t, h, w), in real arithmetic on pairs of a head's channels (arXiv:2104.09864).

A pair is two neighbours ("interleaved", as in Wan) or the same place in both halves of a head ("halves", as in LTX-2).
Shapes: B batch, L tokens, D width, H heads, K head dimension, P = K/2 pairs.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from frameloom.errors import RequestError
from frameloom.ops.norm import rms_norm

THETA = 10000.0
Layout = Literal["interleaved", "halves"]


class RotaryTable(NamedTuple):
    """Cosine and sine of every token's angles, both float32.

    (L, P) where they are the same in all heads, as in Wan; (B, H, L, P) where they are not, as in LTX-2 (B and H may
    be 1).
    """

    cos_LP: Tensor
    sin_LP: Tensor


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode t, h and w: a third each, rounded down to even; time takes the rest."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_table(grid: tuple[int, int, int], head_dim: int, *, device: torch.device) -> RotaryTable:
    """Angles of a (t, h, w) token grid, row-major; made on the CPU in float64, which some devices lack."""
    angles = []
    for axis, (length, dim) in enumerate(zip(grid, split_head_dim(head_dim), strict=True)):
        shape = [1, 1, 1, -1]
        shape[axis] = length
        angles.append(_axis_angles(length, dim).view(shape).expand(*grid, -1))
    angle_LP = torch.cat(angles, dim=-1).flatten(0, 2)
    return RotaryTable(angle_LP.cos().float().to(device), angle_LP.sin().float().to(device))


def _axis_angles(length: int, dim: int) -> Tensor:
    """position · THETA^(-2i/dim) for i < dim/2: (length, dim/2) float64."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    return torch.outer(torch.arange(length, device="cpu"), 1.0 / THETA**exponent)


def rotate(x_BLHK: Tensor, table: RotaryTable) -> Tensor:
    """Turn each pair (2i, 2i+1) of every head by its token's angle; result in the dtype of `x_BLHK`."""
    even, odd = x_BLHK.reshape(*x_BLHK.shape[:-1], -1, 2).unbind(-1)
    cos, sin = map(_of_heads, table)
    first = (even * cos - odd * sin).type_as(x_BLHK)  # rounded before the stack: half the peak memory
    second = (even * sin + odd * cos).type_as(x_BLHK)
    return torch.stack((first, second), dim=-1).flatten(-2)


def rotate_halves(x_BLHK: Tensor, table: RotaryTable) -> Tensor:
    """Turn each pair (i, i + P) of every head by its token's angle; result in the dtype of `x_BLHK`."""
    first, second = x_BLHK.chunk(2, dim=-1)
    cos, sin = map(_of_heads, table)
    turned = (first * cos - second * sin).type_as(x_BLHK), (second * cos + first * sin).type_as(x_BLHK)
    return torch.cat(turned, dim=-1)


def _of_heads(angles: Tensor) -> Tensor:
    """(L, 1, P) or (B, L, H, P): what the heads of all tokens are multiplied by."""
    return angles[:, None] if angles.dim() == 2 else angles.transpose(1, 2)


def norm_rotate(
    x_BLD: Tensor, weight: Tensor, eps: float, table: RotaryTable, head_dim: int, *, layout: Layout = "interleaved"
) -> Tensor:
    """Queries or keys: root mean square norm over all heads, rounded to the dtype of x, then split and turned: x_BLHK.

    Raises RequestError where head_dim, the table and the layout do not fit.
    """
    check_rotation(x_BLD.shape, table, head_dim, layout)
    x_BLHK = rms_norm(x_BLD, weight, eps).view(*x_BLD.shape[:2], x_BLD.shape[2] // head_dim, head_dim)
    return rotate(x_BLHK, table) if layout == "interleaved" else rotate_halves(x_BLHK, table)


def check_rotation(size: Sequence[int], table: RotaryTable, head_dim: int, layout: str) -> None:
    """Raise RequestError unless heads can be cut from x_BLD of this size and each token has an angle for each pair."""
    batch, length, width = size
    if layout not in ("interleaved", "halves"):
        raise RequestError(f"rotary layout {layout!r} is unknown; use 'interleaved' or 'halves'")
    if head_dim < 2 or head_dim % 2 or width % head_dim:
        raise RequestError(f"heads of {head_dim} channels do not divide a width of {width}; give an even divisor of it")
    heads, pairs = width // head_dim, head_dim // 2
    for angles in table:
        *of_heads, tokens, angles_per_head = (1, 1, *angles.shape)[-4:] if angles.dim() in (2, 4) else (0, 0, 0, 0)
        if (tokens, angles_per_head) != (length, pairs) or any(map(_differs, of_heads, (batch, heads))):
            raise RequestError(
                f"the rotary table has shape {tuple(angles.shape)}; {length} tokens with heads of {head_dim} channels "
                f"need ({length}, {pairs}), or ({batch}, {heads}, {length}, {pairs}) where heads differ"
            )


def angle_strides(angles: Tensor) -> tuple[int, int, int]:
    """How far a table's entries lie apart in memory from sample to sample, head to head and token to token."""
    if angles.dim() == 2:
        return 0, 0, angles.stride(0)
    batch, head = (0 if angles.shape[i] == 1 else angles.stride(i) for i in (0, 1))
    return batch, head, angles.stride(2)


def _differs(have: int, wanted: int) -> bool:
    return have not in (1, wanted)
