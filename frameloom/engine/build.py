"""The assembler: a checkpoint becomes a running engine. Every choice is one line of the log."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch

from frameloom.config import memory_bytes, residences
from frameloom.engine.blueprint import Blueprint, draw
from frameloom.engine.dit import FastDit, load_plain_dit, make_fast_dit, step_planner
from frameloom.engine.engine import Engine
from frameloom.engine.job import Origin, absolute, absolute_loras
from frameloom.engine.loras import adapters_of_experts, beside, contents_of, exchange, loras_of, read_alike
from frameloom.engine.modules import fill, quantized_of
from frameloom.engine.prompts import cached_prompts
from frameloom.engine.ranks import Ranks, Take, gather_ranks, own_device
from frameloom.engine.residence import Residents, settle
from frameloom.engine.rewrites import policy_of
from frameloom.engine.vae import load_fast_vae
from frameloom.models.adapters import Adapters
from frameloom.models.clip import (
    ImageEncoder,
    build_image_encoder,
    image_encoder_key,
    load_image_processor,
)
from frameloom.models.defaults import preset_of
from frameloom.models.dit_rewrites import TOGETHER
from frameloom.models.encoders import (
    TextEncoder,
    build_text_encoder,
    text_encoder_keeps_fp32,
)
from frameloom.models.umt5 import Umt5Encoder
from frameloom.ops.registry import Policy
from frameloom.pipeline.wan import EncodesPrompts, WanPipeline
from frameloom.pipeline.windows import WINDOWS
from frameloom.platform.allocator import keep_freed_memory
from frameloom.platform.device import check_dtype_name, device_name, memory_errors
from frameloom.settings import LOGGER_NAME, Launched, launched
from frameloom.types import EngineConfig, Lora, Residence
from frameloom.weights.checkpoint import Checkpoint
from frameloom.weights.fingerprint import fingerprint
from frameloom.weights.hub_fetch import OnBytes
from frameloom.weights.load import Quantized
from frameloom.weights.source import Source, open_checkpoint
from frameloom.weights.vocabulary import tokenizer_in

log = logging.getLogger(LOGGER_NAME)

_DEFAULT = EngineConfig()


def build_engine(
    model: Source | None,
    config: EngineConfig = _DEFAULT,
    *,
    parts: Mapping[str, Source] | None = None,
    variant: str = "",
    on_bytes: OnBytes | None = None,
) -> Engine:
    """Open a checkpoint, build its networks and fill them; all but `config` are as `open_checkpoint` takes them.

    Raises CheckpointError for a path or file, RequestError for the rest.
    """
    chosen = _choices_of(config)
    checkpoint = open_checkpoint(model, parts=parts, variant=variant, on_bytes=on_bytes)
    plan = draw(checkpoint, chosen.device, dtype=config.dtype, preset=preset_of(config.preset))
    log.info("dtype %s (VAE %s): %s", _name(plan.dtype), _name(plan.vae_dtype), plan.why_dtype)
    ranks = _gather(plan, chosen, config)
    _tune_allocator(chosen.device)
    loading = f"the weights of '{plan.checkpoint.name}' on {chosen.device}"
    origin = Origin(
        model=None if model is None else absolute(model),
        parts={name: absolute(source) for name, source in (parts or {}).items()},
        config=replace(config, loras=absolute_loras(chosen.loras)),
        variant=variant,
        ranks=ranks.world.size,
        facts=_facts(plan, chosen.device, ranks),
    )
    with memory_errors(loading, "choose another device, or a narrower dtype"):
        return _assembled(plan, chosen, ranks, origin)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Choices:
    """The options of a config, read and found possible before a file is opened."""

    device: torch.device
    place: Launched | None
    policy: Policy
    vae_bytes: int | None
    quantized: Quantized
    loras: tuple[Lora, ...]
    memory: int | None
    residences: Mapping[str, Residence]


def _choices_of(config: EngineConfig) -> _Choices:
    policy = policy_of(config.exactness, config.rewrites, compilation=config.compilation)
    vae_bytes = memory_bytes(config.vae_memory)
    quantized, loras = quantized_of(config.quantized), loras_of(config.loras)
    place = launched()
    device, why = own_device(config.device, place)
    log.info("device %s: %s", device, why)
    check_dtype_name(config.dtype)
    preset_of(config.preset)
    return _Choices(
        device=device, place=place, policy=policy, vae_bytes=vae_bytes, quantized=quantized, loras=loras,
        memory=memory_bytes(config.memory), residences=residences(config.residence),
    )  # fmt: skip


def _gather(plan: Blueprint, chosen: _Choices, config: EngineConfig) -> Ranks:
    """Meet the other ranks, which must have the same checkpoint and the same options."""
    options = (
        config.exactness, sorted(config.rewrites), config.compilation, config.attention, chosen.vae_bytes,
        chosen.quantized, chosen.loras, config.preset, chosen.memory, chosen.residences,
    )  # fmt: skip
    return gather_ranks(
        chosen.place,
        chosen.device,
        config.parallel,
        spec=plan.experts[0],
        guided=plan.defaults.guidance_scale > 1,
        weight_bytes=plan.held_bytes(chosen.quantized),
        facts={
            "model": fingerprint(plan.checkpoint) if chosen.place else "",
            "dtype": str(plan.dtype),
            "options": repr(options),
        },
    )


def _assembled(plan: Blueprint, chosen: _Choices, ranks: Ranks, origin: Origin) -> Engine:
    """Read the weights, one network after the other, and put the networks together."""
    device = chosen.device
    team = None if ranks.alone else ranks.world.everyone
    # First, so that a LoRA that does not fit is told before anything is loaded
    adapters = read_alike(team, functools.partial(adapters_of_experts, plan.experts, chosen.loras))
    residents = settle(plan, origin.config, ranks)
    load_text = functools.partial(
        _load_text_encoder, plan.checkpoint, plan.dtype, residents,
        quantized=chosen.quantized, caches=origin.config.prompt_cache,
    )  # fmt: skip
    text_encoder = ranks.text_encoder(load_text)
    image_encoder = None
    if plan.experts[0].image_dim is not None:  # in the VAE's dtype, as the reference documents it
        load_image = functools.partial(_load_image_encoder, plan.checkpoint, plan.vae_dtype, device)
        image_encoder = ranks.image_encoder(load_image)
    experts, live = _load_experts(plan, chosen, ranks, adapters, attention=origin.config.attention, residents=residents)
    vae = load_fast_vae(
        plan.checkpoint.components["vae"], plan.vae, plan.vae_dtype, device,
        policy=chosen.policy, budget_bytes=residents.vae_bytes, ranks=ranks,
    )  # fmt: skip
    pipeline = WanPipeline(
        text_encoder=text_encoder,
        experts=tuple(expert.dit for expert in experts),
        step_planner=ranks.step_planner(step_planner(experts), insisted=chosen.policy.insists(TOGETHER)),
        vae=vae.vae,
        vae_planner=ranks.vae_planner(vae.planner, plan.vae),
        scheduler=plan.checkpoint.scheduler,
        boundary_ratio=plan.boundary_ratio,
        expand_timesteps=plan.checkpoint.expand_timesteps,
        device=device,
        image_encoder=image_encoder,
        make_predictor=ranks.make_predictor,
        during=residents.during,
    )
    windows = chosen.policy.decide(WINDOWS, None, "for videos longer than the model was trained on")
    decisions = (*experts[0].decisions, windows, *vae.decisions)
    for decision in decisions:
        log.debug("%s", decision)
    return Engine(
        name=plan.checkpoint.name,
        pipeline=pipeline,
        defaults=plan.defaults,
        decisions=decisions,
        team=team,
        adapters=live,
        loras=chosen.loras,
        origin=replace(origin, facts={**origin.facts, "LoRAs": contents_of(adapters)}),
    )


def _facts(plan: Blueprint, device: torch.device, ranks: Ranks) -> dict[str, str]:
    """What the bits of a video depend on, besides the request."""
    return {
        "frameloom": version("frameloom"),
        "torch": torch.__version__,
        "model": fingerprint(plan.checkpoint),
        "device": device_name(device),
        "dtype": f"{_name(plan.dtype)}, VAE {_name(plan.vae_dtype)}",
        "parallel": str(ranks.plan),
    }


def _load_experts(
    plan: Blueprint,
    chosen: _Choices,
    ranks: Ranks,
    adapters: Sequence[Sequence[Adapters]],
    *,
    attention: str,
    residents: Residents,
) -> tuple[list[FastDit], list[Sequence[Adapters]]]:
    """The transformers, and the adapters that are computed beside the weights of each; others are merged into them."""
    live = [
        sets if residents.transformer is not None else beside(part, sets, chosen.quantized)
        for part, sets in zip(plan.transformers, adapters, strict=True)
    ]
    experts = []
    for part, spec, sets, computed in zip(plan.transformers, plan.experts, adapters, live, strict=True):
        plain = load_plain_dit(
            part, spec, plan.dtype, chosen.device, ranks,
            quantized=chosen.quantized, adapters=() if computed else sets, residents=residents,
        )  # fmt: skip
        experts.append(make_fast_dit(plain, policy=chosen.policy, attention=attention, ranks=ranks))
    with residents.during("denoise"):  # what depends on weights has them brought
        exchange([expert.dit for expert in experts], before=live, after=live)
    return experts, live


def _load_text_encoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    residents: Residents,
    cut: Callable[[Umt5Encoder], Take] | None,
    *,
    quantized: Quantized,
    caches: bool,
) -> EncodesPrompts:
    component = checkpoint.components["text_encoder"]
    model = build_text_encoder(component.config, where=str(component.described_by))
    take = None if cut is None else cut(model)
    keep, leave = text_encoder_keeps_fp32(dtype), residents.leave_text_encoder(model, dtype)
    fill(model, component, dtype, residents.device, keep=keep, tied=True, take=take, quantized=quantized, leave=leave)
    encoder = TextEncoder(model=model, tokenizer=tokenizer_in(checkpoint.components["tokenizer"]))
    if not caches or cut is not None:  # of weights that are divided, no rank may find what another has to compute
        return encoder
    return cached_prompts(encoder, component, residents.device)


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
