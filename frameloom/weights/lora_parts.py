"""The parts of one module in a file of adapters, fitted to its parameters and made into an Adapter.

What fits is decided by shapes alone, before any number is read. Shapes: O outputs, I inputs (times the positions of a
convolution's kernel), R rank.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frameloom.errors import CheckpointError
from frameloom.models.adapters import Adapter, Pair, Product
from frameloom.weights.header import TensorEntry
from frameloom.weights.lora_keys import Part
from frameloom.weights.tensors import read_tensor

MAX_SCALE = 1000.0  # alpha / rank of real files lies between 0.01 and 10

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Entries = Mapping[Part, TensorEntry]
Scaling = Callable[[int], float]  # of a rank, where the file has no alpha

# The ways to describe a change, and the products each consists of: (the whole, or the factors a and b, and a core).
_KINDS: Mapping[str, tuple[tuple[Part | None, ...], ...]] = {
    "LoRA": ((None, "up", "down", "mid"),),
    "LoHa": ((None, "hada_w1_a", "hada_w1_b", "hada_t1"), (None, "hada_w2_a", "hada_w2_b", "hada_t2")),
    "LoKr": (("lokr_w1", "lokr_w1_a", "lokr_w1_b", None), ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    "difference": (("diff", None, None, None),),
    "replacement": (("set", None, None, None),),
}
_OTHER_HALF: Mapping[str, str] = {"up": "lora_A or lora_down", "down": "lora_B or lora_up"}
_JOINS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"LoHa": torch.mul, "LoKr": torch.kron}
_WHOLE = ("difference", "replacement")
_BESIDE: tuple[Part, ...] = ("alpha", "magnitude")  # what goes with factors
_BIASES: tuple[Part, ...] = ("diff_b", "up_bias")
_RANKED: tuple[Part, ...] = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # factors whose first size is the rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How the parameter `name` of `shape` (None: there is none) is changed; `kind` None: the entries say not how."""

    name: str
    shape: Shape | None
    kind: str | None
    entries: Entries
    scale: float = 1.0

    @property
    def problem(self) -> str | None:
        """Why it cannot be used; None where it can."""
        if self.kind is None:
            return "what it belongs to is not there"
        if self.shape is None:
            return "this model has no such parameter"
        products = self._products(self.kind)
        if not all(products):
            return self._incomplete()
        found, wanted = self._made(products), self.shape if self.kind in _WHOLE else _flat(self.shape)
        if not found:
            return "its factors do not fit each other"
        if found != wanted:
            return f"it is for {_times(found)}, and this model has {_times(wanted)}"
        magnitude = self.entries.get("magnitude")
        if magnitude is not None and not _along(magnitude.shape, self.shape):
            return f"its magnitude is {_times(magnitude.shape)}, the weight {_times(self.shape)}"
        return None

    def adapter(self) -> Adapter:
        """The same with its numbers, which are read now. Raises CheckpointError unless they are finite."""
        assert self.kind is not None
        assert self.shape is not None
        first, *others = (self._product(entries) for entries in self._products(self.kind))
        magnitude = self.entries.get("magnitude")
        return Adapter(
            factors=Pair(left=first, right=others[0], join=_JOINS[self.kind]) if others else first,
            scale=self.scale,
            magnitude=None if magnitude is None else _numbers(magnitude).reshape(_along(magnitude.shape, self.shape)),
            replaces=self.kind == "replacement",
        )

    def _incomplete(self) -> str:
        other = [_OTHER_HALF[part] for part in ("up", "down") if part in self.entries]
        if self.kind == "LoRA" and len(other) == 1:
            return f"its other half ({other[0]}) is not there"
        return f"it is not complete: there is only {', '.join(sorted(self.entries))}"

    def _products(self, kind: str) -> list[list[TensorEntry]]:
        """The entries of each product; none where its parts are not those of one."""
        found = []
        for whole, a, b, core in _KINDS[kind]:
            there = [part for part in (whole, a, b, core) if part in self.entries]
            complete = there in ([whole], [a, b], [a, b, core])
            found.append([self.entries[part] for part in there if part is not None] if complete else [])
        return found

    def _made(self, products: Sequence[Sequence[TensorEntry]]) -> Shape:
        """The shape of what the products make together, (O, I) of factors; () where they do not fit each other."""
        if self.kind in _WHOLE:
            return products[0][0].shape
        shapes = [_product_shape([entry.shape for entry in product], self._turned(product)) for product in products]
        if not all(shapes):
            return ()
        if self.kind == "LoKr":
            return tuple(math.prod(sizes) for sizes in zip(*shapes, strict=True))
        return shapes[0] if len(set(shapes)) == 1 else ()

    def _product(self, entries: Sequence[TensorEntry]) -> Product:
        a, *others = (_numbers(entry) for entry in entries)
        b, core = (*others, None, None)[:2]
        return Product(a=a.flatten(1).T if self._turned(entries) else a, b=b, core=core)

    def _turned(self, product: Sequence[TensorEntry]) -> bool:
        """LyCORIS stores the first factor beside a core as (R, O)."""
        return len(product) == 3 and self.kind != "LoRA"


def recipes(module: str, entries: Entries, shapes: Shapes, scaling: Scaling) -> Iterator[Recipe]:
    """How the parts of a module change its weight, or the parameter `module` itself, and its bias.

    Every entry is in one recipe. Raises CheckpointError where a parameter is changed in two ways, or no one can mean
    the scale.
    """
    kinds = [kind for kind, products in _KINDS.items() if any(part in entries for part in itertools.chain(*products))]
    biases = [part for part in _BIASES if part in entries]
    if len(kinds) > 1 or len(biases) > 1:
        names = ", ".join(sorted(entry.name for entry in entries.values()))
        raise CheckpointError(f"{_file_of(entries)} changes {module} in two ways ({names}); keep one of them")
    scale, left = 1.0, dict(entries)
    for kind in kinds:
        parts = {*itertools.chain(*_KINDS[kind]), *(() if kind in _WHOLE else _BESIDE)}
        own = {part: left.pop(part) for part in entries if part in parts}
        scale = 1.0 if kind in _WHOLE else _scale(own, scaling)
        name = f"{module}.weight" if f"{module}.weight" in shapes else module
        yield Recipe(name=name, shape=shapes.get(name), kind=kind, entries=own, scale=scale)
    for part in biases:
        name, own = f"{module}.bias", {"diff": left.pop(part)}
        times = scale if part == "up_bias" else 1.0  # PEFT: a bias of lora_B is scaled as the rest of it
        yield Recipe(name=name, shape=shapes.get(name), kind="difference", entries=own, scale=times)
    if left:
        yield Recipe(name=module, shape=None, kind=None, entries=left)


def _numbers(entry: TensorEntry) -> Tensor:
    """A tensor of a file. Raises CheckpointError for values that are no finite numbers."""
    tensor = read_tensor(entry)
    if not torch.isfinite(tensor.float()).all():
        raise CheckpointError(
            f"{entry.file} has '{entry.name}' with values that are no finite numbers; download it again"
        )
    return tensor


def _scale(entries: Entries, scaling: Scaling) -> float:
    """alpha / R; 1 where there is no rank: LyCORIS then takes the numbers as they are."""
    ranked = next((entries[part] for part in _RANKED if part in entries and entries[part].shape), None)
    if ranked is None:
        return 1.0
    rank, alpha = ranked.shape[0], entries.get("alpha")
    if alpha is None:
        return scaling(rank)
    if math.prod(alpha.shape) != 1:
        raise CheckpointError(f"{alpha.file} has {_times(alpha.shape)} numbers as '{alpha.name}'; one is needed")
    scale = float(_numbers(alpha)) / rank
    if not 0 < abs(scale) <= MAX_SCALE:
        raise CheckpointError(
            f"{alpha.file} has '{alpha.name}' {scale * rank:g} for a rank of {rank}, which no one can mean; "
            "download it again"
        )
    return scale


def _product_shape(shapes: Sequence[Shape], turned: bool) -> Shape:
    """(O, I) of a whole, of factors (O, R), (R, I), or of these with a core (R, R, kernel); () if they do not fit."""
    if any(len(shape) < 2 for shape in shapes):
        return ()
    a, *others = map(_flat, shapes)
    if not others:
        return a
    outputs, rank = reversed(a) if turned else a
    b = others[0]
    if len(others) == 1:
        return (outputs, b[1]) if rank == b[0] else ()
    core = shapes[2]
    return (outputs, b[1] * math.prod(core[2:])) if core[:2] == (rank, b[0]) else ()


def _along(magnitude: Shape, weight: Shape) -> Shape:
    """The magnitude's shape with as many axes as the weight: one number per row, or per column; () if it is neither."""
    if len(weight) < 2:
        return ()
    ones = (1,) * (len(weight) - 2)
    count = math.prod(magnitude)
    if magnitude[:1] == weight[:1] == (count,):
        return count, 1, *ones
    if len(magnitude) > 1 and magnitude[0] == 1 and magnitude[1] == weight[1] == count:
        return 1, count, *ones
    return ()


def _flat(shape: Shape) -> Shape:
    """(O, I) of a weight of any number of axes."""
    return shape[0], math.prod(shape[1:])


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _file_of(entries: Entries) -> str:
    return str(next(iter(entries.values())).file)
