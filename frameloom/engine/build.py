"""The assembler: a checkpoint becomes a running engine. Every choice is one line of the log."""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from frameloom.config import memory_bytes
from frameloom.engine.dit import load_plain_dit, make_fast_dit
from frameloom.engine.engine import Engine
from frameloom.engine.loras import adapters_for, beside, exchange, expert_at, loras_of
from frameloom.engine.modules import fill, quantized_of
from frameloom.engine.ranks import Take, gather_ranks, own_device
from frameloom.engine.rewrites import policy_of
from frameloom.engine.vae import load_fast_vae
from frameloom.errors import CheckpointError
from frameloom.models.clip import (
    ImageEncoder,
    build_image_encoder,
    image_encoder_key,
    image_tokens,
    load_image_processor,
)
from frameloom.models.defaults import Defaults, defaults_for, preset_of
from frameloom.models.dit_rewrites import TOGETHER
from frameloom.models.encoders import (
    TextEncoder,
    build_text_encoder,
    text_encoder_keeps_fp32,
)
from frameloom.models.spec import TransformerSpec, VaceSpec, VaeSpec
from frameloom.models.umt5 import Umt5Encoder
from frameloom.pipeline.conditions import channels_beside_image
from frameloom.pipeline.vace import control_channels
from frameloom.pipeline.wan import WanPipeline
from frameloom.platform.allocator import keep_freed_memory
from frameloom.platform.device import (
    DTYPES,
    check_dtype_name,
    choose_dtype,
    memory_errors,
)
from frameloom.sampling.unipc import make_sampler
from frameloom.settings import LOGGER_NAME, launched
from frameloom.types import Lora
from frameloom.weights.checkpoint import Checkpoint, Component
from frameloom.weights.fingerprint import fingerprint
from frameloom.weights.load import Quantized, held_bytes
from frameloom.weights.source import Source, open_checkpoint
from frameloom.weights.tensors import is_quantized
from frameloom.weights.vocabulary import tokenizer_in

log = logging.getLogger(LOGGER_NAME)

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "quantized": torch.bfloat16}


def build_engine(
    model: Source | None,
    *,
    parts: Mapping[str, Source] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    exactness: str = "rounding",
    rewrites: Sequence[str] = (),
    compilation: str = "auto",
    attention: str = "auto",
    vae_memory: int | str = "auto",
    parallel: str = "auto",
    quantized: str = "keep",
    loras: Sequence[Lora | str] = (),
    preset: str | None = None,
) -> Engine:
    """Open a checkpoint, build its networks and fill them; `model` and `parts` are those of `open_checkpoint`.

    `device`: as `choose_device` takes it. `dtype`: auto, float32, bfloat16, float16; auto takes the dtype the
    checkpoint is meant for and keeps the VAE in float32, as the reference documents it. `exactness` and `rewrites`
    ("NAME=on", "NAME=off"): what may be computed in another way, see docs/rewrites.md. `compilation`: auto, on or off,
    whether torch.compile is used. `attention`: auto, or the name of a backend. `vae_memory`: auto, or the bytes that
    the VAE may take besides its weights. `parallel`: auto, or a plan such as "cfg=2,ulysses=2", over the ranks that
    torchrun or --gpus started. `quantized`: keep leaves quantized weights as they are stored, expand makes them plain
    when they are read: the same bits, faster, in more memory. `loras`: Lora, or texts such as "high:FILE:0.8"; merged
    into weights as they are read, computed beside those that stay quantized. `preset`: a recipe of models/defaults.py
    that replaces the checkpoint's scheduler and defaults. Raises CheckpointError for a path or file,
    RequestError for the rest.
    """
    policy = policy_of(exactness, rewrites, compilation=compilation)
    vae_bytes = memory_bytes(vae_memory)
    weights = quantized_of(quantized)
    chosen = loras_of(loras)
    place = launched()
    where, why_device = own_device(device, place)
    log.info("device %s: %s", where, why_device)
    check_dtype_name(dtype)
    recipe = preset_of(preset)
    checkpoint = open_checkpoint(model, parts=parts)
    if recipe is not None:
        own = {**checkpoint.defaults, **recipe.defaults}
        checkpoint = replace(checkpoint, scheduler=recipe.scheduler, defaults=own)
    make_sampler(checkpoint.scheduler, 1)  # so that a scheduler we cannot compute is refused before weights are read
    names = [name for name in ("transformer", "transformer_2") if name in checkpoint.components]
    specs = [_transformer_spec(checkpoint.components[name]) for name in names]
    vae = checkpoint.components["vae"]
    vae_spec = VaeSpec.from_config(vae.config, where=str(vae.described_by))
    _check_fit(checkpoint, dict(zip(names, specs, strict=True)), vae_spec)
    defaults = defaults_for(
        specs[0],
        two_experts=len(names) > 1,
        expand_timesteps=checkpoint.expand_timesteps,
        own=checkpoint.defaults,
    )
    preferred = _preferred_dtype(defaults, checkpoint.components[names[0]])
    compute, why_dtype = choose_dtype(dtype, where, preferred=preferred)
    vae_dtype = torch.float32 if dtype == "auto" else compute
    log.info("dtype %s (VAE %s): %s", _name(compute), _name(vae_dtype), why_dtype)

    ranks = gather_ranks(
        place,
        where,
        parallel,
        spec=specs[0],
        guided=defaults.guidance_scale > 1,
        weight_bytes=sum(held_bytes(checkpoint.components[name], compute, weights) for name in names),
        facts={
            "model": fingerprint(checkpoint) if place else "",
            "dtype": str(compute),
            "options": repr((exactness, sorted(rewrites), compilation, attention, vae_bytes, weights, chosen, preset)),
        },
    )
    _tune_allocator(where)
    with memory_errors(f"the weights of '{checkpoint.name}' on {where}", "choose another device, or a narrower dtype"):
        load_text = functools.partial(_load_text_encoder, checkpoint, compute, where, quantized=weights)
        text_encoder = ranks.text_encoder(load_text)
        image_encoder = None
        if specs[0].image_dim is not None:  # in the VAE's dtype, as the reference documents it
            image_encoder = ranks.image_encoder(functools.partial(_load_image_encoder, checkpoint, vae_dtype, where))
        transformers = [checkpoint.components[name] for name in names]
        sets = [adapters_for(spec, chosen, expert_at(i, len(specs))) for i, spec in enumerate(specs)]
        loaded = [beside(part, adapters, weights) for part, adapters in zip(transformers, sets, strict=True)]
        experts = [
            make_fast_dit(
                load_plain_dit(part, spec, compute, where, ranks, quantized=weights, adapters=() if live else adapters),
                policy=policy,
                attention=attention,
                ranks=ranks,
            )
            for part, spec, adapters, live in zip(transformers, specs, sets, loaded, strict=True)
        ]
        exchange([expert.dit for expert in experts], before=loaded, after=loaded)
        fast = load_fast_vae(vae, vae_spec, vae_dtype, where, policy=policy, budget_bytes=vae_bytes, ranks=ranks)
        pipeline = WanPipeline(
            text_encoder=text_encoder,
            experts=tuple(expert.dit for expert in experts),
            step_planner=ranks.step_planner(experts[0].planner, insisted=policy.insists(TOGETHER)),
            vae=fast.vae,
            vae_planner=ranks.vae_planner(fast.planner, vae_spec),
            scheduler=checkpoint.scheduler,
            boundary_ratio=checkpoint.boundary_ratio if len(names) > 1 else None,
            expand_timesteps=checkpoint.expand_timesteps,
            device=where,
            image_encoder=image_encoder,
            make_predictor=ranks.make_predictor,
        )
    decisions = (*experts[0].decisions, *fast.decisions)
    for decision in decisions:
        log.debug("%s", decision)
    team = None if ranks.alone else ranks.world.everyone
    return Engine(
        name=checkpoint.name,
        pipeline=pipeline,
        defaults=defaults,
        decisions=decisions,
        team=team,
        adapters=loaded,
        loras=chosen,
    )


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


def _preferred_dtype(defaults: Defaults, transformer: Component) -> torch.dtype:
    """The dtype the checkpoint is documented for, else the one most of its transformer is stored in."""
    if defaults.dtype is not None:
        return DTYPES[defaults.dtype]
    sizes: dict[str, int] = {}
    for entry in transformer.tensors.values():
        kind = "quantized" if is_quantized(entry) else entry.dtype
        sizes[kind] = sizes.get(kind, 0) + math.prod(entry.shape)
    stored = max(sizes, key=sizes.__getitem__, default="F32")
    return _STORED.get(stored, torch.float32)


def _load_text_encoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    cut: Callable[[Umt5Encoder], Take] | None,
    *,
    quantized: Quantized,
) -> TextEncoder:
    component = checkpoint.components["text_encoder"]
    model = build_text_encoder(component.config, where=str(component.described_by))
    take = None if cut is None else cut(model)
    keep = text_encoder_keeps_fp32(dtype)
    fill(model, component, dtype, device, keep=keep, tied=True, take=take, quantized=quantized)
    return TextEncoder(model=model, tokenizer=tokenizer_in(checkpoint.components["tokenizer"]))


def _load_image_encoder(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
    component = checkpoint.components["image_encoder"]
    processor = checkpoint.components.get("image_processor")
    model = build_image_encoder(component.config, where=str(component.described_by))
    fill(model, component, dtype, device, rename=image_encoder_key)
    return ImageEncoder(model=model, processor=load_image_processor(None if processor is None else processor.folder))


def _tune_allocator(device: torch.device) -> None:
    """Keep freed memory for the next tensor: giving it back to the system costs a page fault per page."""
    if device.type == "cpu":
        log.info("allocator: %s", keep_freed_memory())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
