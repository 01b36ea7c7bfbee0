"""Where the weights of all components are while a request is answered, and in how many bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from frameloom.memory.lane import PINNED_BYTES
from frameloom.memory.residency import Footprint, resident_bytes
from frameloom.types import Residence, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the weights are: of the text encoder, and of the transformers."""

    text: Residence = Residence.RESIDENT
    transformer: Residence = Residence.RESIDENT

    def of(self, name: str) -> Residence:
        """Of a component; image encoder and VAE are small beside the others, and resident."""
        if name.startswith("transformer"):
            return self.transformer
        return self.text if name == "text_encoder" else Residence.RESIDENT

    @property
    def is_resident(self) -> bool:
        """Whether everything stays where it is."""
        return self.text is self.transformer is Residence.RESIDENT

    @property
    def asked(self) -> str:
        """As an option says it: "text=streamed,transformer=moved"."""
        return f"text={self.text},transformer={self.transformer}"

    def __str__(self) -> str:
        return (
            "all weights resident" if self.is_resident else f"text encoder {self.text}, transformer {self.transformer}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Those of one component, and the stages that compute with them."""

    name: str
    footprint: Footprint
    stages: tuple[Stage, ...]

    def held_bytes(self, stage: Stage, layout: Layout) -> int:
        """What they take of the device in a stage."""
        return resident_bytes(self.footprint, layout.of(self.name), in_its_stage=stage in self.stages)


def layouts(num_experts: int, asked: Mapping[str, Residence]) -> Iterator[Layout]:
    """The fastest first, with what was asked for. The text encoder works once a request: it gives way first."""
    resident, moved, streamed = Residence
    every = [
        {"text": resident, "transformer": resident},
        {"text": streamed, "transformer": resident},
        *([{"text": streamed, "transformer": moved}] if num_experts > 1 else []),  # in one place, changed once
        {"text": streamed, "transformer": streamed},
    ]
    yield from dict.fromkeys(Layout(**{**one, **asked}) for one in every)


def held_in(stage: Stage, weights: Sequence[Weights], layout: Layout) -> int:
    """Bytes of all weights that are on the device in a stage. Experts that come and go share a place: the largest's."""
    held = sum(part.held_bytes(stage, layout) for part in weights)
    experts = [part for part in weights if part.name.startswith("transformer") and stage in part.stages]
    if layout.transformer is Residence.RESIDENT or len(experts) < 2:
        return held
    coming = [part.held_bytes(stage, layout) - part.footprint.stays for part in experts]
    return held - sum(coming) + max(coming)


def pinned_bytes(layout: Layout) -> int:
    """What the host pins on the ways of weights that come and go; those that wait lie in their files."""
    ways = (layout.text, layout.transformer)
    return sum(PINNED_BYTES for where in ways if where is not Residence.RESIDENT)
