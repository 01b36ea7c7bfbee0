"""Rotary position embedding over (t, h, w), in real arithmetic on interleaved pairs (arXiv:2104.09864).

Shapes: B batch, L tokens, H heads, K head dimension, P = K/2 pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class RotaryTable(NamedTuple):
    """Cosine and sine of every token's angles, both (L, P) float32."""

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
    cos, sin = table.cos_LP[:, None], table.sin_LP[:, None]  # the same for all heads
    first = (even * cos - odd * sin).type_as(x_BLHK)  # rounded before the stack: half the peak memory
    second = (even * sin + odd * cos).type_as(x_BLHK)
    return torch.stack((first, second), dim=-1).flatten(-2)
