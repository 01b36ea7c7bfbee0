"""Weights divided over ranks at rest (FSDP2): those of a layer are gathered when it computes, and let go after.

Numbers are moved and none is changed. What is gathered at once is a layer or an attention, not a block: less memory,
and no method but `forward` reads weights that are away. Small weights stay on every rank. In order: `shard_dit` or
`shard_text_encoder` on the meta device, `own_shard` as weights are read, the rewrites, `read_when_used`.
"""

# torch's FSDP is imported where it is used: that takes most of a second, and a single process needs none of it.

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from frameloom.errors import InternalError, RequestError
from frameloom.models.dit_block import FeedForward
from frameloom.models.dit_rewrites import QKV_FUSED
from frameloom.models.division import Division, Undo
from frameloom.models.umt5 import Umt5Encoder
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.dit_rewrites import LINEAR_PACKED, MLP_PACKED
from frameloom.ops.mlp import mlp
from frameloom.ops.registry import Policy
from frameloom.parallel.team import Team
from frameloom.types import ParallelPlan

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        QKV_FUSED.name: "it joins weights that are divided over the ranks (fsdp)",
        LINEAR_PACKED.name: "it lays out weights that are divided over the ranks (fsdp)",
        MLP_PACKED.name: "it lays out weights that are divided over the ranks (fsdp)",
    }
)
"""The rewrites that hold weights in another form, and why they cannot be used."""


def check_sharded_plan(plan: ParallelPlan) -> None:
    """Raise RequestError where the weights would be divided in two ways."""
    if plan.fsdp > 1 and plan.tp > 1:
        raise RequestError(
            f"fsdp={plan.fsdp} and tp={plan.tp} do not go together: each divides the weights; leave one of them out"
        )


def sharded_policy(policy: Policy) -> Policy:
    """`policy` without the rewrites that need whole weights. Raises RequestError if the user insisted on one."""
    for name, reason in REFUSED.items():
        if policy.forced.get(name):
            raise RequestError(f"rewrite {name}=on is not possible here: {reason}; leave it out")
    return replace(policy, forced={**policy.forced, **dict.fromkeys(REFUSED, False)})


def shard_dit(dit: WanDiT, team: Team, device: torch.device) -> None:
    """Divide the weights of a transformer over the team; every rank must then compute with it in the same order.

    It may be on the meta device, to be filled with `own_shard`, or hold the same weights on all ranks.
    """
    _shard(dit, _units_of_dit(dit), team, device, entries=("read_prompt", "velocities"))
    dit.division = _AtRest()


def shard_text_encoder(encoder: Umt5Encoder, team: Team, device: torch.device) -> None:
    """`shard_dit` for the text encoder."""
    table = encoder.encoder.embed_tokens
    _shard(encoder, _units_of_text_encoder(encoder), team, device)
    encoder.shared.weight = table.weight  # its other name, under which nothing is computed


def own_shard(module: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """What `load_module` is to take of every tensor for a module that was sharded on the meta device."""
    from torch.distributed.tensor import DTensor

    slots = module.state_dict(keep_vars=True)

    def take(name: str, whole: Tensor) -> Tensor:
        slot = slots[name]
        if not isinstance(slot, DTensor):
            return whole
        mesh = slot.device_mesh
        mine = _chunk(whole, mesh.size(), mesh.get_local_rank())
        return DTensor.from_local(
            mine.clone(), mesh, slot.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    return take


def read_when_used(dit: WanDiT) -> None:
    """Let feed-forwards that a rewrite computes read their weights once they are gathered; to be called after it."""
    for block in dit.block_list:
        if dit.ops.mlp is not mlp:
            block.ffn.kernel = functools.partial(_computed_now, dit.ops.mlp, block.ffn)


class _AtRest(Division):
    """What adapters must know of weights that are away: every rank computes with all of them once they are gathered."""

    def whole(self, parameter: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def exchange(self, owner: nn.Module, attribute: str, value: Tensor) -> Undo:
        """What is gathered is this rank's own part, so that is written into and not replaced."""
        from torch.distributed.tensor import DTensor

        parameter = getattr(owner, attribute)
        if not isinstance(parameter, DTensor):
            return super().exchange(owner, attribute, value)
        own, mesh = parameter.to_local(), parameter.device_mesh
        undo = functools.partial(_write, own, own.clone())
        _write(own, _chunk(value, mesh.size(), mesh.get_local_rank()))
        return undo


@torch.no_grad()
def _write(own: Tensor, value: Tensor) -> None:
    own.copy_(value)


def _chunk(whole: Tensor, count: int, index: int) -> Tensor:
    """The rows of one of so many ranks, which may be none."""
    parts = whole.chunk(count)
    return parts[index] if index < len(parts) else whole[:0]


def _computed_now(run: Callable[..., Tensor], feed: FeedForward, x: Tensor) -> Tensor:
    return run(x, *feed.weights)


def _units_of_dit(dit: WanDiT) -> Iterator[list[nn.Module]]:
    conditions = dit.condition_embedder
    yield [conditions.text_embedder]
    yield [conditions.time_embedder]
    yield [conditions.time_proj]
    for block in dit.block_list:
        cross = block.attn2
        of_image = [cross.add_k_proj, cross.add_v_proj] if dit.spec.added_kv_proj_dim is not None else []
        yield [block.attn1]
        yield [*of_image, cross.to_k, cross.to_v]  # once per prompt
        yield [cross.to_q]
        yield [cross.out]
        yield [block.ffn]


def _units_of_text_encoder(encoder: Umt5Encoder) -> Iterator[list[nn.Module]]:
    yield [encoder.encoder.embed_tokens]
    for name, module in encoder.named_modules():
        if name.endswith((".SelfAttention", ".wi_0", ".wi_1", ".wo")):  # wo alone: in float16 it stays float32
            yield [module]


def _shard(
    root: nn.Module, units: Iterable[list[nn.Module]], team: Team, device: torch.device, *, entries: Sequence[str] = ()
) -> None:
    """`entries`: methods of the root that are called without its `forward`."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    if team.group is None:
        raise InternalError("weights cannot be divided over a single rank")
    mesh = DeviceMesh.from_group(team.group, device.type)
    for unit in list(units):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    small = {parameter for parameter in root.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(root, mesh=mesh, ignored_params=small)
    for name in entries:
        register_fsdp_forward_method(root, name)
