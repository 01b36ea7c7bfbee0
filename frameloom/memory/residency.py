"""The weights of a network that can be away: in which units they come and go, and in how many bytes.

What stays when the weights of its linear layers are away (norms, biases, embedders) is small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor, nn

from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.umt5 import Umt5Encoder
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.quantized import Linear
from frameloom.types import Residence

_Named = tuple[str, nn.Module]
_ONCE_PER_PROMPT: Final = ("attn2.to_k", "attn2.to_v", "attn2.add_k_proj", "attn2.add_v_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """The weights of a network that can be away, as names of parameters, in the order in which they compute.

    From `cycle_from` on they compute once per step. `slots`: so many units are there at a time when they are streamed.
    `tables`: embeddings, of which single rows are read.
    """

    units: tuple[tuple[str, ...], ...]
    cycle_from: int = 0
    slots: int = 2
    tables: tuple[str, ...] = ()

    def arranged(self, residence: Residence) -> "Chain":
        """As it comes and goes: all of it together where it is moved in for its stage."""
        if residence is not Residence.MOVED:
            return self
        return Chain(units=(tuple(name for unit in self.units for name in unit),), slots=1, tables=self.tables)


def chain_of_dit(dit: WanDiT) -> Chain:
    """Of every block what reads the prompt, once per request; then the rest of every block.

    Blocks beside (VACE) give their hints while a block of the network's own is at work: three are there then.
    """
    own, beside = _blocks(dit, "blocks"), _blocks(dit, "vace_blocks")
    once = [_weights(block, path, only_prompt=True) for path, block in (*own, *beside)]
    each_step = [_weights(block, path, only_prompt=False) for path, block in _in_order(dit.spec, own, beside)]
    slots = 3 if isinstance(dit.spec, VaceSpec) else 2
    return Chain(units=(*once, *each_step), cycle_from=len(once), slots=slots)


def chain_of_text_encoder(encoder: Umt5Encoder) -> Chain:
    """Its layers, and its table."""
    blocks = enumerate(encoder.encoder.block)
    units = tuple(_weights(block, f"encoder.block.{index}") for index, block in blocks)
    return Chain(units=units, tables=("shared.weight",))


def _blocks(dit: WanDiT, name: str) -> list[_Named]:
    children = dict(dit.named_children())
    return [(f"{name}.{index}", block) for index, block in children[name].named_children()] if name in children else []


def _in_order(spec: TransformerSpec, own: Sequence[_Named], beside: Sequence[_Named]) -> list[_Named]:
    """As they compute in a step: the first one beside comes first, the others after the layer that they hint at."""
    if not isinstance(spec, VaceSpec):
        return list(own)
    hinted: dict[int, _Named] = dict(zip(spec.vace_layers[1:], beside[1:], strict=True))
    found = [beside[0]]
    for layer, block in enumerate(own):
        found += [block, *([hinted[layer]] if layer in hinted else [])]
    return found


def _weights(block: nn.Module, path: str, *, only_prompt: bool | None = None) -> tuple[str, ...]:
    """The weights of its linear layers: all, those that read the prompt, or the others."""
    names = [name for name, module in block.named_modules() if isinstance(module, Linear)]
    if only_prompt is not None:
        names = [name for name in names if (name in _ONCE_PER_PROMPT) is only_prompt]
    return tuple(f"{path}.{name}.weight" for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes of a component: of what stays, of its tables, of each unit of the rest, `slots` of which are streamed."""

    stays: int
    units: tuple[int, ...] = ()
    slots: int = 0
    tables: int = 0

    @classmethod
    def of(cls, network: nn.Module, chain: Chain, size_bytes: Callable[[str, Tensor], int]) -> "Footprint":
        """Of a network, which may be on the meta device. `size_bytes`: what a parameter takes, by its name."""
        sizes = {name: size_bytes(name, value) for name, value in network.named_parameters()}
        units = tuple(sum(sizes[name] for name in unit) for unit in chain.units)
        tables = sum(sizes[name] for name in chain.tables)
        return cls(stays=sum(sizes.values()) - sum(units) - tables, units=units, slots=chain.slots, tables=tables)

    def divided(self, parts: int) -> "Footprint":
        """Of one of several ranks that have equal parts of all weights."""
        units = tuple(unit // parts for unit in self.units)
        return replace(self, stays=self.stays // parts, units=units, tables=self.tables // parts)


def resident_bytes(component: Footprint, residence: Residence, *, in_its_stage: bool = True) -> int:
    """What the weights of a component take at most, in its stage or between."""
    if residence is Residence.RESIDENT:
        return component.stays + component.tables + sum(component.units)
    if not in_its_stage:
        return component.stays
    if residence is Residence.MOVED:
        return component.stays + sum(component.units)
    return component.stays + component.slots * max(component.units, default=0)
