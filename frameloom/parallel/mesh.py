"""Which rank has which place: the teams of a plan, and a plan for those who name none."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from frameloom.config import nearest_plan
from frameloom.errors import RequestError
from frameloom.models.spec import TransformerSpec
from frameloom.parallel.sequence import check_heads
from frameloom.parallel.team import Team, World
from frameloom.parallel.tensor import check_tensor_plan
from frameloom.parallel.weights import check_sharded_plan
from frameloom.types import ParallelPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """This rank's team along each axis of a plan; ranks that talk the most are neighbours.

    The rank is ((cfg * ring + place in the ring) * ulysses + place in Ulysses) * tp + place in tp.
    """

    cfg: Team
    ring: Team
    ulysses: Team
    tp: Team

    @classmethod
    def of(cls, world: World, plan: ParallelPlan) -> "Mesh":
        """Every rank of the world must call this with the same plan."""
        sizes = (plan.cfg, plan.ring, plan.ulysses, plan.tp)
        cfg, ring, ulysses, tp = (world.divide(_lines(sizes, axis)) for axis in range(len(sizes)))
        return cls(cfg=cfg, ring=ring, ulysses=ulysses, tp=tp)


def check_plan(plan: ParallelPlan, spec: TransformerSpec) -> None:
    """Raise RequestError where a transformer cannot be divided so."""
    check_tensor_plan(spec, plan.tp)
    check_heads(spec.num_attention_heads // plan.tp, plan.ulysses)
    check_sharded_plan(plan)


def auto_plan(
    num_ranks: int, spec: TransformerSpec, *, guided: bool, per_machine: int, weights_fit: bool
) -> tuple[ParallelPlan, str]:
    """A plan for so many ranks, and why.

    Guidance divides best: its groups meet once per step. Then Ulysses, which sends each token twice per layer however
    many ranks there are, over the ranks of one machine; the ring, which sends while it computes, over the rest.
    """
    cfg = 2 if guided and num_ranks % 2 == 0 else 1
    rest = num_ranks // cfg
    most = min(spec.num_attention_heads, max(1, per_machine))
    ulysses = max(
        (n for n in range(1, rest + 1) if rest % n == 0 and n <= most),
        key=lambda n: (spec.num_attention_heads % n == 0, n),
    )
    plan = ParallelPlan(
        cfg=cfg, ulysses=ulysses, ring=rest // ulysses, vae=num_ranks, fsdp=1 if weights_fit else num_ranks
    )
    reasons = [f"{num_ranks} ranks"]
    reasons += ["guidance on two groups"] * (cfg == 2)
    reasons += [f"{spec.num_attention_heads} heads over {ulysses}"] * (ulysses > 1)
    reasons += ["the ring for the rest"] * (plan.ring > 1)
    reasons += ["weights divided: they do not fit one device"] * (not weights_fit)
    return plan, ", ".join(reasons)


def possible_plan(plan: ParallelPlan, spec: TransformerSpec) -> ParallelPlan:
    """`plan`, if a transformer can be divided so. RequestError names the nearest plan where it cannot."""
    try:
        check_plan(plan, spec)
    except RequestError as error:
        ring = ParallelPlan(cfg=plan.cfg, ring=plan.num_ranks // plan.cfg, fsdp=plan.fsdp, vae=plan.vae)
        near = nearest_plan(ring, plan.num_ranks)
        raise RequestError(f"{error}; a plan that is possible with {plan.num_ranks} ranks: {near}") from None
    return plan


def _lines(sizes: Sequence[int], axis: int) -> list[tuple[int, ...]]:
    """The ranks that differ in their place along one axis alone."""
    strides = [1] * len(sizes)
    for index in reversed(range(len(sizes) - 1)):
        strides[index] = strides[index + 1] * sizes[index + 1]
    others = [range(size) if index != axis else range(1) for index, size in enumerate(sizes)]
    firsts = [
        sum(place * stride for place, stride in zip(places, strides, strict=True))
        for places in itertools.product(*others)
    ]
    return [tuple(first + step * strides[axis] for step in range(sizes[axis])) for first in firsts]
