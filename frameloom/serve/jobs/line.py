"""Who goes next: priority first, then the key that has had least work of late, then who came first."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from frameloom.serve.config import Limits
from frameloom.serve.jobs.job import Ask, Job
from frameloom.serve.service import RefusedError

_LEAST_S: Final = 1.0
"""What a job counts for at least: those of which nothing is foreseen share the workers by their number."""
_MOST_RETRY_S: Final = 120
"""Clients wait no longer: they give up, or come again at once."""
_UNKNOWN_S: Final = 10.0
"""When to come again while nothing is known of how long jobs take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    number: int
    id: str
    key: str
    priority: int
    work_s: float

    @property
    def counts_s(self) -> float:
        return max(_LEAST_S, self.work_s)


class WaitingLine:
    """The jobs that wait. A key's clock tells the work that was begun for it; the key whose clock is behind goes next.

    A key that comes anew starts with the clock of who is next, so nobody saves up work by staying away.
    """

    def __init__(self) -> None:
        self._numbers = 0
        self._came: dict[str, int] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._expected: dict[str, Ask] = {}
        self._clocks: dict[str, float] = {}
        self._now = 0.0  # the clock of the key that went last
        self._order: dict[str, int] | None = None

    def add(self, job: Job) -> None:
        """A job waits; one that had begun before keeps its place among those of its key."""
        ask = job.ask
        self._numbers += 1
        number = self._came.setdefault(job.id, self._numbers)
        if not any(waiting.key == ask.key for waiting in self._waiting.values()):
            self._clocks[ask.key] = max(self._now, self._clocks.get(ask.key, 0.0))
        self._waiting[job.id] = _Waiting(
            number=number, id=job.id, key=ask.key, priority=ask.priority, work_s=ask.work_s
        )  # fmt: skip
        self._order = None

    @contextmanager
    def expecting(self, job: Job) -> Iterator[None]:
        """While a job is written to the disk it has a place already: no more come than may wait."""
        self._expected[job.id] = job.ask
        try:
            yield
        finally:
            del self._expected[job.id]

    def remove(self, job_id: str) -> None:
        """A job waits no longer."""
        if self._waiting.pop(job_id, None):
            self._order = None

    def forget(self, job_id: str) -> None:
        """A job has ended, and does not come back."""
        self.remove(job_id)
        self._came.pop(job_id, None)

    def first(self) -> str | None:
        """Who goes next."""
        return next(iter(self.order()), None)

    def begin(self, job_id: str, *, in_turn: bool = True) -> None:
        """A job waits no longer since it is begun: its work counts for its key.

        `in_turn` False: it goes with another whose turn it is, and the turn of those that were passed is still to come.
        """
        waiting = self._waiting.get(job_id)
        if waiting is None:
            return
        if in_turn:
            self._now = max(self._now, self._clocks[waiting.key])
        self._clocks[waiting.key] += waiting.counts_s
        self.remove(job_id)

    def order(self) -> Mapping[str, int]:
        """All that wait, as they will go if nobody else comes, and how many go before each."""
        if self._order is None:
            self._order = {waiting.id: position for position, waiting in enumerate(self._in_order())}
        return self._order

    def before_s(self, job_id: str) -> float:
        """Seconds of work foreseen for all that go before a job."""
        order = self.order()
        mine = order.get(job_id, 0)
        return sum(self._waiting[other].work_s for other, position in order.items() if position < mine)

    @property
    def work_s(self) -> float:
        """Seconds of work foreseen for all that wait."""
        waiting_s = sum(waiting.work_s for waiting in self._waiting.values())
        return waiting_s + sum(ask.work_s for ask in self._expected.values())

    def count(self, key: str | None = None) -> int:
        """How many wait, in all or of a key."""
        keys = [waiting.key for waiting in self._waiting.values()] + [ask.key for ask in self._expected.values()]
        return len(keys) if key is None else keys.count(key)

    def _in_order(self) -> Iterator[_Waiting]:
        clocks = dict(self._clocks)
        rest: dict[int, dict[str, list[_Waiting]]] = {}
        for waiting in sorted(self._waiting.values(), key=lambda waiting: -waiting.number):
            rest.setdefault(waiting.priority, {}).setdefault(waiting.key, []).append(waiting)
        for priority in sorted(rest, reverse=True):
            keys = rest[priority]
            while keys:
                key = min(keys, key=lambda key: (clocks[key], keys[key][-1].number))
                waiting = keys[key].pop()
                clocks[key] += waiting.counts_s
                yield waiting
                if not keys[key]:
                    del keys[key]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How much may wait. `workers`: how many work at it. `queued_by_key`: for those keys that have their own."""

    limits: Limits
    workers: int
    queued_by_key: Mapping[str, int]

    def check(self, line: WaitingLine, key: str, work_s: float, *, running_s: float) -> None:
        """Raise RefusedError where another job of a key would be too much.

        `running_s`: seconds that are left of the jobs that run. A job alone is never too much work.
        """
        most = self.queued_by_key.get(key, self.limits.queued_by_key)
        if line.count() >= self.limits.queued:
            raise self._refused(
                "queue_full", f"{line.count()} jobs wait, and no more may", self._until_next_s(line, running_s)
            )
        if line.count(key) >= most:
            raise self._refused(
                "key_queue_full",
                f"{line.count(key)} jobs of this key wait, and it may have no more",
                self._until_next_s(line, running_s),
            )
        waits_s = (line.work_s + running_s) / self.workers
        too_much_s = waits_s + work_s / self.workers - self.limits.queued_s
        if too_much_s > 0 and line.count():
            raise self._refused("queue_full", f"{waits_s:.0f} s of work wait, and this would be too much", too_much_s)

    def _until_next_s(self, line: WaitingLine, running_s: float) -> float:
        known = running_s or line.work_s / max(1, line.count())
        return known / self.workers if known else _UNKNOWN_S

    def _refused(self, code: str, why: str, seconds: float) -> RefusedError:
        retry_s = min(_MOST_RETRY_S, max(1, math.ceil(seconds)))
        return RefusedError(code, f"{why}; come again in {retry_s} s", retry_s=retry_s)
