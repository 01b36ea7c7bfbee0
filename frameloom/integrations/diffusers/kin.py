"""Blocks that are Wan's but for their attention, which stays as Diffusers has it: Helios and AnyFlow."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.integrations.diffusers.blocks import BoundBlock, modulation_of, refuses_block
from frameloom.integrations.diffusers.plain import is_traced


class TakenHeliosBlock(nn.Module):
    """Mixin of HeliosTransformerBlock, whose tokens begin with those of the frames before."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        original_context_length: int | None = None,
    ) -> Tensor:
        """hidden_states (B, L, D) -> (B, L, D); temb (B, 6, D) or (B, L, 6, D). The last so many tokens are new."""
        if is_traced() or refuses_block(self, hidden_states, temb, encoder_hidden_states):
            given = hidden_states, encoder_hidden_states, temb, rotary_emb, original_context_length
            plain: Tensor = super().forward(*given)
            return plain
        module: Any = self
        length = original_context_length

        def to_text(normed_BLD: Tensor, context_BSD: Tensor) -> Tensor:
            """Of the new tokens alone, where the network reads the text so: to the others nothing is added."""
            past = normed_BLD.shape[1] - length if module.guidance_cross_attn and length is not None else 0
            new_BLD = normed_BLD[:, past:].contiguous()  # as the norm of these tokens alone would give them
            return F.pad(module.attn2(new_BLD, context_BSD, None, None, length), (0, 0, past, 0))

        bound = BoundBlock(
            self, hidden_states, lambda normed, rope: module.attn1(normed, None, None, rope, length), to_text
        )
        modulation = modulation_of(self, hidden_states, temb)
        return bound.forward(hidden_states, modulation, rotary_emb, encoder_hidden_states)


class TakenAnyFlowBlock(nn.Module):
    """Mixin of AnyFlowTransformerBlock, whose self-attention may keep the keys of the frames before."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        attention_mask: Any,
        kv_cache: Any = None,
        kv_cache_flag: Any = None,
    ) -> Tensor:
        """hidden_states (B, L, D) -> (B, L, D); temb (B, L, 6, D)."""
        if is_traced() or refuses_block(self, hidden_states, temb, encoder_hidden_states):
            given = hidden_states, encoder_hidden_states, temb, rotary_emb, attention_mask, kv_cache, kv_cache_flag
            plain: Tensor = super().forward(*given)
            return plain
        module: Any = self
        named = {"attention_mask": attention_mask}
        if kv_cache is not None:
            named |= {"kv_cache": kv_cache, "kv_cache_flag": kv_cache_flag}
        bound = BoundBlock(
            self,
            hidden_states,
            lambda normed, rope: module.attn1(hidden_states=normed, rotary_emb=rope, **named),
            lambda normed, context: module.attn2(hidden_states=normed, encoder_hidden_states=context),
        )
        modulation = modulation_of(self, hidden_states, temb)
        return bound.forward(hidden_states, modulation, rotary_emb, encoder_hidden_states)
