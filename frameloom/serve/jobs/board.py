"""How all jobs that have not ended stand now, in memory: clients that ask for it wait for no disk."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from frameloom.serve.jobs.job import Job
from frameloom.serve.jobs.line import WaitingLine
from frameloom.serve.jobs.speed import progress_of
from frameloom.serve.service import Standing
from frameloom.serve.workers.worker import Worker
from frameloom.wire import News

End = Literal["cancelled", "deadline_exceeded", "drained"]
"""Why an attempt is stopped."""
_RECENT: Final = 1000  # jobs that have ended and are remembered, so that asking for them waits for no disk either
_APART_S: Final = 0.05  # between two standings that a watcher is told
_SILENCE_S: Final = 60.0
_TELLING: Final = 3  # percent after which the time since the start foretells the rest


@dataclass(slots=True, eq=False)
class Live:
    """A job that has not ended. `phase`: it waits in line, a worker's lane has it, or it is being ended.

    `company`: how many are made together with it, itself included. `ending`: why it is to stop. `reasons`: what became
    of its attempts. `gap_s`: the longest between two signs of progress of this attempt. `was_begun`: a worker has begun
    one since the server was started. Times are those of the event loop.
    """

    job: Job
    phase: Literal["waiting", "taken", "ending"] = "waiting"
    ending: End | None = None
    worker: Worker | None = None
    news: News | None = None
    progress: int = 0
    began: float = 0.0
    heard: float = 0.0
    company: int = 1
    gap_s: float = 0.0
    was_begun: bool = False
    reasons: list[str] = field(default_factory=list)
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wake those who watch."""
        self.changed.set()
        self.changed = asyncio.Event()

    def close(self) -> None:
        """Nothing happens at a later time any more."""
        for timer in self.timers:
            timer.cancel()

    def begin(self, job: Job, worker: Worker, now: float) -> None:
        """A worker begins an attempt."""
        self.job, self.worker, self.news, self.progress = job, worker, None, 0
        self.began = self.heard = now
        self.gap_s, self.company = 0.0, 1
        self.tell()

    def hear(self, news: News, now: float) -> None:
        """A worker is so far; progress never goes back within an attempt."""
        self.gap_s = max(self.gap_s, now - self.heard)
        self.heard, self.news = now, news
        self.progress = max(self.progress, progress_of(news.stage, news.step, news.total))
        self.tell()

    def still_s(self, now: float) -> float:
        """The longest that this attempt gave no sign of progress, or is foreseen to give none, by its work.

        What it gives none now counts for a minute at most: who hangs is not given the more time the longer it hangs.
        """
        steps = self.job.ask.resolved.get("steps")
        foreseen_s = self.company * self.job.ask.work_s / steps if steps else 0.0
        return max(self.gap_s, min(now - self.heard, _SILENCE_S), foreseen_s)


class Board:
    """The standings. `fetch`: how a job that is not in memory is found."""

    def __init__(self, line: WaitingLine, fetch: Callable[[str], Awaitable[Job | None]], *, workers: int) -> None:
        self._line, self._fetch, self._workers = line, fetch, workers
        self._live: dict[str, Live] = {}
        self._recent: OrderedDict[str, Job] = OrderedDict()

    def add(self, live: Live) -> None:
        """A job has come."""
        self._live[live.job.id] = live

    def live(self, job_id: str) -> Live | None:
        """A job that has not ended."""
        return self._live.get(job_id)

    def taken(self) -> list[Live]:
        """Those that are made now, or about to be."""
        return [live for live in self._live.values() if live.phase == "taken"]

    def all(self) -> Iterator[Live]:
        """All that have not ended."""
        return iter(list(self._live.values()))

    def end(self, live: Live, job: Job) -> None:
        """A job has ended, and stands so."""
        live.job, live.phase, live.worker = job, "ending", None
        live.close()
        self._live.pop(job.id, None)
        self._line.forget(job.id)
        self._remember(job)
        live.ended.set()
        live.tell()
        self.tell_waiting()

    def forget(self, job_id: str) -> None:
        """A job is removed."""
        self._recent.pop(job_id, None)

    def tell_waiting(self) -> None:
        """The line has moved."""
        for live in self._live.values():
            if live.phase == "waiting":
                live.tell()

    async def standing(self, job_id: str) -> Standing | None:
        """How a job stands."""
        if live := self._live.get(job_id):
            return self._of_live(live)
        job = self._recent.get(job_id) or await self._fetch(job_id)
        return self.of(job) if job else None

    def of(self, job: Job) -> Standing:
        """How a job stands that was just read, or stands in memory."""
        if live := self._live.get(job.id):
            return self._of_live(live)
        if job.status in ("completed", "failed"):
            self._remember(job)
        return _of_ended(job)

    async def watch(self, job_id: str) -> AsyncIterator[Standing]:
        """How a job stands now and whenever that changes, until it has ended or is removed."""
        live, last = self._live.get(job_id), None
        if live is None:
            if (standing := await self.standing(job_id)) is not None:
                yield standing
            return
        while True:
            changed, is_over = live.changed, live.ended.is_set()
            standing = self._of_live(live)
            if standing != last:
                yield standing
            last = standing
            if is_over:
                return
            await changed.wait()
            await asyncio.sleep(_APART_S)

    def running_s(self) -> float:
        """Seconds that are left of the jobs that run, as foreseen."""
        return sum((self._left_s(live) or 0.0) / live.company for live in self._live.values() if live.phase == "taken")

    def _of_live(self, live: Live) -> Standing:
        job, news = live.job, live.news
        if live.ended.is_set():
            return _of_ended(job)
        if job.status == "queued":
            work_s = job.ask.work_s
            ahead_s = (self.running_s() + self._line.before_s(job.id)) / self._workers
            return Standing(
                job=job,
                position=self._line.order().get(job.id, 0),
                remaining_s=ahead_s + work_s if work_s else None,
            )
        return Standing(
            job=job,
            progress=live.progress,
            stage=news.stage if news else None,
            step=news.step if news else 0,
            total=news.total if news else 0,
            preview=news.previewed if news else 0,
            remaining_s=self._left_s(live),
        )

    def _left_s(self, live: Live) -> float | None:
        """By the time that the last news came, so that asking twice gives the same answer."""
        spent_s = live.heard - live.began
        if live.progress > _TELLING:
            return spent_s * (100 - live.progress) / live.progress
        return max(0.0, live.job.ask.work_s - spent_s) if live.job.ask.work_s else None

    def _remember(self, job: Job) -> None:
        self._recent[job.id] = job
        self._recent.move_to_end(job.id)
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

    def mark(self, live: Live) -> None:
        """A running job was asked to end."""
        live.job = replace(live.job, cancelled=True)
        live.tell()


def _of_ended(job: Job) -> Standing:
    return Standing(job=job, progress=100 if job.status == "completed" else 0)
