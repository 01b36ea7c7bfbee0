"""What a denoiser of Diffusers makes anew at every step though it does not change: embedded texts, rotary tables."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from frameloom.integrations.diffusers.attention import ForgetsReplaced, as_table
from frameloom.integrations.diffusers.plain import first_reason, is_hooked, is_traced, refuses_input, refuses_layer
from frameloom.integrations.diffusers.remembered import Remembered, State, state_of
from frameloom.integrations.diffusers.swap import held_by
from frameloom.integrations.diffusers.ways import PROMPTS_KEPT, Padding, Ways
from frameloom.models.wan_dit import ROPE_TABLES_KEPT, collapse_padding
from frameloom.ops.rope import RotaryTable


class HeldTexts:
    """The embedded texts of a transformer."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways
        self.embedded: Remembered[Tensor] = Remembered(PROMPTS_KEPT)

    def forget(self) -> None:
        """A layer was replaced: what it computed may not hold any more."""
        self.embedded.clear()
        self.ways.forget()

    release = forget


class TakenTextEmbedder(ForgetsReplaced):
    """Mixin of the layers that bring a text to the width of a network: once for each text that lives."""

    def forward(self, caption: Tensor) -> Tensor:
        """(B, S, E) -> (B, S, D)."""
        embed = functools.partial(super().forward, caption)
        if is_traced() or not held_by(self).ways.remembers_prompts or _refuses_text(self, caption):
            plain: Tensor = embed()
            return plain
        held: HeldTexts = held_by(self)
        return held.embedded.get(caption, list(self.parameters()), functools.partial(_embed, held.ways, caption, embed))


class HeldTables:
    """The rotary tables that a transformer used last."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways
        self._tables: dict[tuple[torch.Size, torch.device], tuple[State | None, RotaryTable]] = {}

    def table(self, module: Any, x_BCTHW: Tensor, make: Any) -> RotaryTable:
        """For latents like these, on their device."""
        key, state = (x_BCTHW.shape[2:], x_BCTHW.device), state_of(module.buffers())
        known = self._tables.pop(key, None)
        if known is None or known[0] != state or state is None:
            with torch.inference_mode(False):  # so that a later training step may use it too
                known = state, RotaryTable(*(angles.contiguous() for angles in as_table(make())))
        while len(self._tables) >= ROPE_TABLES_KEPT:
            del self._tables[next(iter(self._tables))]  # the one that was not used for longest
        self._tables[key] = known
        return known[1]

    def release(self) -> None:
        """Let the tables go."""
        self._tables.clear()


class TakenRotary(nn.Module):
    """Mixin of the modules that make rotary tables: each pair's angle once, and not at every step."""

    def forward(self, hidden_states: Tensor) -> Any:
        """Latents (B, C, T, H, W) -> cosines and sines: a RotaryTable, or (1, L, 1, K) each where hooks see them."""
        make = functools.partial(super().forward, hidden_states)
        if is_traced() or is_hooked(self) or refuses_input(self, hidden_states):
            return make()
        held: HeldTables = held_by(self)
        return held.table(self, hidden_states, make)


def _embed(ways: Ways, text_BSE: Tensor, embed: Any) -> Tensor:
    """Embedded, and known as a text: of its padding one position is enough."""
    text_BSD: Tensor = embed()
    short, bias_S = collapse_padding(text_BSE) if ways.collapses_padding else (text_BSE, None)
    ways.padding.put(text_BSD, Padding(short.shape[1], bias_S))
    return text_BSD


def _refuses_text(module: Any, caption: Tensor) -> str | None:
    layers = module.linear_1, module.act_1, module.linear_2
    plain = (refuses_layer(layer, nn.Linear, nn.GELU) for layer in layers)
    return refuses_input(module, caption) or first_reason(plain)
