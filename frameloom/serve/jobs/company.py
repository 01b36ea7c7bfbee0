"""Which small jobs are made together, and how their attempts begin as one."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from frameloom.serve.config import ServeConfig
from frameloom.serve.jobs.board import Board, Live
from frameloom.serve.jobs.job import Job
from frameloom.serve.jobs.known import Known
from frameloom.serve.jobs.line import WaitingLine
from frameloom.serve.jobs.speed import alike_of
from frameloom.serve.workers.worker import Outcome, Worker
from frameloom.wire import News, Run


class Companions:
    """Finds who may be made together with the job whose turn it is. `clock`: seconds since 1970."""

    def __init__(
        self, config: ServeConfig, known: Known, line: WaitingLine, board: Board, clock: Callable[[], float]
    ) -> None:
        self._config, self._known, self._line, self._board, self._clock = config, known, line, board, clock

    def of(self, lead: Live, *, free: int) -> list[Live]:
        """Waiting jobs like this one, in their order; none where they are better made one at a time.

        They have its priority, and share what waits with the workers that are `free`, this one included. A job that was
        begun before goes alone: so nobody suffers twice from others.
        """
        most = min(self._config.batch, math.ceil((self._line.count() + 1) / free))
        alike = self._alike(lead) if most > 1 and self._config.gpus_per_worker == 1 else None
        if alike is None:
            return []
        waiting = (self._board.live(job_id) for job_id in self._line.order())
        fitting = (live for live in waiting if live is not None and self._fits(live, lead, alike))
        found = list(islice(fitting, most - 1))
        return found[: self._known.pace.number(alike[0], 1 + len(found)) - 1]

    def _fits(self, live: Live, lead: Live, alike: tuple[str, str]) -> bool:
        is_level = live.phase == "waiting" and live.job.ask.priority == lead.job.ask.priority
        return is_level and self._alike(live) == alike

    def _alike(self, live: Live) -> tuple[str, str] | None:
        job = live.job
        return None if job.fence or self._is_pressed(job) else alike_of(job, self._known.card)

    def _is_pressed(self, job: Job) -> bool:
        """Whether its deadline may come before a whole batch is done."""
        patience_s = self._config.patience.deadline_s
        within_s = patience_s if job.ask.deadline_s is None else job.ask.deadline_s
        if within_s is None:
            return False
        left_s = job.created_at + within_s - self._clock()
        return not 0 < job.ask.work_s * self._config.batch < left_s


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Here:
    live: Live
    order: Run
    on_news: Callable[[News], None]
    turn: "asyncio.Future[asyncio.Future[Outcome] | None]"


@dataclass(kw_only=True, slots=True, eq=False)
class Party:
    """Attempts that begin as one when each has come or left. `begun`: is called with the jobs that do, if several."""

    worker: Worker
    lives: Sequence[Live]
    begun: Callable[[Sequence[Job]], None]
    number: int = 0
    began: float = 0.0
    _away: set[str] = field(init=False)
    _here: list[_Here] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._away = {live.job.id for live in self.lives}

    async def come(self, live: Live, order: Run, on_news: Callable[[News], None]) -> "asyncio.Future[Outcome] | None":
        """Wait for the others; what becomes of this attempt, or None where it has to go alone or not at all."""
        turn: asyncio.Future[asyncio.Future[Outcome] | None] = asyncio.get_running_loop().create_future()
        self._here.append(_Here(live=live, order=order, on_news=on_news, turn=turn))
        self.leave(live)
        return await turn

    def leave(self, live: Live) -> None:
        """Nobody is to wait for this one any more."""
        if live.job.id in self._away:
            self._away.remove(live.job.id)
            if not self._away:
                self._begin()

    def _begin(self) -> None:
        here = [one for one in self._here if one.live.ending is None] if self.worker.is_ready else []
        outcomes: dict[str, asyncio.Future[Outcome]] = {}
        if len(here) > 1:
            heard = {one.order.job: one.on_news for one in here}
            self.number, self.began = len(here), asyncio.get_running_loop().time()
            self.begun([one.live.job for one in here])
            futures = self.worker.begin_together([one.order for one in here], lambda news: heard[news.job](news))
            outcomes = {one.order.job: future for one, future in zip(here, futures, strict=True)}
        for one in self._here:
            one.live.company = self.number if one.order.job in outcomes else 1
            if not one.turn.done():
                one.turn.set_result(outcomes.get(one.order.job))
