"""The blocks of Wan's family in Diffusers, computed by the equations of ours with their own layers.

Attention and feed-forward are called as the modules they are. So hooks on them, and on the block, are called as ever.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from frameloom.integrations.diffusers.plain import (
    first_reason,
    has_affine,
    is_traced,
    refuses_input,
    refuses_layer,
    refuses_method,
    refuses_weights,
)
from frameloom.integrations.diffusers.swap import held_by, plain_class
from frameloom.integrations.diffusers.ways import Ways
from frameloom.models.dit_block import BlockSteps
from frameloom.ops.mlp import mlp


@dataclass(frozen=True, slots=True)
class _Reads:
    """A cross-attention that makes its queries itself: (x_BLD, context_BSD) -> (B, L, D)."""

    attend: Callable[[Tensor, Tensor], Tensor]

    def queries(self, x_BLD: Tensor, /) -> Tensor:
        return x_BLD

    def __call__(self, x_BLD: Tensor, context_BSD: Tensor, /) -> Tensor:
        return self.attend(x_BLD, context_BSD)


class BoundBlock(BlockSteps[Tensor]):
    """A block of a tree, with its layers as they are at a call, for tokens like x.

    Its attention is `attn1(x, rope)` and `attn2(x, context)`; the prompt is what the tree hands on: embedded text,
    (B, S, D).
    """

    def __init__(
        self, module: Any, x_BLD: Tensor, attn1: Callable[..., Tensor], attn2: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        norm2, ways = module.norm2, held_by(module).ways
        self.eps = module.norm1.eps
        self.ops = ways.of(x_BLD).ops
        self.attn1 = attn1
        self.attn2 = _Reads(attn2)
        self.norm2 = None if isinstance(norm2, nn.Identity) else norm2
        self.ffn = module.ffn


class TakenBlock(nn.Module):
    """Mixin of WanTransformerBlock and of the classes that are the same."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        """hidden_states (B, L, D) -> (B, L, D); temb (B, 6, D), or (B, M, 6, D) with an entry for L/M tokens each."""
        if is_traced() or refuses_block(self, hidden_states, temb, encoder_hidden_states):
            each = _for_each_token(temb, hidden_states.shape[1])
            plain: Tensor = super().forward(hidden_states, encoder_hidden_states, each, rotary_emb)
            return plain
        return compute_block(
            self, hidden_states, encoder_hidden_states, modulation_of(self, hidden_states, temb), rotary_emb
        )


class TakenVaceBlock(nn.Module):
    """Mixin of WanVACETransformerBlock: a block over the control's tokens, with a projection at either end."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        control_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
    ) -> tuple[Tensor | None, Tensor]:
        """Return the hint for the video's tokens, and the control's tokens, both (B, L, D)."""
        if is_traced() or refuses_block(self, control_hidden_states, temb, encoder_hidden_states, hidden_states):
            given = hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb
            plain: tuple[Tensor | None, Tensor] = super().forward(*given)
            return plain
        module: Any = self
        control = control_hidden_states
        if module.proj_in is not None:
            control = module.proj_in(control) + hidden_states
        control = compute_block(self, control, encoder_hidden_states, modulation_of(self, control, temb), rotary_emb)
        return None if module.proj_out is None else module.proj_out(control), control


class TakenSkyReelsBlock(nn.Module):
    """Mixin of SkyReelsV2TransformerBlock: its self-attention may have a mask, its tokens timesteps of their own."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """hidden_states (B, L, D) -> (B, L, D); temb (B, 6, D), or (B, 6, L, D) with an entry for each token."""
        if is_traced() or refuses_block(self, hidden_states, temb, encoder_hidden_states):
            plain: Tensor = super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb, attention_mask)
            return plain
        by_token = temb if temb.ndim == 3 else temb.transpose(1, 2)
        modulation = modulation_of(self, hidden_states, by_token)
        return compute_block(self, hidden_states, encoder_hidden_states, modulation, rotary_emb, mask=attention_mask)


class TakenFeedForward(nn.Module):
    """Mixin of FeedForward with GELU in its tanh form: its wide activation exists for some tokens at a time."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        if is_traced() or args or kwargs or _refuses_mlp(self, hidden_states):  # not told: the layers do it as well
            plain: Tensor = super().forward(hidden_states, *args, **kwargs)
            return plain
        module: Any = self
        first, _, last = module.net
        linear = first.proj
        ways: Ways = held_by(self).ways
        return ways.of(hidden_states).ops.mlp(hidden_states, linear.weight, linear.bias, last.weight, last.bias)


def compute_block(
    module: Any, x_BLD: Tensor, context_BSD: Tensor, modulation: Sequence[Tensor], rotary_emb: Any, *, mask: Any = None
) -> Tensor:
    """A block of a tree by our equations: x_BLD -> x_BLD. `modulation`: see `modulation_of`."""
    return BoundBlock(
        module,
        x_BLD,
        lambda normed_BLD, rope: module.attn1(normed_BLD, None, mask, rope),
        lambda normed_BLD, context: module.attn2(normed_BLD, context, None, None),
    ).forward(x_BLD, modulation, rotary_emb, context_BSD)


def modulation_of(module: Any, x_BLD: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """The six of a block: (B, 1, D), or of temb (B, M, 6, D) either (B, L, D) or (B, M, 1, D)."""
    table_16D: Tensor = module.scale_shift_table
    if temb.ndim == 3:
        return (table_16D + temb.float()).chunk(6, dim=1)
    entries = (table_16D[:, None] + temb.float()).unbind(2)
    is_each = temb.shape[1] == x_BLD.shape[1]
    return entries if is_each else tuple(entry.unsqueeze(2) for entry in entries)


def _for_each_token(temb: Tensor, length: int) -> Tensor:
    """(B, M, 6, D) as (B, L, 6, D); others stay."""
    if temb.ndim == 3 or temb.shape[1] == length:
        return temb
    return temb.repeat_interleave(length // temb.shape[1], dim=1)


def refuses_block(module: Any, x: Tensor, temb: Tensor, *others: Tensor) -> bool:
    """Whether a block computes as Diffusers has it; the reason is told."""
    reason = first_reason(_reasons(module, x, temb, others))
    if reason is not None:
        held_by(module).ways.told.tell_plain(type(module).__name__, reason)
    return reason is not None


def _reasons(module: Any, x: Tensor, temb: Tensor, others: Sequence[Tensor]) -> Iterator[str | None]:
    yield refuses_method(plain_class(type(module)), "forward")
    yield refuses_input(module, x, temb, *others)
    if len({given.shape[0] for given in (x, temb, *others)}) > 1:
        yield "tokens, timesteps and texts come in different numbers"
    norm1, norm2, norm3 = module.norm1, module.norm2, module.norm3
    yield refuses_layer(norm1, FP32LayerNorm)
    yield refuses_layer(norm2, FP32LayerNorm, nn.Identity)
    yield refuses_layer(norm3, FP32LayerNorm)
    affine = [] if isinstance(norm2, nn.Identity) else [norm2]
    if len({norm.eps for norm in (norm1, *affine, norm3)}) > 1 or any(map(has_affine, (norm1, norm3))):
        yield "its norms are not those of Wan"
    weights = [weight for norm in affine for weight in (norm.weight, norm.bias)]
    yield refuses_weights((module.scale_shift_table, temb, *weights), x)


def _refuses_mlp(module: Any, x: Tensor) -> str | None:
    return first_reason(_reasons_of_mlp(module, x))


def _reasons_of_mlp(module: Any, x: Tensor) -> Iterator[str | None]:
    ways: Ways = held_by(module).ways
    yield refuses_input(module, x)
    yield refuses_method(plain_class(type(module)), "forward")
    if ways.of(x).ops.mlp is mlp:
        yield "nothing is gained"
    layers = tuple(module.net)
    kinds = GELU, nn.Dropout, nn.Linear
    yield "other layers" if len(layers) != len(kinds) else None
    yield from map(refuses_layer, layers, kinds)
    first, dropout, last = layers
    linear = first.proj
    yield refuses_method(GELU, "gelu")
    yield refuses_layer(linear, nn.Linear)
    if first.approximate != "tanh" or (dropout.p and dropout.training):
        yield "other layers"
    yield refuses_weights((linear.weight, linear.bias, last.weight, last.bias), x, same_dtype=True)
