"""Adaptive layer norm (arXiv:2212.09748): shift and scale what enters a branch, gate what leaves it.

Shapes: x and branch (B, L, D). A modulation tensor is (B, 1, D) per sample, (B, F, 1, D) per frame (F frames of L/F
tokens each, in order) or (B, L, D) per token, in float32 or wider (a narrower one is widened); for B it may have 1.
One that is neither raises RequestError. Everything is computed in at least float32 and rounded once, at the end.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from frameloom.errors import RequestError
from frameloom.ops.norm import Kind, at_least_fp32, wide_norm


def tokens_per_entry(m: Tensor, shape: Sequence[int]) -> int:
    """How many tokens in a row share an entry of the modulation `m` of a tensor (B, L, D): L, L/F or 1."""
    batch, length, width = shape
    fits = m.ndim in (3, 4) and m.shape[0] in (1, batch) and m.shape[-1] == width
    if fits and m.ndim == 3 and m.shape[1] in (1, length):
        return length if m.shape[1] == 1 else 1
    if fits and m.ndim == 4 and m.shape[2] == 1 and m.shape[1] > 0 and length % m.shape[1] == 0:
        return length // m.shape[1]
    raise RequestError(
        f"a modulation of shape {tuple(m.shape)} does not fit tokens of shape {tuple(shape)}; "
        f"give ({batch}, 1, {width}) per sample, ({batch}, frames, 1, {width}) per frame, "
        f"or ({batch}, {length}, {width}) per token"
    )


def mul_add(a: Tensor, k: float, b: Tensor, c: Tensor | float) -> Tensor:
    """a · (k + b) + c for a (B, L, D), in the dtype of `a`; b is a modulation, c one too or a number."""
    y = _with_each(torch.mul, a, k + at_least_fp32(b))
    return (_with_each(torch.add, y, c) if isinstance(c, Tensor) else y + c).type_as(a)


def add_gated(x: Tensor, branch: Tensor, *, gate: Tensor) -> Tensor:
    """x + branch · gate, in the dtype of `x`."""
    return (at_least_fp32(x) + _with_each(torch.mul, branch, at_least_fp32(gate))).type_as(x)


def norm_scale_shift(
    x: Tensor,
    eps: float,
    *,
    scale: Tensor,
    shift: Tensor,
    kind: Kind = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """norm(x) · (1 + scale) + shift, in the dtype of `x`; `weight` and `bias` (D,) belong to the norm."""
    return _modulated(wide_norm(x, eps, kind=kind, weight=weight, bias=bias), scale, shift).type_as(x)


def add_norm(
    x: Tensor,
    branch: Tensor,
    eps: float,
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    kind: Kind = "layer",
) -> tuple[Tensor, Tensor]:
    """The sum s = x + branch · gate, and norm(s) · (1 + scale) + shift of the rounded s, both in the dtype of `x`.

    Without a gate the branch is added as it is; without scale or shift that step is left out.
    """
    summed = (x + branch).type_as(x) if gate is None else add_gated(x, branch, gate=gate)
    normed = wide_norm(summed, eps, kind=kind, weight=weight, bias=bias)
    return summed, _modulated(normed, scale, shift).type_as(x)


def norm_tanh_mul_add(
    x: Tensor, branch: Tensor, gate: Tensor, eps: float, *, weight: Tensor | None = None, kind: Kind = "rms"
) -> Tensor:
    """x + tanh(gate) · norm(branch), in the dtype of `x`, as Lumina (arXiv:2503.21758) and Z-Image gate a branch."""
    normed = wide_norm(branch, eps, kind=kind, weight=weight)
    return (at_least_fp32(x) + _with_each(torch.mul, normed, at_least_fp32(gate).tanh())).type_as(x)


def _modulated(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x · (1 + scale) + shift for x in float32 or wider; None leaves a step out."""
    if scale is not None:
        x = _with_each(torch.mul, x, 1 + at_least_fp32(scale))
    return x if shift is None else _with_each(torch.add, x, shift)


def _with_each(operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, m: Tensor) -> Tensor:
    """operation(x, m) with every token's entry of m, which is read where it lies and never repeated in memory."""
    every = tokens_per_entry(m, x.shape)
    if m.ndim == 3:
        return operation(x, m)
    return operation(x.view(x.shape[0], m.shape[1], every, x.shape[2]), m).flatten(1, 2)
