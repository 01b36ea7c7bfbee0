"""What an engine will be, by its checkpoint's descriptions alone: networks, defaults, dtypes. No weight is read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from frameloom.errors import CheckpointError
from frameloom.models.clip import image_tokens
from frameloom.models.defaults import Defaults, Preset, defaults_for
from frameloom.models.spec import TransformerSpec, VaceSpec, VaeSpec
from frameloom.pipeline.conditions import Takes, channels_beside_image, pictures_taken, size_rules
from frameloom.pipeline.vace import control_channels
from frameloom.platform.device import DTYPES, choose_dtype
from frameloom.sampling.unipc import make_sampler
from frameloom.types import SizeRules
from frameloom.weights.checkpoint import Checkpoint, Component
from frameloom.weights.load import Quantized, held_bytes
from frameloom.weights.tensors import is_quantized

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "quantized": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Blueprint:
    """A checkpoint whose parts fit together, and what is made of it.

    `experts`: the transformers, for high noise first. `dtype`: of what is computed, but for the VAE. `why_dtype`: a
    phrase for the log.
    """

    checkpoint: Checkpoint
    experts: tuple[TransformerSpec, ...]
    vae: VaeSpec
    defaults: Defaults
    dtype: torch.dtype
    vae_dtype: torch.dtype
    why_dtype: str

    @property
    def transformers(self) -> list[Component]:
        """Where the weights of the experts lie."""
        return [self.checkpoint.components[name] for name in _experts_in(self.checkpoint)]

    @property
    def boundary_ratio(self) -> float | None:
        """Where the second expert takes over; None of a single one."""
        return self.checkpoint.boundary_ratio if len(self.experts) > 1 else None

    @property
    def size_rules(self) -> SizeRules:
        """The sizes that can be computed."""
        return size_rules(self.experts[0], self.vae)

    @property
    def takes(self) -> Takes:
        """The pictures that the checkpoint starts from."""
        return pictures_taken(self.experts[0], self.vae, expand_timesteps=self.checkpoint.expand_timesteps)

    def held_bytes(self, quantized: Quantized) -> int:
        """Of the weights of all experts, once they are loaded."""
        return sum(held_bytes(part, self.dtype, quantized) for part in self.transformers)


def draw(
    checkpoint: Checkpoint, device: torch.device, *, dtype: str = "auto", preset: Preset | None = None
) -> Blueprint:
    """Read and check the descriptions of a checkpoint; `preset` replaces its scheduler and defaults.

    Raises CheckpointError for what cannot be computed and for parts that do not belong together, RequestError for a
    dtype that the device lacks.
    """
    if preset is not None:
        own = {**checkpoint.defaults, **preset.defaults}
        checkpoint = replace(checkpoint, scheduler=preset.scheduler, defaults=own)
    make_sampler(checkpoint.scheduler, 1)  # so that a scheduler we cannot compute is refused before weights are read
    names = _experts_in(checkpoint)
    specs = tuple(_transformer_spec(checkpoint.components[name]) for name in names)
    vae = checkpoint.components["vae"]
    vae_spec = VaeSpec.from_config(vae.config, where=str(vae.described_by))
    _check_fit(checkpoint, dict(zip(names, specs, strict=True)), vae_spec)
    defaults = defaults_for(
        specs[0],
        two_experts=len(names) > 1,
        expand_timesteps=checkpoint.expand_timesteps,
        own=checkpoint.defaults,
    )
    preferred = preferred_dtype(defaults, checkpoint.components[names[0]])
    compute, why = choose_dtype(dtype, device, preferred=preferred)
    return Blueprint(
        checkpoint=checkpoint,
        experts=specs,
        vae=vae_spec,
        defaults=defaults,
        dtype=compute,
        vae_dtype=torch.float32 if dtype == "auto" else compute,
        why_dtype=why,
    )


def _experts_in(checkpoint: Checkpoint) -> list[str]:
    return [name for name in ("transformer", "transformer_2") if name in checkpoint.components]


def _check_fit(checkpoint: Checkpoint, experts: Mapping[str, TransformerSpec], vae: VaeSpec) -> None:
    """Raise CheckpointError for parts that each are valid and do not belong together."""
    first = experts["transformer"]
    text_width = checkpoint.components["text_encoder"].config.get("d_model")
    picture = 3 * (vae.patch_size or 1) ** 2
    pairs: list[tuple[str, object, str, object]] = [
        ("vae in_channels", vae.in_channels, "the channels of a picture", picture),
        ("vae out_channels", vae.out_channels, "the channels of a picture", picture),
    ]
    for name, spec in experts.items():
        takes_image = spec.in_channels == channels_beside_image(vae) and not isinstance(spec, VaceSpec)
        pairs += [
            (f"{name} in_channels", spec.in_channels, "transformer in_channels", first.in_channels),
            (f"{name} in_channels", spec.in_channels if not takes_image else vae.z_dim, "vae z_dim", vae.z_dim),
            (f"{name} out_channels", spec.out_channels, "vae z_dim", vae.z_dim),
            (f"{name} text_dim", spec.text_dim, "text_encoder d_model", text_width),
            (f"{name} patch_size", spec.patch_size, "transformer patch_size", first.patch_size),
            (f"{name} image_dim", spec.image_dim, "transformer image_dim", first.image_dim),
            (f"{name} VACE layers", _vace_layers(spec), "transformer VACE layers", _vace_layers(first)),
        ]
        if isinstance(spec, VaceSpec):
            pairs.append((f"{name} vace_in_channels", spec.vace_in_channels, "a control", control_channels(vae)))
        if spec.image_dim is not None and "image_encoder" in checkpoint.components:
            pairs += _of_images(name, spec, checkpoint.components["image_encoder"])
    for what, value, other, expected in pairs:
        if value != expected:
            raise CheckpointError(
                f"'{checkpoint.name}' is put together from parts that do not fit: {what} is {value}, {other} "
                f"{expected}; take all parts from one checkpoint"
            )


def _vace_layers(spec: TransformerSpec) -> int:
    return len(spec.vace_layers) if isinstance(spec, VaceSpec) else 0


def _of_images(name: str, spec: TransformerSpec, encoder: Component) -> list[tuple[str, object, str, object]]:
    """What must agree between a transformer and its image encoder; a table of positions is for two images."""
    tokens, width = image_tokens(encoder.config, where=str(encoder.described_by))
    pairs: list[tuple[str, object, str, object]] = [(f"{name} image_dim", spec.image_dim, "image_encoder width", width)]
    if spec.pos_embed_seq_len is not None:
        both = "the tokens of two images"
        pairs.append((f"{name} pos_embed_seq_len", spec.pos_embed_seq_len, both, 2 * tokens))
    return pairs


def _transformer_spec(component: Component) -> TransformerSpec:
    return TransformerSpec.from_config(component.config, where=str(component.described_by))


def preferred_dtype(defaults: Defaults, transformer: Component) -> torch.dtype:
    """The dtype the checkpoint is documented for, else the one most of its transformer is stored in."""
    if defaults.dtype is not None:
        return DTYPES[defaults.dtype]
    sizes: dict[str, int] = {}
    for entry in transformer.tensors.values():
        kind = "quantized" if is_quantized(entry) else entry.dtype
        sizes[kind] = sizes.get(kind, 0) + math.prod(entry.shape)
    stored = max(sizes, key=sizes.__getitem__, default="F32")
    return _STORED.get(stored, torch.float32)
