"""The pipeline of Wan: the order of work from text, from pictures or from a video, with one expert or two."""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from frameloom.errors import RequestError
from frameloom.models.dit_fast import LoopChoices
from frameloom.models.spec import VaceSpec
from frameloom.models.vace import strengths_for
from frameloom.models.vae_fast import prepare
from frameloom.models.vae_state import Frames, Passage
from frameloom.models.wan_dit import Control, WanDiT
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.precision import own_precision
from frameloom.pipeline import stages
from frameloom.pipeline.conditions import (
    Condition,
    EncodesImages,
    Takes,
    beside,
    clip_images,
    fitted_to,
    noised,
    pictures_taken,
    size_rules,
    video_of_ends,
)
from frameloom.pipeline.keep import FORGETS, Keeper
from frameloom.pipeline.preview import Preview
from frameloom.pipeline.vace import UNCONTROLLED, VaceConditions, VaceInputs, prepare_control
from frameloom.pipeline.windows import Windows
from frameloom.platform.device import platform_of, synchronise
from frameloom.sampling.flow import FlowSchedule
from frameloom.sampling.guidance import ExpertSwitch
from frameloom.sampling.unipc import make_sampler
from frameloom.sampling.windows import windows_over
from frameloom.settings import LOGGER_NAME
from frameloom.types import Progress, ProgressCallback, ResolvedRequest, SizeRules, Stage

log = logging.getLogger(LOGGER_NAME)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StageClock:
    """Seconds per stage, honest on devices that work ahead of the host."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    marks: list[Any] = field(default_factory=list)

    def copy(self) -> "StageClock":
        """One that goes on from here by itself."""
        return StageClock(device=self.device, seconds=dict(self.seconds), marks=list(self.marks))

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time one stage."""
        begun = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def each_step(self, on_step: stages.StepCallback) -> stages.StepCallback:
        """The same callback, with a mark in the device's time after every step; nothing waits for the device."""
        platform = platform_of(self.device)
        self.marks.append(platform.mark(self.device.index))

        def step(index: int) -> None:
            self.marks.append(platform.mark(self.device.index))
            on_step(index)

        return step

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of every step; ask after the stage, when the device is done."""
        between = platform_of(self.device).seconds_between
        return [between(first, second) for first, second in itertools.pairwise(self.marks)]

    def each(self, name: Stage, items: Iterator[Frames]) -> Iterator[Frames]:
        """Pass items on, and time the making of each, not what is done with it."""
        while True:
            with self.stage(name):
                item = next(items, None)
            if item is None:
                return
            yield item


class EncodesPrompts(Protocol):
    """A text encoder."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as features (B, S, E)."""
        ...


class StepPlanner(Protocol):
    """Says how the steps of a video are computed."""

    def loop(self, latents_BCTHW: tuple[int, ...], *, guided: bool) -> tuple[LoopChoices, str]:
        """The way, and why."""
        ...


class VaePlanner(Protocol):
    """Says how latents or frames of a shape pass through the VAE: the best way first, then narrower ones."""

    def decode(self, shape_BZTHW: tuple[int, ...]) -> Iterator[Passage]:
        """Passages for latents."""
        ...

    def encode(self, shape_BCTHW: tuple[int, ...]) -> Iterator[Passage]:
        """Passages for frames."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WanPipeline:
    """Loaded networks and what the checkpoint says of their use. `experts`: one, or high noise then low noise.

    `image_encoder`: where the transformer reads CLIP's features. `make_predictor`: who predicts
    under the branches of the guidance. `during`: who has the weights of a stage there meanwhile.
    """

    text_encoder: EncodesPrompts
    experts: tuple[WanDiT, ...]
    step_planner: StepPlanner
    vae: WanVAE
    vae_planner: VaePlanner
    scheduler: Mapping[str, Any]
    boundary_ratio: float | None
    expand_timesteps: bool
    device: torch.device
    image_encoder: EncodesImages | None = None
    make_predictor: stages.MakePredictor = stages.Predictor
    during: Callable[[Stage], AbstractContextManager[object]] = nullcontext

    @property
    def takes(self) -> Takes:
        """The pictures that this checkpoint starts from."""
        return pictures_taken(self.experts[0].spec, self.vae.spec, expand_timesteps=self.expand_timesteps)

    @property
    def size_rules(self) -> SizeRules:
        """The sizes this checkpoint can compute."""
        return size_rules(self.experts[0].spec, self.vae.spec)

    def check_size(self, request: ResolvedRequest) -> None:
        """Raise RequestError for a size that the position table of the DiT does not reach."""
        spec, rules = self.experts[0].spec, self.size_rules
        patch_t = spec.patch_size[0]
        if request.window_frames is not None and patch_t > 1:
            raise RequestError(f"windows are not possible with a patch of {patch_t} latent frames; leave them out")
        latent_frames = self._latent_size(request)[0] + len(request.references)
        if latent_frames % patch_t:
            raise RequestError(
                f"{request.num_frames} frames make {latent_frames} latent frames, not a multiple of the patch {patch_t}"
            )
        reach = spec.rope_max_seq_len
        reach_in_time = reach * patch_t - len(request.references)
        limits = {
            "frames": (request.window_frames or request.num_frames, 1 + rules.temporal * (reach_in_time - 1)),
            "height": (request.height, rules.height_multiple * reach),
            "width": (request.width, rules.width_multiple * reach),
        }
        for name, (asked, limit) in limits.items():
            if asked > limit:
                other = ", or denoise it in windows (--windows)" if name == "frames" else ""
                raise RequestError(
                    f"{name} {asked} is past the last position of this checkpoint; use {limit} or less{other}"
                )

    def check_control(self, request: ResolvedRequest) -> None:
        """Raise RequestError for inputs of VACE that do not fit together, or not to this checkpoint."""
        if isinstance(spec := self.experts[0].spec, VaceSpec):
            inputs = VaceInputs.of(request)
            inputs.check(request.num_frames)
            strengths_for(spec, inputs.strengths)

    def plan(self, request: ResolvedRequest) -> Iterator[Passage]:
        """How its latents will pass through the VAE. Raises RequestError where memory will not do, before any work."""
        return self.plan_decode((len(request.prompts), self.vae.spec.z_dim, *self._latent_size(request)))

    def plan_decode(self, shape_BZTHW: tuple[int, ...]) -> Iterator[Passage]:
        """The same for latents of a shape. The decoder's kernels are made first: they are part of what is not free."""
        prepare(self.vae.decoder)
        return self.vae_planner.decode(shape_BZTHW)

    def latents(
        self,
        request: ResolvedRequest,
        clock: StageClock,
        report: ProgressCallback,
        keeper: Keeper = FORGETS,
        *,
        preview: Preview | None = None,
    ) -> Tensor:
        """Prompts and pictures to latents: float32 (B, C, T', H', W'), normalised. `keeper` gets what is computed."""
        sampler = make_sampler(
            self.scheduler, request.steps, flow_shift=request.flow_shift, skipped=request.skipped_steps
        )
        switch = ExpertSwitch(
            boundary_ratio=self.boundary_ratio,
            guidance_scale=request.guidance_scale,
            guidance_scale_2=request.guidance_scale_2,
            num_train_timesteps=sampler.schedule.num_train_timesteps,
        )
        text, negative = self._texts(request, clock, report, keeper, guided=switch.guided)
        condition, control, begin = self._pictures(request, sampler.schedule, clock, report, keeper)
        windows = self._windows(request, control)
        area = self._latent_size(request)[1:]
        shape = (len(request.prompts), self.experts[0].spec.in_channels, windows.longest, *area)
        loop = LoopChoices(**keeper.choice("loop", lambda: self._loop(shape, guided=negative is not None)))
        if preview is not None:
            keeper = preview.beside(keeper, sampler.schedule, lambda x: control.cut(condition.kept(x)))
        make = control.predictor(windows.predictor(self.make_predictor))
        prompts = stages.Prompts(text_BSE=text, negative_BSE=negative, condition=condition, make_predictor=make)
        with clock.stage("denoise"), self.during("denoise"):
            out = stages.denoise(
                self.experts,
                begin,
                prompts,
                sampler=sampler,
                switch=switch,
                per_token=self.expand_timesteps,
                on_step=clock.each_step(_reporter(report, "denoise", sampler.schedule.num_steps)),
                choices=loop,
                keeper=keeper,
            )
        return _plain(control.cut(out))

    def _loop(self, shape_BCTHW: tuple[int, ...], *, guided: bool) -> dict[str, bool]:
        """The fields of the LoopChoices for latents of a shape."""
        loop, why = self.step_planner.loop(shape_BCTHW, guided=guided)
        log.info("steps: %s", why)
        return asdict(loop)

    def _windows(self, request: ResolvedRequest, control: VaceConditions) -> Windows:
        """What the denoiser sees of the video at a time: all, unless windows were asked for."""
        frames, temporal = self._latent_size(request)[0], self.vae.spec.temporal_scale
        length = frames if request.window_frames is None else 1 + (request.window_frames - 1) // temporal
        found = windows_over(frames - 1, length - 1, request.window_overlap // temporal)
        if len(found) > 1:
            log.info("windows: %d of %d frames over %d", len(found), request.window_frames, request.num_frames)
        return Windows(each=found, always=1 + control.num_references)

    def _texts(
        self, request: ResolvedRequest, clock: StageClock, report: ProgressCallback, keeper: Keeper, *, guided: bool
    ) -> tuple[Tensor, Tensor | None]:
        def encoded() -> dict[str, Tensor]:
            found = {"text": self.text_encoder.encode_prompts(request.prompts)}
            return found | ({"negative": self.text_encoder.encode_prompts(request.negative_prompts)} if guided else {})

        with clock.stage("text"), self.during("text"), own_precision(self.device):
            report(Progress(stage="text", step=0, total=1))
            texts = {name: x.to(self.device) for name, x in keeper.once("prompts", encoded).items()}
            report(Progress(stage="text", step=1, total=1))
        return texts["text"], texts.get("negative")

    def _pictures(
        self,
        request: ResolvedRequest,
        schedule: FlowSchedule,
        clock: StageClock,
        report: ProgressCallback,
        keeper: Keeper,
    ) -> tuple[Condition, VaceConditions, Callable[[], Tensor]]:
        """What is given, encoded before the denoiser begins; and what makes the latents that it begins with."""
        shape = (len(request.prompts), self.vae.spec.z_dim, *self._latent_size(request))
        spec = self.experts[0].spec
        if request.image is None and request.video is None and not isinstance(spec, VaceSpec):
            noise = functools.partial(stages.initial_noise, shape, request.seed, self.device)
            return stages.FROM_TEXT, UNCONTROLLED, noise
        with clock.stage("image"), own_precision(self.device):
            report(Progress(stage="image", step=0, total=1))
            encoded = keeper.once("pictures", lambda: self._given(request))
            given = {name: x.to(self.device) for name, x in encoded.items()}
            condition = Condition(
                beside_BCTHW=given.get("beside"), first_BCTHW=given.get("first"), image_BNE=given.get("image")
            )
            control = UNCONTROLLED
            if isinstance(spec, VaceSpec):
                control = VaceConditions(
                    control=Control(given["control"], strengths_for(spec, request.control_strength)),
                    num_references=len(request.references),
                )
            noise = functools.partial(stages.initial_noise, control.lengthened(shape), request.seed, self.device)
            video = given.get("video")

            def begin() -> Tensor:
                return noise() if video is None else noised(video, noise(), schedule)

            report(Progress(stage="image", step=1, total=1))
        return condition, control, begin

    def _given(self, request: ResolvedRequest) -> dict[str, Tensor]:
        """All that is encoded of the pictures."""
        spec = self.experts[0].spec
        condition = self._condition(request)
        control = self._control(request, spec).control if isinstance(spec, VaceSpec) else None
        video = None
        if request.video is not None:
            video = self._encoded(torch.from_numpy(fitted_to(request, request.video)))
        found = {
            "beside": condition.beside_BCTHW,
            "first": condition.first_BCTHW,
            "image": condition.image_BNE,
            "control": None if control is None else control.x_BCTHW,
            "video": video,
        }
        return {name: x for name, x in found.items() if x is not None}

    def _control(self, request: ResolvedRequest, spec: VaceSpec) -> VaceConditions:
        return prepare_control(
            VaceInputs.of(request),
            (request.num_frames, request.height, request.width),
            spec=spec,
            vae=self.vae.spec,
            encode=self._encoded,
            keeps_aspect=request.keeps_aspect,
        )

    def _condition(self, request: ResolvedRequest) -> Condition:
        if request.image is None:
            return stages.FROM_TEXT
        image_BNE = None
        if self.image_encoder is not None:  # the tokens of both images follow each other
            image_BNE = self.image_encoder.encode_images(clip_images(request)).flatten(0, 1)
            image_BNE = image_BNE.expand(len(request.prompts), -1, -1)
        if self.expand_timesteps:
            first = self._encoded(torch.from_numpy(fitted_to(request, request.image)))
            return Condition(first_BCTHW=first, image_BNE=image_BNE)
        latents = self._encoded(video_of_ends(request, request.image, request.last_image))
        given = beside(latents, self.vae.spec.temporal_scale, has_last=request.last_image is not None)
        return Condition(beside_BCTHW=given, image_BNE=image_BNE)

    def decode(
        self,
        latents_BCTHW: Tensor,
        passages: Iterator[Passage],
        clock: StageClock,
        report: ProgressCallback,
        *,
        skipped: int = 0,
    ) -> Iterator[Frames]:
        """Latents to frames uint8 (B, t, H, W, 3), as they come, without the first `skipped`."""
        total = 1 + self.vae.spec.temporal_scale * (latents_BCTHW.shape[2] - 1)
        reporter = _reporter(report, "decode", total)
        frames = stages.decode(self.vae, latents_BCTHW, passages, reporter, skipped=skipped)
        return clock.each("decode", frames)

    def encode(self, frames: Frames, clock: StageClock, report: ProgressCallback) -> Tensor:
        """Frames uint8 (T, H, W, 3) to latents (1, C, T', H', W')."""
        with clock.stage("encode"):
            report(Progress(stage="encode", step=0, total=1))
            latents = self._encoded(torch.from_numpy(np.array(frames)))  # a copy: read-only arrays would warn
            report(Progress(stage="encode", step=1, total=1))
        return _plain(latents)

    def _encoded(self, levels_THWC: Tensor) -> Tensor:
        """Latents (1, C, T', H', W') of frames whose levels are of 255."""
        num_frames, height, width, channels = levels_THWC.shape
        prepare(self.vae.encoder)
        passages = self.vae_planner.encode((1, channels, num_frames, height, width))
        return stages.encode(self.vae, levels_THWC, passages)

    def _latent_size(self, request: ResolvedRequest) -> tuple[int, int, int]:
        spec = self.vae.spec
        frames = 1 + (request.num_frames - 1) // spec.temporal_scale
        return frames, request.height // spec.spatial_scale, request.width // spec.spatial_scale


def _plain(latents: Tensor) -> Tensor:
    """float32, and out of inference mode, so that its owner may write to it or train with it."""
    return torch.empty(latents.shape, dtype=torch.float32, device=latents.device).copy_(latents)


def _reporter(report: ProgressCallback, stage: Stage, total: int) -> Callable[[int], None]:
    report(Progress(stage=stage, step=0, total=total))
    return lambda step: report(Progress(stage=stage, step=step, total=total))
