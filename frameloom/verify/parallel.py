"""Every way to share a network over ranks against one rank alone: the parts of the VAE, the plans of a transformer.

All ranks compute and the first compares: that the others have the same bits as the first is part of every promise.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from types import MappingProxyType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from frameloom.engine.dit import load_fast_dit
from frameloom.engine.ranks import Ranks, single
from frameloom.engine.vae import load_fast_vae
from frameloom.errors import RequestError
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.vae_state import Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import BF16_SLACK, ROUNDING_FP32, Policy
from frameloom.parallel.mesh import Mesh, check_plan
from frameloom.parallel.rendezvous import join
from frameloom.parallel.share import Share
from frameloom.parallel.team import Team
from frameloom.parallel.vae_margin import margin_cells
from frameloom.parallel.vae_passage import SharedPassage
from frameloom.parallel.weights import sharded_policy
from frameloom.pipeline.stages import to_uint8
from frameloom.platform.device import free_memory_bytes, timed
from frameloom.settings import Launched
from frameloom.types import ParallelPlan
from frameloom.verify.finding import Errors, Finding
from frameloom.verify.networks import PROMISE_FP32, lack_of_memory, latents_and_frames
from frameloom.verify.trial import Compute, Trial
from frameloom.weights.checkpoint import Component
from frameloom.weights.fingerprint import fingerprint_of_parts

_DTYPES = (torch.float32, torch.bfloat16)
_FRAMES, _ROWS, _COLUMNS = 3, 9, 10  # of latents
_PIXELS_APART = 1e-5  # of all, by one level: where a kernel sums in another order for another shape
_DIGEST_BYTES = hashlib.sha256().digest_size
_ASKED = "everything that may be asked of it"


def verify_parallel(
    parts: Mapping[str, Component],
    name: str,
    *,
    samples: Mapping[str, Component] = MappingProxyType({}),
    place: Launched,
    device: torch.device,
    plan: ParallelPlan | None,
) -> Iterator[Finding]:
    """The VAE and the transformers of a checkpoint over the ranks that were started, the same findings on all of them.

    `samples`: other transformers, by what they are called. `plan`: the only one to prove; None: all that there are.
    Raises RequestError as `join`.
    """
    versions = {"frameloom": version("frameloom"), "torch": torch.__version__}
    world = join(place, device=device, facts={**versions, "model": fingerprint_of_parts(parts), "plan": str(plan)})
    plans = list(plans_for(world.size)) if plan is None else [plan]
    of_vae = ParallelPlan(vae=plans[0].vae)
    ranks = Ranks(world=world, plan=of_vae, mesh=None, device=device, per_machine=place.local_world_size)
    if "vae" in parts:
        yield from _verify_vae(parts["vae"], f"VAE of {name}", ranks)
    own = {f"{part} of {name}": parts[part] for part in ("transformer", "transformer_2") if part in parts}
    for title, component in {**samples, **own}.items():
        yield from _verify_transformer(component, title, ranks, plans)


def plans_for(num_ranks: int) -> Iterator[ParallelPlan]:
    """Every product of ways to denoise on so many ranks, then those that also divide the weights at rest."""
    divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
    sizes = [divisors[:2] if num_ranks % 2 == 0 else [1], divisors, divisors, divisors]
    products = [product for product in itertools.product(*sizes) if math.prod(product) == num_ranks]
    plans = [ParallelPlan(cfg=c, ulysses=u, ring=r, tp=t, vae=num_ranks) for c, u, r, t in products]
    yield from plans
    yield from (replace(plan, fsdp=num_ranks) for plan in plans if plan.tp == 1)


class _Alone(NamedTuple):
    """What one rank alone computes: in the dtype of the claim and in float32, and the seconds of the former."""

    result: Tensor
    exact: Tensor
    seconds: float

    @classmethod
    def of(cls, compute: Compute, exact: Tensor) -> Self:
        """Compute it, twice: the second time is the one that counts."""
        return cls(compute(), exact, timed(compute, exact.device))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Claim:
    """What is promised of a result. `bitwise`: the bits of one rank. `frames`: it is a video in [-1, 1]."""

    name: str
    what: str
    dtype: torch.dtype
    bitwise: bool = False
    frames: bool = False

    @property
    def promise(self) -> str:
        """In words."""
        if self.bitwise:
            return "the same bits"
        if self.dtype != torch.float32:
            return f"error <= {BF16_SLACK:g} x one rank's own"
        return f"{PROMISE_FP32}, frames 1 level apart in 1e-5 of the pixels" if self.frames else PROMISE_FP32

    @property
    def title(self) -> str:
        """What the finding is called."""
        return f"{self.name}, {_dtype_name(self.dtype)}"

    def not_here(self, reason: str) -> Finding:
        """Where it does not apply."""
        return Finding(name=self.title, what=self.what, promise=self.promise, note=reason)

    def judge(self, result: Tensor, alone: _Alone, seconds: float, *, strays: list[int]) -> Finding:
        """What the first rank finds; `strays`: ranks that have other bits than it."""
        errors = Errors.of(result, alone.result, alone.exact)
        apart = _levels_apart(result, alone.result) if self.frames else _Apart(0, 0, 1)
        told = f"rank {strays[0]} has other bits than rank 0" if strays else ""
        told = told or ("the bits of one rank" if errors.max_abs == 0 else str(apart) if self.frames else "")
        return Finding(
            name=self.title,
            what=self.what,
            promise=self.promise,
            max_abs=errors.max_abs,
            relative=errors.relative,
            psnr_db=errors.psnr_db,
            speedup=alone.seconds / seconds,
            kept=not strays and self._keeps(errors, apart),
            note=told,
        )

    def _keeps(self, errors: Errors, apart: "_Apart") -> bool:
        if self.bitwise:
            return errors.max_abs == 0
        if self.dtype != torch.float32:
            return errors.relative_to_exact <= BF16_SLACK * errors.reference_to_exact
        return errors.relative <= ROUNDING_FP32 and apart.few


class _Apart(NamedTuple):
    """Levels (of 256) between two videos at most, and how many of their numbers differ."""

    levels: int
    differing: int
    total: int

    @property
    def few(self) -> bool:
        """Whether that is a rounding here and there; one number may differ in any video."""
        return self.levels <= 1 and self.differing <= max(1, _PIXELS_APART * self.total)

    def __str__(self) -> str:
        return f"{self.differing} of {self.total} numbers of the frames differ, by {self.levels} levels at most"


def _levels_apart(a: Tensor, b: Tensor) -> _Apart:
    apart = np.abs(to_uint8(a).astype(np.int16) - to_uint8(b))
    return _Apart(int(apart.max()), int(np.count_nonzero(apart)), apart.size)


def _prove(team: Team, claim: _Claim, compute: Compute, alone: _Alone | None) -> Finding:
    """Compute on all ranks and compare on the first, which has what it computed `alone`; all return its finding."""
    result = compute()
    strays = _strays(team, result)
    seconds = timed(compute, result.device)

    def judged() -> dict[str, object]:
        assert alone is not None, "the first rank has what it computed alone"
        return asdict(claim.judge(result, alone, seconds, strays=strays))

    return Finding(**team.first(judged))


def _strays(team: Team, x: Tensor) -> list[int]:
    """The ranks that have other bits than the first."""
    data = x.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
    digest = torch.frombuffer(bytearray(hashlib.sha256(data).digest()), dtype=torch.uint8)
    told = team.collect(digest.to(team.device), [(_DIGEST_BYTES,)] * team.size)
    return [rank for rank, other in zip(team.ranks, told, strict=True) if not torch.equal(other, told[0])]


@torch.inference_mode()
def _verify_transformer(component: Component, name: str, ranks: Ranks, plans: list[ParallelPlan]) -> Iterator[Finding]:
    """Every plan in both dtypes; a network is loaded, divided, compared and let go, as it was where it is alone."""
    spec = TransformerSpec.from_config(component.config, where=str(component.described_by))
    free = ranks.world.everyone.least(free_memory_bytes(ranks.device) // ranks.sharing_memory)
    if note := lack_of_memory(component, free):
        yield Finding(name=name, what=_ASKED, promise=PROMISE_FP32, note=f"{note} for each rank")
        return
    load = functools.partial(_load_predictions, component, spec)
    exact = load(torch.float32, single(ranks.device), Policy())() if ranks.world.rank == 0 else None
    for dtype, (fsdp, these) in itertools.product(_DTYPES, _by_fsdp(plans)):
        policy = sharded_policy(Policy()) if fsdp > 1 else Policy()
        alone = None if exact is None else _Alone.of(load(dtype, single(ranks.device), policy), exact)
        for plan in these:
            claim = _Claim(name=f"{name}, {_named(plan)}", what=_ASKED, dtype=dtype, bitwise=_moves_only(plan))
            if reason := _refusal(plan, spec):
                yield claim.not_here(reason)
                continue
            sharing = replace(ranks, plan=plan, mesh=Mesh.of(ranks.world, plan))
            yield _prove(ranks.world.everyone, claim, load(dtype, sharing, policy), alone)


def _by_fsdp(plans: list[ParallelPlan]) -> list[tuple[int, list[ParallelPlan]]]:
    """Those that leave the weights whole, and those that divide them: the latter do without some rewrites."""
    return [(fsdp, [*these]) for fsdp, these in itertools.groupby(plans, key=lambda plan: plan.fsdp)]


def _load_predictions(
    component: Component, spec: TransformerSpec, dtype: torch.dtype, ranks: Ranks, policy: Policy
) -> Compute:
    """Load a transformer; what is returned asks it all that a Trial asks, on these ranks."""
    fast = load_fast_dit(component, spec, dtype, ranks.device, policy=policy, ranks=ranks)
    loop = replace(fast.choices.loop, guidance_batched=False)
    return Trial.of(spec, ranks.device).everything(fast.dit, loop, ranks.make_predictor)


def _refusal(plan: ParallelPlan, spec: TransformerSpec) -> str | None:
    """Why this transformer cannot be divided so, or None."""
    try:
        check_plan(plan, spec)
    except RequestError as error:
        return str(error)
    return None


def _moves_only(plan: ParallelPlan) -> bool:
    """Whether no sum is taken in another order: branches and weights at rest are divided, and nothing else."""
    return plan.ulysses * plan.ring * plan.tp == 1


def _named(plan: ParallelPlan) -> str:
    sizes = {axis: getattr(plan, axis) for axis in ("cfg", "ulysses", "ring", "tp", "fsdp")}
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


@torch.inference_mode()
def _verify_vae(component: Component, name: str, ranks: Ranks) -> Iterator[Finding]:
    """Both directions in both dtypes, of a picture whose rows divide by few numbers, and of one that has too few."""
    spec = VaeSpec.from_config(component.config, where=str(component.described_by))
    vaes = {
        dtype: load_fast_vae(component, spec, dtype, ranks.device, policy=Policy(), ranks=ranks) for dtype in _DTYPES
    }
    heights = (_ROWS, max(1, ranks.plan.vae - 1))
    for dtype, direction, height in itertools.product(_DTYPES, ("decode", "encode"), heights):
        run, run_exactly = (_passing(vaes[kind].vae, direction, height) for kind in (dtype, torch.float32))
        whole = replace(vaes[dtype].planner.choices.passage, steps=2, rows=None)
        alone = _Alone.of(functools.partial(run, whole), run_exactly(whole)) if ranks.world.rank == 0 else None
        for way, passage in _passages(spec, ranks, whole, height, encodes=direction == "encode"):
            title = f"{name}, {direction}, {height} x {_COLUMNS}, {way}"
            claim = _Claim(
                name=title,
                what=str(passage),
                dtype=dtype,
                bitwise=whole.tile_rows is not None,
                frames=direction == "decode",
            )
            yield _prove(ranks.world.everyone, claim, functools.partial(run, passage), alone)


def _passing(vae: WanVAE, direction: str, height: int) -> Callable[[Passage], Tensor]:
    """How latents, or frames, of so many latent rows pass a VAE."""
    z, x = latents_and_frames(vae, (_FRAMES, height, _COLUMNS))
    return functools.partial(vae.decode, z) if direction == "decode" else functools.partial(vae.encode, x)


def _passages(
    spec: VaeSpec, ranks: Ranks, whole: Passage, height: int, *, encodes: bool
) -> Iterator[tuple[str, SharedPassage]]:
    """Every way to divide a picture of so many latent rows, and its name."""
    parts = ranks.plan.vae
    share = functools.partial(Share.of, ranks.world.everyone, height, _COLUMNS, parts=parts)
    passage = functools.partial(SharedPassage, **(asdict(whole) | {"encodes": encodes}))
    yield "in rows", passage(share=share(columns=1, overlaps=False))
    yield "in rows, the inner ones first", passage(share=share(columns=1))
    if ranks.device.type != "cpu":  # there it is always rows
        yield "in columns", passage(share=share(columns=parts))
        if parts > 2 and parts % 2 == 0:
            yield "in rows and columns", passage(share=share(columns=2))
    yield "in rows with a margin", passage(share=share(columns=1), margin=margin_cells(spec, encodes=encodes))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
