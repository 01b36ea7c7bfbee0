"""What files of adapters change in a network: LoRA, LoHa, LoKr, DoRA, whole differences; the formulas, and their use.

Either merged into weights as they are read (`merge`), or computed beside them (`attach`) until `detach`: then the base
stays as it is, in whatever form its weights are held.
"""

# Shapes: O outputs and I inputs of a layer, each kernel position of a convolution an input; R rank.

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.errors import RequestError
from frameloom.models.wan_dit import FeedForward, SelfAttention, WanDiT
from frameloom.ops.linear import PackedMlp
from frameloom.ops.mlp import in_pieces, rows_at_once
from frameloom.ops.norm import at_least_fp32
from frameloom.ops.quantized import Linear


class Factors(Protocol):
    """What a difference of a weight is made of."""

    def dense(self, like: Tensor) -> Tensor:
        """(O, I) in the dtype and on the device of `like`."""
        ...

    def moved(self, device: torch.device) -> "Factors":
        """The same on a device."""
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapter:
    """The change of one parameter: scale · factors.

    `magnitude` (DoRA): the lengths that the rows, (O, 1, ...), or the columns, (1, I, ...), of the sum are given.
    `replaces`: the factors are the new weight, and no difference.
    """

    factors: Factors
    scale: float = 1.0
    magnitude: Tensor | None = None
    replaces: bool = False

    @property
    def needs_weight(self) -> bool:
        """Whether what it adds depends on the weight."""
        return self.replaces or self.magnitude is not None


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
    return (wide + change) * _gain(wide + change, adapter.magnitude) - wide


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
    changes = [(adapters.changes[name], adapters.strength) for adapters in sets if name in adapters.changes]
    return merged(weight, changes) if changes else weight


def _gain(value: Tensor, magnitude: Tensor) -> Tensor:
    """What the rows, or the columns, of a weight are multiplied by to get their lengths; it broadcasts."""
    lengths = magnitude.to(value)
    axes = [axis for axis, size in enumerate(lengths.shape) if size == 1]
    norm: Tensor = torch.linalg.vector_norm(value, dim=axes, keepdim=True)
    return lengths / norm.clamp_min(torch.finfo(value.dtype).tiny)


# --- beside the weights ---


Kernel = Callable[[Tensor], Tensor]
Undo = Callable[[], None]
Step = Callable[[], Undo]


class Term(Protocol):
    """What an adapter adds to the output of a linear layer."""

    def __call__(self, x: Tensor, out: Tensor, /) -> Tensor:
        """x (..., I) -> (..., O), or what broadcasts to it; `out`: of the layer and of the terms before this one."""
        ...


@torch.no_grad()
def attach(dit: WanDiT, sets: Sequence[Adapters]) -> None:
    """Let a network compute with these adapters, in this order, instead of those it had; its base stays as it is.

    Beside a linear layer a LoRA is computed by its factors, LoHa and LoKr by a difference that is made anew at each
    call, whole differences are kept. What is no linear layer gets another tensor. Raises RequestError where the base
    is held in a form that has no place for them; nothing is attached then.
    """
    detach(dit)
    changes = _by_parameter(sets)
    if not changes:
        return
    _check_whole(dit)
    layers = {path: layer for path, layer in dit.named_modules() if isinstance(layer, nn.Linear)}
    terms = {}
    for path, layer in layers.items():
        of_weight, of_bias = (changes.get(f"{path}.{attribute}", ()) for attribute in ("weight", "bias"))
        if of_weight or of_bias:
            like = dit.patch_embedding.weight if layer.weight is None else layer.weight
            terms[path] = tuple(_terms(path, layer, of_weight, of_bias, like=like[:0]))
    steps = [*_opened_feed_forwards(dit, terms), *_fused_projections(dit, terms)]
    steps += [functools.partial(_hook, layers[path], found) for path, found in terms.items()]
    for name, found in changes.items():
        path, _, attribute = name.rpartition(".")
        if path not in layers:
            weight = nn.Parameter(merged(dit.get_parameter(name), found), requires_grad=False)
            steps.append(functools.partial(_exchange, dit.get_submodule(path), attribute, weight))
    dit.undo_adapters = tuple(step() for step in steps)


def detach(dit: WanDiT) -> None:
    """Take all adapters away again: the network is the very one it was."""
    for undo in reversed(dit.undo_adapters):
        undo()
    dit.undo_adapters = ()


def _by_parameter(sets: Sequence[Adapters]) -> dict[str, list[Change]]:
    """All changes of each parameter, in the order of the files."""
    found: dict[str, list[Change]] = {}
    for adapters in sets:
        for name, adapter in adapters.changes.items():
            found.setdefault(name, []).append((adapter, adapters.strength))
    return found


def _check_whole(dit: WanDiT) -> None:
    weight = dit.block_list[0].attn2.to_k.weight  # of no rewrite: what others may hold in another form
    divided = weight is not None and weight.shape[0] != dit.spec.dim
    if divided or any(type(parameter.data) is not Tensor for parameter in dit.parameters()):
        raise RequestError(
            "adapters cannot be switched where the weights are divided over ranks (tp or fsdp); give them when the "
            "model is loaded"
        )


def _hook(layer: nn.Module, terms: Sequence[Term]) -> Undo:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return _added(terms, inputs[0], out)

    return layer.register_forward_hook(add).remove


def _exchange(owner: nn.Module, attribute: str, value: object) -> Undo:
    undo = functools.partial(setattr, owner, attribute, getattr(owner, attribute))
    setattr(owner, attribute, value)
    return undo


def _added(terms: Iterable[Term], x: Tensor, out: Tensor) -> Tensor:
    for term in terms:
        out += term(x, out)
    return out


def _opened_feed_forwards(dit: WanDiT, terms: Mapping[str, Sequence[Term]]) -> Iterator[Step]:
    """Feed-forwards whose layers are computed by one kernel get one that calls these layers, for as many tokens."""
    for path, feed in dit.named_modules():
        if not isinstance(feed, FeedForward) or feed.kernel is None:
            continue
        if terms.keys().isdisjoint((f"{path}.net.0.proj", f"{path}.net.2")):
            continue
        first, second = feed.layers
        if isinstance(feed.kernel, PackedMlp):
            rows = feed.kernel.rows
            yield functools.partial(_exchange, first, "kernel", feed.kernel.first.product)
            yield functools.partial(_exchange, second, "kernel", feed.kernel.second)
        else:
            rows = rows_at_once(first.weight)
        kernel = functools.partial(in_pieces, feed.net, width=second.out_features, rows=rows)
        yield functools.partial(_exchange, feed, "kernel", kernel)


def _fused_projections(dit: WanDiT, terms: dict[str, tuple[Term, ...]]) -> Iterator[Step]:
    """Where queries, keys and values come from one product; takes the terms of these layers out of `terms`."""
    for path, attention in dit.named_modules():
        if isinstance(attention, SelfAttention) and attention.project is not None:
            parts = tuple(terms.pop(f"{path}.{name}", ()) for name in ("to_q", "to_k", "to_v"))
            if any(parts):
                project = functools.partial(_projected, attention.project, parts)
                yield functools.partial(_exchange, attention, "project", project)


def _projected(project: Kernel, parts: Sequence[Sequence[Term]], x: Tensor) -> Tensor:
    """(..., D) -> (..., 3 D)."""
    out = project(x)
    for terms, part in zip(parts, out.chunk(3, dim=-1), strict=True):
        _added(terms, x, part)
    return out


def _terms(
    path: str, layer: nn.Linear, of_weight: Sequence[Change], of_bias: Sequence[Change], *, like: Tensor
) -> Iterator[Term]:
    """What adapters add to the output of a layer, computed in the dtype and on the device of `like`."""
    for index, (adapter, strength) in enumerate(of_weight):
        if adapter.needs_weight:
            weight = merged(_weight_of(path, layer), of_weight[:index])
            yield _term_of_weight(adapter, strength, weight=at_least_fp32(weight), bias=layer.bias, like=like)
        else:
            yield _term(adapter, strength, like=like)
    if of_bias:
        nothing = torch.zeros(layer.out_features, dtype=like.dtype, device=like.device)
        yield functools.partial(_kept_bias, merged(nothing, of_bias))


def _weight_of(path: str, layer: nn.Linear) -> Tensor:
    weight: Tensor | None = layer.plain_weight() if isinstance(layer, Linear) else layer.weight
    if weight is None:
        raise RequestError(
            f"an adapter of {path} depends on its weight (DoRA), which a rewrite holds in another form; load the model "
            "with the adapters, or with the rewrites dit.qkv_fused, dit.linear_packed and dit.mlp_packed off"
        )
    return weight


def _term(adapter: Adapter, strength: float, *, like: Tensor) -> Term:
    factors, scale, wide = adapter.factors.moved(like.device), strength * adapter.scale, at_least_fp32(like)
    if not isinstance(factors, Product):
        return functools.partial(_made_anew, factors, scale)
    if factors.b is None or factors.core is not None:
        return functools.partial(_kept_weight, (scale * factors.dense(wide)).to(like.dtype))
    up, down = scale * factors.a.to(wide).flatten(1), factors.b.flatten(1)
    return functools.partial(_low_rank, up.to(like.dtype), down.to(like.dtype))


def _term_of_weight(adapter: Adapter, strength: float, *, weight: Tensor, bias: Tensor | None, like: Tensor) -> Term:
    """Of a DoRA that scales rows the output is scaled; what scales columns, or replaces, is a whole difference."""
    if adapter.magnitude is None or adapter.magnitude.shape[0] != weight.shape[0]:
        return functools.partial(_kept_weight, (strength * delta(adapter, weight)).to(like.dtype))
    plain = replace(adapter, magnitude=None)
    gain_O = _gain(weight + delta(plain, weight), adapter.magnitude).flatten().to(like.dtype)
    return functools.partial(_stretched, gain_O, bias, strength, _term(plain, 1.0, like=like))


def _low_rank(up: Tensor, down: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return F.linear(F.linear(x, down), up)


def _made_anew(factors: Factors, scale: float, x: Tensor, _: Tensor) -> Tensor:
    return F.linear(x, (scale * factors.dense(at_least_fp32(x[..., :0]))).to(x.dtype))


def _kept_weight(weight: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return F.linear(x, weight)


def _kept_bias(bias: Tensor, _: Tensor, __: Tensor) -> Tensor:
    return bias


def _stretched(gain_O: Tensor, bias: Tensor | None, strength: float, term: Term, x: Tensor, out: Tensor) -> Tensor:
    """g (W x + D x) - W x, where W x is `out` without its bias and D x the term."""
    product = out if bias is None else out - bias
    return strength * ((gain_O - 1) * product + gain_O * term(x, out))
