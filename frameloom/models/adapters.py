"""What files of adapters change in a network: LoRA, LoHa, LoKr, DoRA, whole differences; and the formulas.

They are merged into weights as these are read (`merge`), or computed beside them (models/adapters_beside.py).
"""

# Shapes: O outputs and I inputs of a layer, each kernel position of a convolution an input; R rank.

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from frameloom.models.division import Division
from frameloom.ops.norm import at_least_fp32


class Factors(Protocol):
    """What a difference of a weight is made of."""

    def dense(self, like: Tensor) -> Tensor:
        """(O, I) in the dtype and on the device of `like`."""
        ...

    def moved(self, device: torch.device) -> "Factors":
        """The same on a device."""
        ...

    def part(self, axis: int, division: Division) -> "Factors":
        """Of the rows (0) or columns (1) of a linear layer's weight those that this rank has."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Product:
    """a · b, (O, R) · (R, I): LoRA (arXiv:2106.09685). `b` None: `a` is the whole, of any shape.

    With a core (R, R, kernel) the Tucker product of a convolution (LyCORIS, arXiv:2309.14859).
    """

    a: Tensor
    b: Tensor | None = None
    core: Tensor | None = None

    def dense(self, like: Tensor) -> Tensor:
        """(O, I); as `a` is where that is the whole."""
        a = self.a.to(like)
        if self.b is None:
            return a
        a, b = a.flatten(1), self.b.to(like).flatten(1)
        return a @ b if self.core is None else torch.einsum("mn...,om,ni->oi...", self.core.to(like), a, b).flatten(1)

    def moved(self, device: torch.device) -> "Product":
        """The same on a device."""
        b, core = (None if part is None else part.to(device) for part in (self.b, self.core))
        return Product(a=self.a.to(device), b=b, core=core)

    def part(self, axis: int, division: Division) -> "Product":
        """The rows are those of `a`, the columns those of `b`."""
        if axis == 0 or self.b is None:
            return replace(self, a=_own(self.a, axis, division))
        return replace(self, b=_own(self.b.flatten(1), axis, division))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pair:
    """Two products, joined: by torch.mul in LoHa (FedPara, arXiv:2108.06098), by torch.kron in LoKr (LyCORIS)."""

    left: Product
    right: Product
    join: Callable[[Tensor, Tensor], Tensor]

    def dense(self, like: Tensor) -> Tensor:
        """(O, I)."""
        return self.join(self.left.dense(like).flatten(1), self.right.dense(like).flatten(1))

    def moved(self, device: torch.device) -> "Pair":
        """The same on a device."""
        return Pair(left=self.left.moved(device), right=self.right.moved(device), join=self.join)

    def part(self, axis: int, division: Division) -> "Factors":
        """Of LoHa both products are cut alike; a part of LoKr belongs to no factors."""
        if self.join is not torch.mul:
            return _Part(of=self, axis=axis, division=division)
        return Pair(left=self.left.part(axis, division), right=self.right.part(axis, division), join=self.join)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """Some rows or columns of what factors make, which is made whole for it."""

    of: Factors
    axis: int
    division: Division

    def dense(self, like: Tensor) -> Tensor:
        return _own(self.of.dense(like), self.axis, self.division)

    def moved(self, device: torch.device) -> "_Part":
        return replace(self, of=self.of.moved(device))

    def part(self, axis: int, division: Division) -> "_Part":
        return _Part(of=self, axis=axis, division=division)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapter:
    """The change of one parameter: scale · factors.

    `magnitude` (DoRA): the lengths that the rows, (O, 1, ...), or the columns, (1, I, ...), of the sum are given.
    `replaces`: the factors are the new weight, and no difference. `add_up`: over the ranks that have the rest of what
    the magnitude is a length of; None: there is no rest.
    """

    factors: Factors
    scale: float = 1.0
    magnitude: Tensor | None = None
    replaces: bool = False
    add_up: Callable[[Tensor], Tensor] | None = None

    @property
    def needs_weight(self) -> bool:
        """Whether what it adds depends on the weight."""
        return self.replaces or self.magnitude is not None

    def part(self, axis: int, division: Division) -> "Adapter":
        """The change of the rows or columns of a weight that this rank has, or of the numbers of a bias or norm."""
        factors = self.factors.part(axis, division)
        if self.magnitude is None:
            return replace(self, factors=factors)
        if self.magnitude.shape[axis] == 1:  # each length spans the ranks
            return replace(self, factors=factors, add_up=division.add_up)
        return replace(self, factors=factors, magnitude=_own(self.magnitude, axis, division))


Change = tuple[Adapter, float]  # and how strongly it applies


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapters:
    """What one file changes, by the name of the parameter. `unused`: each other key of the file, and why."""

    name: str
    strength: float
    changes: Mapping[str, Adapter]
    num_keys: int
    unused: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "name": self.name,
            "strength": self.strength,
            "keys": self.num_keys,
            "keys_used": self.num_keys - len(self.unused),
            "parameters": sorted(self.changes),
            "unused": list(self.unused),
        }


# --- the formulas ---


def delta(adapter: Adapter, weight: Tensor) -> Tensor:
    """What an adapter of strength 1 adds to a weight; float32 or wider.

    DoRA (arXiv:2402.09353): m · V / |V| - W, where V = W + scale · factors.
    """
    wide = at_least_fp32(weight.detach())
    change = adapter.scale * adapter.factors.dense(wide).reshape(wide.shape)
    if adapter.replaces:
        return change - wide
    if adapter.magnitude is None:
        return change
    return (wide + change) * gain(wide + change, adapter.magnitude, adapter.add_up) - wide


def merged(weight: Tensor, changes: Iterable[Change]) -> Tensor:
    """The weight with all changes, added up in float32 and rounded once to its dtype.

    In the given order. It matters where a change depends on the weight (DoRA, a replacement): that one takes the
    weight as those before it leave it.
    """
    wide = at_least_fp32(weight.detach())
    for adapter, strength in changes:
        wide = torch.add(wide, delta(adapter, wide), alpha=strength)
    return wide.to(weight.dtype)


def merge(sets: Sequence[Adapters], name: str, weight: Tensor) -> Tensor:
    """The parameter `name` as the adapters of several files leave it, in this order."""
    changes = [(one.changes[name], one.strength) for one in sets if one.strength and name in one.changes]
    return merged(weight, changes) if changes else weight


def gain(value: Tensor, magnitude: Tensor, add_up: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """What the rows, or the columns, of a weight are multiplied by to get their lengths; it broadcasts.

    What is nothing but zeros stays so. `add_up`: as in `Adapter`.
    """
    lengths = magnitude.to(value)
    axes = [axis for axis, size in enumerate(lengths.shape) if size == 1]
    norm: Tensor = torch.linalg.vector_norm(value, dim=axes, keepdim=True)
    if add_up is not None:
        norm = add_up(norm.square()).sqrt()
    return torch.where(norm > torch.finfo(value.dtype).tiny, lengths / norm, 1.0)


def _own(whole: Tensor, axis: int, division: Division) -> Tensor:
    return whole.tensor_split(division.size, axis)[division.index]
