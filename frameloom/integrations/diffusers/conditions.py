"""What a denoiser of Diffusers makes beside its blocks: embedded texts and rotary tables. Nothing is kept."""

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frameloom.integrations.diffusers.attention import as_table
from frameloom.integrations.diffusers.plain import (
    first_reason,
    is_hooked,
    is_traced,
    refuses_input,
    refuses_layer,
    refuses_method,
)
from frameloom.integrations.diffusers.swap import held_by, is_swapped, plain_class
from frameloom.integrations.diffusers.ways import Padding, Ways
from frameloom.models.wan_dit import collapse_padding
from frameloom.ops.rope import RotaryTable


class TakenTextEmbedder(nn.Module):
    """Mixin of the layers that bring a text to the width of a network: of its padding one position is embedded.

    Where the padding begins is read at each call, and only of a text on the CPU: others would make the host wait.
    """

    def forward(self, caption: Tensor) -> Tensor:
        """(B, S, E) -> (B, S, D)."""
        ways: Ways = held_by(self).ways
        if is_traced() or first_reason(_reasons(self, ways, caption)):
            plain: Tensor = super().forward(caption)
            return plain
        return _embed(ways, caption, super().forward)


def _embed(ways: Ways, text_BSE: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Embedded, and known by its padding to the blocks; as long as ever, for whoever else reads it."""
    short_BNE, bias_N = collapse_padding(text_BSE)
    if bias_N is None:
        return embed(text_BSE)
    short_BND = embed(short_BNE)
    rest_BSD = short_BND[:, -1:].expand(-1, text_BSE.shape[1] - short_BND.shape[1], -1)
    text_BSD = torch.cat((short_BND, rest_BSD), dim=1)
    ways.paddings.put(text_BSD, Padding(0, short_BND.shape[1], bias_N))
    return text_BSD


def _reasons(module: Any, ways: Ways, caption: Tensor) -> Iterator[str | None]:
    yield None if ways.collapses_padding else "padding has to be counted as it is"
    yield refuses_input(module, caption)
    yield None if caption.device.type == "cpu" and caption.ndim == 3 else "its padding cannot be read"
    yield refuses_method(plain_class(type(module)), "forward")
    yield from (refuses_layer(layer, nn.Linear, nn.GELU) for layer in (module.linear_1, module.act_1, module.linear_2))


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldTables:
    """What a taken module of rotary tables holds: the network that asks for them, as long as it lives."""

    network: weakref.ref[Any]

    def release(self) -> None:
        """There is nothing to let go."""


class TakenRotary(nn.Module):
    """Mixin of the modules that make rotary tables: each pair's angle once."""

    def forward(self, hidden_states: Tensor) -> Any:
        """Latents (B, C, T, H, W) -> cosines and sines: a RotaryTable, or (1, L, 1, K) each where others see them."""
        make = functools.partial(super().forward, hidden_states)
        network = held_by(self).network()
        if is_traced() or is_hooked(self) or refuses_input(self, hidden_states) or _is_seen(network):
            return make()
        methods = (refuses_method(plain_class(type(module)), "forward") for module in (network, self))
        if first_reason(methods):
            return make()
        return RotaryTable(*(angles.contiguous() for angles in as_table(make())))


def _is_seen(network: Any) -> bool:
    """Whether somebody reads what a network's blocks are handed: a hook, or a layer that is not ours."""
    if network is None:
        return True
    blocks = *network.blocks, *getattr(network, "vace_blocks", ())
    readers: Iterator[Any] = (part for block in blocks for part in (block, getattr(block, "attn1", None)))
    return any(not is_swapped(part) or is_hooked(part) for part in readers)
