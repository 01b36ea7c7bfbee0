"""What the weights of a blueprint's components take once they are loaded, by their descriptions alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from frameloom.engine.blueprint import Blueprint
from frameloom.memory.residency import Footprint, chain_of_dit, chain_of_text_encoder
from frameloom.models.encoders import build_text_encoder, text_encoder_keeps_fp32
from frameloom.models.meta import on_meta
from frameloom.models.vace import make_dit
from frameloom.models.wan_dit import WanDiT
from frameloom.weights.checkpoint import Component
from frameloom.weights.load import Quantized, held_bytes
from frameloom.weights.tensors import is_quantized


def footprints(plan: Blueprint, quantized: Quantized) -> dict[str, Footprint]:
    """Of every component that has weights, by its name. The VAE's are plain, without what its kernels keep beside."""
    parts = plan.checkpoint.components
    found = {"text_encoder": _of_text_encoder(parts["text_encoder"], plan.dtype, quantized)}
    for part, spec in zip(plan.transformers, plan.experts, strict=True):
        with on_meta():
            dit = make_dit(spec)
        sizes = _sizes(part, plan.dtype, quantized, WanDiT.keep_in_fp32)
        found[part.name] = Footprint.of(dit, chain_of_dit(dit), sizes)
    small = {name: parts[name] for name in ("image_encoder", "vae") if name in parts}
    return found | {name: Footprint(stays=held_bytes(part, plan.vae_dtype, "expand")) for name, part in small.items()}


def _of_text_encoder(part: Component, dtype: torch.dtype, quantized: Quantized) -> Footprint:
    encoder = build_text_encoder(part.config, where=str(part.described_by))
    sizes = _sizes(part, dtype, quantized, text_encoder_keeps_fp32(dtype))
    return Footprint.of(encoder, chain_of_text_encoder(encoder), sizes)


def _sizes(
    part: Component, dtype: torch.dtype, quantized: Quantized, keeps: Callable[[str], bool]
) -> Callable[[str, Tensor], int]:
    """What parameters take once they are loaded."""

    def size_bytes(name: str, value: Tensor) -> int:
        entry = part.tensors.get(name)
        if quantized == "keep" and entry is not None and is_quantized(entry):
            return entry.size_bytes
        return value.numel() * (torch.float32 if keeps(name) else dtype).itemsize

    return size_bytes
