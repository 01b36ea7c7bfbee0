"""The networks of a checkpoint, with the ways they are computed in here, against themselves without any, in float32."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from frameloom.engine.dit import load_fast_dit, load_plain_dit
from frameloom.engine.vae import FastVae, load_fast_vae, load_plain_vae
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.wan_dit import WanDiT
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import ROUNDING_FP32, Policy
from frameloom.platform.device import free_memory_bytes, timed
from frameloom.verify.finding import Errors, Finding
from frameloom.verify.trial import Compute, Trial
from frameloom.weights.checkpoint import Component

_LATENTS = (4, 9, 8)  # frames, rows and columns that a checkpoint's VAE is tried on
_WAYS = (  # latent frames at a time, and rows per band
    ("whole pictures", 1, None),
    ("2 latent frames at a time", 2, None),
    ("3 latent frames at a time", 3, None),
    ("bands of 16 rows", 2, 16),
    ("bands of 5 rows", 1, 5),
    ("bands of 1 row", 3, 1),
)
PROMISE_FP32 = f"relative error <= {ROUNDING_FP32:g}"
SAME_BITS = "the same bits"


def verify_networks(parts: Mapping[str, Component], name: str, device: torch.device) -> Iterator[Finding]:
    """The transformers and the VAE of a checkpoint."""
    for part in ("transformer", "transformer_2"):
        if part in parts:
            yield from verify_transformer(parts[part], f"{part} of {name}", device)
    if "vae" in parts:
        component = parts["vae"]
        spec = VaeSpec.from_config(component.config, where=str(component.described_by))
        plain = load_plain_vae(component, spec, torch.float32, device)
        fast = load_fast_vae(component, spec, torch.float32, device, policy=Policy())
        yield from verify_vae(plain, fast, f"VAE of {name}")


@torch.inference_mode()
def verify_transformer(component: Component, name: str, device: torch.device) -> Iterator[Finding]:
    """Its predictions, plain and then fast: one copy of the weights is there at a time."""
    spec = TransformerSpec.from_config(component.config, where=str(component.described_by))
    if note := lack_of_memory(component, free_memory_bytes(device)):
        yield Finding(name=name, what="one prompt", promise=PROMISE_FP32, note=note)
        return
    trial = Trial.of(spec, device)
    expected = _references(trial, load_plain_dit(component, spec, torch.float32, device))
    fast = load_fast_dit(component, spec, torch.float32, device, policy=Policy())
    for what, way, compute in trial.fast(fast.dit, fast.choices.loop):
        reference, seconds = expected[what]
        yield compare(f"{name}, {what}, {way}", way, compute=compute, reference=reference, seconds=seconds)


def lack_of_memory(component: Component, free: int) -> str | None:
    """Why a network cannot be compared in float32 with so many bytes free, or None."""
    needed = 4 * component.num_parameters
    if needed <= free:
        return None
    return f"in float32 its weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _references(trial: Trial, dit: WanDiT) -> dict[str, tuple[Tensor, float]]:
    """What the plain network computes, and in how many seconds."""
    ways = trial.plain(dit)
    return {what: (compute(), timed(compute, trial.x_BCTHW.device)) for what, compute in ways.items()}


@torch.inference_mode()
def verify_vae(plain: WanVAE, fast: FastVae, name: str) -> Iterator[Finding]:
    """The VAE with its kernels against the plain one: whole pictures, chunks of frames, bands of rows, both ways."""
    z, x = latents_and_frames(plain)
    for direction, data in (("decode", z), ("encode", x)):
        reference = functools.partial(getattr(plain, direction), data)
        expected, seconds = reference(), timed(reference, z.device)
        for way, steps, rows in _WAYS:
            passage = replace(fast.planner.choices.passage, steps=steps, rows=rows)
            compute = functools.partial(getattr(fast.vae, direction), data, passage)
            title = f"{name}, {direction}, {way}"
            yield compare(title, way, compute=compute, reference=expected, seconds=seconds)


def compare(
    name: str, what: str, *, compute: Compute, reference: Tensor, seconds: float, bitwise: bool = False
) -> Finding:
    """A result against the reference, which took so many seconds; both in the dtype of the promise."""
    error = Errors.of(compute(), reference, reference)
    return Finding(
        name=name,
        what=what,
        promise=SAME_BITS if bitwise else PROMISE_FP32,
        max_abs=error.max_abs,
        relative=error.relative,
        psnr_db=error.psnr_db,
        speedup=seconds / timed(compute, reference.device),
        kept=error.max_abs == 0 if bitwise else error.relative <= ROUNDING_FP32,
    )


def latents_and_frames(vae: WanVAE, size: tuple[int, int, int] = _LATENTS) -> tuple[Tensor, Tensor]:
    """Random ones of so many latent frames, rows and columns: z_BZTHW and x_BCTHW."""
    spec, weight = vae.spec, next(vae.parameters())
    frames, rows, columns = size
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, spec.z_dim, frames, rows, columns, generator=generator)
    pixels = (1 + spec.temporal_scale * (frames - 1), spec.spatial_scale * rows, spec.spatial_scale * columns)
    x = torch.rand(1, 3, *pixels, generator=generator) * 2 - 1
    return z.to(weight), x.to(weight)
