"""The workers of a server: started, handed attempts, watched, and started again when they die. Torch-free."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from frameloom.serve.config import ServeConfig
from frameloom.serve.worker import Died, Outcome, Worker
from frameloom.wire import Card, Foresee, Foreseen, News, Run

__all__ = ["Died", "Outcome", "Pauses", "Pool"]

log = logging.getLogger(__name__)

_ENDING: Final = "the server ends"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pauses:
    """Before a worker is started again that died at its start: the first pause, each twice the last, up to the most.

    `unable_s`: where trying again would not help, until something outside has changed.
    """

    first_s: float = 0.5
    most_s: float = 60.0
    unable_s: float = 60.0


def _nothing() -> None:
    """What those do who need not know of changes."""


class Pool:
    """`config.workers` workers. All of it on one event loop; `changed` is called when a worker's state changes."""

    def __init__(
        self, config: ServeConfig, *, changed: Callable[[], object] = _nothing, pauses: Pauses | None = None
    ) -> None:
        self._config, self._changed, self._pauses = config, changed, pauses or Pauses()
        self._workers: dict[int, Worker] = {}
        self._troubles: dict[int, str] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers = itertools.count(1)
        self._news = asyncio.Event()
        self._ending = asyncio.Event()
        self._card: Card | None = None
        self._usual_seconds: float | None = None

    @property
    def card(self) -> Card | None:
        """What the model can do; None until a worker has said it once."""
        return self._card

    @property
    def usual_seconds(self) -> float | None:
        """Foreseen of a request that leaves everything open; None if unknown."""
        return self._usual_seconds

    @property
    def workers(self) -> list[Worker]:
        """All of them, in order."""
        return [worker for _, worker in sorted(self._workers.items())]

    @property
    def num_idle(self) -> int:
        """Workers that can begin an attempt now."""
        return sum(worker.state == "idle" for worker in self._workers.values())

    @property
    def num_ready(self) -> int:
        """Workers whose engine is built."""
        return sum(worker.state in ("idle", "busy") for worker in self._workers.values())

    @property
    def is_ready(self) -> bool:
        """Whether there is such a worker."""
        return self.num_ready > 0

    @property
    def trouble(self) -> str:
        """Why there is no worker, in one sentence; empty where there is one, or one may come without more ado."""
        return "" if self.is_ready else next(iter(self._troubles.values()), "")

    async def start(self) -> None:
        """Start the workers, and keep them running; returns before they are ready."""
        self._tasks = [asyncio.create_task(self._keep(number)) for number in range(self._config.workers)]

    async def stop(self, grace_s: float) -> None:
        """End: what is being made may be finished within `grace_s` seconds. A second call may give less."""
        self._ending.set()
        for worker in self._workers.values():
            worker.stop()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for worker in self._workers.values():
                worker.kill(_ENDING)
            if late:
                await asyncio.wait(late)
        self._news.set()

    async def run(self, order: Run, on_news: Callable[[News], object]) -> Outcome:
        """Have the next idle worker make an attempt; `on_news` is told of its steps, on the event loop."""
        while (worker := self._idle()) is None:
            if self._ending.is_set():
                return Died(reason=_ENDING)
            self._news.clear()
            await self._news.wait()
        return await worker.run(order, on_news)

    def cancel(self, job: str, fence: int) -> None:
        """Have an attempt stopped within a step; its `run` returns then. Nothing happens if it is over."""
        for worker in self._workers.values():
            if worker.makes(job, fence):
                worker.cancel(job, fence)

    def kill(self, job: str, fence: int, reason: str) -> None:
        """End the worker that makes an attempt, whatever it does; its `run` returns Died."""
        for worker in self._workers.values():
            if worker.makes(job, fence):
                worker.kill(reason)

    async def foresee(self, request: Mapping[str, Any]) -> Foreseen | None:
        """What a request would take, by the planner of a worker; None where there is none. Takes a second or so."""
        ready = [worker for worker in self.workers if worker.state in ("idle", "busy")]
        if not ready:
            return None
        chosen = min(ready, key=lambda worker: (worker.asked, worker.state != "idle"))
        return await chosen.foresee(Foresee(number=next(self._numbers), request=dict(request)))

    def _idle(self) -> Worker | None:
        if self._ending.is_set():
            return None
        return next((worker for worker in self.workers if worker.state == "idle"), None)

    async def _keep(self, number: int) -> None:
        """Keep one worker running."""
        failures = 0
        while not self._ending.is_set():
            worker = self._workers[number] = Worker(number, self._config, self._tell)
            reason = await worker.live()
            if self._ending.is_set():
                return
            failures = 0 if worker.card is not None else failures + 1
            pause_s = self._pause_s(worker, failures)
            self._troubles[number] = worker.unable or f"the worker does not start: it {reason}; the log may say more"
            again = f"in {pause_s:g} s" if pause_s else "at once"
            log.warning("worker %d %s; it is started again %s", number, worker.unable or reason, again)
            try:
                await asyncio.wait_for(self._ending.wait(), pause_s)
            except TimeoutError:
                continue

    def _pause_s(self, worker: Worker, failures: int) -> float:
        if worker.unable:
            return self._pauses.unable_s
        return min(self._pauses.most_s, self._pauses.first_s * 2.0 ** (failures - 1)) if failures else 0.0

    def _tell(self) -> None:
        for worker in self._workers.values():
            if worker.card is not None:
                self._card = worker.card
                self._usual_seconds = worker.usual_seconds or self._usual_seconds
            if worker.state == "idle":
                self._troubles.pop(worker.number, None)
        self._news.set()
        self._changed()
