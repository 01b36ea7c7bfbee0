"""The attention modules of Wan's family in Diffusers, computed by the equations of ours with their own layers.

Projections are called: whatever they are by now (a LoRA's, quantized, with hooks) computes.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn

from frameloom.integrations.diffusers.plain import (
    first_reason,
    is_traced,
    refuses_input,
    refuses_layer,
    refuses_method,
    refuses_weights,
)
from frameloom.integrations.diffusers.swap import held_by, plain_class
from frameloom.integrations.diffusers.ways import Way, Ways
from frameloom.models.dit_block import AttentionSteps, CrossAttentionSteps, KeysValues, SelfAttentionSteps
from frameloom.ops.dit_ops import Ops
from frameloom.ops.rope import RotaryTable

TEXT_TOKENS = 512  # where an image comes with the text, Diffusers' processors count the text's from the end
Rotary = RotaryTable | tuple[Tensor, Tensor] | None


class _Bound(AttentionSteps):
    """The layers of an attention module, as they are at a call."""

    def __init__(self, module: Any, way: Way) -> None:
        self.head_dim = module.inner_dim // module.heads
        self.to_q, self.to_k, self.to_v = module.to_q, module.to_k, module.to_v
        self.to_out = functools.partial(_out, module.to_out)
        self.norm_q, self.norm_k = module.norm_q, module.norm_k
        self.attend = way.attend


class BoundSelfAttention(_Bound, SelfAttentionSteps):
    """Of every token to every token."""

    project = None

    def __init__(self, module: Any, way: Way, ops: Ops) -> None:
        super().__init__(module, way)
        self.ops = ops


class BoundCrossAttention(_Bound, CrossAttentionSteps):
    """Of every token to the text and the image; the layers of an image are None where there is none."""

    def __init__(self, module: Any, way: Way) -> None:
        super().__init__(module, way)
        self.add_k_proj, self.add_v_proj = module.add_k_proj, module.add_v_proj
        self.norm_added_k: Any = getattr(module, "norm_added_k", None)


class TakenAttention(nn.Module):
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
            ways.told.tell_plain(type(self).__name__, reason)
            return plain(attention_mask, rotary_emb, **kwargs)
        way = ways.of(hidden_states)
        if encoder_hidden_states is None:
            return _to_itself(self, way, hidden_states, as_table(rotary_emb))
        bound = BoundCrossAttention(self, way)
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
    return BoundSelfAttention(module, way, ops).forward(x_BLD, rope)


def _out(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """By the first two: Diffusers calls no others."""
    projected: Tensor = layers[1](layers[0](x))
    return projected


def _prompt(module: Any, bound: BoundCrossAttention, context_BSD: Tensor) -> KeysValues:
    """Keys and values of text and image; of the text those that stand for all, where its padding is known."""
    ways: Ways = held_by(module).ways
    text_BSD, image_BND = _split(module, context_BSD)
    padding = ways.paddings.of(context_BSD)
    if padding is None or padding.start != context_BSD.shape[1] - text_BSD.shape[1]:
        return bound.keys_and_values(text_BSD, image_BND, None)
    bias_BN = padding.bias_N.expand(text_BSD.shape[0], -1)
    return bound.keys_and_values(text_BSD[:, : padding.length], image_BND, bias_BN)


def _split(module: Any, context_BSD: Tensor) -> tuple[Tensor, Tensor | None]:
    if module.add_k_proj is None:
        return context_BSD, None
    num_image = context_BSD.shape[1] - TEXT_TOKENS
    return context_BSD[:, num_image:], context_BSD[:, :num_image]


def refuses_attention(kind: Any) -> str | None:
    """Why what an attention class of Diffusers does, with its processor, may not be what is known of it, or None."""
    return refuses_method(kind, "forward") or refuses_method(kind._default_processor_cls, "__call__")


def _refuses_call(mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    if mask is not None:
        return "there is a mask on the attention"
    return "the processor is given arguments of its own" if kwargs else None


def _refuses(module: Any, x: Tensor, context: Tensor | None, rotary_emb: Rotary) -> str | None:
    """Why ours does not compute this call, or None."""
    return first_reason(_reasons(module, x, context, rotary_emb))


def _reasons(module: Any, x: Tensor, context: Tensor | None, rotary_emb: Rotary) -> Iterator[str | None]:
    yield refuses_attention(plain_class(type(module)))
    yield _refuses_processor(module)
    yield refuses_input(module, x, context)
    if getattr(module, "fused_projections", False):
        yield "its projections are fused"
    if module.kv_inner_dim != module.inner_dim:
        yield "keys are not as wide as queries"
    if context is None:
        yield _refuses_self(module, x, rotary_emb)
    elif context.shape[0] != x.shape[0]:
        yield "the text comes in another number than the tokens"
    elif rotary_emb is not None:
        yield "the keys of a text would be rotated"
    elif module.add_k_proj is not None and context.shape[1] <= TEXT_TOKENS:
        yield "no image comes with the text"


def _refuses_self(module: Any, x: Tensor, rotary_emb: Rotary) -> str | None:
    if rotary_emb is None:
        return "no positions are given"
    shape = (x.shape[1],) if isinstance(rotary_emb, RotaryTable) else (1, x.shape[1], 1)
    if any(angles.shape[:-1] != shape for angles in rotary_emb):
        return "its positions are not one for each token"
    norms = module.norm_q, module.norm_k
    if any(getattr(norm, name, None) is None for norm in norms for name in ("weight", "eps")):
        return "a norm has no weight or no epsilon"
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
