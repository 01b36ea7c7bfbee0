"""A job as the server knows it, and the store that keeps jobs: all that is said between SQL and the rest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from frameloom.wire import Code

Status = Literal["queued", "in_progress", "completed", "failed"]
Kind = Literal["create", "remix", "edit", "extension"]

JOB_ID: Final = re.compile(r"video_[0-9a-f]{32}")
"""What every id of ours looks like, and nothing else becomes a path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobError:
    """Why a job has failed: one sentence. `param`: the field of the request that is to blame, if one is."""

    code: Code
    message: str
    param: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The files of a finished job, in its folder; `sha256` and `num_bytes` of the video. `made`: told by the engine."""

    video: str
    thumbnail: str
    sheet: str
    num_bytes: int
    sha256: str
    width: int
    height: int
    num_frames: int
    fps: float
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a client asks for, checked.

    `request`: fields of types.GenerateRequest that were given, as JSON has them; a picture is named by its file in the
    folder of the job, `inputs/...`, and so is `extends`, the video that an extension goes on from. `loras`: registered
    names and strengths. `quality`: 0 to 100. `priority`: higher goes first. `deadline_s`: from now on. `source`: the
    job that this one is made from, of a remix, an edit or an extension. `work_s`: the seconds it is foreseen to take.
    `resolved`: width, height, num_frames (extended ones included), steps and fps as they were worked out at the door;
    empty where the model was not known yet.
    """

    key: str
    kind: Kind
    model: str
    request: Mapping[str, Any]
    loras: tuple[tuple[str, float], ...] = ()
    quality: int | None = None
    priority: int = 0
    deadline_s: float | None = None
    source: str | None = None
    work_s: float = 0.0
    resolved: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job that was accepted. Times: seconds since 1970, as a clock on the wall has them.

    `fence` grows with every start, and what a start of another fence says does not count; `attempts` are the starts
    that count against the job. `cancelled`: it was asked to end.
    """

    id: str
    ask: Ask
    status: Status
    created_at: float
    attempts: int = 0
    fence: int = 0
    cancelled: bool = False
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    error: JobError | None = None
    result: Result | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """An Idempotency-Key, and the digest of the request that it came with."""

    name: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """What waits and what runs: jobs, and the seconds foreseen for those that wait; and waiting jobs by key."""

    queued: int
    running: int
    queued_s: float
    by_key: Mapping[str, int]


class StoreError(Exception):
    """The store cannot do it: the disk is full or broken, or the store is damaged. One sentence."""


class RepeatError(Exception):
    """An Idempotency-Key came before with another request."""


class JobStore(Protocol):
    """Keeps jobs; what a method has returned is on the disk. One thread calls it at a time. Raises StoreError."""

    def add(self, job: Job, repeat: Repeat | None) -> Job:
        """Keep a new job; or return the one that came before with the same Idempotency-Key. Raises RepeatError."""
        ...

    def repeated(self, key: str, repeat: Repeat) -> Job | None:
        """The job that came with an Idempotency-Key before. Raises RepeatError."""
        ...

    def get(self, job_id: str) -> Job | None:
        """A job."""
        ...

    def page(self, key: str, *, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool] | None:
        """Jobs of a key, and whether there are more; None where `after` is none of its jobs."""
        ...

    def waiting(self) -> list[Job]:
        """All that are queued, in the order in which they came."""
        ...

    def start(self, job_id: str, now: float) -> Job | None:
        """Queued to in_progress, with a new fence and one attempt more; None if it is not queued any more."""
        ...

    def finish(self, job_id: str, fence: int, result: Result, *, now: float, expires_at: float) -> bool:
        """In_progress to completed; False for another fence than the job's, and nothing happens."""
        ...

    def fail(self, job_id: str, fence: int | None, error: JobError, *, now: float, expires_at: float) -> bool:
        """To failed, from in_progress with this fence, or (None) from queued; False else, and nothing happens."""
        ...

    def requeue(self, job_id: str, fence: int, *, counts: bool) -> bool:
        """In_progress back to queued; an attempt that does not count is taken back. False for another fence."""
        ...

    def mark_cancelled(self, job_id: str) -> bool:
        """Remember that a running job was asked to end; False if it does not run."""
        ...

    def remove(self, job_id: str) -> bool:
        """Forget a job that does not run; False where there is none."""
        ...

    def ended_before(self, now: float) -> list[Job]:
        """Those whose time is up."""
        ...

    def ended(self) -> list[Job]:
        """All that are completed or failed, the first that ended first."""
        ...

    def running(self) -> list[Job]:
        """All in_progress: after a start of the server, those that its end has interrupted."""
        ...

    def queue(self) -> Queue:
        """How much waits and runs."""
        ...

    def note(self, name: str, value: str) -> None:
        """Keep a text under a name: what is known of the model, and how fast it was."""
        ...

    def noted(self, name: str) -> str | None:
        """The text of a name."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...
