"""Layers that hold their weights as they are stored: each becomes plain numbers when it computes, and only then.

Shapes: x (..., K), weight (N, K), bias (N,), out (..., N); a table of R rows (R, D), ids (...).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.ops.dequant import dequantise

Kernel = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedWeight:
    """A tensor of `shape` as a file has it: its bytes, and what they mean (ops/dequant.py).

    `scale`: what the stored numbers are multiplied by, one for all or one per row; None: they mean themselves.
    `rotated`: the rows are rotated in groups of so many numbers, 0: they are not.
    """

    raw_U8: Tensor
    dtype_name: str
    shape: tuple[int, ...]
    scale: Tensor | None = None
    rotated: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.raw_U8.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """All of it, in memory of its own."""
        return self._numbers(self.raw_U8, self.shape, dtype, self.scale)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (...) -> (..., D): the rows that are asked for, of which each must be whole blocks."""
        chosen = ids.flatten()
        raw_U8 = self.raw_U8.view(self.shape[0], -1)[chosen].flatten()
        scale = self.scale if self.scale is None or self.scale.numel() == 1 else self.scale[chosen]
        shape = len(chosen), *self.shape[1:]
        return self._numbers(raw_U8, shape, dtype, scale).view(*ids.shape, *self.shape[1:])

    def _numbers(self, raw_U8: Tensor, shape: tuple[int, ...], dtype: torch.dtype, scale: Tensor | None) -> Tensor:
        return dequantise(raw_U8, self.dtype_name, shape=shape, dtype=dtype, scale=scale, rotated=self.rotated)


class QuantizedLinear:
    """x · weightᵀ + bias, bit by bit what the plain weight of `dtype` gives; no copy of that is kept."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return F.linear(x, self.weight.plain(self.dtype), self.bias)


class QuantizedTable:
    """An embedding of which only the rows that are asked for become plain."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def __call__(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        return self.weight.rows(ids, self.dtype)


class Linear(nn.Linear):
    """A linear layer; `kernel`, where there is one, computes it in another way and holds the weight in another form."""

    kernel: Kernel | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return super().forward(x) if self.kernel is None else self.kernel(x)

    @property
    def stored(self) -> QuantizedWeight | None:
        """The weight as a file has it, if that is what is held."""
        return self.kernel.weight if isinstance(self.kernel, QuantizedLinear) else None

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in."""
        return self.kernel.dtype if isinstance(self.kernel, QuantizedLinear) else self.weight.dtype

    def plain_weight(self) -> Tensor:
        """The weight (out_features, in_features) in `dtype`; made for this call if it is held as stored."""
        return self.weight if self.stored is None else self.stored.plain(self.dtype)


class Embedding(nn.Embedding):
    """A table of rows; `kernel`, where there is one, holds it in another form."""

    kernel: Kernel | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., embedding_dim)."""
        return super().forward(ids) if self.kernel is None else self.kernel(ids)


def hold(layer: Linear | Embedding, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Let a layer compute in `dtype` with a weight as it is stored, instead of its own; its bias is filled already."""
    if isinstance(layer, Linear):
        layer.kernel = QuantizedLinear(weight, layer.bias, dtype)
    else:
        layer.kernel = QuantizedTable(weight, dtype)
    layer.register_parameter("weight", None)


def is_quantized(network: nn.Module) -> bool:
    """Whether any linear layer holds its weight as it is stored."""
    return any(isinstance(module, Linear) and module.stored is not None for module in network.modules())


def largest_plain_bytes(network: nn.Module) -> int:
    """Bytes of the largest weight that is made plain while its layer computes; 0 where none is."""
    held = (module for module in network.modules() if isinstance(module, Linear) and module.stored is not None)
    return max((layer.in_features * layer.out_features * layer.dtype.itemsize for layer in held), default=0)
