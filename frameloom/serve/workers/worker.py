"""What the service needs of its workers, whoever starts them."""

from asyncio import Future
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from frameloom.wire import Cancelled, Card, Done, Failed, Foreseen, News, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Died:
    """A worker ended, or was ended, in the middle of an attempt. `reason`: words that go on from "the worker ..."."""

    reason: str


Outcome: TypeAlias = Done | Failed | Cancelled | Died


class Worker(Protocol):
    """One engine in a process of its own, with its ranks; when it dies it is started again, with the same number."""

    @property
    def number(self) -> int:
        """From 0 on."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether its engine is built, busy or not."""
        ...

    @property
    def trouble(self) -> str:
        """Why its engine is not built, in one sentence; empty where it is, or where it is still being built."""
        ...

    @property
    def card(self) -> Card | None:
        """What it said of its model; None before."""
        ...

    @property
    def usual_seconds(self) -> float | None:
        """What it foresees of a request that leaves everything open; None if unknown."""
        ...

    async def ready(self) -> None:
        """Return when its engine is built and it makes nothing: at once, or after however many starts."""
        ...

    async def run(self, order: Run, on_news: Callable[[News], None]) -> Outcome:
        """Make a video; `on_news` is called on the event loop. One at a time, of a worker that is ready."""
        ...

    def begin_together(self, orders: Sequence[Run], on_news: Callable[[News], None]) -> "Sequence[Future[Outcome]]":
        """Make several videos as one batch, of a worker that is ready; the outcome of each comes by itself."""
        ...

    def cancel(self, job: str, fence: int) -> None:
        """Ask for the end of this attempt; nothing happens if it is over."""
        ...

    def kill(self, reason: str) -> None:
        """End the process now, with its ranks: `run` says `Died(reason)`, and it is started again."""
        ...

    async def foresee(self, request: Mapping[str, Any]) -> Foreseen | None:
        """What a request would take, also while it makes something else; None where it cannot be said in time."""
        ...


class Workers(Protocol):
    """All workers of a server."""

    @property
    def all(self) -> Sequence[Worker]:
        """In the order of their numbers; the same objects for as long as the server lives."""
        ...

    async def start(self) -> None:
        """Start the processes; does not wait for their engines."""
        ...

    async def stop(self) -> None:
        """End the processes, whatever they make, and wait until they are gone."""
        ...
