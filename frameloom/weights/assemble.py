"""Makes a checkpoint of components that no model_index.json lists: what they are says how they are used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frameloom.errors import CheckpointError
from frameloom.models.defaults import boundary_ratio_of, scheduler_of
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.weights.checkpoint import Checkpoint, Component, JsonObject

REQUIRED = ("transformer", "vae", "text_encoder", "tokenizer")
_OPTIONS = {
    "vae": "--vae wan_2.1_vae.safetensors",
    "text_encoder": "--text-encoder umt5_xxl_fp16.safetensors",
    "tokenizer": "--tokenizer FOLDER",
    "transformer": "--transformer FILE",
    "image_encoder": "--image-encoder clip_vision_h.safetensors",
}


def assemble(components: Mapping[str, Component], *, facts: JsonObject, name: str, path: Path) -> Checkpoint:
    """A checkpoint of loose components. `facts`: what their files say of scheduler, boundary and defaults, if anything.

    Raises CheckpointError, naming the options to give, where components are missing.
    """
    if missing := lacking(components):
        raise CheckpointError(_what_lacks(name, components, missing))
    transformer = components["transformer"]
    spec = TransformerSpec.from_config(transformer.config, where=str(transformer.described_by))
    is_pair = "transformer_2" in components
    per_token = facts.get("expand_timesteps", bool(components["vae"].config.get("is_residual")))
    pipeline = facts.get("pipeline", _pipeline(spec, expand_timesteps=bool(per_token)))
    scheduler = facts.get("scheduler", scheduler_of(spec, expand_timesteps=bool(per_token)))
    return Checkpoint(
        path=path,
        name=name,
        index={},
        pipeline=pipeline,
        boundary_ratio=facts.get("boundary_ratio", boundary_ratio_of(spec)) if is_pair else None,
        expand_timesteps=bool(per_token),
        scheduler=scheduler,
        defaults=facts.get("defaults", {}),
        components=components,
    )


def lacking(components: Mapping[str, Component]) -> list[str]:
    """The components that a checkpoint still needs."""
    needed = list(REQUIRED)
    transformer = components.get("transformer")
    if transformer is not None and transformer.config.get("image_dim") is not None:
        needed.append("image_encoder")
    return [part for part in needed if part not in components]


def facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `assemble` cannot see in the components, as it takes it."""
    return {
        "pipeline": checkpoint.pipeline,
        "boundary_ratio": checkpoint.boundary_ratio,
        "expand_timesteps": checkpoint.expand_timesteps,
        "scheduler": dict(checkpoint.scheduler),
        "defaults": dict(checkpoint.defaults),
    }


def _pipeline(spec: TransformerSpec, *, expand_timesteps: bool) -> str:
    if isinstance(spec, VaceSpec):
        return "WanVACEPipeline"
    takes_image = spec.image_dim is not None or spec.in_channels != spec.out_channels
    return "WanImageToVideoPipeline" if takes_image and not expand_timesteps else "WanPipeline"


def _what_lacks(name: str, components: Mapping[str, Component], missing: list[str]) -> str:
    holds = " and ".join(part.replace("_", " ") for part in components if part != "tokenizer") or "no network"
    lacks = " and ".join(part.replace("_", " ") for part in missing)
    give = ", ".join(_OPTIONS[part] for part in missing)
    return f"'{name}' holds the {holds} alone; the {lacks} must be given too: {give}"
