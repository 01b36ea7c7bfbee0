"""Trains the VAE of the built-in model: single frames first, then short crops, then windows, then whole clips.

Run it through `python -m frameloom.shapes.train`; the recipe stands in `STAGES` and `SPEC`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import CausalState
from frameloom.models.wan_vae import WanVAE
from frameloom.shapes.training import Trainer, mixed_precision, rng_for, to_video
from frameloom.shapes.world import NUM_FRAMES, SIZE, Frames, random_scene, render

Z_DIM = 8
SPEC = VaeSpec(
    base_dim=16,
    z_dim=Z_DIM,
    dim_mult=(1, 2, 4),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    latents_mean=(0.0,) * Z_DIM,
    latents_std=(1.0,) * Z_DIM,
    scale_factor_temporal=4,
    scale_factor_spatial=4,
)
LEARNING_RATE = 1.5e-3
KL_WEIGHT = 1e-6  # a whiff: at 1e-4 the posterior collapses before the decoder has learnt anything


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """`steps` optimiser steps on `batch` pieces, `frames` long and `size` pixels square, several to a clip."""

    steps: int
    batch: int
    pieces_per_clip: int = 1
    frames: int
    size: int


STAGES = (
    Stage(steps=600, batch=32, pieces_per_clip=4, frames=1, size=64),
    Stage(steps=1000, batch=16, pieces_per_clip=4, frames=9, size=32),
    Stage(steps=2800, batch=4, frames=NUM_FRAMES, size=40),
    Stage(steps=600, batch=4, frames=NUM_FRAMES, size=SIZE),
)


def stage_at(step: int, stages: tuple[Stage, ...] = STAGES) -> Stage:
    """The stage that a step of the run belongs to."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return stages[-1]


def cut(clip: Frames, stage: Stage, rng: np.random.Generator) -> Frames:
    """A random piece of a clip: frames and a square window, as the stage asks, more often near the middle."""
    start = rng.integers(NUM_FRAMES - stage.frames + 1)
    y, x = rng.integers(0, SIZE - stage.size + 1, (2, 2)).sum(0) // 2
    return clip[start : start + stage.frames, y : y + stage.size, x : x + stage.size]


def reconstruct(vae: WanVAE, x_BCTHW: Tensor, noise_BZTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Frames through the latents and back, and the mean KL divergence of the posterior from a unit Gaussian."""
    mean, log_variance = vae.encode_chunk(x_BCTHW, CausalState()).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    z = mean + noise_BZTHW * torch.exp(0.5 * log_variance)
    x = vae.decoder(vae.post_quant_conv(z, CausalState()), CausalState())
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return x.float(), kl


def train_vae(
    folder: Path, device: torch.device, *, start: Mapping[str, Tensor] | None = None, compile_model: bool = True
) -> tuple[WanVAE, float]:
    """Train or go on; returns the averaged VAE and the seconds spent (checkpoint in `folder`/vae.pt).

    `start` gives the weights to begin from; they have learnt what single frames and crops teach, so those are left out.
    """
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # the optimiser's squared gradients underflow: ten times slower without it
    vae = WanVAE(SPEC)
    with torch.no_grad():  # start from a sharp posterior: with unit noise the decoder learns to ignore the latents
        vae.quant_conv.weight[Z_DIM:].zero_()
        vae.quant_conv.bias[Z_DIM:] = -8.0  # type: ignore[index]
    if start is not None:
        vae.load_state_dict(start)
    vae.to(device)
    stages = STAGES if start is None else tuple(stage for stage in STAGES if stage.frames == NUM_FRAMES)
    trainer = Trainer(
        vae,
        path=folder / "vae.pt",
        total_steps=sum(s.steps for s in stages),
        learning_rate=LEARNING_RATE,
        plain=("gamma", "encoder.conv_in", "decoder.conv_out"),
    )
    run = torch.compile(reconstruct, dynamic=False) if compile_model else reconstruct
    saved = shown = time.monotonic()
    while trainer.step < trainer.total_steps:
        stage, rng = stage_at(trainer.step, stages), rng_for(trainer.step, salt=1)
        clips = [render(random_scene(rng), rng) for _ in range(stage.batch // stage.pieces_per_clip)]
        pieces = [cut(clip, stage, rng) for clip in clips for _ in range(stage.pieces_per_clip)]
        x = to_video(pieces).to(device)
        latent = (stage.batch, Z_DIM, 1 + (stage.frames - 1) // 4, stage.size // 4, stage.size // 4)
        noise = torch.from_numpy(rng.standard_normal(latent, dtype=np.float32)).to(device)
        with mixed_precision(device):
            y, kl = run(vae, x, noise)
        squared = F.mse_loss(y, x)
        trainer.update(F.l1_loss(y, x) + 4 * squared + KL_WEIGHT * kl)
        now = time.monotonic()
        if now - shown > 20:
            psnr = float(10 * torch.log10(4 / squared.detach()))
            where = f"vae {trainer.step}/{trainer.total_steps} ({stage.frames} frames of {stage.size})"
            print(f"{where} {psnr:.1f} dB, {trainer.elapsed_s / 60:.1f} min", flush=True)
            shown = now
        if now - saved > 120:
            trainer.save()
            saved = now
    trainer.save()
    trainer.use_average()
    return vae, trainer.elapsed_s
