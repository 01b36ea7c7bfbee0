"""What several ranks do with the networks that the assembler makes; a single process is a run of one.

The networks never hear of a rank: their seams are set here, and their weights cut as they are read.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from torch import Tensor

from frameloom.config import parallel_plan
from frameloom.memory.vae import VaePlanner
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.umt5 import Umt5Encoder
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.registry import Policy
from frameloom.parallel import tensor, weights
from frameloom.parallel.agreement import (
    AgreedSteps,
    EncodedOnce,
    EncodesImages,
    EncodesPrompts,
    ImagesEncodedOnce,
    PlansSteps,
)
from frameloom.parallel.guidance import one_branch_each
from frameloom.parallel.mesh import Mesh, auto_plan, possible_plan
from frameloom.parallel.rendezvous import choose_local_device, join
from frameloom.parallel.sequence import SequenceParallel
from frameloom.parallel.team import World
from frameloom.parallel.vae_plan import SharedVaePlanner
from frameloom.pipeline import stages
from frameloom.pipeline.wan import VaePlanner as PlansVae
from frameloom.platform.device import choose_device, platform_of
from frameloom.platform.tuning import Agreed, alone
from frameloom.settings import LOGGER_NAME, Launched
from frameloom.types import ParallelPlan

log = logging.getLogger(LOGGER_NAME)
UNDIVIDED = 0.7
"""Of a device's memory weights may take so much before they are divided."""
Take = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ranks:
    """The ranks of a run, what is divided over them, and how many of them are on this machine."""

    world: World
    plan: ParallelPlan
    mesh: Mesh | None
    device: torch.device
    per_machine: int = 1

    @property
    def alone(self) -> bool:
        """Whether this is a single process."""
        return self.world.size == 1

    @property
    def agreed(self) -> Agreed:
        """How a choice is made that all ranks must make alike."""
        return alone if self.alone else self.world.everyone.first

    @property
    def sharing_memory(self) -> int:
        """Processes that share the memory of this one's device."""
        return self.per_machine if self.device.type == "cpu" else 1

    def policy(self, policy: Policy) -> Policy:
        """What is allowed of it where weights are divided."""
        return weights.sharded_policy(policy) if self.plan.fsdp > 1 else policy

    def cut_dit(self, dit: WanDiT) -> Take | None:
        """Divide a transformer on the meta device; returns what to take of each tensor as it is read."""
        if self.plan.fsdp > 1:
            weights.shard_dit(dit, self.world.everyone, self.device)
            return weights.own_shard(dit)
        if self.mesh is not None and self.plan.tp > 1:
            return functools.partial(_own_part, self.mesh)
        return None

    def divide_dit(self, dit: WanDiT) -> None:
        """After its weights are read, before they are laid out in other forms."""
        if self.mesh is not None and self.plan.tp > 1:
            tensor.divide(dit, self.mesh.tp)

    def connect_dit(self, dit: WanDiT) -> None:
        """After all rewrites: set its seams."""
        if self.mesh is None:
            return
        if self.plan.tp > 1:
            tensor.join(dit, self.mesh.tp)
        if self.plan.fsdp > 1:
            weights.read_when_used(dit)
        if self.plan.ulysses * self.plan.ring > 1:
            SequenceParallel(ulysses=self.mesh.ulysses, ring=self.mesh.ring).install(dit)

    def text_encoder(self, load: Callable[[Callable[[Umt5Encoder], Take] | None], EncodesPrompts]) -> EncodesPrompts:
        """The text encoder: on the first rank, or its weights over all. `load` takes how to divide the network."""
        if self.alone:
            return load(None)
        if self.plan.fsdp > 1:
            return load(self._cut_text)
        encoder = load(None) if self.world.rank == 0 else None
        return EncodedOnce(team=self.world.everyone, encoder=encoder, device=self.device)

    def image_encoder(self, load: Callable[[], EncodesImages]) -> EncodesImages:
        """The image encoder, on the first rank."""
        if self.alone:
            return load()
        encoder = load() if self.world.rank == 0 else None
        return ImagesEncodedOnce(team=self.world.everyone, encoder=encoder, device=self.device)

    def step_planner(self, planner: PlansSteps, *, insisted: bool) -> PlansSteps:
        """The same way of a step on all ranks."""
        return planner if self.alone else AgreedSteps(team=self.world.everyone, planner=planner, insisted=insisted)

    def vae_planner(self, planner: VaePlanner, spec: VaeSpec) -> PlansVae:
        """The part of each rank."""
        if self.alone:
            return planner
        whole = replace(planner, choices=replace(planner.choices, bands=False, always_bands=False))
        return SharedVaePlanner(
            spec=spec,
            dtype=planner.dtype,
            device=self.device,
            team=self.world.everyone,
            parts=self.plan.vae,
            whole=whole,
            bands=planner,
            overlaps=self.device.type != "cpu" or self.per_machine < self.world.size,
        )

    @property
    def make_predictor(self) -> stages.MakePredictor:
        """Who predicts under the branches of the guidance."""
        if self.mesh is None or self.plan.cfg == 1:
            return stages.Predictor
        return one_branch_each(stages.Predictor, self.mesh.cfg)

    def _cut_text(self, encoder: Umt5Encoder) -> Take:
        weights.shard_text_encoder(encoder, self.world.everyone, self.device)
        return weights.own_shard(encoder)


def single(device: torch.device) -> Ranks:
    """One process."""
    return Ranks(world=World(0, 1), plan=ParallelPlan(), mesh=None, device=device)


def own_device(name: str, place: Launched | None) -> tuple[torch.device, str]:
    """The device of this process, and why. Raises RequestError."""
    return choose_device(name) if place is None else choose_local_device(name, place)


def gather_ranks(
    place: Launched | None,
    device: torch.device,
    parallel: str,
    *,
    spec: TransformerSpec,
    guided: bool,
    weight_bytes: int,
    facts: Mapping[str, str],
) -> Ranks:
    """Meet the other ranks and divide the work by the plan `parallel` ("auto": by the checkpoint and their number).

    `weight_bytes`: of all transformers. `facts` must be equal on all ranks. Raises RequestError where the plan is not
    possible, ranks are missing or have something else.
    """
    size = 1 if place is None else place.world_size
    plan = parallel_plan(parallel, size)
    if place is None or size == 1:
        return single(device)
    reason = "asked for"
    if plan is None:
        total = platform_of(device).total_memory_bytes(device.index)
        plan, reason = auto_plan(
            size,
            spec,
            guided=guided,
            per_machine=place.local_world_size,
            weights_fit=weight_bytes <= UNDIVIDED * total / (place.local_world_size if device.type == "cpu" else 1),
        )
    plan = possible_plan(plan, spec)
    versions = {"frameloom": version("frameloom"), "torch": torch.__version__}
    world = join(place, device=device, facts={**versions, **facts, "plan": str(plan)})
    log.info("parallel %s: %s", plan, reason)
    return Ranks(world=world, plan=plan, mesh=Mesh.of(world, plan), device=device, per_machine=place.local_world_size)


def _own_part(mesh: Mesh, name: str, whole: Tensor) -> Tensor:
    return tensor.own_part(name, whole, team=mesh.tp)
