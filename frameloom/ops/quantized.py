"""Layers whose weights are not plain numbers of their own: as a file has them, or brought in when they compute.

Shapes: x (..., K), weight (N, K), bias (N,), out (..., N); a table of R rows (R, D), ids (...).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.ops.dequant import dequantise

Kernel = Callable[[Tensor], Tensor]


class HeldWeight(Protocol):
    """A weight of a linear layer that is asked for anew at each call."""

    @property
    def form(self) -> str:
        """What is said of it: quantized, streamed."""
        ...

    @property
    def copies(self) -> bool:
        """Whether its plain numbers are made for the call."""
        ...

    def plain(self, dtype: torch.dtype) -> Tensor:
        """All of it, (N, K); good until another layer asks for its own."""
        ...


class HeldTable(Protocol):
    """An embedding, likewise."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (...) -> (..., D)."""
        ...


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

    form = "quantized"
    copies = True

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


class HeldLinear:
    """x · weightᵀ + bias, bit by bit what the plain weight of `dtype` gives; no copy of that is kept."""

    def __init__(self, weight: HeldWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return F.linear(x, self.weight.plain(self.dtype), self.bias)


class HeldRows:
    """An embedding of which only the rows that are asked for become plain."""

    def __init__(self, weight: HeldTable, dtype: torch.dtype) -> None:
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
    def stored(self) -> HeldWeight | None:
        """What is held instead of a weight, if it is."""
        return self.kernel.weight if isinstance(self.kernel, HeldLinear) else None

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in."""
        return self.kernel.dtype if isinstance(self.kernel, HeldLinear) else self.weight.dtype

    def plain_weight(self) -> Tensor:
        """The weight (out_features, in_features) in `dtype`; made for this call if it is held as stored."""
        return self.weight if self.stored is None else self.stored.plain(self.dtype)


class Embedding(nn.Embedding):
    """A table of rows; `kernel`, where there is one, holds it in another form."""

    kernel: Kernel | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., embedding_dim)."""
        return super().forward(ids) if self.kernel is None else self.kernel(ids)


def hold_weight(layer: Linear, weight: HeldWeight, dtype: torch.dtype) -> None:
    """Let a layer compute in `dtype` with a weight that is held, instead of its own; its bias is filled already."""
    layer.kernel = HeldLinear(weight, layer.bias, dtype)
    layer.register_parameter("weight", None)


def hold_table(layer: Embedding, table: HeldTable, dtype: torch.dtype) -> None:
    """The same of an embedding."""
    layer.kernel = HeldRows(table, dtype)
    layer.register_parameter("weight", None)


def hold(layer: Linear | Embedding, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Either, with a weight as it is stored."""
    if isinstance(layer, Linear):
        hold_weight(layer, weight, dtype)
    else:
        hold_table(layer, weight, dtype)


def held_form(network: nn.Module) -> str | None:
    """What is said of the weights of the linear layers where one does not have its own; None where all do."""
    return next((weight.form for _, weight in _held(network)), None)


def is_quantized(network: nn.Module) -> bool:
    """Whether any linear layer holds its weight as it is stored."""
    return any(isinstance(weight, QuantizedWeight) for _, weight in _held(network))


def largest_plain_bytes(network: nn.Module) -> int:
    """Bytes of the largest weight that is made plain while its layer computes; 0 where none is."""
    made = (layer for layer, weight in _held(network) if weight.copies)
    return max((layer.in_features * layer.out_features * layer.dtype.itemsize for layer in made), default=0)


def _held(network: nn.Module) -> Iterator[tuple[Linear, HeldWeight]]:
    for module in network.modules():
        if isinstance(module, Linear) and (weight := module.stored) is not None:
            yield module, weight
