"""The workers of a server: processes that are started, watched, and started again when they die. Torch-free."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from frameloom.serve.config import ServeConfig
from frameloom.serve.workers.process import Process
from frameloom.serve.workers.worker import Died, Outcome
from frameloom.wire import Card, Foresee, Foreseen, News, Run

log = logging.getLogger(__name__)

_ENDED: Final = "was ended with the server"
_FORESEE_S: Final = 10.0  # a plan takes a second or so; behind some others, and a step that computes, longer


@dataclass(frozen=True, kw_only=True, slots=True)
class Pauses:
    """Before a worker is started again that died at its start: the first pause, each twice the last, up to the most.

    `unable_s`: where trying again would not help, until something outside has changed.
    """

    first_s: float = 0.5
    most_s: float = 60.0
    unable_s: float = 60.0


class PoolWorker:
    """A `workers.Worker`: one process after the other under one number."""

    def __init__(self, number: int, config: ServeConfig, pauses: Pauses) -> None:
        self._number, self._config, self._pauses = number, config, pauses
        self._process: Process | None = None
        self._card: Card | None = None
        self._usual_seconds: float | None = None
        self._trouble = ""
        self._questions = itertools.count(1)
        self._changed, self._ending = asyncio.Event(), asyncio.Event()

    @property
    def number(self) -> int:
        """From 0 on."""
        return self._number

    @property
    def pid(self) -> int | None:
        """The number of its process; of several ranks, of the process that has started them."""
        return None if self._process is None else self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether its engine is built, busy or not."""
        return self._process is not None and self._process.is_ready

    @property
    def trouble(self) -> str:
        """Why its engine is not built, in one sentence; empty where it is, or where it is still being built."""
        return self._trouble

    @property
    def card(self) -> Card | None:
        """What it said of its model; None before."""
        return self._card

    @property
    def usual_seconds(self) -> float | None:
        """What it foresees of a request that leaves everything open; None if unknown."""
        return self._usual_seconds

    async def ready(self) -> None:
        """Return when its engine is built and it makes nothing: at once, or after however many starts."""
        while self._process is None or self._process.state != "idle":
            self._changed.clear()
            await self._changed.wait()

    async def run(self, order: Run, on_news: Callable[[News], None]) -> Outcome:
        """Make a video; `on_news` is called on the event loop. One at a time, of a worker that is ready."""
        if self._process is None or self._process.state != "idle":
            return Died(reason="was gone before it could begin")
        return await self._process.run(order, on_news)

    def begin_together(
        self, orders: Sequence[Run], on_news: Callable[[News], None]
    ) -> "Sequence[asyncio.Future[Outcome]]":
        """Make several videos as one batch, of a worker that is ready; the outcome of each comes by itself."""
        if self._process is None or self._process.state != "idle":
            gone: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            gone.set_result(Died(reason="was gone before it could begin"))
            return [gone] * len(orders)
        return self._process.begin_together(orders, on_news)

    def cancel(self, job: str, fence: int) -> None:
        """Ask for the end of this attempt; nothing happens if it is over."""
        if self._process is not None and self._process.makes(job, fence):
            self._process.cancel(job, fence)

    def kill(self, reason: str) -> None:
        """End the process now, with its ranks: `run` says `Died(reason)`, and it is started again."""
        if self._process is not None:
            self._process.kill(reason)

    async def foresee(self, request: Mapping[str, Any]) -> Foreseen | None:
        """What a request would take, also while it makes something else; None where it cannot be said in time."""
        if self._process is None or not self._process.is_ready:
            return None
        with suppress(TimeoutError):
            question = Foresee(number=next(self._questions), request=dict(request))
            return await asyncio.wait_for(self._process.foresee(question), _FORESEE_S)
        return None

    async def keep(self) -> None:
        """Keep a process running until `end`."""
        failures = 0
        while not self._ending.is_set():
            process = self._process = Process(self._number, self._config, self._hear)
            try:
                reason = await process.live()
            except OSError as error:
                reason = f"cannot be started ({error})"
            if self._ending.is_set():
                return
            failures = 0 if process.card is not None else failures + 1
            pause_s = self._pause_s(process, failures)
            self._tell_of_end(process, reason, pause_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause_s)

    def end(self) -> None:
        """End the process, whatever it makes, and start no other."""
        self._ending.set()
        self.kill(_ENDED)

    def _pause_s(self, process: Process, failures: int) -> float:
        if process.unable:
            return self._pauses.unable_s
        return min(self._pauses.most_s, self._pauses.first_s * 2.0 ** (failures - 1)) if failures else 0.0

    def _tell_of_end(self, process: Process, reason: str, pause_s: float) -> None:
        if process.unable:
            self._trouble = process.unable
        elif process.card is None:
            self._trouble = f"worker {self._number} does not start: it {reason}; the log may say more"
        again = f"in {pause_s:g} s" if pause_s else "at once"
        log.warning(
            "worker %d %s; it is started again %s", self._number, process.unable or reason, again,
            extra={"worker": self._number},
        )  # fmt: skip

    def _hear(self) -> None:
        process = self._process
        if process is not None and process.card is not None:
            self._card, self._trouble = process.card, ""
            self._usual_seconds = process.usual_seconds or self._usual_seconds
        self._changed.set()


class Pool:
    """`workers.Workers`: as many as the config says. All of it on one event loop."""

    def __init__(self, config: ServeConfig, *, pauses: Pauses | None = None) -> None:
        self._all = [PoolWorker(number, config, pauses or Pauses()) for number in range(config.workers)]
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def all(self) -> Sequence[PoolWorker]:
        """In the order of their numbers; the same objects for as long as the server lives."""
        return self._all

    async def start(self) -> None:
        """Start the processes; does not wait for their engines."""
        self._tasks = [asyncio.create_task(worker.keep()) for worker in self._all]

    async def stop(self) -> None:
        """End the processes, whatever they make, and wait until they are gone."""
        for worker in self._all:
            worker.end()
        if self._tasks:
            await asyncio.wait(self._tasks)
