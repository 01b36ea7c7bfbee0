"""Every rewrite and every attention backend of a platform against its reference, on example inputs."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from frameloom.attention.backend import Backend, Place
from frameloom.attention.core import BACKENDS, cuda_capability, sdpa
from frameloom.ops.registry import BF16_SLACK, Rewrite, Sizes
from frameloom.platform.device import timed
from frameloom.verify.finding import Errors, Finding

_SIZES = (
    Sizes(in_channels=16, out_channels=24, frames=3, height=11, width=14),
    Sizes(batch=2, in_channels=5, out_channels=7, frames=1, height=4, width=3, seed=1),
    Sizes(in_channels=512, out_channels=640, frames=2, height=12, width=16, seed=3),  # sums long enough to differ
    Sizes(in_channels=96, out_channels=96, frames=4, height=33, width=50, seed=2),
)
_ROUNDS = 3


@torch.inference_mode()
def verify_rewrite(rewrite: Rewrite, dtype: torch.dtype, device: torch.device) -> Finding:
    """One rewrite on inputs of several sizes: the worst errors, and the speed on the largest."""
    errors = []
    name, promise = f"{rewrite.name} {str(dtype).removeprefix('torch.')}", _promise(rewrite, dtype)
    for sizes in _SIZES:
        arguments = rewrite.example(sizes, dtype, device)
        if reason := rewrite.refuses(*arguments):
            return Finding(name=name, what=rewrite.replaces, promise=promise, note=reason)
        reference = rewrite.reference(*arguments)
        is_exact = dtype == torch.float32
        exact = reference if is_exact else rewrite.reference(*rewrite.example(sizes, torch.float32, device))
        errors.append(Errors.of(rewrite.fast(*arguments), reference, exact))
    plain, fast = functools.partial(rewrite.reference, *arguments), functools.partial(rewrite.fast, *arguments)
    worst = max(errors, key=lambda error: error.relative)
    return Finding(
        name=name,
        what=rewrite.replaces,
        promise=promise,
        max_abs=worst.max_abs,
        relative=worst.relative,
        psnr_db=worst.psnr_db,
        speedup=_speedup(plain, fast, device),
        kept=all(error.keeps(rewrite, dtype) for error in errors),
    )


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
