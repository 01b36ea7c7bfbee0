"""LTX-2's attention norms queries and keys and turns them by halves of a head; here that is one pass over memory.

All else of the attention, with its masks, gates, perturbations and backends, is the processor's own: it is handed a
view of the module whose norms turn, too, and which has no rotation left to do.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frameloom.errors import RequestError
from frameloom.integrations.diffusers.plain import (
    Told,
    first_reason,
    is_traced,
    refuses_input,
    refuses_layer,
    refuses_method,
    refuses_weights,
)
from frameloom.integrations.diffusers.report import Entry
from frameloom.integrations.diffusers.swap import held_by, is_swapped, plain_class, swap
from frameloom.ops.dit_ops import ops_for
from frameloom.ops.dit_rewrites import NORM_ROTATE_NATIVE, NORM_ROTATE_TRITON
from frameloom.ops.registry import Policy
from frameloom.ops.rope import RotaryTable, check_rotation, norm_rotate
from frameloom.platform.device import platform_of

_ATTENTION = "LTX2Attention"
_KERNELS = (NORM_ROTATE_TRITON, NORM_ROTATE_NATIVE)
_PROCESSORS = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
_HOME = "diffusers.models.transformers.transformer_ltx2"

Rotary = tuple[Tensor, Tensor] | None


def take_ltx2(name: str, module: nn.Module, policy: Policy) -> Entry | None:
    """Let LTX-2's attentions norm and turn in one pass; None where there are none. See `accelerate.Take`."""
    attentions: list[Any] = [part for part in module.modules() if _is_known(part, _ATTENTION)]
    if not attentions:
        return None
    entry = functools.partial(Entry, component=name, kind=type(module).__name__)
    if any(map(is_swapped, attentions)):
        return entry(taken=True, what="it was taken before")
    turning = [
        part for part in attentions if part.rope_type == "split" and getattr(part.norm_q, "weight", None) is not None
    ]
    if not turning:
        return entry(taken=False, what="its rotary embedding is interleaved, or its norms have no weights")
    weight = turning[0].norm_q.weight
    if weight.is_meta and not any(hasattr(part, "_hf_hook") for part in module.modules()):
        return entry(taken=False, what="its weights are on the meta device; load them first")
    if refusal := first_reason(map(policy.refuses, _KERNELS)):
        return entry(taken=False, what=f"its norm and rotation in one pass: {refusal}")
    turns = Turns(policy)
    for part in turning:
        swap(part, TurningAttention, turns)
    kernel = turns.at(weight.device, weight.dtype)
    how = "where there is a kernel" if kernel is None else f"by {kernel.name}"
    return entry(taken=True, what=f"norm and rotation of {len(turning)} attentions in one pass, {how}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A provider of `norm_rotate`, and the name of its rewrite."""

    name: str
    run: Callable[..., Tensor]


class Turns:
    """What the attentions of one network share: the kernel for each device and dtype that they meet."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._chosen: dict[tuple[torch.device, torch.dtype], Kernel | None] = {}
        self.told = Told()

    def at(self, device: torch.device, dtype: torch.dtype) -> Kernel | None:
        """The kernel of a place, or None where there is none."""
        key = device, dtype
        if key not in self._chosen:
            self._chosen[key] = self._choose(device, dtype)
        return self._chosen[key]

    def release(self) -> None:
        """Nothing of a module's was changed."""

    def _choose(self, device: torch.device, dtype: torch.dtype) -> Kernel | None:
        try:
            ops, decisions = ops_for(platform_of(device).name, policy=self._policy, dtype=dtype)
        except RequestError:  # a kind of device that is not known here
            return None
        used = {decision.name for decision in decisions if decision.used}
        name = next((kernel.name for kernel in _KERNELS if kernel.name in used), None)
        return None if name is None else Kernel(name=name, run=ops.norm_rotate)


class TurningAttention(nn.Module):
    """Mixin of LTX2Attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Rotary = None,
        key_rotary_emb: Rotary = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, L, D) -> (B, L, D), turned by cosines and sines (B, H, L, P) of queries and keys."""
        given = encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb
        module: Any = self
        if query_rotary_emb is not None and not is_traced() and _has_kernel(self, hidden_states):
            keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            reason = first_reason(_reasons(self, (hidden_states, keys), (query_rotary_emb, key_rotary_emb)))
            if reason is None:
                module = _Turned(self, query_rotary_emb, key_rotary_emb or query_rotary_emb)
            else:
                held_by(self).told.tell_plain(_ATTENTION, reason)
        plain: Any = plain_class(type(self))
        turned: Tensor = plain.forward(module, hidden_states, *given, **kwargs)
        return turned


def _has_kernel(module: nn.Module, x: Tensor) -> bool:
    """Whether there is anything to gain; where there is not, nothing is to be told."""
    return held_by(module).at(x.device, x.dtype) is not None


class _Turned:
    """An attention module as its processor sees it: its norms turn what they norm, and nothing is left to turn."""

    rope_type = "none"

    def __init__(self, module: Any, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> None:
        self._module = module
        self.norm_q = functools.partial(_norm_rotate, module, module.norm_q, RotaryTable(*queries))
        self.norm_k = functools.partial(_norm_rotate, module, module.norm_k, RotaryTable(*keys))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _norm_rotate(module: Any, norm: Any, table: RotaryTable, x_BLD: Tensor) -> Tensor:
    """x_BLD normed over all heads and turned, still as wide."""
    kernel = held_by(module).at(x_BLD.device, x_BLD.dtype)
    run = norm_rotate if kernel is None else kernel.run
    turned: Tensor = run(x_BLD, norm.weight, norm.eps, table, module.head_dim, layout="halves")
    return turned.flatten(2)


def _reasons(
    module: Any, sides: tuple[Tensor, Tensor], tables: tuple[tuple[Tensor, Tensor], Rotary]
) -> Iterator[str | None]:
    yield None if _is_known(module.processor, *_PROCESSORS) else f"its processor is {type(module.processor).__name__}"
    yield refuses_method(plain_class(type(module)), "forward")
    yield refuses_method(type(module.processor), "__call__")
    yield refuses_input(module, *sides)
    queries, keys = tables[0], tables[1] or tables[0]
    widths = module.inner_dim, module.inner_kv_dim
    norms = module.norm_q, module.norm_k
    for x, norm, width, table in zip(sides, norms, widths, (queries, keys), strict=True):
        yield refuses_layer(norm, nn.RMSNorm)
        yield "a norm has no weight or no epsilon" if norm.weight is None or norm.eps is None else None
        yield refuses_weights((norm.weight,), x, same_dtype=True)
        yield _refuses_table(x, width, table, module.head_dim)


def _refuses_table(x_BLD: Tensor, width: int, table: tuple[Tensor, Tensor], head_dim: int) -> str | None:
    """Why queries or keys that are made of x cannot be turned by a table, or None."""
    if any(angles.dtype != torch.float32 or angles.device != x_BLD.device for angles in table):
        return "its angles are not in float32 beside the tokens"
    try:
        check_rotation((*x_BLD.shape[:2], width), RotaryTable(*table), head_dim, "halves")
    except RequestError as error:
        return str(error)
    return None


def _is_known(part: object, *names: str) -> bool:
    """Whether an object is of one of LTX-2's own classes, and of no class that is derived from it."""
    plain: Any = type(part)
    kind = plain_class(plain)
    return kind.__module__ == _HOME and kind.__name__ in names
