"""Says what a checkpoint holds without loading its weights: the headers of its files are enough."""

import dataclasses
import math
import os
from typing import Any

from frameloom.models.defaults import defaults_for
from frameloom.models.spec import TransformerSpec
from frameloom.weights.checkpoint import Component
from frameloom.weights.source import open_checkpoint


def describe_checkpoint(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Facts of a checkpoint as plain data: pipeline, components, defaults. Raises CheckpointError.

    Of a hub id only the JSON files and the headers of the weight files are fetched.
    """
    checkpoint = open_checkpoint(model, fetch_weights=False)
    parts = checkpoint.components
    facts: dict[str, Any] = {
        "model": checkpoint.name,
        "path": str(checkpoint.path),
        "pipeline": checkpoint.pipeline,
        "scheduler": checkpoint.scheduler.get("_class_name"),
        "components": [_component(part) for part in parts.values() if part.files],
    }
    facts["bytes"] = sum(part["bytes"] for part in facts["components"])
    facts["parameters"] = sum(part["parameters"] for part in facts["components"])
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


def _component(part: Component) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for entry in part.tensors.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + math.prod(entry.shape)
    return {
        "name": part.name,
        "class": part.class_name,
        "parameters": sum(dtypes.values()),
        "dtypes": sorted(dtypes, key=dtypes.__getitem__, reverse=True),
        "bytes": part.size_bytes,
        "files": len(part.files),
    }
