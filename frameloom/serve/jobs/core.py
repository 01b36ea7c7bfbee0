"""The server behind its routes: accepts jobs, ends them, and says how they stand."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from frameloom.serve.config import ServeConfig
from frameloom.serve.jobs.board import Board, End, Live
from frameloom.serve.jobs.company import Companions
from frameloom.serve.jobs.dispatch import Desk, Dispatcher
from frameloom.serve.jobs.folder import DataFolder, DataFolderError
from frameloom.serve.jobs.job import JOB_ID, Ask, Job, JobStore, Repeat, RepeatError, StoreError
from frameloom.serve.jobs.keeper import Keeper
from frameloom.serve.jobs.known import Known
from frameloom.serve.jobs.line import Bounds, WaitingLine
from frameloom.serve.jobs.recovery import recover
from frameloom.serve.jobs.retention import Retention
from frameloom.serve.jobs.sqlite import SqliteStore
from frameloom.serve.service import Nobody, RefusedError, Standing, Witness
from frameloom.serve.workers.worker import Worker, Workers
from frameloom.settings import LOGGER_NAME
from frameloom.wire import Card, Foreseen

T = TypeVar("T")
_SWEEP_S: Final = 60.0
_ROOM_RETRY_S: Final = 60
_START_RETRY_S: Final = 10
_LOG = logging.getLogger(f"{LOGGER_NAME}.serve")


class Core:
    """A `service.Service`. Begins with `start`, ends with `stop`, or is used in `async with`; on one event loop.

    `workers`: who makes the videos. `witness`: is told what becomes of jobs. `clock`: seconds since 1970. Deadlines
    are of the event loop's clock, which nobody sets.
    """

    def __init__(
        self,
        config: ServeConfig,
        workers: Workers,
        *,
        witness: Witness | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._workers, self._clock = config, workers, clock
        self._witness: Witness = witness or Nobody()
        self._line = WaitingLine()
        self._known = Known(config)
        self._state = "new"
        self._hurry = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Open the folder and the store, take up what a former server has left, and start the workers.

        Raises DataFolderError.
        """
        folder = await asyncio.to_thread(DataFolder, self._config.data)
        expects_jobs = bool(folder.jobs())
        keeper = Keeper(lambda: SqliteStore(folder.store, clock=self._clock, expects_jobs=expects_jobs))
        try:
            await keeper.open()
        except StoreError as error:
            folder.close()
            raise DataFolderError(str(error)) from None
        self._furnish(folder, keeper)
        try:
            await keeper.do(self._known.read)
            for job in await recover(self._desk):
                self._enter(job)
            await self._workers.start()
        except BaseException as error:
            await keeper.close()
            folder.close()
            if isinstance(error, StoreError | OSError):
                raise DataFolderError(f"the data folder {folder.path} cannot be used: {error}") from None
            raise
        self._state = "open"
        self._dispatcher.start()
        self._sweeper = asyncio.create_task(self._sweep_often())

    def _furnish(self, folder: DataFolder, keeper: Keeper) -> None:
        config = self._config
        own = {key.name: key.queued for key in config.keys if key.queued is not None}
        self._bounds = Bounds(limits=config.limits, workers=config.workers, queued_by_key=own)
        self._board = Board(
            self._line, lambda job_id: keeper.do(lambda store: store.get(job_id)), workers=config.workers
        )
        self._desk = Desk(
            config=config,
            folder=folder,
            keeper=keeper,
            line=self._line,
            board=self._board,
            workers=self._workers,
            witness=self._witness,
            clock=self._clock,
        )
        if config.batch > 1 and config.gpus_per_worker > 1:
            _LOG.warning("small jobs are made one at a time: only workers of one device make several together")
        self._dispatcher = Dispatcher(
            self._desk,
            companions=Companions(config, self._known, self._line, self._board, self._clock),
            on_ready=self._met,
            on_done=self._learn,
            on_together=self._learn_together,
        )
        self._retention = Retention(keeper, folder, config.keeping, clock=self._clock, remove=self._remove)

    def drain(self) -> None:
        """Take no new jobs from now on, and begin none; `stop` is to follow."""
        if self._state == "open":
            self._state = "draining"
            self._dispatcher.hold()

    def hasten(self) -> None:
        """Let `stop` wait for nothing that runs."""
        self._hurry.set()

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no new jobs; what runs may be done within the grace, else it waits for the next server. Then end."""
        if self._state in ("new", "ended"):
            return
        self.drain()
        await self._drained(self._config.patience.grace_s if grace_s is None else grace_s)
        self._dispatcher.interrupt()
        await self._workers.stop()
        await self._dispatcher.stop()
        for live in self._board.all():
            live.close()
            live.ended.set()  # who waits for its end waits no longer; it goes on with the next server
            live.tell()
        self._sweeper.cancel()
        await asyncio.gather(self._sweeper, *self._tasks, return_exceptions=True)
        await self._desk.keeper.close()
        self._desk.folder.close()
        self._state = "ended"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def card(self) -> Card | None:
        """What the model can do; None until a worker has said it once."""
        return self._known.card

    @property
    def is_ready(self) -> bool:
        """Whether a worker can take a job."""
        return self._state == "open" and any(worker.is_ready for worker in self._workers.all)

    @property
    def trouble(self) -> str:
        """Why jobs are not taken or not run now, in one sentence; empty where all is well."""
        if self._state != "open":
            return "the server is starting" if self._state == "new" else "the server is ending"
        if any(worker.is_ready for worker in self._workers.all):
            return ""
        troubles = [worker.trouble for worker in self._workers.all if worker.trouble]
        return troubles[0] if troubles else "the model is being opened"

    def new_id(self) -> str:
        """A name for a job that nobody can guess."""
        return f"video_{secrets.token_hex(16)}"

    def check_room(self, key: str, work_s: float) -> None:
        """Raise RefusedError where `accept` would, for the queue or the disk, before a body is read."""
        try:
            self._check_room(key, work_s, 0)
        except RefusedError as error:
            self._witness.refused(error.code)
            raise

    async def repeated(self, key: str, repeat: Repeat) -> Standing | None:
        """The job that came with an Idempotency-Key before. Raises RefusedError where its request was another one."""
        try:
            before = await self._desk.keeper.do(lambda store: store.repeated(key, repeat))
        except RepeatError as error:
            self._witness.refused("idempotency_mismatch")
            raise RefusedError("idempotency_mismatch", str(error)) from None
        return None if before is None else self._board.of(before)

    async def accept(self, job_id: str, ask: Ask, inputs: Mapping[str, bytes], repeat: Repeat | None) -> Standing:
        """Keep a job and its inputs, by file name; it is on the disk before this returns. Raises RefusedError."""
        try:
            return await self._whole(self._accept(job_id, ask, inputs, repeat))
        except RefusedError as error:
            self._witness.refused(error.code)
            raise

    async def standing(self, job_id: str) -> Standing | None:
        """How a job stands. Raises StoreError."""
        return await self._board.standing(job_id) if JOB_ID.fullmatch(job_id) else None

    async def page(
        self, key: str, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Standing], bool] | None:
        """Jobs of a key and whether there are more; None where `after` is none of them. Raises StoreError."""
        found = await self._desk.keeper.do(
            lambda store: store.page(key, after=after, limit=limit, newest_first=newest_first)
        )
        return None if found is None else ([self._board.of(job) for job in found[0]], found[1])

    async def cancel(self, job_id: str) -> Standing | None:
        """End a job that has not ended: a queued one never starts, a running one stops within a step.

        Raises RefusedError where it cannot be kept that a job was to end.
        """
        if live := self._board.live(job_id):
            await self._whole(self._end(live, "cancelled"))
        return await self.standing(job_id)

    async def delete(self, job_id: str) -> bool:
        """Cancel a job if need be, and remove it and its files; False where there is none. Raises RefusedError."""
        return await self._whole(self._delete(job_id)) if JOB_ID.fullmatch(job_id) else False

    def watch(self, job_id: str) -> AsyncIterator[Standing]:
        """How a job stands now, and whenever that changes, until it has ended; what comes too fast is left out."""
        return self._board.watch(job_id)

    async def foresee(self, request: Mapping[str, Any]) -> Foreseen | None:
        """What a request would take, by the planner of a worker; None where none can say it in time."""
        for worker in self._workers.all:
            if worker.is_ready:
                return await worker.foresee(request)
        return None

    def work_s(self, request: Mapping[str, Any]) -> float:
        """At once: the seconds a request takes, by what was learned; 0 where nothing was."""
        return self._known.work_s(request)

    def folder(self, job_id: str) -> Path:
        """Where the files of a job are. Raises ValueError for what is no id of ours."""
        return self._desk.folder.of(job_id)

    def numbers(self) -> Mapping[str, float]:
        """For the metrics; `data_bytes` is of the last sweep, which is at most a minute old."""
        workers = self._workers.all
        return {
            "queued": self._line.count(),
            "running": len(self._board.taken()),
            "queued_s": self._line.work_s,
            "workers": len(workers),
            "workers_ready": sum(worker.is_ready for worker in workers),
            "data_bytes": self._retention.used_bytes,
            "free_bytes": self._desk.folder.free_bytes(),
        }

    def _check_room(self, key: str, work_s: float, num_bytes: int) -> None:
        if self._state != "open":
            raise self._closed()
        troubles = [worker.trouble for worker in self._workers.all]
        if all(troubles):
            raise RefusedError("starting", troubles[0], retry_s=_ROOM_RETRY_S)
        self._bounds.check(self._line, key, work_s, running_s=self._board.running_s())
        keeping = self._config.keeping
        if self._desk.folder.free_bytes() - num_bytes < keeping.reserve_bytes:
            raise RefusedError("insufficient_storage", "the disk of the server is full", retry_s=_ROOM_RETRY_S)
        if keeping.quota_bytes is not None and self._retention.used_bytes + num_bytes > keeping.quota_bytes:
            raise RefusedError("insufficient_storage", "the quota of the server is used up", retry_s=_ROOM_RETRY_S)

    def _closed(self) -> RefusedError:
        code = "starting" if self._state == "new" else "draining"
        return RefusedError(code, f"{self.trouble}; come again soon", retry_s=_START_RETRY_S)

    def _not_kept(self, error: Exception) -> RefusedError:
        """What could not be written: there is no room, or the store is closed already, as the server ends."""
        if self._state != "open":
            return self._closed()
        _LOG.error("a job could not be kept: %s", error)  # it names files, which are nothing to clients
        message = "the disk of the server is full, or cannot be written"
        return RefusedError("insufficient_storage", message, retry_s=_ROOM_RETRY_S)

    async def _accept(self, job_id: str, ask: Ask, inputs: Mapping[str, bytes], repeat: Repeat | None) -> Standing:
        keeper, folder = self._desk.keeper, self._desk.folder
        job = Job(id=job_id, ask=ask, status="queued", created_at=self._clock())
        try:
            if repeat is not None:
                before = await keeper.do(lambda store: store.repeated(ask.key, repeat))
                if before is not None:
                    return self._board.of(before)
            self._check_room(ask.key, ask.work_s, sum(map(len, inputs.values())))
            with self._line.expecting(job):
                await asyncio.to_thread(folder.keep_inputs, job_id, inputs)
                kept = await keeper.do(lambda store: store.add(job, repeat))
        except RepeatError as error:
            raise RefusedError("idempotency_mismatch", str(error)) from None
        except (StoreError, OSError) as error:
            await asyncio.to_thread(folder.remove, job_id)
            raise self._not_kept(error) from None
        if kept.id != job_id:
            await asyncio.to_thread(folder.remove, job_id)
            return self._board.of(kept)
        self._enter(kept)
        _LOG.info("accepted", extra={"job": job_id, "key": ask.key})
        self._witness.accepted(kept)
        self._dispatcher.wake()
        return self._board.of(kept)

    def _enter(self, job: Job) -> None:
        live = Live(job=job)
        self._board.add(live)
        self._line.add(job)
        within_s = self._config.patience.deadline_s if job.ask.deadline_s is None else job.ask.deadline_s
        if within_s is not None:
            left_s = within_s - max(0.0, self._clock() - job.created_at)
            loop = asyncio.get_running_loop()
            live.timers.append(loop.call_later(max(0.0, left_s), lambda: self._spawn(self._expire(live))))

    async def _expire(self, live: Live) -> None:
        while not live.ended.is_set():
            try:
                await self._end(live, "deadline_exceeded")
            except RefusedError:
                await asyncio.sleep(1.0)  # until the store can keep it
            else:
                return

    async def _end(self, live: Live, why: End) -> None:
        """A job that waits has ended when this returns; one that runs has been told to."""
        is_kept = True
        if why == "cancelled" and live.phase == "taken" and live.ending != why:
            is_kept = await self._mark(live)
        if live.phase == "waiting":
            try:
                await self._dispatcher.end_waiting(live, why)
            except StoreError as error:
                raise self._not_kept(error) from None
        elif live.phase == "taken":
            self._dispatcher.end(live, why)
            if not is_kept:  # it is about to wait again, and ends then
                await live.ended.wait()
        elif not live.ended.is_set():  # by another, who may find that it cannot be kept
            await live.changed.wait()
            await self._end(live, why)

    async def _mark(self, live: Live) -> bool:
        def mark(store: JobStore) -> bool:
            return store.mark_cancelled(live.job.id)

        try:
            is_marked = await self._desk.keeper.do(mark)
        except StoreError as error:
            raise self._not_kept(error) from None
        if is_marked and live.phase == "taken":
            self._board.mark(live)
        return is_marked

    async def _delete(self, job_id: str) -> bool:
        if live := self._board.live(job_id):
            await self._end(live, "cancelled")
            await live.ended.wait()
        try:
            return await self._remove(job_id)
        except StoreError as error:
            raise self._not_kept(error) from None

    async def _remove(self, job_id: str) -> bool:
        found = await self._desk.keeper.do(lambda store: store.remove(job_id))
        if found:
            self._board.forget(job_id)
            await asyncio.to_thread(self._desk.folder.remove, job_id)
        return found

    async def _drained(self, grace_s: float) -> None:
        async def none_runs() -> None:
            while taken := self._board.taken():
                await taken[0].changed.wait()

        waits = [asyncio.create_task(none_runs()), asyncio.create_task(self._hurry.wait())]
        await asyncio.wait(waits, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    def _met(self, worker: Worker) -> None:
        if self._known.meet(worker):
            self._spawn(self._keep_known())

    def _learn(self, job: Job, seconds: float) -> None:
        if job.attempts == 1 and job.fence == 1:  # another one may have gone on from what was computed before
            self._known.learn(job, seconds)
            self._spawn(self._keep_known())

    def _learn_together(self, job: Job, number: int, seconds: float | None) -> None:
        self._known.learn_together(job, number, seconds)
        self._spawn(self._keep_known())

    async def _keep_known(self) -> None:
        try:
            await self._desk.keeper.do(self._known.write)
        except StoreError as error:
            _LOG.warning("what was learned of the model is not kept: %s", error)

    async def _sweep_often(self) -> None:
        while True:
            try:
                await self._retention.sweep()
            except (StoreError, OSError) as error:
                _LOG.warning("old jobs cannot be removed now: %s", error)
            await asyncio.sleep(_SWEEP_S)

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """What work returns, which goes on to its end even where nobody waits for it any more."""
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
