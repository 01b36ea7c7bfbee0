"""What an opened checkpoint is, whatever layout its files have: its components, and what goes for all of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frameloom.weights.header import TensorEntry

JsonObject = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One network of a checkpoint, or what goes with one: a tokenizer or image processor has no weight files.

    `folder`: where its files are. `described_by`: the file that its config comes from, for messages.
    """

    name: str
    folder: Path
    described_by: Path
    class_name: str
    config: JsonObject
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.size_bytes for entry in self.tensors.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checked checkpoint: what its JSON files say, where its tensors lie. `name` is as the user gave it."""

    path: Path
    name: str
    index: JsonObject
    pipeline: str
    boundary_ratio: float | None  # part of the noise schedule done by `transformer`, the rest by `transformer_2`
    expand_timesteps: bool  # one timestep per token (Wan 2.2 TI2V-5B)
    scheduler: JsonObject
    defaults: JsonObject  # frameloom.json, unchecked (see models/defaults.py); empty when there is none
    components: Mapping[str, Component]
