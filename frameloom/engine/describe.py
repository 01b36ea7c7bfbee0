"""Says what a checkpoint, or any weight file, holds without loading it: the headers of its files are enough."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frameloom.models.defaults import defaults_for
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.types import Expert
from frameloom.weights.assemble import assemble, lacking
from frameloom.weights.checkpoint import Checkpoint, Component
from frameloom.weights.configs import model_name
from frameloom.weights.experts import is_high
from frameloom.weights.hub_fetch import OnBytes
from frameloom.weights.lora import describe_lora
from frameloom.weights.source import Source, open_checkpoint, open_loose


def describe_checkpoint(
    model: Source,
    *,
    parts: Mapping[str, Source] | None = None,
    variant: str = "",
    on_bytes: OnBytes | None = None,
) -> dict[str, Any]:
    """Facts as plain data; `variant` and `on_bytes` are those of `open_checkpoint`. Raises CheckpointError.

    Of a checkpoint: pipeline, components, defaults. Of files that are part of one: their components, and what it
    "lacks". Of a LoRA ("kind"): its keys and ranks. Of a hub id only the JSON files and the headers of the weight files
    are fetched.
    """
    path = Path(os.path.expanduser(os.fspath(model)))
    if path.is_file() and path.name != "model_index.json" and (lora := describe_lora(path)) is not None:
        return lora
    if not parts and path.exists() and not (path / "model_index.json").exists():
        found = open_loose(path, variant=variant)
        name = os.fspath(model)
        if lacks := lacking(found.components):
            return {"model": name, "path": str(path), "lacks": lacks, **_components(found.components)}
        return _whole(assemble(found.components, facts=found.facts, name=name, path=path))
    return _whole(open_checkpoint(model, parts=parts, variant=variant, fetch_weights=False, on_bytes=on_bytes))


def _whole(checkpoint: Checkpoint) -> dict[str, Any]:
    parts = checkpoint.components
    facts: dict[str, Any] = {
        "model": checkpoint.name,
        "path": str(checkpoint.path),
        "pipeline": checkpoint.pipeline,
        "scheduler": checkpoint.scheduler.get("_class_name"),
        **_components(parts),
    }
    transformer = parts["transformer"]
    spec = TransformerSpec.from_config(transformer.config, where=str(transformer.described_by))
    defaults = defaults_for(
        spec,
        two_experts="transformer_2" in parts,
        expand_timesteps=checkpoint.expand_timesteps,
        own=checkpoint.defaults,
    )
    facts["defaults"] = dataclasses.asdict(defaults)
    if defaults.flow_shift is None:  # then the scheduler's own value is computed with
        facts["defaults"]["flow_shift"] = checkpoint.scheduler.get("flow_shift", checkpoint.scheduler.get("shift"))
    if checkpoint.boundary_ratio is not None:
        facts["boundary_ratio"] = checkpoint.boundary_ratio
    return facts


def _components(parts: Mapping[str, Component]) -> dict[str, Any]:
    """The networks among them, and their sums."""
    is_pair = "transformer_2" in parts
    found = [_component(part, is_pair=is_pair) for part in parts.values() if part.files]
    return {
        "components": found,
        "bytes": sum(part["bytes"] for part in found),
        "parameters": sum(part["parameters"] for part in found),
    }


def _what(part: Component, *, is_pair: bool) -> str:
    """What users call a network; its config may leave out what is the reference's default."""
    config, where = part.config, str(part.described_by)
    if part.name.startswith("transformer"):
        spec = TransformerSpec.from_config(config, where=where)
        expert, how = _expert(part, is_pair=is_pair)
        name = model_name("transformer", {**dataclasses.asdict(spec), **config}, expert=expert)
        return f"{name}{how}" if name.endswith("expert") else name
    if part.name == "vae":
        return model_name("vae", dataclasses.asdict(VaeSpec.from_config(config, where=where)))
    return model_name(part.name, config.get("vision_config", config))


def _expert(part: Component, *, is_pair: bool) -> tuple[Expert | None, str]:
    """Which noise expert a transformer is said to be, and how that is known: the tensors of both are alike."""
    high = is_high(part.files[0])
    named: Expert | None = None if high is None else "high" if high else "low"
    if is_pair:
        role: Expert = "low" if part.name == "transformer_2" else "high"
        return role, " by its name" if named == role else ""
    is_21 = re.search(r"2[._]1(?!\d)", part.files[0].name) is not None  # where "high" means something else
    return (None, "") if is_21 else (named, " by its name")


def _component(part: Component, *, is_pair: bool) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for entry in part.tensors.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + math.prod(entry.shape)
    return {
        "name": part.name,
        "what": _what(part, is_pair=is_pair),
        "class": part.class_name,
        "parameters": sum(dtypes.values()),
        "dtypes": sorted(dtypes, key=dtypes.__getitem__, reverse=True),
        "bytes": part.size_bytes,
        "files": len(part.files),
    }
