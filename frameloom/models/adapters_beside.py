"""Adapters computed beside the weights of a network, until others take their place: the base stays as it is, in
whatever form its weights are held, and on however many ranks.
"""

# Shapes: x (..., I), out (..., O) of a layer with I inputs and O outputs; D width.

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.errors import InternalError
from frameloom.models.adapters import Adapter, Adapters, Change, Factors, Product, delta, gain, merged
from frameloom.models.dit_block import FeedForward, SelfAttention
from frameloom.models.division import Division, Undo
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.linear import PackedLinear, PackedMlp, PlainLinear
from frameloom.ops.mlp import in_pieces, rows_at_once
from frameloom.ops.norm import at_least_fp32
from frameloom.ops.quantized import Kernel, Linear

Step = Callable[[], Undo]

_FUSED = ("to_q", "to_k", "to_v")
_FED = ("net.0.proj", "net.2")


class Term(Protocol):
    """What an adapter adds to the output of a linear layer."""

    def __call__(self, x: Tensor, out: Tensor, /) -> Tensor:
        """x (..., I) -> (..., O), or what broadcasts to it; `out`: of the layer and of the terms before this one."""
        ...


@torch.no_grad()
def attach(dit: WanDiT, sets: Sequence[Adapters]) -> None:
    """Let a network compute with these adapters, in this order, instead of those it had; its base stays as it is.

    Beside a linear layer a LoRA is computed by its factors, LoHa and LoKr by a difference that is made anew at each
    call, whole differences are kept. What depends on the weight (DoRA) is found out here, once, in float32. What is no
    linear layer gets another tensor. Where ranks share the weights, all must attach the same at the same time.
    """
    detach(dit)
    changes = _by_parameter(dit.division, sets)
    layers = _layers(dit)
    terms = {path: found for path, layer in layers.items() if (found := tuple(_terms(path, layer, changes)))}
    steps = [*_opened_feed_forwards(dit, terms), *_fused_projections(dit, terms)]
    steps += [functools.partial(_hook, dit.get_submodule(path), found) for path, found in terms.items()]
    for name, of_other in changes.items():
        path, _, attribute = name.rpartition(".")
        if path not in layers:
            value = merged(dit.division.whole(dit.get_parameter(name)), of_other)
            steps.append(functools.partial(dit.division.exchange, dit.get_submodule(path), attribute, value))
    dit.undo_adapters = tuple(step() for step in steps)
    dit.adapters = tuple(sets)


def detach(dit: WanDiT) -> None:
    """Take all adapters away again: the network is the very one it was."""
    for undo in reversed(dit.undo_adapters):
        undo()
    dit.undo_adapters, dit.adapters = (), ()


def _by_parameter(division: Division, sets: Sequence[Adapters]) -> dict[str, list[Change]]:
    """All changes of what this rank has of each parameter, in the order of the files; strength 0 changes nothing."""
    found: dict[str, list[Change]] = {}
    for adapters in sets:
        for name, adapter in adapters.changes.items() if adapters.strength else ():
            axis = division.axis(name)
            own = adapter if axis is None else adapter.part(axis, division)
            found.setdefault(name, []).append((own, adapters.strength))
    return found


# --- the layers, and who computes them ---


Plain = Callable[[], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Layer:
    """A linear layer, whoever computes it. `plain`: its weight (O, I) and bias (O,), made plain where they are not.

    `outputs`: O, of this rank. `like`: an empty tensor of the dtype that is computed in, where it is computed.
    `adds_bias`: whether this rank adds what changes the bias; one does where the outputs of all are added up.
    """

    plain: Plain
    outputs: int
    like: Tensor
    adds_bias: bool


def _layers(dit: WanDiT) -> dict[str, _Layer]:
    """The linear layers by their paths, in an order that is the same on all ranks."""
    elsewhere, division = dict(_computed_elsewhere(dit)), dit.division
    found = {}
    for path, module in dit.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        typical = dit.patch_embedding.weight if module.weight is None else module.weight
        axis = division.axis(f"{path}.weight")
        found[path] = _Layer(
            plain=elsewhere.get(path, functools.partial(_of_layer, division, module)),
            outputs=module.out_features // (division.size if axis == 0 else 1),
            like=torch.empty(0, dtype=typical.dtype, device=typical.device),
            adds_bias=axis != 1 or division.index == 0,
        )
    return found


def _computed_elsewhere(dit: WanDiT) -> Iterator[tuple[str, Plain]]:
    """The layers whose weights belong to a kernel of several."""
    for path, module in dit.named_modules():
        if isinstance(module, SelfAttention) and module.project is not None:
            if not isinstance(module.project, PackedLinear | PlainLinear):
                raise InternalError(f"the joined projections of {path} tell no weight: {module.project!r}")
            for index, name in enumerate(_FUSED):
                yield f"{path}.{name}", functools.partial(_third, module.project, index)
        elif isinstance(module, FeedForward) and isinstance(module.kernel, PackedMlp):
            for name, packed in zip(_FED, (module.kernel.first, module.kernel.second), strict=True):
                yield f"{path}.{name}", functools.partial(_of_packed, packed)


def _third(joined: PackedLinear | PlainLinear, index: int) -> tuple[Tensor, Tensor | None]:
    bias = None if joined.bias is None else joined.bias.chunk(3)[index]
    return joined.weight.chunk(3)[index], bias


def _of_packed(packed: PackedLinear) -> tuple[Tensor, Tensor | None]:
    return packed.weight, packed.bias


def _of_layer(division: Division, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, Linear) and isinstance(layer.kernel, PackedLinear):
        return _of_packed(layer.kernel)
    bias = None if layer.bias is None else division.whole(layer.bias)
    if isinstance(layer, Linear) and layer.stored is not None:
        return layer.plain_weight(), bias
    return division.whole(layer.weight), bias


def _opened_feed_forwards(dit: WanDiT, terms: dict[str, tuple[Term, ...]]) -> Iterator[Step]:
    """Where one kernel computes both layers, each is computed for itself; takes their terms out of `terms`."""
    for path, feed in dit.named_modules():
        if isinstance(feed, FeedForward) and feed.kernel is not None:
            parts = tuple(terms.pop(f"{path}.{name}", ()) for name in _FED)
            if any(parts):
                kernel = functools.partial(_fed, feed, feed.kernel, parts)
                yield functools.partial(_exchange, feed, "kernel", kernel)


def _fed(feed: FeedForward, kernel: Kernel, parts: Sequence[Sequence[Term]], x: Tensor) -> Tensor:
    """(..., D) -> (..., D), for as many tokens at a time as the kernel takes; weights are made plain once for all."""
    (first, second), rows = _one_by_one(feed, kernel)

    def run(piece: Tensor) -> Tensor:
        hidden = feed.net[1](_added(parts[0], piece, first(piece)))
        return _added(parts[1], hidden, second(hidden))

    return in_pieces(run, x, width=feed.layers[1].out_features, rows=rows)


def _one_by_one(feed: FeedForward, kernel: Kernel) -> tuple[tuple[Kernel, Kernel], int]:
    """Both layers of a feed-forward that a kernel computes, and how many tokens it takes at a time."""
    if isinstance(kernel, PackedMlp):
        return (kernel.first.product, kernel.second), kernel.rows
    first, second = feed.layers
    rows = rows_at_once(torch.empty(first.out_features, 0, dtype=first.dtype))
    return (_made_plain(first), _made_plain(second)), rows


def _made_plain(layer: Linear) -> Kernel:
    return layer if layer.stored is None else PlainLinear(layer.plain_weight(), layer.bias)


def _fused_projections(dit: WanDiT, terms: dict[str, tuple[Term, ...]]) -> Iterator[Step]:
    """Where queries, keys and values come from one product; takes the terms of these layers out of `terms`."""
    for path, attention in dit.named_modules():
        if isinstance(attention, SelfAttention) and attention.project is not None:
            parts = tuple(terms.pop(f"{path}.{name}", ()) for name in _FUSED)
            if any(parts):
                project = functools.partial(_projected, attention.project, parts)
                yield functools.partial(_exchange, attention, "project", project)


def _projected(project: Kernel, parts: Sequence[Sequence[Term]], x: Tensor) -> Tensor:
    """(..., D) -> (..., 3 D)."""
    out = project(x)
    for terms, part in zip(parts, out.chunk(3, dim=-1), strict=True):
        _added(terms, x, part)
    return out


def _hook(layer: nn.Module, terms: Sequence[Term]) -> Undo:
    """Before other hooks: ranks that divide a layer by rows add up what comes out of it in one."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return _added(terms, inputs[0], out)

    return layer.register_forward_hook(add, prepend=True).remove


def _exchange(owner: nn.Module, attribute: str, value: object) -> Undo:
    undo = functools.partial(setattr, owner, attribute, getattr(owner, attribute))
    setattr(owner, attribute, value)
    return undo


def _added(terms: Iterable[Term], x: Tensor, out: Tensor) -> Tensor:
    for term in terms:
        out += term(x, out)
    return out


# --- what they add ---


def _terms(path: str, layer: _Layer, changes: Mapping[str, Sequence[Change]]) -> Iterator[Term]:
    """What adapters add to the output of a layer."""
    of_weight, of_bias = (changes.get(f"{path}.{attribute}", ()) for attribute in ("weight", "bias"))
    for index, (adapter, strength) in enumerate(of_weight):
        if adapter.needs_weight:
            plain, bias = layer.plain()
            weight = merged(at_least_fp32(plain), of_weight[:index])
            yield _term_of_weight(adapter, strength, weight=weight, bias=bias, like=layer.like)
        else:
            yield _term(adapter, strength, like=layer.like)
    if of_bias and layer.adds_bias:
        nothing = torch.zeros(layer.outputs, device=layer.like.device)
        yield functools.partial(_kept_bias, merged(nothing, of_bias).to(layer.like.dtype))


def _term(adapter: Adapter, strength: float, *, like: Tensor) -> Term:
    factors, scale, wide = adapter.factors.moved(like.device), strength * adapter.scale, at_least_fp32(like)
    if not isinstance(factors, Product):
        return functools.partial(_made_anew, factors, scale)
    if factors.b is None or factors.core is not None:
        return functools.partial(_kept_weight, (scale * factors.dense(wide)).to(like.dtype))
    up, down = scale * factors.a.to(wide).flatten(1), factors.b.flatten(1)
    return functools.partial(_low_rank, up.to(like.dtype), down.to(like.dtype).contiguous())


def _term_of_weight(adapter: Adapter, strength: float, *, weight: Tensor, bias: Tensor | None, like: Tensor) -> Term:
    """Of a DoRA that scales rows the output is scaled; what scales columns, or replaces, is a whole difference.

    What the output is scaled by is rounded less 1: near 1 bfloat16 knows steps of 0.8 % only.
    """
    if adapter.magnitude is None or adapter.magnitude.shape[0] != weight.shape[0]:
        return functools.partial(_kept_weight, (strength * delta(adapter, weight)).to(like.dtype))
    plain = replace(adapter, magnitude=None)
    gain_O = gain(weight + delta(plain, weight), adapter.magnitude, adapter.add_up).flatten()
    more_O, times_O = (strength * (gain_O - 1)).to(like.dtype), (strength * gain_O).to(like.dtype)
    return functools.partial(_stretched, more_O, times_O, bias, _term(plain, 1.0, like=like))


def _low_rank(up: Tensor, down: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return F.linear(F.linear(x, down), up)


def _made_anew(factors: Factors, scale: float, x: Tensor, _: Tensor) -> Tensor:
    return F.linear(x, (scale * factors.dense(at_least_fp32(x[..., :0]))).to(x.dtype))


def _kept_weight(weight: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return F.linear(x, weight)


def _kept_bias(bias: Tensor, _: Tensor, __: Tensor) -> Tensor:
    return bias


def _stretched(more_O: Tensor, times_O: Tensor, bias: Tensor | None, term: Term, x: Tensor, out: Tensor) -> Tensor:
    """s (g (W x + D x) - W x) = s (g - 1) W x + s g D x, where W x is `out` without its bias and D x the term."""
    product = out if bias is None else out - bias
    return more_O * product + times_O * term(x, out)
