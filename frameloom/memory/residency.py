"""Where the weights of each component are while a request is answered, in how many bytes, and why.

What stays when the weights of its linear layers are away (norms, biases, embedders) is small.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.umt5 import Umt5Encoder
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.quantized import Linear
from frameloom.types import Residence

_FOR_WEIGHTS: Final = 0.7  # of the memory: the rest is for what is computed
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
    units: tuple[int, ...]
    slots: int
    tables: int = 0

    @classmethod
    def of(cls, network: nn.Module, chain: Chain, size_bytes: Callable[[str, Tensor], int]) -> "Footprint":
        """Of a network, which may be on the meta device. `size_bytes`: what a parameter takes, by its name."""
        sizes = {name: size_bytes(name, value) for name, value in network.named_parameters()}
        units = tuple(sum(sizes[name] for name in unit) for unit in chain.units)
        tables = sum(sizes[name] for name in chain.tables)
        return cls(stays=sum(sizes.values()) - sum(units) - tables, units=units, slots=chain.slots, tables=tables)


def resident_bytes(component: Footprint, residence: Residence, *, in_its_stage: bool = True) -> int:
    """What the weights of a component take at most, in its stage or between."""
    if residence is Residence.RESIDENT:
        return component.stays + component.tables + sum(component.units)
    if not in_its_stage:
        return component.stays
    if residence is Residence.MOVED:
        return component.stays + sum(component.units)
    return component.stays + component.slots * max(component.units, default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """Where text encoder and transformers are, and the reason, for the log."""

    text: Residence
    transformer: Residence
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """What is to be arranged: the text encoder, the experts, and the bytes of all else that stays."""

    text: Footprint
    experts: Sequence[Footprint]
    others_bytes: int

    def peak_bytes(self, text: Residence, transformer: Residence) -> int:
        """The most that all weights take together. Of experts that are moved in, one is there at a time."""
        resting = sum(resident_bytes(expert, transformer, in_its_stage=False) for expert in self.experts)
        coming = max(
            resident_bytes(expert, transformer) - resident_bytes(expert, transformer, in_its_stage=False)
            for expert in self.experts
        )
        reading = resident_bytes(self.text, text) + resting
        denoising = resident_bytes(self.text, text, in_its_stage=False) + resting + coming
        return self.others_bytes + max(reading, denoising)


def as_asked(asked: Mapping[str, Residence]) -> Arrangement:
    """Where nothing bounds the memory: resident, but for what was asked otherwise."""
    text, transformer = (asked.get(name, Residence.RESIDENT) for name in ("text", "transformer"))
    reason = "asked for" if asked else "no bound was given for the memory"
    return Arrangement(text=text, transformer=transformer, reason=reason)


def arrange(components: Components, asked: Mapping[str, Residence], memory: int) -> Arrangement:
    """The first arrangement that leaves room to compute in `memory` bytes, with what was asked for."""
    room = round(_FOR_WEIGHTS * memory)
    for first, second in _candidates(components):
        text, transformer = asked.get("text", first), asked.get("transformer", second)
        needed = components.peak_bytes(text, transformer)
        if needed <= room:
            break
    resident = components.peak_bytes(Residence.RESIDENT, Residence.RESIDENT)
    fits = "" if needed <= room else ", which is more, and there is no smaller arrangement"
    reason = (
        f"weights take {needed / 1e9:.2f} GB at a time (all of them {resident / 1e9:.2f} GB), and of the "
        f"{memory / 1e9:.2f} GB of memory {room / 1e9:.2f} GB are for weights{fits}"
    )
    return Arrangement(text=text, transformer=transformer, reason=reason)


def _candidates(components: Components) -> list[tuple[Residence, Residence]]:
    """The fastest first. A text encoder works once per request: it is streamed before anything else."""
    resident, moved, streamed = Residence
    shared = [(streamed, moved)] if len(components.experts) > 1 else []
    return [(resident, resident), (streamed, resident), *shared, (streamed, streamed)]
