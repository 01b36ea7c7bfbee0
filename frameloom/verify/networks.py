"""The networks of a checkpoint, with the ways they are computed in here, against themselves without any, in float32."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frameloom.engine.dit import load_fast_dit, load_plain_dit
from frameloom.engine.vae import FastVae, load_fast_vae, load_plain_vae
from frameloom.models.dit_fast import LoopChoices
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.wan_dit import FrameTimes, WanDiT
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import ROUNDING_FP32, Policy
from frameloom.pipeline.stages import PLAINLY, MakePredictor, Predictor
from frameloom.platform.device import free_memory_bytes, timed
from frameloom.verify.finding import Errors, Finding
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
_PATCHES = (3, 5, 4)  # frames, rows and columns of tokens that a transformer is tried on
_TEXT_TOKENS, _WORDS, _IMAGE_TOKENS = 512, (20, 5), 257
_TIMESTEP = 500.0
Compute = Callable[[], Tensor]


def verify_networks(parts: Mapping[str, Component], name: str, device: torch.device) -> Iterator[Finding]:
    """The transformers and the VAE of a checkpoint."""
    for part in ("transformer", "transformer_2"):
        if part in parts:
            yield from _verify_transformer(parts[part], f"{part} of {name}", device)
    if "vae" in parts:
        component = parts["vae"]
        spec = VaeSpec.from_config(component.config, where=str(component.described_by))
        plain = load_plain_vae(component, spec, torch.float32, device)
        fast = load_fast_vae(component, spec, torch.float32, device, policy=Policy())
        yield from verify_vae(plain, fast, f"VAE of {name}")


@torch.inference_mode()
def _verify_transformer(component: Component, name: str, device: torch.device) -> Iterator[Finding]:
    """Its prediction, plain and then fast: one copy of the weights is there at a time."""
    spec = TransformerSpec.from_config(component.config, where=str(component.described_by))
    if note := lack_of_memory(component, free_memory_bytes(device)):
        yield Finding(name=name, what="one prompt", promise=PROMISE_FP32, note=note)
        return
    trial = Trial.of(spec, device)
    expected = _references(trial, load_plain_dit(component, spec, torch.float32, device))
    fast = load_fast_dit(component, spec, torch.float32, device, policy=Policy())
    for what, way, compute in trial.fast(fast.dit, fast.choices.loop):
        reference, seconds = expected[what]
        yield _compare(f"{name}, {what}, {way}", way, compute, reference, seconds)


def lack_of_memory(component: Component, free: int) -> str | None:
    """Why a network cannot be compared in float32 with so many bytes free, or None."""
    needed = 4 * component.num_parameters
    if needed <= free:
        return None
    return f"in float32 its weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _references(trial: "Trial", dit: WanDiT) -> dict[str, tuple[Tensor, float]]:
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
            yield _compare(f"{name}, {direction}, {way}", way, compute, expected, seconds)


def _compare(name: str, what: str, compute: Compute, reference: Tensor, reference_seconds: float) -> Finding:
    error = Errors.of(compute(), reference, reference)
    return Finding(
        name=name,
        what=what,
        promise=PROMISE_FP32,
        max_abs=error.max_abs,
        relative=error.relative,
        psnr_db=error.psnr_db,
        speedup=reference_seconds / timed(compute, reference.device),
        kept=error.relative <= ROUNDING_FP32,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trial:
    """Random input of a transformer: latents, their timestep, two prompts that zeros fill up, and an image if it asks.

    `frame_times`: the first frame is given, as an image would be.
    """

    x_BCTHW: Tensor
    timestep_B: Tensor
    frame_times: FrameTimes
    texts: tuple[Tensor, Tensor]
    image_BNE: Tensor | None

    @classmethod
    def of(cls, spec: TransformerSpec, device: torch.device) -> "Trial":
        """The same numbers on every machine."""
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        grid = [cells * patch for cells, patch in zip(_PATCHES, spec.patch_size, strict=True)]
        texts = [noise(1, _TEXT_TOKENS, spec.text_dim) for _ in range(2)]
        for text, words in zip(texts, _WORDS, strict=True):
            text[:, words:] = 0
        return cls(
            x_BCTHW=noise(1, spec.in_channels, *grid),
            timestep_B=torch.tensor([_TIMESTEP], device=device),
            frame_times=FrameTimes(
                torch.tensor([[0.0, _TIMESTEP]], device=device), (torch.arange(_PATCHES[0], device=device) > 0).long()
            ),
            texts=(texts[0], texts[1]),
            image_BNE=None
            if spec.image_dim is None
            else noise(1, spec.pos_embed_seq_len or _IMAGE_TOKENS, spec.image_dim),
        )

    def plain(self, dit: WanDiT) -> dict[str, Compute]:
        """What may be asked of the network, each in the reference's way."""
        first, x, t = self.texts[0], self.x_BCTHW, self.timestep_B
        if self.image_BNE is not None:
            return {"a prompt and an image": lambda: dit(x, t, first, self.image_BNE)}
        guided = Predictor(self.texts, PLAINLY)
        values_M, index_F = self.frame_times.values_BM[0], self.frame_times.index_F
        times_BL = values_M[index_F].repeat_interleave(_PATCHES[1] * _PATCHES[2])[None]
        return {
            "one prompt": lambda: dit(x, t, first),
            "guidance": lambda: torch.cat(guided(dit, x, t)),
            "a given frame": lambda: dit(x, times_BL, first),
        }

    def fast(
        self, dit: WanDiT, loop: LoopChoices, make_predictor: MakePredictor = Predictor
    ) -> Iterator[tuple[str, str, Compute]]:
        """The same by the ways of `loop`: what is asked, in which way, and how it is computed."""
        first, x, t = self.texts[0], self.x_BCTHW, self.timestep_B
        if self.image_BNE is not None:
            yield "a prompt and an image", "as chosen here", lambda: dit(x, t, first, self.image_BNE)
            return
        yield "one prompt", "as chosen here", lambda: dit(x, t, first)
        in_turn = make_predictor(self.texts, replace(loop, guidance_batched=False))
        yield "guidance", "one branch after the other", lambda: torch.cat(in_turn(dit, x, t))
        if loop.guidance_batched:
            batched = make_predictor(self.texts, loop)
            yield "guidance", "both branches in one batch", lambda: torch.cat(batched(dit, x, t))
        if loop.distinct_timesteps:
            yield "a given frame", "two timesteps embedded", lambda: dit(x, self.frame_times, first)


def latents_and_frames(vae: WanVAE, size: tuple[int, int, int] = _LATENTS) -> tuple[Tensor, Tensor]:
    """Random ones of so many latent frames, rows and columns: z_BZTHW and x_BCTHW."""
    spec, weight = vae.spec, next(vae.parameters())
    frames, rows, columns = size
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, spec.z_dim, frames, rows, columns, generator=generator)
    pixels = (1 + spec.temporal_scale * (frames - 1), spec.spatial_scale * rows, spec.spatial_scale * columns)
    x = torch.rand(1, 3, *pixels, generator=generator) * 2 - 1
    return z.to(weight), x.to(weight)
