"""Gives a WanDiT its fast ways: which of the allowed rewrites are used here, and why.

The choice is data (`DitChoices`): made once by `choose`, installed into the loaded network by `install`, and into a
copy without weights when memory is planned.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from frameloom.attention.backend import shapes_alone
from frameloom.models.dit_block import Attention, Block, FeedForward
from frameloom.models.dit_rewrites import (
    COLLAPSED_PADDING,
    DISTINCT_TIMESTEPS,
    PROMPT_ONCE,
    QKV_FUSED,
    SHARED_BRANCHES,
    TOGETHER,
)
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.vace import make_dit
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.dit_ops import Compiler, Ops, ops_for
from frameloom.ops.dit_rewrites import LINEAR_PACKED, MLP_PACKED, MLP_ROWS
from frameloom.ops.linear import PackedLinear, PackedMlp, refuses_packed
from frameloom.ops.mlp import mlp
from frameloom.ops.quantized import held_form
from frameloom.ops.registry import Decision, Policy, Rewrite
from frameloom.platform.tuning import Tuner

_MEASURED_TOKENS = 256
_PLAIN = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopChoices:
    """How the steps of a video are computed; all off is the order of the reference pipeline."""

    prompt_once: bool = False
    shared_branches: bool = False
    guidance_batched: bool = False  # where memory allows
    distinct_timesteps: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DitChoices:
    """How each part of the network is computed, and the decisions that led there."""

    ops: Ops = field(default_factory=Ops)
    loop: LoopChoices = field(default_factory=LoopChoices)
    collapses_padding: bool = False
    fuses_qkv: bool = False
    packs_linear: bool = False
    packs_mlp: bool = False
    decisions: tuple[Decision, ...] = ()


@torch.inference_mode()
def choose(
    dit: WanDiT, policy: Policy, tuner: Tuner, *, platform_name: str, compiler: Compiler | None = None
) -> DitChoices:
    """Which rewrites compute `dit`. Raises RequestError for one that was insisted on and does not apply."""
    told: list[Decision] = []

    def uses(rewrite: Rewrite, refusal: str | None = None, reason: str = "it applies") -> bool:
        told.append(policy.decide(rewrite, refusal, reason))
        return told[-1].used

    prompt_once = uses(PROMPT_ONCE)
    without = None if prompt_once else f"it needs {PROMPT_ONCE.name}"
    loop = LoopChoices(
        prompt_once=prompt_once,
        shared_branches=uses(SHARED_BRANCHES, without),
        guidance_batched=uses(TOGETHER, without, "where memory allows"),
        distinct_timesteps=uses(DISTINCT_TIMESTEPS),
    )
    collapses_padding = uses(COLLAPSED_PADDING)
    packed = _choose_packed(dit, policy, tuner)
    packs_linear, packs_mlp = (uses(rewrite, refusal) for rewrite, refusal in packed.items())
    on_cpu = platform_name == "cpu" and not packs_linear and not policy.insists(QKV_FUSED)
    slower = f"no faster on a CPU without {LINEAR_PACKED.name}" if on_cpu else None
    fuses_qkv = uses(QKV_FUSED, _not_plain(dit) or slower)
    ops, told_of_ops = ops_for(platform_name, policy=policy, compiler=compiler, dtype=dit.dtype)
    told += [
        _instead(decision) if packs_mlp and decision.name == MLP_ROWS.name else decision for decision in told_of_ops
    ]
    return DitChoices(
        ops=ops,
        loop=loop,
        collapses_padding=collapses_padding,
        fuses_qkv=fuses_qkv,
        packs_linear=packs_linear,
        packs_mlp=packs_mlp,
        decisions=tuple(told),
    )


def install(dit: WanDiT, choices: DitChoices) -> None:
    """Give the network its ways; a weight that is held in another form is let go."""
    dit.ops, dit.collapses_padding = choices.ops, choices.collapses_padding
    for block in dit.block_list:
        block.ops = block.attn1.ops = choices.ops
        if choices.fuses_qkv:
            block.attn1.fuse_projections(PackedLinear if choices.packs_linear else None)
        if choices.packs_linear:
            _pack_linears(block, fused=choices.fuses_qkv)
        _set_feed_forward(block.ffn, choices)


def without_weights(spec: TransformerSpec, dtype: torch.dtype, choices: DitChoices) -> WanDiT:
    """The same network, in the same ways, on the meta device: it computes shapes and nothing else."""
    with on_meta():
        dit = make_dit(spec).eval()
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if dit.keep_in_fp32(name) else dtype)
    install(dit, choices)
    for module in dit.modules():
        if isinstance(module, Attention):
            module.attend = shapes_alone
    return dit


def _not_plain(dit: WanDiT) -> str | None:
    """Why its weights cannot be laid out in another form, or None."""
    form = held_form(dit)
    return None if form is None else f"the weights are {form}"


def _instead(decision: Decision) -> Decision:
    """The packed feed-forward takes some tokens at a time as well."""
    return replace(decision, used=False, reason=f"{MLP_PACKED.name} is used instead")


def _choose_packed(dit: WanDiT, policy: Policy, tuner: Tuner) -> Mapping[Rewrite, str | None]:
    """Why weights are not laid out for oneDNN, for single layers and for the feed-forward; None where they are."""
    block = dit.block_list[0]
    linear, feed = block.attn1.out, block.ffn
    ways: dict[Rewrite, dict[str, Callable[[], Callable[[Tensor], Tensor]]]] = {
        LINEAR_PACKED: {
            _PLAIN: lambda: linear,
            LINEAR_PACKED.name: lambda: PackedLinear(linear.weight, linear.bias),
        },
        MLP_PACKED: {
            _PLAIN: lambda: functools.partial(_called_with, mlp, feed.weights),
            MLP_PACKED.name: lambda: PackedMlp(*feed.weights),
        },
    }
    refusals: dict[Rewrite, str | None] = {}
    for rewrite, makers in ways.items():
        refusal = policy.refuses(rewrite) or _not_plain(dit) or refuses_packed(linear.weight)
        if refusal is None and not policy.insists(rewrite):
            first = linear.weight if rewrite is LINEAR_PACKED else feed.weights[0]
            key = f"{rewrite.name} {tuple(feed.weights[0].shape)} {linear.weight.dtype}"
            prepare = functools.partial(_runs, first, makers)
            refusal = "slower here" if tuner.best(key, tuple(makers), prepare) == _PLAIN else None
        refusals[rewrite] = refusal
    tuner.save()
    return refusals


def _runs(
    weight: Tensor, makers: Mapping[str, Callable[[], Callable[[Tensor], Tensor]]]
) -> dict[str, Callable[[], object]]:
    x = torch.randn(_MEASURED_TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    made = {name: make() for name, make in makers.items()}
    return {name: functools.partial(run, x) for name, run in made.items()}


def _pack_linears(block: Block, *, fused: bool) -> None:
    """The layers that every token passes; keys and values of the prompt are computed once and stay as they are."""
    layers = [block.attn1.out, block.attn2.to_q, block.attn2.out]
    if not fused:
        layers += [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
    for layer in layers:
        layer.kernel = PackedLinear(layer.weight, layer.bias)
        layer.register_parameter("weight", None)


def _set_feed_forward(feed: FeedForward, choices: DitChoices) -> None:
    if choices.packs_mlp:
        feed.kernel = PackedMlp(*feed.weights)
        for layer in feed.layers:
            layer.register_parameter("weight", None)
    elif choices.ops.mlp is not mlp:
        held = any(layer.stored is not None for layer in feed.layers)
        feed.kernel = (
            functools.partial(_called_with_plain, choices.ops.mlp, feed)
            if held
            else functools.partial(_called_with, choices.ops.mlp, feed.weights)
        )


def _called_with_plain(run: Callable[..., Tensor], feed: FeedForward, x: Tensor) -> Tensor:
    """With both weights made plain for this call."""
    first, second = feed.layers
    return run(x, first.plain_weight(), first.bias, second.plain_weight(), second.bias)


def _called_with(run: Callable[..., Tensor], weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return run(x, *weights)
