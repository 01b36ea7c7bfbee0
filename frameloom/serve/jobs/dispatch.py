"""Hands waiting jobs to workers, and keeps what becomes of each attempt."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from frameloom.errors import RequestError
from frameloom.serve.config import MAX_ATTEMPTS, ServeConfig
from frameloom.serve.jobs.board import Board, End, Live
from frameloom.serve.jobs.company import Companions, Party
from frameloom.serve.jobs.folder import DataFolder
from frameloom.serve.jobs.job import Job, JobError, JobStore, Result, StoreError
from frameloom.serve.jobs.keeper import Keeper
from frameloom.serve.jobs.line import WaitingLine
from frameloom.serve.jobs.orders import order_of
from frameloom.serve.service import Witness
from frameloom.serve.workers.worker import Died, Outcome, Worker, Workers
from frameloom.settings import LOGGER_NAME
from frameloom.wire import Cancelled, Code, Done, Failed, News, Run

_CANCEL_S: Final = 5.0
"""What a worker is given to stop, and twice the time that it may need for a step besides."""
_PAUSE_S: Final = 1.0  # after a start that could not be kept
_KEEPING_S: Final = 10.0  # at the end of the server, for what the store cannot keep at once
_SENTENCES: Final = {
    "cancelled": "the job was cancelled",
    "deadline_exceeded": "the job was not done within its deadline",
}
_LOG = logging.getLogger(f"{LOGGER_NAME}.serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """What everybody behind the routes works with. `clock`: seconds since 1970."""

    config: ServeConfig
    folder: DataFolder
    keeper: Keeper
    line: WaitingLine
    board: Board
    workers: Workers
    witness: Witness
    clock: Callable[[], float]

    def expiry(self) -> float:
        """Until when a job is kept that ends now."""
        return self.clock() + self.config.keeping.ttl_s


class Dispatcher:
    """One lane for each worker, which takes the next job whenever its worker is ready.

    `companions`: finds jobs that are made together with another. `on_ready`: called when a worker is ready; `on_done`:
    when a job is completed that was made alone, with the seconds that it took; `on_together`: when a batch is over,
    with one of its jobs, their number, and the seconds, or None where none was completed.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        companions: Companions,
        on_ready: Callable[[Worker], None],
        on_done: Callable[[Job, float], None],
        on_together: Callable[[Job, int, float | None], None],
    ) -> None:
        self._desk, self._companions = desk, companions
        self._on_ready, self._on_done, self._on_together = on_ready, on_done, on_together
        self._lanes: list[asyncio.Task[None]] = []
        self._busy: set[int] = set()
        self._moved = asyncio.Event()
        self._takes = True

    def start(self) -> None:
        """Begin to hand out jobs."""
        self._lanes = [asyncio.create_task(self._lane(worker)) for worker in self._desk.workers.all]

    def wake(self) -> None:
        """A job waits, or something else has changed."""
        self._moved.set()
        self._moved = asyncio.Event()

    def hold(self) -> None:
        """Hand out no more jobs."""
        self._takes = False

    def interrupt(self) -> None:
        """What runs is to wait again, and its attempt not to count; the workers are stopped by whoever calls this."""
        self.hold()
        for live in self._desk.board.taken():
            live.ending = live.ending or "drained"

    async def stop(self) -> None:
        """End the lanes, after the workers were stopped and it is kept how their jobs stand."""
        self.hold()
        for worker, lane in zip(self._desk.workers.all, self._lanes, strict=True):
            if worker.number not in self._busy:
                lane.cancel()
        if self._lanes:
            _, late = await asyncio.wait(self._lanes, timeout=_KEEPING_S)
            for lane in late:  # the store cannot keep it: the next start finds these jobs interrupted
                lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)

    def end(self, live: Live, why: End) -> None:
        """Stop an attempt that is under way. The first reason counts."""
        if live.ending in (None, "drained"):
            live.ending = why
            if live.worker is not None:
                self._stop(live, live.worker, live.job.fence)

    def _stop(self, live: Live, worker: Worker, fence: int) -> None:
        _LOG.info("stopped: %s", live.ending, extra=_of(live.job))
        worker.cancel(live.job.id, fence)
        loop = asyncio.get_running_loop()
        patience_s = _CANCEL_S + 2 * live.still_s(loop.time())

        def check() -> None:
            if live.worker is worker and live.job.fence == fence:
                worker.kill(f"did not stop within {patience_s:.0f} s of being asked to")

        live.timers.append(loop.call_later(patience_s, check))

    async def _lane(self, worker: Worker) -> None:
        while self._takes:
            await worker.ready()
            self._on_ready(worker)
            moved = self._moved
            live = self._next()
            if live is None:
                await moved.wait()
            else:
                company = self._company(live)
                self._busy.add(worker.number)
                await (self._take_together(worker, [live, *company]) if company else self._take_safely(worker, live))
                self._busy.discard(worker.number)

    def _next(self) -> Live | None:
        line, board = self._desk.line, self._desk.board
        while self._takes and (job_id := line.first()) is not None:
            line.begin(job_id)
            live = board.live(job_id)
            if live is not None and live.phase == "waiting":
                live.phase = "taken"
                board.tell_waiting()
                return live
        return None

    def _company(self, lead: Live) -> list[Live]:
        """Those that are made together with a job; they wait no longer."""
        desk = self._desk
        free = sum(worker.is_ready and worker.number not in self._busy for worker in desk.workers.all)
        found = self._companions.of(lead, free=max(1, free)) if self._takes else []
        for live in found:
            desk.line.begin(live.job.id, in_turn=False)
            live.phase = "taken"
        if found:
            desk.board.tell_waiting()
        return found

    async def _take_together(self, worker: Worker, lives: Sequence[Live]) -> None:
        party = Party(worker=worker, lives=lives, begun=self._begun_together)

        async def take(live: Live) -> None:
            try:
                await self._take_safely(worker, live, party)
            finally:
                party.leave(live)

        await asyncio.gather(*map(take, lives))
        stands = {live.job.status for live in lives}
        seconds = asyncio.get_running_loop().time() - party.began
        if party.number == len(lives) and self._takes and stands in ({"completed"}, {"queued"}):
            self._on_together(lives[0].job, party.number, seconds if stands == {"completed"} else None)

    def _begun_together(self, jobs: Sequence[Job]) -> None:
        _LOG.info("%d jobs are made together", len(jobs), extra={"job": ",".join(job.id for job in jobs)})
        self._desk.witness.together(jobs)

    async def _take_safely(self, worker: Worker, live: Live, party: Party | None = None) -> None:
        """An error of ours costs the job an attempt, and not the server a worker."""
        try:
            await self._take(worker, live, party)
        except Exception:
            _LOG.exception("an error of the server in an attempt", extra=_of(live.job, worker))
            live.worker = None
            if not live.ended.is_set() and live.job.status == "in_progress":
                await self._again(live, Died(reason="was let down by the server, see its log"))

    async def _take(self, worker: Worker, live: Live, party: Party | None) -> None:
        try:
            started = await self._desk.keeper.do(lambda store: store.start(live.job.id, self._desk.clock()))
        except StoreError as error:
            _LOG.error("a start cannot be kept: %s", error, extra=_of(live.job))
            started = None
        if started is None:
            if party is not None:
                party.leave(live)
            await asyncio.sleep(_PAUSE_S)
            await self._wait_again(live)
            return
        live.begin(started, worker, asyncio.get_running_loop().time())
        outcome = await self._attempt(worker, live, party)
        live.worker = None
        if outcome is None:
            await self._requeue(live, counts=False)
        else:
            await self._settle(live, outcome)
        self.wake()

    async def _attempt(self, worker: Worker, live: Live, party: Party | None) -> Outcome | None:
        """What becomes of an attempt; None of one that did not begin. It never raises: how it went has to be kept."""
        job, desk = live.job, self._desk
        order = await self._order(job)
        if isinstance(order, Failed):
            if party is not None:
                party.leave(live)
            return order
        over = None if party is None else await party.come(live, order, lambda news: self._hear(live, news))
        if over is None and live.ending is not None:
            return Cancelled(job=job.id, fence=job.fence)
        if over is None and not worker.is_ready:
            return None
        _LOG.info("attempt %d begun", job.attempts, extra=_of(job, worker))
        desk.witness.started(job, is_first=job.attempts == 1 and not live.was_begun)
        live.was_begun = True
        try:
            return await (over or worker.run(order, lambda news: self._hear(live, news)))
        except Exception:
            _LOG.exception("an attempt came to nothing", extra=_of(job, worker))
            return Died(reason="could not be asked, see the log of the server")

    async def _order(self, job: Job) -> Run | Failed:
        folder = self._desk.folder
        try:
            await asyncio.to_thread(folder.prepare, job.id)
            return order_of(job, folder.of(job.id), folder.files(job.id, job.fence), self._desk.config)
        except RequestError as error:
            return Failed(job=job.id, fence=job.fence, code="invalid_request", message=str(error))
        except OSError as error:
            message = f"the files of the job cannot be written ({error.strerror})"
            return Failed(job=job.id, fence=job.fence, code="insufficient_storage", message=message)

    def _hear(self, live: Live, news: News) -> None:
        if (news.job, news.fence) == (live.job.id, live.job.fence) and live.worker is not None:
            live.hear(news, asyncio.get_running_loop().time())
            self._desk.witness.advanced(live.job, news.stage, news.step)

    async def _settle(self, live: Live, outcome: Outcome) -> None:
        if live.ending == "cancelled" or (live.ending is not None and not isinstance(outcome, Done)):
            await self._end_as_asked(live)
        elif isinstance(outcome, Done):
            await self._complete(live, outcome)
        elif isinstance(outcome, Failed) and not outcome.again:
            await self._fail(live, JobError(code=outcome.code, message=outcome.message))
        else:
            await self._again(live, outcome)

    async def _end_as_asked(self, live: Live) -> None:
        if live.ending == "drained":
            live.ending = None
            await self._requeue(live, counts=False)
        else:
            await self._fail(live, sentence(live.ending))

    async def _complete(self, live: Live, done: Done) -> None:
        job, desk = live.job, self._desk
        files = desk.folder.files(job.id, job.fence)
        try:
            size = (await asyncio.to_thread(files.video.stat)).st_size
        except OSError:
            size = -1
        if size != done.num_bytes:
            reason = f"said that it was done, but its video has {max(size, 0)} bytes in place of {done.num_bytes}"
            await self._again(live, Died(reason=reason))
            return
        result = Result(
            video=files.video.name, thumbnail=files.thumbnail.name, sheet=files.sheet.name, num_bytes=done.num_bytes,
            sha256=done.sha256, width=done.width, height=done.height, num_frames=done.num_frames, fps=done.fps,
            made=done.made,
        )  # fmt: skip

        def finish(store: JobStore) -> Job | None:
            store.finish(job.id, job.fence, result, now=desk.clock(), expires_at=desk.expiry())
            return store.get(job.id)

        kept = await desk.keeper.insist(finish, what="the end of a job")
        if kept is not None:
            if live.company == 1:
                self._on_done(kept, asyncio.get_running_loop().time() - live.began)
            self._ended(live, kept)
            await self._tidy(job.id, job.fence)

    async def _again(self, live: Live, outcome: Outcome) -> None:
        """Another attempt, if the job may have one. One that failed in a batch does not count: the next is alone."""
        if isinstance(outcome, Failed) and outcome.together:
            _LOG.warning("failed with others, and is made alone next: %s", outcome.message, extra=_of(live.job))
            self._desk.witness.lost(live.job, "together")
            await self._requeue(live, counts=False)
            return
        if isinstance(outcome, Failed):
            why, reason = "failed", outcome.message
        elif isinstance(outcome, Died):
            why, reason = "died", f"the worker {outcome.reason}"
        else:
            why, reason = "failed", "the worker stopped it unasked"
        live.reasons.append(reason)
        _LOG.warning("attempt %d came to nothing: %s", live.job.attempts, reason, extra=_of(live.job))
        self._desk.witness.lost(live.job, why)
        if live.job.attempts < MAX_ATTEMPTS:
            await self._requeue(live, counts=True)
        else:
            await self._fail(live, exhausted(live.job.attempts, live.reasons))

    async def _requeue(self, live: Live, *, counts: bool) -> None:
        job = live.job

        def requeue(store: JobStore) -> Job | None:
            store.requeue(job.id, job.fence, counts=counts)
            return store.get(job.id)

        kept = await self._desk.keeper.insist(requeue, what="that a job waits again")
        if kept is not None:
            live.job = kept
            await self._wait_again(live)

    async def _wait_again(self, live: Live) -> None:
        """A job is queued in the store again; if it was to end meanwhile, it ends."""
        live.news, live.progress = None, 0
        if live.ending in (None, "drained"):
            live.phase, live.ending = "waiting", None
            self._desk.line.add(live.job)
            live.tell()
            self.wake()
            return
        why = live.ending
        job = await self._desk.keeper.insist(
            lambda store: self._failed(store, live.job.id, None, sentence(why)), what="the end of a job"
        )
        if job is not None:
            self._ended(live, job)
            await self._tidy(job.id, None)

    async def _fail(self, live: Live, error: JobError) -> None:
        job = await self._desk.keeper.insist(
            lambda store: self._failed(store, live.job.id, live.job.fence, error), what="the end of a job"
        )
        if job is not None:
            self._ended(live, job)
            await self._tidy(job.id, None)

    def _failed(self, store: JobStore, job_id: str, fence: int | None, error: JobError) -> Job | None:
        store.fail(job_id, fence, error, now=self._desk.clock(), expires_at=self._desk.expiry())
        return store.get(job_id)

    def _ended(self, live: Live, job: Job) -> None:
        if job.error is None:
            _LOG.info("completed", extra=_of(job))
        else:
            _LOG.warning("failed: %s", job.error.message, extra={**_of(job), "code": job.error.code})
        self._desk.board.end(live, job)
        self._desk.witness.ended(job)

    async def _tidy(self, job_id: str, fence: int | None) -> None:
        try:
            await asyncio.to_thread(self._desk.folder.tidy, job_id, fence)
        except OSError as error:
            _LOG.warning("old files stay until the next start: %s", error, extra={"job": job_id})

    async def end_waiting(self, live: Live, why: End) -> None:
        """End a job that waits; it never starts. Raises StoreError, and it waits on."""
        live.phase, live.ending = "ending", why
        self._desk.line.remove(live.job.id)
        try:
            job = await self._desk.keeper.do(lambda store: self._failed(store, live.job.id, None, sentence(why)))
        except StoreError:
            live.phase, live.ending = "waiting", None
            self._desk.line.add(live.job)
            live.tell()
            self.wake()
            raise
        if job is not None:
            self._ended(live, job)
            await self._tidy(job.id, None)
        self.wake()


def exhausted(attempts: int, reasons: list[str]) -> JobError:
    """The error of a job that has had all its attempts."""
    told = "; ".join(dict.fromkeys(reasons)) or "the server ended while it was made"
    return JobError(code="attempts_exhausted", message=f"{attempts} attempts came to nothing: {told}")


def sentence(why: End | None) -> JobError:
    """The error of a job that was stopped."""
    code: Code = "deadline_exceeded" if why == "deadline_exceeded" else "cancelled"
    return JobError(code=code, message=_SENTENCES[code])


def _of(job: Job, worker: Worker | None = None) -> dict[str, object]:
    known: dict[str, object] = {"job": job.id, "fence": job.fence, "attempt": job.attempts}
    return known if worker is None else {**known, "worker": worker.number}
