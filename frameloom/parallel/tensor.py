"""Tensor parallelism: a plan applied to a built WanDiT, of which each rank computes some heads and hidden channels.

Layers are divided by columns, which takes no exchange, and those after them by rows, whose results the ranks add up.
Wan's norm of queries and keys spans all heads, so its mean square is added up, too.
In order: `own_part` as weights are read, `divide`, the rewrites (models/dit_fast.py), `join`.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from frameloom.errors import InternalError, RequestError
from frameloom.models.dit_block import Block, RMSNorm
from frameloom.models.division import Division
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.vace import make_dit
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.norm import at_least_fp32, rms_norm
from frameloom.ops.rope import RotaryTable
from frameloom.parallel.team import Team

_COLUMNS = re.compile(
    r"(vace_)?blocks\.\d+\.(attn[12]\.(to_[qkv]|add_[kv]_proj|norm_(q|k|added_k))|ffn\.net\.0\.proj)\."
)
_ROWS = re.compile(r"(vace_)?blocks\.\d+\.(attn[12]\.to_out\.0|ffn\.net\.2)\.weight")
_SET_ASIDE = "bias_of_sum"  # the bias of a layer divided by rows, which is added once, to the sum


def check_tensor_plan(spec: TransformerSpec, tp: int) -> None:
    """Raise RequestError unless `tp` ranks can hold equally many whole heads and hidden channels."""
    most = math.gcd(spec.num_attention_heads, spec.ffn_dim)
    if most % tp:
        near = min((n for n in range(1, most + 1) if most % n == 0), key=lambda n: abs(math.log(n / tp)))
        raise RequestError(
            f"tp={tp} does not divide both the {spec.num_attention_heads} heads and the {spec.ffn_dim} hidden channels "
            f"of this checkpoint; use tp={near}"
        )


def own_part(name: str, whole: Tensor, *, team: Team) -> Tensor:
    """What this rank keeps of the parameter `name`, in memory of its own; all of it where every rank needs it."""
    axis = _axis(name)
    if axis is None or team.size == 1:
        return whole
    return whole.tensor_split(team.size, axis)[team.index].clone(memory_format=torch.contiguous_format)


def divide(dit: WanDiT, team: Team) -> None:
    """Keep this rank's part of every weight; those that `own_part` cut when they were read stay as they are.

    To be called before weights are laid out in other forms. Raises RequestError where the ranks cannot share equally.
    """
    check_tensor_plan(dit.spec, team.size)
    with on_meta():
        whole = make_dit(dit.spec)
    for name, parameter in whole.named_parameters():
        _cut(name, dit.get_parameter(name), parameter.shape, team)
    for block in dit.block_list:
        for layer in _layers_by_rows(block):
            layer.register_parameter(_SET_ASIDE, layer.bias)
            layer.register_parameter("bias", None)
    dit.division = _ByHeads(team)


def join(dit: WanDiT, team: Team) -> None:
    """Let the ranks exchange what a divided network needs of the others; to be called once, after all rewrites.

    Every rank computes the same numbers, to the bit, wherever it holds the whole token stream.
    """
    _check_counts(dit)
    for block in dit.block_list:
        modules = block.attn1.out, block.attn2.out, block.ffn  # the feed-forward may have one kernel for all of it
        for module, layer in zip(modules, _layers_by_rows(block), strict=True):
            module.register_forward_hook(functools.partial(_add_up, team, layer.get_parameter(_SET_ASIDE)))
        for name, norm in list(block.attn2.named_children()):
            if isinstance(norm, RMSNorm):
                block.attn2.add_module(name, _NormOverRanks(norm, team))
        norm_rotate = functools.partial(_norm_rotate, team, block.attn1.ops.norm_rotate)
        block.attn1.ops = replace(block.attn1.ops, norm_rotate=norm_rotate)


class _ByHeads(Division):
    """What adapters must know of a network that was divided."""

    def __init__(self, team: Team) -> None:
        self.team, self.size, self.index = team, team.size, team.index

    def axis(self, name: str) -> int | None:
        return _axis(name)

    def add_up(self, x: Tensor) -> Tensor:
        return self.team.add_up(x)


def _axis(name: str) -> int | None:
    """The axis along which the parameter `name` is cut: 0 outputs, 1 inputs; None: it stays whole."""
    return 0 if _COLUMNS.match(name) else 1 if _ROWS.match(name) else None


def _cut(name: str, parameter: nn.Parameter, whole: torch.Size, team: Team) -> None:
    part = own_part(name, torch.empty(whole, device="meta"), team=team).shape
    if parameter.shape == whole:
        parameter.data = own_part(name, parameter.data, team=team)
    elif parameter.shape != part:
        raise InternalError(f"{name} has shape {tuple(parameter.shape)}, neither {tuple(whole)} nor {tuple(part)}")


def _check_counts(dit: WanDiT) -> None:
    """A module skipped in silence, or changed twice, would be a wrong picture."""
    norms = [module for block in dit.block_list for module in block.attn2.children() if isinstance(module, RMSNorm)]
    layers = [module for module in dit.modules() if hasattr(module, _SET_ASIDE)]
    of_image = dit.spec.added_kv_proj_dim is not None
    for found, each, what in ((layers, 3, "layers divided by rows"), (norms, 2 + of_image, "norms of one rank")):
        if len(found) != each * dit.spec.num_blocks:
            raise InternalError(f"{len(found)} {what} where {each * dit.spec.num_blocks} were expected")


def _layers_by_rows(block: Block) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return block.attn1.out, block.attn2.out, block.ffn.layers[1]


def _add_up(team: Team, bias: Tensor, _: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
    """A forward hook."""
    return (team.add_up(out) + bias).to(out.dtype)


class _NormOverRanks(nn.Module):
    """An RMSNorm over the channels of all ranks, of which this one has some."""

    def __init__(self, norm: RMSNorm, team: Team) -> None:
        super().__init__()
        self.weight, self.eps, self.team = norm.weight, norm.eps, team

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return _over_all_heads(self.team, functools.partial(rms_norm, weight=self.weight, eps=self.eps), x, self.eps)


def _norm_rotate(
    team: Team,
    inner: Callable[..., Tensor],
    x_BLD: Tensor,
    weight: Tensor,
    eps: float,
    table: RotaryTable,
    head_dim: int,
) -> Tensor:
    """`norm_rotate` over the channels of all ranks: x_BLHK."""
    normed = functools.partial(inner, weight=weight, eps=eps, table=table, head_dim=head_dim)
    return _over_all_heads(team, normed, x_BLD, eps)


def _over_all_heads(team: Team, normed: Callable[[Tensor], Tensor], x_BLD: Tensor, eps: float) -> Tensor:
    """What `normed` makes of x, but with the mean square over all ranks; what it does after its norm must be linear.

    In float32 or wider until the end: corrected after rounding, bfloat16 would lose up to 15 % more than on one rank.
    """
    wide_BLD = at_least_fp32(x_BLD)
    own_BL1 = torch.linalg.vector_norm(wide_BLD, dim=-1, keepdim=True).square() / x_BLD.shape[-1]
    all_BL1 = team.add_up(own_BL1) / team.size
    out = normed(wide_BLD)
    correction_BL1 = ((own_BL1 + eps) / (all_BL1 + eps)).sqrt()
    return out.mul_(correction_BL1.view(*out.shape[:2], *(1 for _ in out.shape[2:]))).to(x_BLD.dtype)
