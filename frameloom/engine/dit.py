"""Loads a transformer of a checkpoint: as the reference computes it, or with the rewrites that a policy allows."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from frameloom.attention.backend import Place
from frameloom.attention.core import sdpa
from frameloom.attention.native import NATIVE
from frameloom.engine.compiled import COMPILER
from frameloom.engine.loras import merging
from frameloom.engine.modules import fill, set_attention
from frameloom.engine.ranks import Ranks, single
from frameloom.engine.residence import Residents
from frameloom.memory.dit import StepPlanner
from frameloom.memory.stream import block_by_block
from frameloom.models.adapters import Adapters
from frameloom.models.dit_block import CrossAttention, SelfAttention
from frameloom.models.dit_fast import DitChoices, choose, install
from frameloom.models.dit_rewrites import TOGETHER
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.vace import make_dit
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.quantized import largest_plain_bytes
from frameloom.ops.registry import Decision, Policy
from frameloom.platform.device import platform_of
from frameloom.platform.tuning import Tuner
from frameloom.weights.checkpoint import Component
from frameloom.weights.load import Quantized

_MEASURED_TOKENS, _MEASURED_HEADS = 512, 4
MEASURED = "the fastest of those that were measured here"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FastDit:
    """A transformer with its ways, what plans its memory, and what was decided."""

    dit: WanDiT
    choices: DitChoices
    planner: StepPlanner
    decisions: tuple[Decision, ...]


def load_plain_dit(
    component: Component,
    spec: TransformerSpec,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks | None = None,
    *,
    quantized: Quantized = "expand",
    adapters: Sequence[Adapters] = (),
    residents: Residents | None = None,
) -> WanDiT:
    """The transformer as the reference computes it, with torch's own attention; this rank's part of its weights.

    `quantized`: whether quantized weights become plain, or stay as they are stored: then they cannot be divided.
    `adapters` are merged into the weights, which then must be plain. `residents`: whether they come and go.
    """
    with on_meta():
        dit = make_dit(spec).eval()
    ranks = ranks or single(device)
    leave = None if residents is None else residents.leave_dit(dit, dtype)
    fill(
        dit,
        component,
        dtype,
        device,
        keep=WanDiT.keep_in_fp32,
        take=merging(adapters, ranks.cut_dit(dit)),
        quantized=quantized,
        leave=leave,
    )
    if leave is not None:
        dit.run_blocks = block_by_block
    ranks.divide_dit(dit)
    return dit


def load_fast_dit(
    component: Component,
    spec: TransformerSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    policy: Policy,
    attention: str = "auto",
    ranks: Ranks | None = None,
    quantized: Quantized = "expand",
) -> FastDit:
    """The transformer with the rewrites that `policy` allows and that are fastest here, and an attention backend.

    Raises RequestError for a rewrite or a backend that was asked for by name and cannot be used, and for quantized
    weights that would have to be divided over ranks as they are stored.
    """
    dit = load_plain_dit(component, spec, dtype, device, ranks, quantized=quantized)
    return make_fast_dit(dit, policy=policy, attention=attention, ranks=ranks)


def make_fast_dit(dit: WanDiT, *, policy: Policy, attention: str = "auto", ranks: Ranks | None = None) -> FastDit:
    """Give a loaded transformer its ways, and its place among the ranks; it keeps no other form of its weights."""
    weight = dit.patch_embedding.weight
    platform = platform_of(weight.device).name
    ranks = ranks or single(weight.device)
    policy = ranks.policy(policy)
    tuner = Tuner(weight.device, agreed=ranks.agreed)
    because = None
    if attention == "auto" and policy.exactness == "bitwise":
        attention, because = "sdpa", "other kernels round otherwise"
    elif attention == "auto" and platform == "cpu":
        attention = fastest_attention(dit.spec.num_attention_heads, dit.spec.attention_head_dim, dit.dtype, tuner)
        because = MEASURED
    chosen = ""
    for kind, biased in ((SelfAttention, False), (CrossAttention, True)):
        found = set_attention(
            dit, kind, expected=dit.spec.num_blocks, name=attention, platform=platform,
            head_dim=dit.spec.attention_head_dim, dtype=weight.dtype, biased=biased,
            because=because,
        )  # fmt: skip
        chosen = chosen or found
    choices = choose(dit, policy, tuner, platform_name=platform, compiler=COMPILER)
    install(dit, choices)
    ranks.connect_dit(dit)
    planner = StepPlanner(
        spec=dit.spec,
        dtype=weight.dtype,
        choices=choices,
        device=weight.device,
        insisted=policy.insists(TOGETHER),
        plain_bytes=2 * largest_plain_bytes(dit),  # a feed-forward has two
        by_block=dit.run_blocks is block_by_block,
    )
    backend, _, reason = chosen.partition(": ")
    told = Decision(name=f"attention.{backend.partition(' ')[0]}", used=True, reason=reason)
    return FastDit(dit=dit, choices=choices, planner=planner, decisions=(*choices.decisions, told))


def step_planner(experts: Sequence[FastDit]) -> StepPlanner:
    """One for all experts: what each may have beside its weights, and as stored, is counted."""
    plain_bytes = max(expert.planner.plain_bytes for expert in experts)
    return replace(experts[0].planner, plain_bytes=plain_bytes, experts=tuple(expert.dit for expert in experts))


@torch.inference_mode()
def fastest_attention(heads: int, head_dim: int, dtype: torch.dtype, tuner: Tuner) -> str:
    """Torch's attention or ours, whichever is faster on this CPU for such heads."""
    if NATIVE.refuses(Place(platform="cpu", head_dim=head_dim, dtype=dtype)):
        return "sdpa"
    ways = {"sdpa": sdpa, NATIVE.name: NATIVE.kernel()}

    def prepare() -> dict[str, Callable[[], object]]:
        shape = (3, 1, _MEASURED_TOKENS, min(heads, _MEASURED_HEADS), head_dim)
        q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return {name: functools.partial(attend, q, k, v) for name, attend in ways.items()}

    best = tuner.best(f"attention {heads} {head_dim} {dtype}", tuple(ways), prepare)
    tuner.save()
    return best
