"""What the routes call: accepts jobs, says how they stand, ends them. The queue and the workers are behind it."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from frameloom.serve.jobs.job import Ask, Job, Repeat
from frameloom.types import Stage
from frameloom.wire import Card, Foreseen


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How a job stands now. `progress`: 0 to 100, 100 only of a completed one. `position`: how many go before it.

    `preview`: counts the drawings of the preview, 0 if there is none yet. `remaining_s`: foreseen until it is done.
    """

    job: Job
    progress: int = 0
    stage: Stage | None = None
    step: int = 0
    total: int = 0
    position: int | None = None
    preview: int = 0
    remaining_s: float | None = None


class RefusedError(Exception):
    """A job is not accepted, or not ended; the routes make an answer of it.

    `code`: queue_full, key_queue_full, starting, draining, insufficient_storage, idempotency_mismatch, video_not_found.
    `retry_s`: when to come again.
    """

    def __init__(self, code: str, message: str, *, retry_s: int | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_s = code, message, retry_s


class Witness(Protocol):
    """Is told what becomes of jobs, on the event loop, for the metrics; what is called here takes no time."""

    def accepted(self, job: Job) -> None:
        """A new job was kept; one that came again with its Idempotency-Key is not new."""
        ...

    def refused(self, code: str) -> None:
        """A job was not accepted, with the code of its RefusedError."""
        ...

    def started(self, job: Job, *, is_first: bool) -> None:
        """An attempt has begun, the first one or another."""
        ...

    def together(self, jobs: Sequence[Job]) -> None:
        """Attempts of these have begun as one batch; each is told to `started`, too."""
        ...

    def advanced(self, job: Job, stage: Stage, step: int) -> None:
        """A running job is so far."""
        ...

    def lost(self, job: Job, reason: str) -> None:
        """An attempt came to nothing, and the job may have another: `died`, `failed`, `together` or `interrupted`."""
        ...

    def ended(self, job: Job) -> None:
        """A job is completed or failed."""
        ...


class Nobody:
    """A witness who keeps nothing."""

    def accepted(self, job: Job) -> None:
        """Nothing is kept."""

    def refused(self, code: str) -> None:
        """Nothing is kept."""

    def started(self, job: Job, *, is_first: bool) -> None:
        """Nothing is kept."""

    def together(self, jobs: Sequence[Job]) -> None:
        """Nothing is kept."""

    def advanced(self, job: Job, stage: Stage, step: int) -> None:
        """Nothing is kept."""

    def lost(self, job: Job, reason: str) -> None:
        """Nothing is kept."""

    def ended(self, job: Job) -> None:
        """Nothing is kept."""


class Service(Protocol):
    """The server behind its routes; all of it on one event loop."""

    @property
    def card(self) -> Card | None:
        """What the model can do; None until a worker has said it once (it is remembered between starts)."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a worker can take a job."""
        ...

    @property
    def trouble(self) -> str:
        """Why jobs are not taken or not run now, in one sentence; empty where all is well."""
        ...

    def new_id(self) -> str:
        """A name for a job that nobody can guess."""
        ...

    async def accept(self, job_id: str, ask: Ask, inputs: Mapping[str, bytes], repeat: Repeat | None) -> Standing:
        """Keep a job and its inputs, by file name; it is on the disk before this returns. Raises RefusedError.

        The same request again, by its Idempotency-Key, gives the job that it gave at first.
        """
        ...

    async def repeated(self, key: str, repeat: Repeat) -> Standing | None:
        """The job that came with an Idempotency-Key before; None where none did. Raises RefusedError for another."""
        ...

    def check_room(self, key: str, work_s: float) -> None:
        """Raise RefusedError where `accept` would, for the queue or the disk, before a body is read."""
        ...

    async def standing(self, job_id: str) -> Standing | None:
        """How a job stands."""
        ...

    async def page(
        self, key: str, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Standing], bool] | None:
        """Jobs of a key and whether there are more; None where `after` is none of them."""
        ...

    async def cancel(self, job_id: str) -> Standing | None:
        """End a job that has not ended: a queued one never starts, a running one stops within a step. Twice is fine."""
        ...

    async def delete(self, job_id: str) -> bool:
        """Cancel a job if need be, and remove it and its files; False where there is none."""
        ...

    def watch(self, job_id: str) -> AsyncIterator[Standing]:
        """How a job stands now, and whenever that changes, until it has ended; what comes too fast is left out."""
        ...

    async def foresee(self, request: Mapping[str, Any]) -> Foreseen | None:
        """What a request would take, by the planner of a worker; None where none can say it in time."""
        ...

    def work_s(self, request: Mapping[str, Any]) -> float:
        """At once: the seconds a request takes, by what was learned; 0 where nothing was."""
        ...

    def folder(self, job_id: str) -> Path:
        """Where the files of a job are."""
        ...

    def numbers(self) -> Mapping[str, float]:
        """For the metrics: queued, running, queued_s, workers, workers_ready, data_bytes, free_bytes and such."""
        ...
