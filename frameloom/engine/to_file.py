"""A video on its way into its file: the job that is kept meanwhile, its journal, and the frames as they come."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from frameloom.engine.job import Job, Order, Origin, begin
from frameloom.engine.journal import NO_JOURNAL, Journal, NoJournal
from frameloom.engine.shared_journal import SharedJournal
from frameloom.engine.together import Together
from frameloom.errors import FrameloomError, OutputError
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import Frames
from frameloom.pipeline.media import DEFAULT_QUALITY, check_output, open_writer, written_behind
from frameloom.pipeline.preview import check_preview
from frameloom.pipeline.reader import each_frame
from frameloom.settings import LOGGER_NAME
from frameloom.types import ResolvedRequest

log = logging.getLogger(LOGGER_NAME)


def checked(order: Order, request: ResolvedRequest, vae: VaeSpec) -> Order:
    """The same, its output and its preview by their whole paths. Raises OutputError where one cannot be written."""
    target = check_output(order.output, fps=request.fps, quality=order.quality)
    preview = None if order.preview is None else str(check_preview(order.preview, vae, target=target))
    return replace(order, output=f"{target.path}{'/' * (target.kind == 'folder')}", preview=preview)


def begin_if_possible(origin: Origin, order: Order, request: ResolvedRequest, folder: Path | None) -> Job | None:
    """A new job, as `job.begin` makes it; None, with a line in the log, where none can be kept."""
    try:
        return begin(origin, order, request, folder)
    except OutputError as error:
        log.warning("%s; this run cannot be resumed", error)
        return None


@contextmanager
def working_on(job: Job | None) -> Iterator[None]:
    """Hold the job meanwhile; what is kept of it is kept whatever happens, and an error says how to go on."""
    if job is None:
        yield
        return
    with closing(job.held()) as lock:
        if lock.before is not None:
            check_output(job.order.output).remove_partials(lock.before)
        try:
            yield
        except FrameloomError as error:
            left = "what could be written is kept" if job.journal.is_broken else "what was computed is kept"
            raise type(error)(f"{error}; {left}, and `frameloom resume {job.name}` goes on from there") from error


def journal_of(job: Job | None, together: Together) -> Journal | NoJournal:
    """Where a run keeps what it computes; on all ranks that of the first."""
    if not together.of_first(job is not None):
        return NO_JOURNAL
    if together.team is None:
        return NO_JOURNAL if job is None else job.journal
    return SharedJournal(together.team, None if job is None else job.journal)


def write(
    order: Order,
    request: ResolvedRequest,
    journal: Journal | NoJournal,
    decode: Callable[[int], Iterator[Frames]],
) -> float:
    """Write the frames that the journal has, and what `decode` makes after so many; returns the seconds after the last.

    Raises OutputError.
    """
    dial = DEFAULT_QUALITY if order.quality is None else order.quality
    writer = open_writer(order.output, width=request.width, height=request.height, fps=request.fps, quality=dial)
    skipped = 0 if order.extends is None else 1
    with writer, written_behind(writer) as put:
        if order.extends is not None:
            for frame in each_frame(order.extends):
                put(frame[None])
        done = 0
        for part in journal.frames():
            put(part[max(0, skipped - done) :])
            done += len(part)
        for (part,) in decode(done):
            journal.keep_frames(done, part)
            put(part[max(0, skipped - done) :])
            done += len(part)
        decoded = time.perf_counter()
    return time.perf_counter() - decoded
