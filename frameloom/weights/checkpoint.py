"""What an opened checkpoint is, whatever layout its files have: its components, and what goes for all of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frameloom.errors import CheckpointError
from frameloom.weights.header import TensorEntry

JsonObject = Mapping[str, Any]

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "WanVideoToVideoPipeline")
"""The pipelines of Diffusers whose checkpoints this engine computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One network of a checkpoint, or what goes with one: a tokenizer or image processor has no weight files.

    `folder`: where its files are. `described_by`: the file that its config comes from, for messages. `vocabulary`: of a
    tokenizer that lies in a weight file (see vocabulary.py).
    """

    name: str
    folder: Path
    described_by: Path
    class_name: str
    config: JsonObject
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    vocabulary: TensorEntry | JsonObject | None = None

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


def checkpoint_facts(facts: Any, *, where: Path) -> JsonObject:
    """What a file says of its whole checkpoint, each value checked. Raises CheckpointError.

    pipeline, boundary_ratio and expand_timesteps are those of a model_index.json; scheduler and defaults are objects
    that sampling and models judge.
    """
    if not isinstance(facts, dict):
        raise CheckpointError(f"{where} says no JSON object of its checkpoint; convert it again")
    if facts.get("pipeline", PIPELINES[0]) not in PIPELINES:
        raise CheckpointError(f"{where} asks for {facts['pipeline']!r}; supported pipelines are {', '.join(PIPELINES)}")
    for key in ("scheduler", "defaults"):
        if not isinstance(facts.get(key, {}), dict):
            raise CheckpointError(f"{where} has {key} {facts[key]!r}; it must be a JSON object")
    checked = {
        "boundary_ratio": boundary_ratio(facts, where=where),
        "expand_timesteps": expand_timesteps(facts, where=where),
    }
    return {**facts, **{key: value for key, value in checked.items() if key in facts}}


def boundary_ratio(facts: JsonObject, *, where: Path) -> float | None:
    """The checked boundary_ratio of a model_index.json; None without. Raises CheckpointError."""
    value = facts.get("boundary_ratio")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise CheckpointError(f"{where} has boundary_ratio {value!r}; it must be null or between 0 and 1, as 0.875")
    return float(value)


def expand_timesteps(facts: JsonObject, *, where: Path) -> bool:
    """The checked expand_timesteps of a model_index.json. Raises CheckpointError."""
    value = facts.get("expand_timesteps")
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where} has expand_timesteps {value!r}; it must be true or false")
    return bool(value)
