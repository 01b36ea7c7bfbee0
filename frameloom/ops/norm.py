"""Normalization: root mean square over all heads, and layer norm in at least float32."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.errors import RequestError

Kind = Literal["layer", "rms"]


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in float32 if it is narrower, unchanged otherwise (a float64 model stays an oracle in float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, any leading shape; result in the dtype of `x`.

    Wan normalizes queries and keys before they are split into heads, so the mean spans all heads
    (arXiv:1910.07467 for the formula). `weight` is (D,) and applied in the dtype of `x`.
    """
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def layer_norm(x: Tensor, eps: float, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Layer norm over the last axis, computed and returned in at least float32 (arXiv:1607.06450).

    The caller rounds: what follows is often another float32 step, and rounding twice costs accuracy.
    """
    x = at_least_fp32(x)
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def wide_norm(
    x: Tensor, eps: float, *, kind: Kind = "layer", weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Layer norm or root mean square norm over the last axis, in at least float32 for the caller to round.

    `weight` and `bias` are (D,). Raises RequestError on another kind.
    """
    check_kind(kind)
    if kind == "layer":
        return layer_norm(x, eps, weight=weight, bias=bias)
    x = at_least_fp32(x)
    y = F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
    return y if bias is None else y + bias


def check_kind(kind: str) -> None:
    """Raise RequestError unless `kind` is a norm that there is."""
    if kind not in ("layer", "rms"):
        raise RequestError(f"norm {kind!r} is unknown; use 'layer' or 'rms'")
