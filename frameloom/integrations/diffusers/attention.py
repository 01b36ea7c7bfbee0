"""The attention modules of Wan's family in Diffusers, computed by the equations of ours with their own layers.

Projections are called: whatever they are by now (a LoRA's, quantized, with hooks) computes.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn

from frameloom.attention.core import Attend
from frameloom.integrations.diffusers.plain import (
    first_reason,
    is_traced,
    refuses_input,
    refuses_layer,
    refuses_weights,
)
from frameloom.integrations.diffusers.remembered import Remembered
from frameloom.integrations.diffusers.swap import held_by, is_swapped
from frameloom.integrations.diffusers.ways import PROMPTS_KEPT, Padding, Way, Ways
from frameloom.models.dit_block import CrossAttentionSteps, KeysValues, Norm, SelfAttentionSteps
from frameloom.ops.dit_ops import Ops
from frameloom.ops.quantized import Kernel
from frameloom.ops.rope import RotaryTable

TEXT_TOKENS = (
    512  # where an image comes with the text, the processors of Diffusers count the text's tokens from the end
)
Rotary = RotaryTable | tuple[Tensor, Tensor] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundSelfAttention(SelfAttentionSteps):
    """Layers of a tree, as they are at a call."""

    head_dim: int
    to_q: Callable[..., Tensor]
    to_k: Callable[..., Tensor]
    to_v: Callable[..., Tensor]
    to_out: Callable[..., Tensor]
    norm_q: Norm
    norm_k: Norm
    attend: Attend
    ops: Ops
    project: Kernel | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundCrossAttention(CrossAttentionSteps):
    """Layers of a tree, as they are at a call. Those of an image are None where there is none."""

    head_dim: int
    to_q: Callable[..., Tensor]
    to_k: Callable[..., Tensor]
    to_v: Callable[..., Tensor]
    to_out: Callable[..., Tensor]
    norm_q: Norm
    norm_k: Norm
    attend: Attend
    add_k_proj: Any
    add_v_proj: Any
    norm_added_k: Any


class HeldAttention:
    """What a taken attention module holds: its ways, and the keys and values of the texts it has seen."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways
        self.keys_values: Remembered[KeysValues] = Remembered(PROMPTS_KEPT)

    def forget(self) -> None:
        """A layer was replaced: what it computed may not hold any more."""
        self.keys_values.clear()

    release = forget


class ForgetsReplaced(nn.Module):
    """Tells what a taken module holds when one of its layers is replaced, as adapters do when they come and go.

    A weight that such an adapter is merged into does not count that it was written to.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it; what was remembered of the layers before is let go."""
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and is_swapped(self):
            held_by(self).forget()


class TakenAttention(ForgetsReplaced):
    """Mixin of WanAttention and of the classes that are the same."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, L, D) -> (B, L, D), by `rotary_emb` or from `encoder_hidden_states` (B, S, D)."""
        plain = functools.partial(_plainly, super().forward, hidden_states, encoder_hidden_states)
        if is_traced():
            return plain(attention_mask, rotary_emb, **kwargs)
        ways: Ways = held_by(self).ways
        reason = _refuses_call(attention_mask, kwargs) or _refuses(
            self, hidden_states, encoder_hidden_states, rotary_emb
        )
        if reason is not None:
            ways.tell(type(self).__name__, reason)
            return plain(attention_mask, rotary_emb, **kwargs)
        way = ways.of(hidden_states)
        if encoder_hidden_states is None:
            return _to_itself(self, way, hidden_states, as_table(rotary_emb))
        bound = bind_cross(self, way)
        return bound.forward(bound.queries(hidden_states), _prompt(self, bound, encoder_hidden_states))


def as_table(rotary_emb: Any) -> RotaryTable:
    """Cosines and sines as Diffusers has them, (1, L, 1, K) with every pair's twice, once: (L, P)."""
    if isinstance(rotary_emb, RotaryTable):
        return rotary_emb
    cos, sin = rotary_emb
    return RotaryTable(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])


def as_pairs(rotary_emb: Any) -> Any:
    """The other way round; what is no table stays as it is."""
    if not isinstance(rotary_emb, RotaryTable):
        return rotary_emb
    return tuple(angles.repeat_interleave(2, dim=-1)[None, :, None] for angles in rotary_emb)


def bind_cross(module: Any, way: Way) -> BoundCrossAttention:
    """The layers of a cross-attention module as they are."""
    return BoundCrossAttention(
        **_layers(module, way),
        add_k_proj=module.add_k_proj,
        add_v_proj=module.add_v_proj,
        norm_added_k=getattr(module, "norm_added_k", None),
    )


def _plainly(
    forward: Callable[..., Tensor],
    x: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
    rotary: Rotary,
    **kwargs: Any,
) -> Tensor:
    return forward(x, context, mask, as_pairs(rotary), **kwargs)


def _to_itself(module: Any, way: Way, x_BLD: Tensor, rope: RotaryTable) -> Tensor:
    # tables narrower than float32 are multiplied as they are, which is the reference's rounding
    ops = way.ops if rope.cos_LP.dtype == torch.float32 else Ops()
    return BoundSelfAttention(**_layers(module, way), ops=ops).forward(x_BLD, rope)


def _layers(module: Any, way: Way) -> dict[str, Any]:
    return {
        "head_dim": module.inner_dim // module.heads,
        "to_q": module.to_q,
        "to_k": module.to_k,
        "to_v": module.to_v,
        "to_out": functools.partial(_in_order, module.to_out),
        "norm_q": module.norm_q,
        "norm_k": module.norm_k,
        "attend": way.attend,
    }


def _in_order(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _prompt(module: Any, bound: BoundCrossAttention, context_BSD: Tensor) -> KeysValues:
    """Keys and values of text and image; the text's are remembered where it is known to come again."""
    held: HeldAttention = held_by(module)
    text_BSD, image_BND = _split(module, context_BSD)
    source = context_BSD if image_BND is None else held.ways.texts.known(context_BSD)
    padding = None if source is None else held.ways.padding.known(source)
    if source is None or padding is None:
        return bound.keys_and_values(text_BSD, image_BND, None)
    read = functools.partial(_read, bound, text_BSD, padding)
    weights = list(_weights_of_text(module))
    known = held.keys_values.get(source, weights, read) if weights else read()
    if image_BND is None:
        return known
    k_BND = bound.norm_added_k(bound.add_k_proj(image_BND))
    return known._replace(image=(bound.split_heads(k_BND), bound.split_heads(bound.add_v_proj(image_BND))))


def _split(module: Any, context_BSD: Tensor) -> tuple[Tensor, Tensor | None]:
    if module.add_k_proj is None:
        return context_BSD, None
    num_image = context_BSD.shape[1] - TEXT_TOKENS
    return context_BSD[:, num_image:], context_BSD[:, :num_image]


def _read(bound: BoundCrossAttention, text_BSD: Tensor, padding: Padding) -> KeysValues:
    bias_BS = None if padding.bias_S is None else padding.bias_S.expand(text_BSD.shape[0], -1)
    return bound.keys_and_values(text_BSD[:, : padding.length], None, bias_BS)


def _weights_of_text(module: Any) -> Iterator[Tensor]:
    """What keys and values of a text are made with; nothing where that is more than plain weights."""
    layers = module.to_k, module.to_v, module.norm_k
    if all(refuses_layer(layer, nn.Linear, nn.RMSNorm) is None for layer in layers):
        for layer in layers:
            yield from layer.parameters(recurse=False)


def _refuses_call(mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    if mask is not None:
        return "there is a mask on the attention"
    return "the processor is given arguments of its own" if kwargs else None


def _refuses(module: Any, x: Tensor, context: Tensor | None, rotary_emb: Rotary) -> str | None:
    """Why ours does not compute this call, or None."""
    return first_reason(_reasons(module, x, context, rotary_emb))


def _reasons(module: Any, x: Tensor, context: Tensor | None, rotary_emb: Rotary) -> Iterator[str | None]:
    yield _refuses_processor(module)
    yield refuses_input(module, x, context)
    if getattr(module, "fused_projections", False):
        yield "its projections are fused"
    if module.kv_inner_dim != module.inner_dim:
        yield "keys are not as wide as queries"
    if context is None:
        yield _refuses_self(module, x, rotary_emb)
    elif rotary_emb is not None:
        yield "the keys of a text would be rotated"
    elif module.add_k_proj is not None and context.shape[1] <= TEXT_TOKENS:
        yield "no image comes with the text"


def _refuses_self(module: Any, x: Tensor, rotary_emb: Rotary) -> str | None:
    if rotary_emb is None:
        return "no positions are given"
    norms = module.norm_q, module.norm_k
    return first_reason(refuses_layer(norm, nn.RMSNorm) for norm in norms) or refuses_weights(
        (norm.weight for norm in norms), x, same_dtype=True
    )


def _refuses_processor(module: Any) -> str | None:
    processor = module.processor
    if type(processor) is not type(module)._default_processor_cls:
        return f"its processor is {type(processor).__name__}"
    if getattr(processor, "_parallel_config", None) is not None:
        return "its sequence is divided over devices"
    registry: Any = attention_dispatch._AttentionBackendRegistry
    backend = processor._attention_backend or registry.get_active_backend()[0]
    name = getattr(backend, "value", backend)
    return None if name == "native" else f"the attention backend {name} was set"
