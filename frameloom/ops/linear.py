"""Linear layers whose weights are laid out once for oneDNN's matrix product, which CPUs then read straight through.

Shapes: x (..., K), weight (N, K), bias (N,), out (..., N). torch offers these products to its own compiler only; a
version that has them no more leaves the layers as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.ops.mlp import in_pieces, rows_at_once

_ROWS = 1024  # tokens that the layout is made for; it computes any number


def refuses_packed(weight: Tensor) -> str | None:
    """Why a weight cannot be laid out here; None where it can."""
    if weight.device.type not in ("cpu", "meta"):
        return f"it is for CPUs, not {weight.device.type}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"it is for float32 and bfloat16, not {weight.dtype}"
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return "this torch has no oneDNN"
    return None


class PlainLinear:
    """x · weightᵀ + bias, for weights that are no layer's own."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """x · weightᵀ + bias, and GELU in its tanh form after it if asked for; keeps no other form of the weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        self.bias = None if bias is None else bias.detach()
        self._activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self._packed = weight.detach()
        if not weight.is_meta:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if x.is_meta:
            return F.linear(x, self._packed, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, *self._activation)
        return out

    @property
    def weight(self) -> Tensor:
        """The weight (N, K) laid out as usual, made for this call."""
        return self._packed.to_dense() if self._packed.is_mkldnn else self._packed

    def product(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), without GELU after it."""
        if x.is_meta:
            return F.linear(x, self._packed, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out


class PackedMlp:
    """linear, GELU (tanh), linear, for some tokens at a time: the wide activation between them never exists whole."""

    def __init__(self, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
        self.first, self.second = PackedLinear(w1, b1, gelu=True), PackedLinear(w2, b2)
        self.rows, self._width = rows_at_once(w1), w2.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return in_pieces(lambda piece: self.second(self.first(piece)), x, width=self._width, rows=self.rows)
