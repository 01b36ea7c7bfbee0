"""A request as work for the networks of a machine: the ways to arrange it, what each takes, and its seconds."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from frameloom.engine.blueprint import Blueprint
from frameloom.engine.foresight import Foresight
from frameloom.engine.rates import Rates, attention_flops, text_flops
from frameloom.memory.layout import Layout, Weights, held_in, layouts, pinned_bytes
from frameloom.memory.plan import Arranged, StagePlan
from frameloom.models.encoders import TEXT_LENGTH
from frameloom.models.spec import VaceSpec
from frameloom.models.vae_state import Passage
from frameloom.parallel.cost import Link, Network, RankCost, predicted_s
from frameloom.parallel.pass_cost import VaeWork, pass_costs
from frameloom.parallel.step_cost import StepWork, step_costs
from frameloom.pipeline.images import image_of
from frameloom.request import resolve
from frameloom.sampling.windows import windows_over
from frameloom.types import GenerateRequest, ParallelPlan, Residence, ResolvedRequest, SizeRules, Stage

_LATENCY_S = 20e-6  # of an exchange
_OF_SAMPLING = 4  # latents, noise or their beginning, and the sampler's memory of steps
_ENCODED_PIXELS_PER_S = 30e6  # of a video file, on one core


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedRequest:
    """What a plan must know of a request. `batch`: prompts; `encodes`: pictures pass the VAE's encoder.

    `window_frames`: of those that are denoised at a time, which share `window_overlap`; None: all of them.
    """

    width: int
    height: int
    num_frames: int
    steps: int
    guided: bool
    batch: int = 1
    encodes: bool = False
    window_frames: int | None = None
    window_overlap: int = 0
    rules: SizeRules

    @classmethod
    def of(cls, request: GenerateRequest, plan: Blueprint) -> "SizedRequest":
        """Of a request, whose image may decide the size; videos and references are not read. Raises RequestError."""
        rules = plan.size_rules
        unread: dict[str, Any] = dict.fromkeys(
            ("last_image", "video", "strength", "control_video", "mask", "references")
        )
        image = None if request.image is None else image_of(request.image)
        asked = replace(request, image=image, **unread)
        encodes = request.video is not None or bool(plan.takes.needed) or isinstance(plan.experts[0], VaceSpec)
        return cls.resolved(resolve(asked, plan.defaults, rules), rules, encodes=encodes)

    @classmethod
    def resolved(cls, request: ResolvedRequest, rules: SizeRules, *, encodes: bool = False) -> "SizedRequest":
        """Of a request that is complete."""
        return cls(
            width=request.width,
            height=request.height,
            num_frames=request.num_frames,
            steps=request.steps - request.skipped_steps,
            guided=request.guidance_scale > 1,  # the first scale decides for both experts
            batch=len(request.prompts),
            encodes=encodes or request.image is not None or request.video is not None,
            window_frames=request.window_frames,
            window_overlap=request.window_overlap,
            rules=rules,
        )

    def __str__(self) -> str:
        windows = "" if self.window_frames is None else f" in windows of {self.window_frames}"
        return f"{self.num_frames} frames{windows} of {self.width}x{self.height}, {self.steps} steps"


class Workload:
    """What a request is for the networks, and the ways to arrange it. `rates`: how fast so much of each stage is."""

    def __init__(
        self,
        foresight: Foresight,
        rates: Callable[[Mapping[str, float]], Rates],
        *,
        request: SizedRequest,
        parallel: ParallelPlan,
        asked: Mapping[str, Residence],
    ) -> None:
        self.foresight, self.request, self.parallel = foresight, request, parallel
        self.plan = plan = foresight.plan
        vae, cells = plan.vae, (request.height // plan.vae.spatial_scale, request.width // plan.vae.spatial_scale)
        self.latent_THW = (1 + (request.num_frames - 1) // vae.temporal_scale, *cells)
        self.views, seen = self._windows()
        self.seen_THW = (seen, *cells)
        self.branches = 2 if request.guided else 1
        with_image = bool(plan.takes.needed)
        self.weights = foresight.weights(encodes=request.encodes, with_image=with_image)
        self.batched, self.why_guidance = self._guidance()
        divided = parallel.tp * parallel.fsdp > 1  # such weights stay
        self._layouts = [Layout()] if divided else list(layouts(len(plan.experts), asked))
        self.rates = rates(self.flops)

    def _guidance(self) -> tuple[tuple[bool, ...], str]:
        """Whether both branches may make one batch, the faster way first."""
        allowed = self.foresight.step_planner.choices.loop.guidance_batched
        if self.branches == 1 or self.parallel.cfg == 2:
            return (False,), "there is one branch on a device"
        if self.foresight.machine.is_host:
            batched, why = self.foresight.step_planner.loop(self._latents, guided=True)
            return (batched.guidance_batched,), why
        return ((True, False), "a batch where memory allows") if allowed else ((False,), "a batch is not allowed")

    def _windows(self) -> tuple[int, int]:
        """How many windows a step has, and how many latent frames each: the video's first, and its own."""
        request, temporal = self.request, self.plan.vae.temporal_scale
        frames = self.latent_THW[0]
        length = frames if request.window_frames is None else 1 + (request.window_frames - 1) // temporal
        windows = windows_over(frames - 1, length - 1, request.window_overlap // temporal)
        return len(windows), min(frames, length)

    @property
    def _latents(self) -> tuple[int, ...]:
        """What the network sees at a time."""
        return (self.request.batch, self.plan.experts[0].in_channels, *self.seen_THW)

    @property
    def _latent_bytes(self) -> int:
        """Of the whole video's."""
        return self.request.batch * self.plan.vae.z_dim * math.prod(self.latent_THW) * torch.float32.itemsize

    def candidates(self) -> Iterator[Arranged]:
        """Ways to arrange the request, the fastest first; each is counted when it is asked for.

        Narrower passages follow only while decoding is what takes the most.
        """
        for layout, batched in itertools.product(self._layouts, self.batched):
            for passage in self.foresight.passages(self._decoded):
                candidate = self._arranged(layout, passage, batched=batched)
                yield candidate
                if candidate.peak.stage != "decode":
                    break

    def _arranged(self, layout: Layout, passage: Passage, *, batched: bool) -> Arranged:
        computed: list[tuple[Stage, int]] = [
            ("text", self._text_bytes),
            ("denoise", self._step_bytes(layout, batched=batched)),
            ("decode", self._decode_bytes(passage)),
            ("encode", 0),
        ]
        if self.request.encodes:
            computed.insert(1, ("image", self._encode_bytes(layout)))
        machine, host = self.foresight.machine, self._host_bytes(layout)
        stages = tuple(
            StagePlan(
                stage=stage,
                device_bytes=machine.base_bytes + self._held(stage, layout) + working,
                host_bytes=host,
                seconds=self._seconds(stage, layout, passage),
            )
            for stage, working in computed
        )
        return Arranged(layout=layout, batched=batched, passage=str(passage), stages=stages)

    # Memory of one rank, the first.

    def _held(self, stage: Stage, layout: Layout) -> int:
        return held_in(stage, [self._of_rank(part) for part in self.weights], layout)

    def _of_rank(self, part: Weights) -> Weights:
        divisor = self.parallel.tp if part.name.startswith("transformer") else 1
        divisor *= self.parallel.fsdp if part.name != "vae" else 1
        return part if divisor == 1 else replace(part, footprint=part.footprint.divided(divisor))

    def _host_bytes(self, layout: Layout) -> int:
        if self.foresight.machine.is_host:
            return 0
        return self.foresight.machine.host_base_bytes + pinned_bytes(layout)

    @functools.cached_property
    def _text_bytes(self) -> int:
        return self.foresight.text_bytes(self.request.batch)

    def _step_bytes(self, layout: Layout, *, batched: bool) -> int:
        branches = 1 if self.parallel.cfg == 2 else self.branches
        kept = _OF_SAMPLING + (branches if self.views > 1 else 0)  # velocities of windows are blended
        whole = self.foresight.step_bytes(
            self._latents, branches=branches, batched=batched, residence=layout.transformer
        )
        return whole // (self.parallel.ring * self.parallel.ulysses) + kept * self._latent_bytes

    @property
    def _decoded(self) -> tuple[int, ...]:
        frames, height, width = self.latent_THW
        return (self.request.batch, self.plan.vae.z_dim, frames, -(-height // self.parallel.vae), width)

    def _decode_bytes(self, passage: Passage) -> int:
        return self.foresight.vae_bytes(self._decoded, passage) + self._latent_bytes

    def _encode_bytes(self, layout: Layout) -> int:
        """Of the fastest passage of pictures that fits beside the weights, else of the narrowest."""
        shape = (1, 3, self.request.num_frames, -(-self.request.height // self.parallel.vae), self.request.width)
        machine, foresight = self.foresight.machine, self.foresight
        room = machine.memory_bytes - machine.base_bytes - self._held("image", layout)
        amount = 0
        for passage in foresight.passages(shape, encode=True):
            amount = foresight.vae_bytes(shape, passage, encode=True)
            if amount <= room:
                break
        return amount

    # Seconds.

    def _seconds(self, stage: Stage, layout: Layout, passage: Passage) -> float:
        rates = self.rates
        if stage == "text":
            return self.flops["text"] / rates.text + self._moving_s("text_encoder", layout)
        if stage == "denoise":
            return self.request.steps * self.views * self._step_s(layout)
        if stage == "encode":
            last = passage.steps * self.plan.vae.temporal_scale
            return min(last, self.request.num_frames) * self.request.width * self.request.height / _ENCODED_PIXELS_PER_S
        rate = rates.encode if stage == "image" else rates.decode
        return predicted_s(self._vae_costs(passage, encodes=stage == "image"), rate, self._network)

    @functools.cached_property
    def flops(self) -> Mapping[str, float]:
        """Of each stage that computes, on one rank that does all of it; of one step, in one window."""
        config = self.plan.checkpoint.components["text_encoder"].config
        found = {
            "text": text_flops(config, self.request.batch * self.branches, TEXT_LENGTH),
            "denoise": step_costs(self.step_work, ParallelPlan())[0].flops,
            "decode": pass_costs(self._vae_work(1, encodes=False), 1)[0].flops,
        }
        if self.request.encodes:
            found["image"] = pass_costs(self._vae_work(1, encodes=True), 1)[0].flops
        return found

    @property
    def step_work(self) -> StepWork:
        """One step, in one window."""
        plan = self.plan
        return StepWork(
            spec=plan.experts[0], latent_THW=self.seen_THW, batch=self.request.batch, branches=self.branches,
            batched=self.batched[0], text_tokens=self.foresight.text_tokens, itemsize=plan.dtype.itemsize,
        )  # fmt: skip

    @functools.cached_property
    def step_costs(self) -> list[RankCost]:
        """Of each rank."""
        return step_costs(self.step_work, replace(self.parallel, fsdp=1))

    def _step_s(self, layout: Layout) -> float:
        rates, flops = self.rates, self.flops["denoise"]
        effective = flops / rates.step_s(flops, attention_flops(self.step_work))
        computing_s = predicted_s(self.step_costs, effective, self._network)
        if self.parallel.fsdp > 1:
            gathered = self.plan.held_bytes(self.foresight.quantized) / len(self.plan.experts)
            computing_s = max(computing_s, gathered / rates.peer)
        moving_s = self._moving_s("transformer", layout)
        if layout.transformer is Residence.STREAMED:
            return max(computing_s, moving_s)
        return computing_s + moving_s / self.request.steps

    def _moving_s(self, name: str, layout: Layout) -> float:
        """Until the weights of a component have come once; those of a resident one are there."""
        part = next(part for part in self.weights if part.name == name)
        where = layout.of(name)
        return 0.0 if where is Residence.RESIDENT else sum(part.footprint.units) / self.rates.link

    def _vae_costs(self, passage: Passage, *, encodes: bool) -> list[RankCost]:
        return pass_costs(
            self._vae_work(passage.steps, encodes=encodes), self.parallel.num_ranks, parts=self.parallel.vae
        )

    def _vae_work(self, steps: int, *, encodes: bool) -> VaeWork:
        return VaeWork(
            spec=self.plan.vae, latent_THW=self.latent_THW, batch=self.request.batch, encodes=encodes, steps=steps,
            itemsize=self.plan.vae_dtype.itemsize,
        )  # fmt: skip

    @property
    def _network(self) -> Network:
        return Network(inside=Link(bytes_per_s=self.rates.peer, latency_s=_LATENCY_S))
