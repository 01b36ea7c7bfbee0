"""The engine: requests in, videos or latents out. Built by `build.build_engine`; use it in a with statement."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from frameloom.engine.asked import Prompts, check_latents, complete, frames_of, request_of, told_of
from frameloom.engine.denoised import Denoised
from frameloom.engine.job import LATENTS, Job, Order, Origin, absolute, absolute_loras, check_unchanged
from frameloom.engine.journal import NO_JOURNAL, Journal, NoJournal
from frameloom.engine.loras import adapters_of_experts, contents_of, exchange, loras_of, read_alike
from frameloom.engine.to_file import begin_if_possible, checked, journal_of, working_on, write
from frameloom.engine.together import Together
from frameloom.errors import InternalError, RequestError
from frameloom.models.adapters import Adapters
from frameloom.models.defaults import Defaults
from frameloom.models.vae_state import Frames, Passage
from frameloom.ops.registry import Decision
from frameloom.parallel.team import Team
from frameloom.pipeline.media import Video, check_output
from frameloom.pipeline.preview import Preview
from frameloom.pipeline.wan import StageClock, WanPipeline
from frameloom.pipeline.windows import WINDOWS
from frameloom.platform.device import memory_errors, peak_memory_bytes
from frameloom.types import GenerateOptions, Lora, Progress, ProgressCallback, ResolvedRequest


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
        self._together, self._origin = Together(team), origin
        self._loras = tuple(loras)
        self._set_loras: tuple[Lora, ...] = ()
        self._set_contents = ""
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

    @property
    def pipeline(self) -> WanPipeline:
        """The networks. Raises RequestError if the engine is closed."""
        return self._open

    @property
    def loras(self) -> tuple[Lora, ...]:
        """Those that were set after the engine was made."""
        return self._set_loras

    @property
    def team(self) -> Team | None:
        """The ranks that answer together; None of a process alone."""
        return self._together.team

    def set_loras(self, loras: Sequence[Lora | str]) -> None:
        """Compute with these LoRAs from the next request on, instead of those that were set before; [] for none.

        Lora, or texts such as "high:FILE:0.8". They come to those given when the model was loaded, and the weights stay
        where they are. Raises CheckpointError for a file and RequestError for the rest; then nothing changes.
        """
        chosen, experts = loras_of(loras), self._open.experts
        if self._is_answering:
            raise RequestError("LoRAs cannot be exchanged in the middle of a video; set them before it or after it")
        self._together.check_same("LoRAs", chosen)
        found = read_alike(self._together.team, lambda: adapters_of_experts([dit.spec for dit in experts], chosen))
        wanted = [[*base, *sets] for base, sets in zip(self._base, found, strict=True)]
        exchange(experts, before=self._attached, after=wanted)
        self._attached, self._set_loras, self._set_contents = wanted, chosen, contents_of(found)

    def resolve(self, prompt: str | Prompts, **options: Unpack[GenerateOptions]) -> ResolvedRequest:
        """Check a request and fill in what it leaves open, without computing anything. Raises RequestError."""
        asked = request_of(prompt, options)
        in_windows = any(told.used for told in self.decisions if told.name == WINDOWS.name)
        return complete(asked, self._open, name=self.name, defaults=self.defaults, in_windows=in_windows)

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
        num_frames, steps, guidance_scale, guidance_scale_2 (low-noise expert), flow_shift, fps, seed (0; or one for
        each prompt). Pictures to start from: image, last_image, or video with strength, as types.GenerateRequest says.
        `output="latents"` returns float32 (B, C, T', H', W'), normalised as the sampler sees them. `progress` is called
        with a types.Progress after every step. Raises RequestError before anything is computed.
        """
        if output not in ("video", "latents"):
            raise RequestError(f"output {output!r} is unknown; use 'video' or 'latents'")
        request = self._together.agreed(self.resolve(prompt, **options))
        report = progress or _silent
        clock = StageClock(device=self._open.device)
        passages = self._open.plan(request) if output == "video" else iter(())
        with self._answering(request):
            latents = self._together.equal(self._open.latents(request, clock, report))
            if output == "latents":
                return latents
            frames = self._together.everywhere(self._open.decode(latents, passages, clock, report))
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
        job: bool | str | os.PathLike[str] = False,
        keep_latents: bool = False,
        preview: str | os.PathLike[str] | None = None,
        extends: str | os.PathLike[str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> dict[str, Any]:
        """Generate straight into a file: frames are written while the next are decoded, the video is never whole.

        `job`: what is computed is kept in the folder of jobs, or in the folder that is given, as it comes, and
        `frameloom.resume` goes on from there whatever happens; with `keep_latents` the latents are kept when all is
        done, too. `preview`: a PNG file that shows, while denoising, what the video is becoming. `extends`: a video of
        this size and rate, which the file begins with; its last frame is in the place of the first that is made.
        Returns what `Video.metadata` holds, and `output`, the absolute path. Raises RequestError or OutputError before
        anything is computed; whatever happens, there is a whole file at `path` or none that was not there before.
        """
        if not isinstance(prompt, str):
            raise RequestError("a file holds the video of one prompt; give a text, or call generate")
        request = self._together.agreed(self.resolve(prompt, **options))
        loras = absolute_loras(self._set_loras)
        front = None if extends is None else absolute(extends)
        order = Order(
            output=os.fspath(path), quality=quality, keeps_latents=keep_latents, loras=loras, extends=front,
            preview=None if preview is None else os.fspath(preview),
        )  # fmt: skip
        if self._together.writes:
            order = checked(order, request, self._open.vae.spec)
        passages = self._open.plan(request)
        begun = self._begin(order, request, job) if job and self._together.writes else None
        with working_on(begun):
            return self._make(order, request, progress or _silent, passages, begun)

    def denoise(
        self, prompts: Prompts, *, progress: ProgressCallback | None = None, **options: Unpack[GenerateOptions]
    ) -> list[Denoised]:
        """Denoise several videos as one batch; `write_to` decodes each by itself, when and if it is wanted.

        Options as `generate` takes them; with a seed for each prompt the noise of each is that of a run of its own, and
        the latents are equal to that run's but for rounding. Nothing is kept on the way: a batch is begun anew, not
        resumed. Raises RequestError before anything is computed.
        """
        if isinstance(prompts, str):
            raise RequestError("a batch is made of a list of prompts; give a list, or call generate_to")
        request = self._together.agreed(self.resolve(prompts, **options))
        clock = StageClock(device=self._open.device)
        each = [request.alone(index) for index in range(len(request.prompts))]
        self._open.plan(each[0])  # what could not be decoded is refused before it is denoised
        with self._answering(request):
            latents = self._together.equal(self._open.latents(request, clock, progress or _silent))
        return [
            Denoised(request=own, latents=latents[index : index + 1], clock=clock.copy(), together=len(each))
            for index, own in enumerate(each)
        ]

    def write_to(
        self,
        path: str | os.PathLike[str],
        video: Denoised,
        *,
        quality: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> dict[str, Any]:
        """Decode one video of `denoise` straight into a file; the file, what is returned and raised as `generate_to`.

        Its seconds of text and denoising are those of the whole batch, of which `together` tells the number.
        """
        request, clock = video.request, video.clock.copy()
        order = Order(output=os.fspath(path), quality=quality)
        if self._together.writes:
            order = checked(order, request, self._open.vae.spec)
        passages = self._open.plan(request)
        with self._answering(request):
            self._decode_to(order, request, video.latents, passages, clock, progress or _silent)
        made = {**self._metadata(request, 0, clock), "output": order.output.rstrip("/")}
        return made | ({"together": video.together} if video.together > 1 else {})

    def finish(
        self,
        job: Job,
        *,
        progress: ProgressCallback | None = None,
        anyway: bool = False,
        output: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """Go on with a job that this engine, or one like it, has begun; returns as `generate_to` does.

        Raises RequestError if it would be another video, or another process works on it. `anyway`: though the bits may
        be others, as versions, device or kernels are. `output`: a video file, in place of the one that was asked for.
        """
        if job.order.loras != self._set_loras:
            self.set_loras(job.order.loras)
        check_unchanged(job, self.facts, anyway=anyway)
        request = self._together.agreed(job.request)
        mine = job if self._together.writes else None
        order = job.order
        if output is not None:
            order = dataclasses.replace(order, output=os.fspath(check_output(output)))
        with working_on(mine):
            return self._make(order, request, progress or _silent, self._open.plan(request), mine)

    @property
    def facts(self) -> dict[str, str]:
        """What the bits of a video depend on, besides the request: versions, model, LoRAs, device, kernels."""
        used = ", ".join(sorted(decision.name for decision in self.decisions if decision.used))
        own = {"rewrites": used, "LoRAs that were set": self._set_contents}
        return {**({} if self._origin is None else self._origin.facts), **own}

    def _begin(self, order: Order, request: ResolvedRequest, kept: bool | str | os.PathLike[str]) -> Job | None:
        """A new job; None of engines that could not be built again, and where none can be kept."""
        if self._origin is None:
            return None
        folder = None if isinstance(kept, bool) else Path(kept)
        return begin_if_possible(dataclasses.replace(self._origin, facts=self.facts), order, request, folder)

    def _make(
        self,
        order: Order,
        request: ResolvedRequest,
        report: ProgressCallback,
        passages: Iterator[Passage],
        job: Job | None,
    ) -> dict[str, Any]:
        """The video of a request in its file, and what is told of it; all but the first rank help."""
        together, clock = self._together, StageClock(device=self._open.device)
        with self._answering(request):
            journal = journal_of(job, together)

            def computed() -> dict[str, Tensor]:
                shown = Preview(Path(order.preview), self._open.vae.spec) if order.preview and together.writes else None
                return {LATENTS: together.equal(self._open.latents(request, clock, report, journal, preview=shown))}

            latents = journal.on_disk(LATENTS, computed)[LATENTS]
            self._decode_to(order, request, latents, passages, clock, report, journal)
        made = {**self._metadata(request, 0, clock), "output": order.output.rstrip("/")}
        if job is not None:
            made["journal_seconds"] = job.journal.seconds
            job.finish(made)
        return made

    def _decode_to(
        self,
        order: Order,
        request: ResolvedRequest,
        latents: Tensor,
        passages: Iterator[Passage],
        clock: StageClock,
        report: ProgressCallback,
        journal: Journal | NoJournal = NO_JOURNAL,
    ) -> None:
        """The frames of latents into the file, with those that the journal has; all but the first rank help."""
        together = self._together

        def decoded(done: int) -> Iterator[Frames]:
            skipped = together.of_first(done)
            if skipped < request.num_frames:
                yield from self._open.decode(latents, passages, clock, report, skipped=skipped)

        if together.writes:
            clock.seconds["encode"] = write(order, request, journal, decoded)
        else:
            for _ in decoded(0):
                raise InternalError("frames came to a rank that does not write")

    def decode(self, latents: Tensor, *, progress: ProgressCallback | None = None) -> Frames:
        """Frames uint8 (T, H, W, 3) of latents (1, C, T', H', W'); (B, T, H, W, 3) of a batch of several.

        From the first value that is no finite number on, frames are black, and a warning says so. Raises RequestError.
        """
        check_latents(latents, self._open.vae.spec.z_dim)
        self._together.check_same_numbers("latents", lambda: latents)
        with memory_errors(f"decoding latents {tuple(latents.shape)}", "decode a shorter or a smaller piece"):
            clock = StageClock(device=self._open.device)
            passages = self._open.plan_decode(tuple(latents.shape))
            frames = self._together.everywhere(self._open.decode(latents, passages, clock, progress or _silent))
        return frames[0] if len(frames) == 1 else frames

    def encode(self, frames: Frames, *, progress: ProgressCallback | None = None) -> Tensor:
        """Latents float32 (1, C, T', H', W') of frames uint8 (T, H, W, 3): the mode of the posterior, normalised."""
        array = frames_of(frames)
        self._open.vae.check_frames(*array.shape[:3])
        # A copy: of read-only arrays torch would warn.
        self._together.check_same_numbers("frames", lambda: torch.from_numpy(np.array(array)))
        with memory_errors(f"encoding frames {array.shape}", "encode a shorter or a smaller piece"):
            return self._open.encode(array, StageClock(device=self._open.device), progress or _silent)

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
            **told_of(request, index),
            **({"loras": list(map(str, loras))} if (loras := (*self._loras, *self._set_loras)) else {}),
            "seconds": dict(clock.seconds),
            "step_seconds": clock.step_seconds,
            "peak_memory_bytes": peak_memory_bytes(self._open.device),
            "torch": torch.__version__,
        }
