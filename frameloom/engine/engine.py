"""The engine: requests in, videos or latents out. Built by `build.build_engine`; use it in a with statement."""

import dataclasses
import difflib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from frameloom.config import check_request, resolve
from frameloom.engine.job import LATENTS, Job, Order, Origin, absolute_loras, begin, differences
from frameloom.engine.journal import NO_JOURNAL, Journal, NoJournal
from frameloom.engine.loras import adapters_of_experts, exchange, loras_of, read_alike
from frameloom.engine.shared_journal import SharedJournal
from frameloom.errors import FrameloomError, InternalError, OutputError, RequestError
from frameloom.models.adapters import Adapters
from frameloom.models.defaults import Defaults
from frameloom.models.vae_state import Frames
from frameloom.ops.registry import Decision
from frameloom.parallel.agreement import check_equal_latents, check_same, check_same_numbers
from frameloom.parallel.team import Team
from frameloom.pipeline.images import image_of, video_of
from frameloom.pipeline.media import DEFAULT_QUALITY, Video, check_output, open_writer, written_behind
from frameloom.pipeline.preview import Preview, check_preview
from frameloom.pipeline.wan import StageClock, WanPipeline
from frameloom.pipeline.windows import WINDOWS
from frameloom.platform.device import memory_errors, peak_memory_bytes
from frameloom.settings import LOGGER_NAME
from frameloom.types import (
    GenerateOptions,
    GenerateRequest,
    Lora,
    Pictures,
    Progress,
    ProgressCallback,
    ResolvedRequest,
    VideoInput,
)

log = logging.getLogger(LOGGER_NAME)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Prompts = list[str] | tuple[str, ...]


def _whole(parts: Iterator[Frames]) -> Frames:
    return np.concatenate(list(parts), axis=1)


def _told(request: ResolvedRequest) -> dict[str, Any]:
    """What is said of the pictures that were given."""
    named = {name: getattr(request, name) for name in ("image", "last_image", "video", "control_video", "mask")}
    told: dict[str, Any] = {name: pictures.name for name, pictures in named.items() if pictures is not None}
    if request.references:
        told["references"] = [picture.name for picture in request.references]
    if request.strength is not None:
        told["strength"] = request.strength
    if request.control_strength != 1:
        told["control_strength"] = request.control_strength
    if request.window_frames is not None:
        told |= {"window_frames": request.window_frames, "window_overlap": request.window_overlap}
    return told


def _video(source: VideoInput, what: str, num_frames: int) -> Pictures:
    pictures = video_of(source, num_frames)
    return dataclasses.replace(pictures, name=f"the {what}") if isinstance(source, np.ndarray) else pictures


def _tell_of_rest(read: GenerateRequest, num_frames: int) -> None:
    """Of videos that are longer than what is made of them."""
    for video in (read.video, read.control_video):
        if isinstance(video, Pictures) and len(video.frames) > num_frames:
            log.info("%s: only its first %d frames are used", video.name, num_frames)


def _no_job() -> None:
    """Of those who keep nothing."""


def _tell_of_length(request: ResolvedRequest, defaults: Defaults) -> None:
    """Of videos that the denoiser sees whole though it was trained on shorter ones."""
    if request.window_frames is None and request.num_frames > defaults.num_frames:
        log.warning(
            "%d frames are more than the %d that this model was trained on; --windows denoises them in windows",
            request.num_frames, defaults.num_frames,
        )  # fmt: skip


def _silent(_: Progress) -> None:
    """The progress callback of those who gave none."""


class Engine:
    """A loaded checkpoint that answers requests one at a time.

    Attributes: `name` (as the user gave it), `defaults` (what a request gets where it is silent), `decisions` (which
    rewrites are used, and why the others are not). `team`: the ranks that answer together; each must be asked the same,
    and each gets the answer, but a file is written by the first alone.
    """

    def __init__(
        self,
        *,
        name: str,
        pipeline: WanPipeline,
        defaults: Defaults,
        decisions: Sequence[Decision] = (),
        team: Team | None = None,
        adapters: Sequence[Sequence[Adapters]] = (),
        loras: Sequence[Lora] = (),
        origin: Origin | None = None,
    ) -> None:
        self._team, self._origin = team, origin
        self._loras = tuple(loras)
        self._set_loras: tuple[Lora, ...] = ()
        self._base = self._attached = adapters or [()] * len(pipeline.experts)
        self._is_answering = False
        self.name = name
        self.defaults = defaults
        self.decisions = tuple(decisions)
        self._pipeline: WanPipeline | None = pipeline

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the weights; further requests are refused."""
        self._pipeline, self._base, self._attached = None, (), ()

    def set_loras(self, loras: Sequence[Lora | str]) -> None:
        """Compute with these LoRAs from the next request on, instead of those that were set before; [] for none.

        Lora, or texts such as "high:FILE:0.8". They come to those given when the model was loaded, and the weights stay
        where they are. Raises CheckpointError for a file and RequestError for the rest; then nothing changes.
        """
        chosen, experts = loras_of(loras), self._open.experts
        if self._is_answering:
            raise RequestError("LoRAs cannot be exchanged in the middle of a video; set them before it or after it")
        if self._team is not None:
            check_same(self._team, "LoRAs", repr(chosen))
        found = read_alike(self._team, lambda: adapters_of_experts([dit.spec for dit in experts], chosen))
        wanted = [[*base, *sets] for base, sets in zip(self._base, found, strict=True)]
        exchange(experts, before=self._attached, after=wanted)
        self._attached, self._set_loras = wanted, chosen

    def resolve(self, prompt: str | Prompts, **options: Unpack[GenerateOptions]) -> ResolvedRequest:
        """Check a request and fill in what it leaves open, without computing anything. Raises RequestError."""
        unknown = [name for name in options if name not in GenerateOptions.__annotations__]
        if unknown:
            near = difflib.get_close_matches(unknown[0], GenerateOptions.__annotations__, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(GenerateOptions.__annotations__)}"
            raise RequestError(f"option '{unknown[0]}' is unknown; {hint}")
        asked = GenerateRequest(prompt=prompt, **options)
        check_request(asked)
        self._open.takes.check(asked, self.name)
        read = self._with_pictures(asked)
        if asked.windows is None and any(told.used for told in self.decisions if told.name == WINDOWS.name):
            read = dataclasses.replace(read, windows=True)
        request = resolve(read, self.defaults, self._open.size_rules)
        _tell_of_rest(read, request.num_frames)
        _tell_of_length(request, self.defaults)
        if options.get("guidance_scale_2") is not None and len(self._open.experts) == 1:
            raise RequestError(
                f"guidance scale 2 is of the second expert, and '{self.name}' has one; leave guidance_scale_2 out"
            )
        self._open.check_size(request)
        self._open.check_control(request)
        return request

    @overload
    def generate(
        self,
        prompt: str,
        *,
        output: Literal["video"] = ...,
        progress: ProgressCallback | None = ...,
        **options: Unpack[GenerateOptions],
    ) -> Video: ...
    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        output: Literal["video"] = ...,
        progress: ProgressCallback | None = ...,
        **options: Unpack[GenerateOptions],
    ) -> list[Video]: ...
    @overload
    def generate(
        self,
        prompt: str | Prompts,
        *,
        output: Literal["latents"],
        progress: ProgressCallback | None = ...,
        **options: Unpack[GenerateOptions],
    ) -> Tensor: ...
    def generate(
        self,
        prompt: str | Prompts,
        *,
        output: Literal["video", "latents"] = "video",
        progress: ProgressCallback | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Video | list[Video] | Tensor:
        """Turn a prompt into a Video; a list of prompts into a list of them, made as one batch.

        Options, each from the checkpoint's defaults when absent or None: negative_prompt, width and height (pixels),
        num_frames, steps, guidance_scale, guidance_scale_2 (low-noise expert), flow_shift, fps, seed (0). Pictures to
        start from: image, last_image, or video with strength, as types.GenerateRequest says.
        `output="latents"` returns float32 (B, C, T', H', W'), normalised as the sampler sees them. `progress` is called
        with a types.Progress after every step. Raises RequestError before anything is computed.
        """
        if output not in ("video", "latents"):
            raise RequestError(f"output {output!r} is unknown; use 'video' or 'latents'")
        request = self._agreed(self.resolve(prompt, **options))
        report = progress or _silent
        clock = StageClock(device=self._open.device)
        passages = self._open.plan(request) if output == "video" else iter(())
        with self._answering(request):
            latents = self._equal(self._open.latents(request, clock, report))
            if output == "latents":
                return latents
            frames = self._everywhere(self._open.decode(latents, passages, clock, report))
        videos = [
            Video(frames=f, fps=request.fps, metadata=self._metadata(request, i, clock)) for i, f in enumerate(frames)
        ]
        return videos[0] if isinstance(prompt, str) else videos

    def generate_to(
        self,
        path: str | os.PathLike[str],
        prompt: str,
        *,
        quality: int | None = None,
        progress: ProgressCallback | None = None,
        job: bool = False,
        keep_latents: bool = False,
        preview: str | os.PathLike[str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> dict[str, Any]:
        """Generate straight into a file: frames are written while the next are decoded, the video is never whole.

        `job`: what is computed is kept in the folder of jobs as it comes, and `frameloom.resume` goes on from there
        whatever happens; with `keep_latents` the latents are kept when all is done, too. `preview`: a PNG file that
        shows, while denoising, what the video is becoming. Returns what `Video.metadata` holds, and `output`, the
        absolute path. Raises RequestError or OutputError before anything is computed; whatever happens, there is a
        whole file at `path` or none that was not there before.
        """
        if not isinstance(prompt, str):
            raise RequestError("a file holds the video of one prompt; give a text, or call generate")
        request = self._agreed(self.resolve(prompt, **options))
        loras = absolute_loras(self._set_loras)
        shown = None if preview is None else str(check_preview(preview, self._open.vae.spec))
        order = Order(output=os.fspath(path), quality=quality, keeps_latents=keep_latents, loras=loras, preview=shown)
        if self._writes:
            target = check_output(path, fps=request.fps, quality=quality)
            order = dataclasses.replace(order, output=str(target.path) + "/" * (target.kind == "folder"))
        begin_job = functools.partial(self._begin, order, request) if job and self._writes else _no_job
        return self._make(order, request, progress or _silent, begin_job)

    def finish(self, job: Job, *, progress: ProgressCallback | None = None, anyway: bool = False) -> dict[str, Any]:
        """Go on with a job that this engine, or one like it, has begun; returns as `generate_to` does.

        Raises RequestError if it would be another video, or another process works on it. `anyway`: though the bits may
        be others, as versions, device or kernels are.
        """
        changed = differences(job.origin.facts, self.facts)
        model = [change for change in changed if change.startswith("model ")]
        if model or (changed and not anyway):
            way_out = (
                "give the model that it began with" if model else "go back to that, or take other bits with --anyway"
            )
            raise RequestError(f"job {job.name} began with something else: {'; '.join(model or changed)}; {way_out}")
        if job.order.loras != self._set_loras:
            self.set_loras(job.order.loras)
        request = self._agreed(job.request)
        return self._make(job.order, request, progress or _silent, lambda: job if self._writes else None)

    @property
    def facts(self) -> dict[str, str]:
        """What the bits of a video depend on, besides the request: versions, model, device, kernels."""
        used = ", ".join(sorted(decision.name for decision in self.decisions if decision.used))
        return {**({} if self._origin is None else self._origin.facts), "rewrites": used}

    def _begin(self, order: Order, request: ResolvedRequest) -> Job | None:
        """A new job; None, with a line in the log, where none can be kept."""
        if self._origin is None:
            return None
        try:
            return begin(dataclasses.replace(self._origin, facts=self.facts), order, request)
        except OutputError as error:
            log.warning("%s; this run cannot be resumed", error)
            return None

    def _make(
        self, order: Order, request: ResolvedRequest, report: ProgressCallback, job_of: Callable[[], Job | None]
    ) -> dict[str, Any]:
        """The video of a request in its file, and what is told of it; all but the first rank help."""
        passages = self._open.plan(request)
        job = job_of()
        clock = StageClock(device=self._open.device)
        with self._working_on(job), self._answering(request):
            journal = self._journal(job)

            def computed() -> dict[str, Tensor]:
                shown = Preview(Path(order.preview), self._open.vae.spec) if order.preview and self._writes else None
                return {LATENTS: self._equal(self._open.latents(request, clock, report, journal, preview=shown))}

            latents = journal.once(LATENTS, computed)[LATENTS].to(self._open.device)

            def decoded(done: int) -> Iterator[Frames]:
                skipped = done if self._team is None else self._team.agree(done)
                if skipped < request.num_frames:
                    yield from self._open.decode(latents, passages, clock, report, skipped=skipped)

            if self._writes:
                clock.seconds["encode"] = self._write(order, request, journal, decoded)
            else:
                for _ in decoded(0):
                    raise InternalError("frames came to a rank that does not write")
        made = {**self._metadata(request, 0, clock), "output": order.output.rstrip("/")}
        if job is not None:
            made["journal_seconds"] = job.journal.seconds
            job.finish(made)
        return made

    def decode(self, latents: Tensor, *, progress: ProgressCallback | None = None) -> Frames:
        """Frames uint8 (T, H, W, 3) of latents (1, C, T', H', W'); (B, T, H, W, 3) of a batch of several.

        From the first value that is no finite number on, frames are black, and a warning says so. Raises RequestError.
        """
        channels = self._open.vae.spec.z_dim
        if not isinstance(latents, Tensor) or latents.dtype not in _FLOATS:
            kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise RequestError(f"latents of type {kind} cannot be decoded; give (1, {channels}, T, H, W) of floats")
        if latents.is_meta or latents.layout is not torch.strided:
            what = "no memory" if latents.is_meta else f"layout {latents.layout}"
            raise RequestError(f"latents of {what} cannot be decoded; give an ordinary tensor")
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            shape = tuple(latents.shape)
            raise RequestError(f"latents of shape {shape} cannot be decoded; give (1, {channels}, T, H, W)")
        if not torch.isfinite(latents[:, :, 0]).all():
            raise RequestError(
                "the latents of the first frame hold values that are no finite numbers, and every frame depends on "
                "them; check where they come from"
            )
        self._given("latents", lambda: latents)
        with memory_errors(f"decoding latents {tuple(latents.shape)}", "decode a shorter or a smaller piece"):
            clock = StageClock(device=self._open.device)
            passages = self._open.plan_decode(tuple(latents.shape))
            frames = self._everywhere(self._open.decode(latents, passages, clock, progress or _silent))
        return frames[0] if len(frames) == 1 else frames

    def encode(self, frames: Frames, *, progress: ProgressCallback | None = None) -> Tensor:
        """Latents float32 (1, C, T', H', W') of frames uint8 (T, H, W, 3): the mode of the posterior, normalised."""
        try:
            array = np.asarray(frames)
        except ValueError:  # lists of unequal lengths
            raise RequestError("these frames are no array; give numpy uint8 (T, H, W, 3)") from None
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise RequestError(
                f"frames {array.dtype} of shape {array.shape} cannot be encoded; give uint8 (T, H, W, 3)"
            )
        self._open.vae.check_frames(*array.shape[:3])
        self._given("frames", lambda: torch.from_numpy(np.array(array)))  # a copy: read-only arrays would warn
        with memory_errors(f"encoding frames {array.shape}", "encode a shorter or a smaller piece"):
            return self._open.encode(array, StageClock(device=self._open.device), progress or _silent)

    def _with_pictures(self, request: GenerateRequest) -> GenerateRequest:
        """The request, its pictures read."""
        read: dict[str, Any] = {
            name: image_of(given, name.replace("_", " "))
            for name in ("image", "last_image")
            if (given := getattr(request, name)) is not None
        }
        wanted = 1 + (request.num_frames or self.defaults.num_frames)  # one more tells whether there are others
        read |= {
            name: _video(given, name.replace("_", " "), wanted)
            for name in ("video", "control_video", "mask")
            if (given := getattr(request, name)) is not None
        }
        if request.references is not None:
            read["references"] = [image_of(given, "reference image") for given in request.references]
        return dataclasses.replace(request, **read)

    @property
    def _writes(self) -> bool:
        """Whether this process writes files: the first rank, or the only one."""
        return self._team is None or self._team.index == 0

    def _write(
        self,
        order: Order,
        request: ResolvedRequest,
        journal: Journal | NoJournal,
        decode: Callable[[int], Iterator[Frames]],
    ) -> float:
        """Write the frames that are there and those that `decode` makes; returns the seconds after the last of them."""
        dial = DEFAULT_QUALITY if order.quality is None else order.quality
        writer = open_writer(order.output, width=request.width, height=request.height, fps=request.fps, quality=dial)
        with writer, written_behind(writer) as write:
            done = 0
            for part in journal.frames():
                write(part)
                done += len(part)
            for (part,) in decode(done):
                journal.keep_frames(done, part)
                write(part)
                done += len(part)
            decoded = time.perf_counter()
        return time.perf_counter() - decoded

    def _journal(self, job: Job | None) -> Journal | NoJournal:
        """Where this run keeps what it computes; on all ranks that of the first."""
        if self._team is None:
            return NO_JOURNAL if job is None else job.journal
        if not self._team.agree(job is not None):
            return NO_JOURNAL
        return SharedJournal(self._team, None if job is None else job.journal)

    @contextmanager
    def _working_on(self, job: Job | None) -> Iterator[None]:
        """Hold the job meanwhile; an error says how to go on."""
        if job is None:
            yield
            return
        with closing(job.held()) as lock:
            if lock.before is not None:
                check_output(job.order.output).remove_partials(lock.before)
            try:
                yield
            except FrameloomError as error:
                again = f"what was computed is kept, and `frameloom resume {job.name}` goes on from there"
                raise type(error)(f"{error}; {again}") from error

    def _agreed(self, request: ResolvedRequest) -> ResolvedRequest:
        """The request, if all ranks were asked the same. Raises RequestError."""
        if self._team is not None:
            for field in dataclasses.fields(request):
                check_same(self._team, field.name.replace("_", " "), repr(getattr(request, field.name)))
        return request

    def _given(self, what: str, numbers: Callable[[], Tensor]) -> None:
        """Raise RequestError unless all ranks were given the same."""
        if self._team is not None:
            check_same_numbers(self._team, what, numbers())

    def _equal(self, latents: Tensor) -> Tensor:
        """Latents, if all ranks have the same."""
        if self._team is not None:
            check_equal_latents(self._team, latents)
        return latents

    def _everywhere(self, parts: Iterator[Frames]) -> Frames:
        """All frames, on every rank."""
        if self._team is None:
            return _whole(parts)
        mine = list(parts)
        frames = torch.from_numpy(np.concatenate(mine, axis=1)).to(self._team.device) if mine else None
        shape = self._team.agree(None if frames is None else list(frames.shape))
        if frames is None:
            frames = torch.empty(shape, dtype=torch.uint8, device=self._team.device)
        whole: Frames = self._team.broadcast(frames).cpu().numpy()
        return whole

    @contextmanager
    def _answering(self, request: ResolvedRequest) -> Iterator[None]:
        """While a video is computed; where memory runs out it is said what of."""
        before, self._is_answering = self._is_answering, True
        what = f"{request.num_frames} frames of {request.width}x{request.height} on {self._open.device}"
        try:
            with memory_errors(what, "ask for a smaller or a shorter video"):
                yield
        finally:
            self._is_answering = before

    @property
    def _open(self) -> WanPipeline:
        if self._pipeline is None:
            raise RequestError("this engine is closed; load the checkpoint again")
        return self._pipeline

    def _metadata(self, request: ResolvedRequest, index: int, clock: StageClock) -> dict[str, Any]:
        return {
            "model": self.name,
            "prompt": request.prompts[index],
            "negative_prompt": request.negative_prompts[index],
            "width": request.width,
            "height": request.height,
            "num_frames": request.num_frames,
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "guidance_scale_2": request.guidance_scale_2,
            "seed": request.seed,
            "fps": request.fps,
            **_told(request),
            **({"loras": list(map(str, loras))} if (loras := (*self._loras, *self._set_loras)) else {}),
            "seconds": dict(clock.seconds),
            "step_seconds": clock.step_seconds,
            "peak_memory_bytes": peak_memory_bytes(self._open.device),
            "torch": torch.__version__,
        }
