"""Runs every rewrite against its reference on this machine, and the VAE of a checkpoint in every way it may be cut.

The command line prints the findings as a table; a finding whose `kept` is False is a broken promise.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frameloom.attention.backend import Backend, Place
from frameloom.attention.core import BACKENDS, cuda_capability, sdpa
from frameloom.engine.rewrites import REWRITES
from frameloom.engine.vae import FastVae, load_fast_vae, load_plain_vae
from frameloom.models.spec import VaeSpec
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import BF16_SLACK, ROUNDING_FP32, Policy, Rewrite, Sizes, document, relative_error
from frameloom.platform.device import choose_device, platform_of, timed
from frameloom.weights.source import open_vae

_SIZES = (
    Sizes(in_channels=16, out_channels=24, frames=3, height=11, width=14),
    Sizes(batch=2, in_channels=5, out_channels=7, frames=1, height=4, width=3, seed=1),
    Sizes(in_channels=96, out_channels=96, frames=4, height=33, width=50, seed=2),
)
_LATENTS = (4, 9, 8)  # frames, rows and columns that a checkpoint's VAE is tried on
_WAYS = (  # latent frames at a time, and rows per band
    ("whole pictures", 1, None),
    ("2 latent frames at a time", 2, None),
    ("3 latent frames at a time", 3, None),
    ("bands of 16 rows", 2, 16),
    ("bands of 5 rows", 1, 5),
    ("bands of 1 row", 3, 1),
)
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one comparison gave. `kept` None: it does not apply here, `note` says why."""

    name: str
    what: str
    promise: str
    max_abs: float | None = None
    relative: float | None = None
    psnr_db: float | None = None
    speedup: float | None = None
    kept: bool | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """One word."""
        return {True: "kept", False: "BROKEN", None: "not here"}[self.kept]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "verdict": self.verdict}


def verify(model: str | os.PathLike[str] | None = None, *, device: str = "auto") -> Iterator[Finding]:
    """Every rewrite and attention backend on example inputs, then, with a `model`, its VAE; a folder of a VAE will do.

    Raises CheckpointError or RequestError.
    """
    where, _ = choose_device(device)
    component, name = (None, "") if model is None else (open_vae(model), Path(os.fspath(model)).name)
    for rewrite in (*REWRITES, *attention_rewrites(platform_of(where).name)):
        for dtype in rewrite.dtypes:
            yield verify_rewrite(rewrite, dtype, where)
    if component is not None:
        spec = VaeSpec.from_config(component.config, where=str(component.folder / "config.json"))
        plain = load_plain_vae(component, spec, torch.float32, where)
        fast = load_fast_vae(component, spec, torch.float32, where, policy=Policy())
        yield from verify_vae(plain, fast, f"VAE of {name}")


def attention_rewrites(platform: str) -> Iterator[Rewrite]:
    """Every backend beside torch's own attention that a platform may have, as something to compare with that."""
    for backend in BACKENDS:
        if platform in backend.platforms:
            yield Rewrite(
                name=f"attention.{backend.name}",
                exactness=backend.exactness,
                replaces="torch's attention",
                reference=sdpa,
                fast=functools.partial(_attend, backend),
                refuses=functools.partial(_refuses_attention, backend, platform),
                example=_attention_example,
                because=f"the kernel of {backend.package} sums in another order",
                dtypes=tuple(dtype for dtype in (torch.float32, torch.bfloat16) if dtype in backend.dtypes),
            )


def _attend(backend: Backend, *qkv: Tensor) -> Tensor:
    return backend.kernel()(*qkv)


def _refuses_attention(backend: Backend, platform: str, q_BLHK: Tensor, *_: Tensor) -> str | None:
    place = Place(
        platform=platform,
        head_dim=q_BLHK.shape[-1],
        dtype=q_BLHK.dtype,
        capability=cuda_capability(q_BLHK.device, platform),
    )
    return backend.refuses(place)


def _attention_example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v of two heads of 128, as Wan's are."""
    generator = torch.Generator().manual_seed(sizes.seed)
    shape = (3, sizes.batch, sizes.height * sizes.width, 2, 128)
    return torch.randn(shape, generator=generator).to(device, dtype).unbind(0)


@torch.inference_mode()
def verify_rewrite(rewrite: Rewrite, dtype: torch.dtype, device: torch.device) -> Finding:
    """One rewrite on inputs of several sizes: the worst errors, and the speed on the largest."""
    errors, speedup = [], 1.0
    name, promise = f"{rewrite.name} {str(dtype).removeprefix('torch.')}", _promise(rewrite, dtype)
    for sizes in _SIZES:
        arguments = rewrite.example(sizes, dtype, device)
        if reason := rewrite.refuses(*arguments):
            return Finding(name=name, what=rewrite.replaces, promise=promise, note=reason)
        plain, fast = functools.partial(rewrite.reference, *arguments), functools.partial(rewrite.fast, *arguments)
        speedup = _speedup(plain, fast, device)
        exact = rewrite.reference(*rewrite.example(sizes, torch.float32, device))
        errors.append(_Errors.of(rewrite.fast(*arguments), rewrite.reference(*arguments), exact))
    worst = max(errors, key=lambda error: error.relative)
    return Finding(
        name=name,
        what=rewrite.replaces,
        promise=promise,
        max_abs=worst.max_abs,
        relative=worst.relative,
        psnr_db=worst.psnr_db,
        speedup=speedup,
        kept=all(error.keeps(rewrite, dtype) for error in errors),
    )


@torch.inference_mode()
def verify_vae(plain: WanVAE, fast: FastVae, name: str) -> Iterator[Finding]:
    """The VAE with its kernels against the plain one: whole pictures, chunks of frames, bands of rows, both ways."""
    z, x = _trial(plain)
    for direction, data in (("decode", z), ("encode", x)):
        reference = functools.partial(getattr(plain, direction), data)
        expected = reference()
        seconds = timed(reference, z.device)
        for way, steps, rows in _WAYS:
            passage = replace(fast.planner.choices.passage, steps=steps, rows=rows)
            compute = functools.partial(getattr(fast.vae, direction), data, passage)
            error = _Errors.of(compute(), expected, expected)
            yield Finding(
                name=f"{name}, {direction}, {way}",
                what=way,
                promise=f"relative error <= {ROUNDING_FP32:g}",
                max_abs=error.max_abs,
                relative=error.relative,
                psnr_db=error.psnr_db,
                speedup=seconds / timed(compute, z.device),
                kept=error.relative <= ROUNDING_FP32,
            )


def _trial(vae: WanVAE) -> tuple[Tensor, Tensor]:
    """Random latents and frames of one size."""
    spec, weight = vae.spec, next(vae.parameters())
    frames, rows, columns = _LATENTS
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, spec.z_dim, frames, rows, columns, generator=generator)
    size = (1 + spec.temporal_scale * (frames - 1), spec.spatial_scale * rows, spec.spatial_scale * columns)
    x = torch.rand(1, 3, *size, generator=generator) * 2 - 1
    return z.to(weight), x.to(weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Errors:
    """A result against the reference in its dtype and in float32."""

    max_abs: float
    relative: float
    psnr_db: float
    relative_to_exact: float
    reference_to_exact: float

    @classmethod
    def of(cls, result: Tensor, reference: Tensor, exact: Tensor) -> "_Errors":
        a, b, c = (tensor.double() for tensor in (result, reference, exact))
        mean_square = float((a - b).square().mean())
        span = float(b.max() - b.min())
        return cls(
            max_abs=float((a - b).abs().max()),
            relative=relative_error(a, b),
            psnr_db=10 * math.log10(span**2 / mean_square) if mean_square and span else math.inf,
            relative_to_exact=relative_error(a, c),
            reference_to_exact=relative_error(b, c),
        )

    def keeps(self, rewrite: Rewrite, dtype: torch.dtype) -> bool:
        """Whether the rewrite's promise holds; a NaN never does."""
        if rewrite.exactness == "bitwise":
            return self.max_abs == 0
        if rewrite.exactness == "lossy":
            return not math.isnan(self.relative)
        if dtype == torch.float32:
            return self.relative <= rewrite.tolerance
        return self.relative_to_exact <= BF16_SLACK * self.reference_to_exact


def _promise(rewrite: Rewrite, dtype: torch.dtype) -> str:
    if rewrite.exactness == "bitwise":
        return "the same bits"
    if rewrite.exactness == "lossy":
        return "none: see PSNR"
    if dtype == torch.float32:
        return f"relative error <= {rewrite.tolerance:g}"
    return f"error <= {BF16_SLACK:g} x the reference's own"


def _speedup(reference: Callable[[], object], fast: Callable[[], object], device: torch.device) -> float:
    """How many times faster: the best of some rounds in turns."""
    best = {reference: math.inf, fast: math.inf}
    for run in (reference, fast) * _ROUNDS:
        best[run] = min(best[run], timed(run, device))
    return best[reference] / best[fast]


if __name__ == "__main__":
    print(document(REWRITES), end="")
