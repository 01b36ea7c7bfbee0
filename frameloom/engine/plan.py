"""Says before a request runs whether it fits, how long it takes and how it is arranged: by descriptions alone."""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from frameloom.config import memory_bytes, parallel_plan, residences
from frameloom.engine.blueprint import Blueprint, draw, preferred_dtype
from frameloom.engine.foresight import Foresight
from frameloom.engine.machine import Machine, machine_of
from frameloom.engine.modules import quantized_of
from frameloom.engine.ranks import UNDIVIDED
from frameloom.engine.rates import Book, Rates, glance, sheet_rates
from frameloom.engine.rewrites import policy_of
from frameloom.engine.workload import SizedRequest, Workload
from frameloom.errors import RequestError
from frameloom.memory.meter import amount
from frameloom.memory.plan import Arranged, Choice, Plan, first_that_fits, next_cheaper, smaller_sizes
from frameloom.models.defaults import preset_of
from frameloom.parallel.mesh import auto_plan, possible_plan
from frameloom.platform.device import DTYPES
from frameloom.platform.tuning import Tuner
from frameloom.types import EngineConfig, GenerateRequest, ParallelPlan
from frameloom.weights.checkpoint import Checkpoint
from frameloom.weights.published import NAMES, published
from frameloom.weights.source import Source, open_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a request is to run: a name of `machine_of`, how many of them, and what may be used of memory."""

    device: str = "auto"
    gpus: int = 1
    memory: int | str = "auto"
    host_memory: int | str = "auto"


_ANYWHERE = Place()


def make_plan(
    model: Source | None,
    request: GenerateRequest,
    config: EngineConfig,
    *,
    place: Place = _ANYWHERE,
    parts: Mapping[str, Source] | None = None,
    variant: str = "",
    here_only: bool = False,
) -> Plan:
    """The plan of a request for a checkpoint of which descriptions are enough.

    `model` and `variant`: as `open_checkpoint` takes them, or the plain name of a published one, for which nothing is
    fetched. `here_only`: on a device that is here, and nothing cheaper is looked for. Raises
    CheckpointError, and RequestError for options that are not possible, but not for what does not fit.
    """
    planner = planner_for(model, config, place=place, parts=parts, variant=variant, here_only=here_only)
    return planner.plan(SizedRequest.of(request, planner.blueprint))


def planner_for(
    model: Source | None,
    config: EngineConfig,
    *,
    place: Place = _ANYWHERE,
    parts: Mapping[str, Source] | None = None,
    variant: str = "",
    here_only: bool = False,
) -> "Planner":
    """Who makes plans for a checkpoint, as `make_plan` does, on the machine as it is now."""
    machine = machine_of(
        place.device,
        memory=memory_bytes(config.memory if place.memory == "auto" else place.memory),
        host_memory=memory_bytes(place.host_memory),
        only_here=here_only,
    )
    blueprint = _drawn(_opened(model, parts, variant), machine, config)
    return Planner(blueprint, machine.shared_by(place.gpus), config, gpus=place.gpus, here_only=here_only)


class Planner:
    """Plans requests for one checkpoint. `machine`: what one rank has of it. `here_only`: nothing cheaper is sought."""

    def __init__(
        self,
        blueprint: Blueprint,
        machine: Machine,
        config: EngineConfig,
        *,
        gpus: int = 1,
        here_only: bool = False,
    ) -> None:
        policy = policy_of(config.exactness, config.rewrites, compilation=config.compilation)
        self.blueprint, self.machine = blueprint, machine
        self.gpus, self._here_only = gpus, here_only
        self._parallel, self._asked = config.parallel, residences(config.residence)
        self._quantized = quantized_of(config.quantized)
        self.foresight = Foresight(
            plan=blueprint, machine=self.machine, policy=policy, quantized=self._quantized,
            processes=gpus if machine.is_host else 1, vae_bytes_at_most=memory_bytes(config.vae_memory),
        )  # fmt: skip
        text = blueprint.checkpoint.components["text_encoder"].config
        self.book = Book(
            tuner=Tuner(machine.device), dit=blueprint.experts[0], dtype=blueprint.dtype, vae=blueprint.vae,
            vae_dtype=blueprint.vae_dtype, text=text,
        )  # fmt: skip

    def look(self) -> None:
        """Measure how fast this machine is, unless that was done before; plans then disturb nobody."""
        _ = self._at_first

    @functools.cached_property
    def _at_first(self) -> Rates:
        """How fast the machine is, for all that is known before it was used."""
        dtype, vae_dtype = self.blueprint.dtype, self.blueprint.vae_dtype
        if self.machine.spec is not None:
            return sheet_rates(self.machine.spec, dtype, vae_dtype)
        vae = self.blueprint.vae
        return glance(self.machine.device, dtype, vae.decoder_base_dim or vae.base_dim, tuner=self.book.tuner)

    def _rates(self, work: Mapping[str, float]) -> Rates:
        """How fast it is for so many operations of each stage."""
        return self._at_first if self.machine.spec is not None else self.book.corrected(self._at_first, work)

    def plan(self, request: SizedRequest) -> Plan:
        """The first arrangement that fits, what else there is, and what would fit where nothing does."""
        machine = self.machine
        layout, why_layout = self._parallel_plan(request)
        work = self._workload(request, layout)
        candidates = work.candidates()
        arranged, fits = first_that_fits(candidates, machine.memory_bytes, machine.host_memory_bytes)
        here = "" if machine.spec is not None or self.gpus > 1 else str(machine.device)
        cheaper = None if self._here_only else next_cheaper(candidates, arranged)
        self.foresight.tuner.save()
        return Plan(
            model=self.blueprint.checkpoint.name,
            request=str(request),
            device=machine.name if self.gpus == 1 else f"{self.gpus} x {machine.name}",
            memory_bytes=machine.memory_bytes,
            host_memory_bytes=machine.host_memory_bytes,
            arranged=arranged,
            choices=tuple(self._choices(work, arranged, why_layout, fits=fits)),
            cheaper=cheaper,
            fits=fits,
            remedy="" if fits else self._remedy(request, arranged),
            rates=work.rates.source,
            here=here,
            lessons=self.book.lessons(work.rates, work.flops) if here else {},
        )

    def _workload(self, request: SizedRequest, parallel: ParallelPlan) -> Workload:
        return Workload(self.foresight, self._rates, request=request, parallel=parallel, asked=self._asked)

    def _parallel_plan(self, request: SizedRequest) -> tuple[ParallelPlan, str]:
        spec, gpus = self.blueprint.experts[0], self.gpus
        asked = parallel_plan(self._parallel, gpus)
        if gpus == 1:
            return ParallelPlan(), "one device"
        if asked is not None:
            return possible_plan(asked, spec), "asked for"
        each = self.machine.total_bytes / (gpus if self.machine.is_host else 1)
        fit = self.blueprint.held_bytes(self._quantized) <= UNDIVIDED * each
        return auto_plan(gpus, spec, guided=request.guided, per_machine=gpus, weights_fit=fit)

    def _choices(self, work: Workload, arranged: Arranged, why_parallel: str, *, fits: bool) -> Iterator[Choice]:
        memory = f"{amount(arranged.device_bytes)} of {amount(self.machine.memory_bytes)}"
        if arranged.host_bytes > self.machine.host_memory_bytes:
            memory = f"{amount(arranged.host_bytes)} of the host's {amount(self.machine.host_memory_bytes)}"
        dtype, vae_dtype = (
            str(each).removeprefix("torch.") for each in (self.blueprint.dtype, self.blueprint.vae_dtype)
        )
        why = f"the first arrangement that fits: {memory}" if fits else f"no arrangement fits; this one takes {memory}"
        yield Choice(what="weights", chosen=str(arranged.layout), reason=why)
        yield Choice(what="dtype", chosen=f"{dtype}, VAE {vae_dtype}", reason=self.blueprint.why_dtype)
        yield Choice(what="guidance", chosen="batched" if arranged.batched else "in turn", reason=work.why_guidance)
        way = "the fastest way that fits beside the weights" if fits else "the one that takes the least"
        yield Choice(what="VAE", chosen=arranged.passage, reason=way)
        yield Choice(what="parallel", chosen=str(work.parallel), reason=why_parallel)

    def _remedy(self, request: SizedRequest, arranged: Arranged) -> str:
        """What to do where nothing fits."""
        lacks_host = arranged.host_bytes > self.machine.host_memory_bytes
        if not lacks_host and (nearest := self._nearest(request)) is not None:
            return f"the nearest that fits is {nearest.num_frames} frames of {nearest.width}x{nearest.height}"
        if lacks_host:
            return "no size of video takes less of the host: allow more host memory"
        return "no size of video fits: take a smaller model, quantized weights, or more memory"

    def _nearest(self, request: SizedRequest) -> SizedRequest | None:
        """The smallest change of the size that fits; None where the smallest video does not."""
        sizes = list(smaller_sizes((request.width, request.height, request.num_frames), request.rules))
        smaller = [replace(request, width=w, height=h, num_frames=n) for w, h, n in sizes]
        if not smaller or not self._fits(smaller[-1]):
            return None
        return next(one for one in smaller if self._fits(one))

    def _fits(self, request: SizedRequest) -> bool:
        work = self._workload(request, self._parallel_plan(request)[0])
        return first_that_fits(work.candidates(), self.machine.memory_bytes, self.machine.host_memory_bytes)[1]


def _opened(model: Source | None, parts: Mapping[str, Source] | None, variant: str) -> Checkpoint:
    name = None if model is None else os.fspath(model)
    if name is not None and not parts and not Path(name).expanduser().exists():
        if known := published(name):
            return known
        if re.fullmatch(r"[\w.-]+", name):
            raise RequestError(
                f"there is no file or folder '{name}', and no published model of that name is known; give a path, "
                f"OWNER/NAME of the hub, or one of {', '.join(NAMES)}"
            )
    return open_checkpoint(model, parts=parts, variant=variant, fetch_weights=False)


def _drawn(checkpoint: Checkpoint, machine: Machine, config: EngineConfig) -> Blueprint:
    """The blueprint in the dtypes that the machine would compute in."""
    preset = preset_of(config.preset)
    if machine.spec is None:
        return draw(checkpoint, machine.device, dtype=config.dtype, preset=preset)
    plan = draw(checkpoint, torch.device("cpu"), dtype=config.dtype, preset=preset)
    if config.dtype != "auto":
        return plan
    dtype = preferred_dtype(plan.defaults, checkpoint.components["transformer"])
    if dtype is DTYPES["bfloat16"] and not machine.spec.bfloat16:
        return replace(plan, dtype=torch.float32, why_dtype=f"a {machine.name} has no bfloat16 arithmetic")
    return replace(plan, dtype=dtype, why_dtype="the dtype of the checkpoint")


def compare(plan: Plan, made: Mapping[str, Any], tuner: Tuner | None = None) -> dict[str, Any]:
    """What was foreseen beside what a run took, by stage; the next plan on this machine knows how fast it was.

    `made`: as `Engine.generate_to` returns it. `tuner`: of the planner that is to know it at once.
    """
    foreseen: dict[str, float] = {stage.stage: stage.seconds for stage in plan.stages}
    tuner = tuner or Tuner(torch.device(plan.here or "cpu"))
    for stage, (key, rate) in plan.lessons.items():
        if measured := made["seconds"].get(stage):
            tuner.note(key, rate * foreseen[stage] / measured)
    tuner.save()
    return {"seconds": foreseen, "peak_memory_bytes": plan.arranged.device_bytes, "rates": plan.rates}
