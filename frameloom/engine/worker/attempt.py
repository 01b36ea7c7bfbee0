"""One attempt of a job of the server: a video in its place, its small pictures, and what is told of them."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from frameloom.engine.engine import Engine
from frameloom.engine.job import Job, Order, absolute_loras, check_unchanged, find
from frameloom.engine.jobs import DESCRIPTION, FINISHED, is_locked
from frameloom.engine.worker.line import Line
from frameloom.errors import RequestError
from frameloom.pipeline.reader import facts_of, last_frame
from frameloom.pipeline.sinks import sync
from frameloom.pipeline.stills import draw_stills
from frameloom.settings import LOGGER_NAME
from frameloom.types import PICTURES, Progress
from frameloom.wire import Done, News, Run

log = logging.getLogger(LOGGER_NAME)

_NEWS_S: Final = 0.05  # between two of a stage; what comes faster nobody could look at
_LOCKED_S: Final = 2.0  # a process that was killed may still hold the journal for so long


class CancelledError(Exception):
    """The attempt was asked to stop."""


def _nothing() -> None:
    """What is called beside an attempt that is made alone."""


@dataclass(kw_only=True, slots=True, eq=False)
class Attempt:
    """`is_first`: this process writes and speaks; the other ranks compute with it. `draws`: previews can be drawn.

    `beside`: is called whenever this one has come a little further.
    """

    engine: Engine
    line: Line
    order: Run
    draws: bool
    is_first: bool
    beside: Callable[[], object] = _nothing
    _told: tuple[str, float] = ("", 0.0)
    _previewed: int = 0
    _preview: tuple[int, ...] = field(default=())

    def run(self) -> Done | None:
        """Make the video; what is told of it, by the first rank. Raises CancelledError, FrameloomError and others."""
        order = self.order
        self._preview = _seen(order.preview)
        options = self.options()
        self.set_loras()
        way = self._agreed(self._way() if self.is_first else "")
        if way == "copy":
            made = self._copied() if self.is_first else {}
        elif way == "finish":
            log.info("going on from what an earlier attempt of this job has left")
            made = self.engine.finish(find(order.journal), progress=self.progress, output=order.output)
        else:
            made = self.engine.generate_to(
                order.output, options.pop("prompt"), quality=order.quality, progress=self.progress, job=order.journal,
                preview=order.preview if self.draws else None, extends=order.extends, **options,
            )  # fmt: skip
        return self.finished(made) if self.is_first else None

    def check(self) -> None:
        """Raise RequestError, before any rank begins, for a request that cannot be computed."""
        options = self.options()
        self.engine.resolve(options.pop("prompt"), **options)

    def tidy(self) -> None:
        """Remove what an attempt has left in its folder, unless it is whole."""
        folder = Path(self.order.output).parent
        for path in (self.order.output, self.order.thumbnail, self.order.sheet):
            with contextlib.suppress(OSError):  # of a disk that is broken the server hears without this
                Path(path).unlink(missing_ok=True)
        sweep(folder)

    def options(self) -> dict[str, Any]:
        """The request, which a video that is gone on with adds to."""
        options = dict(self.order.request)
        if self.order.extends is None:
            return options
        if "image" not in self.engine.pipeline.takes.possible:
            raise RequestError(
                f"'{self.engine.name}' does not start from an image, and a video is gone on with from its last frame; "
                "use a model that takes an image"
            )
        front = facts_of(self.order.extends)
        own = {"image": last_frame(self.order.extends), "width": front.width, "height": front.height, "fps": front.fps}
        return options | own

    def set_loras(self) -> None:
        """Have the engine compute with what this one asks for."""
        loras = absolute_loras(self.order.loras)
        if loras != self.engine.loras:
            self.engine.set_loras(loras)

    def _agreed(self, way: str) -> str:
        """What the first rank says, on all."""
        team = self.engine.team
        return way if team is None else str(team.agree(way))

    def _way(self) -> str:
        """How to begin: "finish" what was left, "copy" a video that is whole, or "new"."""
        folder = Path(self.order.journal)
        sweep(folder.parent)
        if not folder.exists():
            return "new"
        try:
            job = self._left(folder)
        except (RequestError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning(
                "what an earlier attempt has left is put aside, and the video is made from its start: %s", error
            )
            _put_aside(folder)
            return "new"
        return "copy" if job.is_finished else "finish"

    def _left(self, folder: Path) -> Job:
        """The job of an earlier attempt. Raises RequestError and others where it cannot be gone on with."""
        until = time.monotonic() + _LOCKED_S
        while is_locked(folder):
            if time.monotonic() > until:
                raise RequestError("another process works on it")
            time.sleep(0.05)
        if not (folder / DESCRIPTION).is_file():
            raise RequestError("it had hardly begun")
        job = find(str(folder))
        check_unchanged(job, self.engine.facts, anyway=False)
        order = self.order
        mine = Order(output=order.output, quality=order.quality, loras=self.engine.loras, extends=order.extends)
        if replace(job.order, output=order.output, preview=None) != mine:
            raise RequestError("it was asked for with other options")
        if job.is_finished and not Path(_told_of(folder)["output"]).is_file():
            raise RequestError("its video is gone")
        return job

    def _copied(self) -> dict[str, Any]:
        """The video that an earlier attempt has finished but not told of."""
        made = _told_of(Path(self.order.journal))
        output = Path(self.order.output)
        if made["output"] != str(output):
            output.unlink(missing_ok=True)
            os.link(made["output"], output)
            sync(output.parent)
        return made

    def progress(self, progress: Progress) -> None:
        """It is so far. Raises CancelledError where it was asked to stop."""
        self.line.work += 1
        self.beside()
        if self._is_cancelled():
            raise CancelledError
        if self.is_first:
            self.tell(progress)

    def _is_cancelled(self) -> bool:
        team = self.engine.team
        is_cancelled = self.line.is_cancelled(self.order)
        return is_cancelled if team is None else bool(team.agree(is_cancelled))

    def tell(self, progress: Progress) -> None:
        """Send the news, unless there were some just now."""
        stage, told_at = self._told
        now = time.monotonic()
        if progress.stage == stage and progress.step < progress.total and now - told_at < _NEWS_S:
            return
        if (preview := _seen(self.order.preview)) != self._preview:
            self._preview, self._previewed = preview, self._previewed + 1
        self._told = progress.stage, now
        self.line.tell(
            News(
                job=self.order.job, fence=self.order.fence, stage=progress.stage, step=progress.step,
                total=progress.total, previewed=self._previewed,
            )
        )  # fmt: skip

    def finished(self, made: Mapping[str, Any]) -> Done:
        """Draw the small pictures of the video, and say what there is."""
        order, output = self.order, Path(self.order.output)
        front = facts_of(output)
        drawn = 0

        def each() -> None:
            nonlocal drawn
            self.line.work += 1
            drawn += 1
            self.beside()
            if self.line.is_cancelled(order):
                raise CancelledError
            self.tell(Progress(stage="encode", step=drawn, total=front.num_frames))

        seen = draw_stills(
            output, front.num_frames, thumbnail=Path(order.thumbnail), sheet=Path(order.sheet), each=each
        )
        with output.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Done(
            job=order.job, fence=order.fence, num_bytes=output.stat().st_size, sha256=sha256, width=seen.width,
            height=seen.height, num_frames=seen.num_frames, fps=front.fps, made=_made(made),
        )  # fmt: skip


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder: hidden files that say they are partial."""
    for path in folder.glob(".*.partial*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _put_aside(folder: Path) -> None:
    """Out of the way at once, whoever still writes there, and then away."""
    aside = folder.with_name(f".{folder.name}.{time.time_ns()}.partial")
    with contextlib.suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _told_of(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / FINISHED).read_text("utf-8"))
    return told


def _made(made: Mapping[str, Any]) -> dict[str, Any]:
    """What was told of a video, as JSON has it, without the paths of the server."""
    told: dict[str, Any] = json.loads(json.dumps(dict(made), default=str))
    del told["output"]
    for name in PICTURES:
        if name in told:
            told[name] = Path(told[name]).name
    for name in ("references", "loras"):
        if name in told:
            told[name] = [Path(each).name for each in told[name]]
    return told


def _seen(path: str) -> tuple[int, ...]:
    """Tells a file from another one in its place."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns
