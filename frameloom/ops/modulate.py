"""Adaptive layer norm (arXiv:2212.09748): shift and scale what enters a branch, gate what leaves it.

Modulation tensors broadcast against (B, L, D): (B, 1, D) per sample or (B, L, D) per token, float32 or wider.
"""

from torch import Tensor

from frameloom.ops.norm import at_least_fp32, layer_norm


def norm_scale_shift(x: Tensor, eps: float, *, scale: Tensor, shift: Tensor) -> Tensor:
    """layer_norm(x) · (1 + scale) + shift for x (B, L, D): one rounding, at the end, to the dtype of `x`."""
    return (layer_norm(x, eps) * (1 + scale) + shift).type_as(x)


def add_gated(x: Tensor, branch: Tensor, *, gate: Tensor) -> Tensor:
    """x + branch · gate for x and branch (B, L, D): one rounding, at the end, to the dtype of `x`."""
    return (at_least_fp32(x) + branch * gate).type_as(x)
