"""The store of jobs in one SQLite file: all the SQL there is.

Write-ahead log, synchronous=FULL: a commit is one fsync, and survives the loss of power. Releases of SQLite before
3.51.3 can lose pages where two connections write or checkpoint at once; here one connection holds the file for itself
(locking_mode=EXCLUSIVE), so there never is a second one. SQLite does not notice changed bytes inside of a row, so
every row carries a checksum.
"""

import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from threading import Lock
from typing import Any, Final

import msgspec

from frameloom.serve.jobs.folder import sync_folder
from frameloom.serve.jobs.job import Ask, Job, JobError, Queue, Repeat, RepeatError, Result, StoreError

VERSION: Final = 1
"""Of the tables; a file of a later one is left alone."""
REPEATS_S: Final = 86_400.0
"""How long an Idempotency-Key is remembered."""
_APPLICATION: Final = 0x464C4F4D  # PRAGMA application_id: whose file this is
_SCHEMA: Final = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order in which they came
    id TEXT NOT NULL UNIQUE,
    key TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('queued', 'in_progress', 'completed', 'failed')),
    created_at REAL NOT NULL,
    attempts INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    cancelled INTEGER NOT NULL,
    started_at REAL,
    completed_at REAL,
    expires_at REAL,
    work_s REAL NOT NULL,
    ask TEXT NOT NULL,
    error TEXT,
    result TEXT,
    seal INTEGER NOT NULL
) STRICT;
CREATE INDEX jobs_of_key ON jobs (key, number);
CREATE INDEX jobs_by_status ON jobs (status, number);
CREATE TABLE repeats (
    key TEXT NOT NULL,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    at REAL NOT NULL,
    PRIMARY KEY (key, name)
) STRICT;
CREATE INDEX repeats_of_job ON repeats (job);
CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
_COLUMNS: Final = (
    "id", "key", "status", "created_at", "attempts", "fence", "cancelled", "started_at", "completed_at", "expires_at",
    "work_s", "ask", "error", "result", "seal",
)  # fmt: skip
_SELECT: Final = f"SELECT {', '.join(_COLUMNS)} FROM jobs"
_UPDATE: Final = f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in _COLUMNS)}"
_INSERT: Final = f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_PLAIN: Final = {field.name for field in fields(Job)} - {"ask", "error", "result"}
_NOT_RUNNING: Final = "status <> 'in_progress'"
_IS_ENDED: Final = "status IN ('completed', 'failed')"


class SqliteStore:
    """A `jobs.JobStore` in one file; one process at a time has it open. `clock`: seconds since 1970.

    `expects_jobs`: there must have been a store before, and an empty one is a damaged one. Raises StoreError where the
    file is damaged, newer, or none of ours.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, expects_jobs: bool = False) -> None:
        self._path, self._clock, self._lock = path, clock, Lock()
        with self._told():
            _keep_private(path)
            self._sql = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
            try:
                self._open(expects_jobs)
            except BaseException:
                self._sql.close()
                raise
        sync_folder(path.parent)

    def add(self, job: Job, repeat: Repeat | None) -> Job:
        """Keep a new job; or return the one that came before with the same Idempotency-Key. Raises RepeatError."""
        with self._writing():
            before = self._of_repeat(job.ask.key, repeat) if repeat else None
            if before:
                return before
            self._sql.execute(_INSERT, _row(job))
            if repeat:
                values = (job.ask.key, repeat.name, repeat.digest, job.id, self._clock())
                self._sql.execute("INSERT OR REPLACE INTO repeats VALUES (?, ?, ?, ?, ?)", values)
                self._sql.execute("DELETE FROM repeats WHERE at <= ?", (self._clock() - REPEATS_S,))
        return job

    def repeated(self, key: str, repeat: Repeat) -> Job | None:
        """The job that came with an Idempotency-Key before. Raises RepeatError."""
        with self._told():
            return self._of_repeat(key, repeat)

    def get(self, job_id: str) -> Job | None:
        """A job."""
        return next(iter(self._jobs("WHERE id = ?", job_id)), None)

    def page(self, key: str, *, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool] | None:
        """Jobs of a key, and whether there are more; None where `after` is none of its jobs."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where, values = "WHERE key = ?", [key]
        if after is not None:
            if not self._jobs("WHERE id = ? AND key = ?", after, key):
                return None
            where += f" AND number {sign} (SELECT number FROM jobs WHERE id = ?)"
            values.append(after)
        found = self._jobs(f"{where} ORDER BY number {order} LIMIT ?", *values, limit + 1)
        return found[:limit], len(found) > limit

    def waiting(self) -> list[Job]:
        """All that are queued, in the order in which they came."""
        return self._jobs("WHERE status = 'queued' ORDER BY number")

    def start(self, job_id: str, now: float) -> Job | None:
        """Queued to in_progress, with a new fence and one attempt more; None if it is not queued any more."""

        def started(job: Job) -> Job:
            return replace(
                job, status="in_progress", attempts=job.attempts + 1, fence=job.fence + 1, started_at=now, error=None
            )

        return self._change(started, job_id, "status = 'queued'")

    def finish(self, job_id: str, fence: int, result: Result, *, now: float, expires_at: float) -> bool:
        """In_progress to completed; False for another fence than the job's, and nothing happens."""

        def finished(job: Job) -> Job:
            return replace(job, status="completed", completed_at=now, expires_at=expires_at, result=result)

        return self._change(finished, job_id, "status = 'in_progress' AND fence = ?", fence) is not None

    def fail(self, job_id: str, fence: int | None, error: JobError, *, now: float, expires_at: float) -> bool:
        """To failed, from in_progress with this fence, or (None) from queued; False else, and nothing happens."""

        def failed(job: Job) -> Job:
            return replace(job, status="failed", completed_at=now, expires_at=expires_at, error=error)

        if fence is None:
            return self._change(failed, job_id, "status = 'queued'") is not None
        return self._change(failed, job_id, "status = 'in_progress' AND fence = ?", fence) is not None

    def requeue(self, job_id: str, fence: int, *, counts: bool) -> bool:
        """In_progress back to queued; an attempt that does not count is taken back. False for another fence."""

        def queued(job: Job) -> Job:
            return replace(job, status="queued", attempts=job.attempts - (not counts))

        return self._change(queued, job_id, "status = 'in_progress' AND fence = ?", fence) is not None

    def mark_cancelled(self, job_id: str) -> bool:
        """Remember that a running job was asked to end; False if it does not run."""
        return self._change(lambda job: replace(job, cancelled=True), job_id, "status = 'in_progress'") is not None

    def remove(self, job_id: str) -> bool:
        """Forget a job that does not run; False where there is none."""
        with self._writing():
            return self._sql.execute(f"DELETE FROM jobs WHERE id = ? AND {_NOT_RUNNING}", (job_id,)).rowcount > 0

    def ended_before(self, now: float) -> list[Job]:
        """Those whose time is up."""
        return self._jobs(f"WHERE {_IS_ENDED} AND expires_at <= ? ORDER BY expires_at, number", now)

    def ended(self) -> list[Job]:
        """All that are completed or failed, the first that ended first."""
        return self._jobs(f"WHERE {_IS_ENDED} ORDER BY completed_at, number")

    def running(self) -> list[Job]:
        """All in_progress: after a start of the server, those that its end has interrupted."""
        return self._jobs("WHERE status = 'in_progress' ORDER BY number")

    def queue(self) -> Queue:
        """How much waits and runs."""
        counted = "SELECT key, count(*), total(work_s) FROM jobs WHERE status = ? GROUP BY key"
        with self._told():
            waiting = self._sql.execute(counted, ("queued",)).fetchall()
            running = self._sql.execute(counted, ("in_progress",)).fetchall()
        return Queue(
            queued=sum(count for _, count, _ in waiting),
            running=sum(count for _, count, _ in running),
            queued_s=sum(seconds for _, _, seconds in waiting),
            by_key={key: count for key, count, _ in waiting},
        )

    def note(self, name: str, value: str) -> None:
        """Keep a text under a name: what is known of the model, and how fast it was."""
        with self._writing():
            self._sql.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))

    def noted(self, name: str) -> str | None:
        """The text of a name."""
        with self._told():
            row = self._sql.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._sql.close()

    def _open(self, expects_jobs: bool) -> None:
        execute = self._sql.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")  # before the log is touched: its index then is in this process alone
        version, owner = self._pragma("user_version"), self._pragma("application_id")
        is_new = not execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if owner != _APPLICATION and not is_new:
            raise StoreError(f"{self._path} is no store of Frameloom's jobs: name another data folder")
        if version > VERSION:
            raise StoreError(
                f"{self._path} was written by a newer Frameloom (tables {version}, this one knows {VERSION}): "
                "use that one, or name another data folder"
            )
        if is_new and expects_jobs:
            raise self._damage("it is empty, and there are videos beside it")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA foreign_keys = ON")
        if is_new:
            self._sql.executescript(
                f"BEGIN; PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {VERSION}; {_SCHEMA} COMMIT;"
            )
        else:
            self._check()

    def _check(self) -> None:
        (found,) = self._sql.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise self._damage(found)
        for row in self._sql.execute(_SELECT):
            self._job(row)

    def _pragma(self, name: str) -> int:
        return int(self._sql.execute(f"PRAGMA {name}").fetchone()[0])

    def _of_repeat(self, key: str, repeat: Repeat) -> Job | None:
        since = self._clock() - REPEATS_S
        row = self._sql.execute(
            "SELECT digest, job FROM repeats WHERE key = ? AND name = ? AND at > ?", (key, repeat.name, since)
        ).fetchone()
        if row is None:
            return None
        if row[0] != repeat.digest:
            raise RepeatError(
                f"the Idempotency-Key {repeat.name!r} came before with another request: send the same, or another key"
            )
        return self._job(self._sql.execute(f"{_SELECT} WHERE id = ?", (row[1],)).fetchone())

    def _jobs(self, where: str, *values: object) -> list[Job]:
        with self._told():
            return [self._job(row) for row in self._sql.execute(f"{_SELECT} {where}", values)]

    def _change(self, change: Callable[[Job], Job], job_id: str, condition: str, *values: object) -> Job | None:
        where = f"WHERE id = ? AND {condition}"
        with self._writing():
            row = self._sql.execute(f"{_SELECT} {where}", (job_id, *values)).fetchone()
            if row is None:
                return None
            job = change(self._job(row))
            self._sql.execute(f"{_UPDATE} {where}", (*_row(job), job_id, *values))
        return job

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction; on the disk when it is over, or nothing of it."""
        with self._told():
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._sql.execute("COMMIT")
            finally:
                if self._sql.in_transaction:
                    with suppress(sqlite3.Error):  # an error of the disk may have ended it
                        self._sql.execute("ROLLBACK")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """One at a time, and SQLite's errors in our words."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise self._in_words(error) from error
            except UnicodeDecodeError as error:  # of SQLite's own words about bytes that are no text
                raise self._damage("what should be text is none") from error

    def _in_words(self, error: sqlite3.Error) -> StoreError:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            return StoreError(f"the disk with {self._path} is full: make room on it")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "decode to UTF-8" in str(error):
            return self._damage(str(error))
        if name.startswith("SQLITE_BUSY"):
            return StoreError(f"another process has {self._path} open: end it, or name another data folder")
        return StoreError(f"{self._path} cannot be read or written ({error}, {name or 'no code'})")

    def _damage(self, what: str) -> StoreError:
        return StoreError(
            f"{self._path} is damaged ({what}): put a copy back from a backup, or name another data folder"
        )

    def _job(self, row: tuple[Any, ...]) -> Job:
        values = dict(zip(_COLUMNS, row, strict=True))
        if values["seal"] != _sealed(row[:-1]):
            raise self._damage(f"the checksum of job {values['id']} does not fit")
        return Job(
            ask=msgspec.json.decode(values["ask"], type=Ask),
            error=msgspec.json.decode(values["error"], type=JobError) if values["error"] else None,
            result=msgspec.json.decode(values["result"], type=Result) if values["result"] else None,
            **{name: values[name] for name in _PLAIN - {"cancelled"}},
            cancelled=bool(values["cancelled"]),
        )


def _row(job: Job) -> tuple[Any, ...]:
    values: dict[str, Any] = {name: getattr(job, name) for name in _PLAIN}
    values |= {
        "key": job.ask.key,
        "cancelled": int(job.cancelled),
        "created_at": float(job.created_at),
        "work_s": float(job.ask.work_s),
        "ask": _json(job.ask),
        "error": _json(job.error) if job.error else None,
        "result": _json(job.result) if job.result else None,
    }
    values |= {
        name: float(values[name]) for name in ("started_at", "completed_at", "expires_at") if values[name] is not None
    }
    row = tuple(values[name] for name in _COLUMNS[:-1])
    return (*row, _sealed(row))


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _sealed(row: tuple[Any, ...]) -> int:
    return zlib.crc32(msgspec.json.encode(row))


def _keep_private(path: Path) -> None:
    """Prompts are in the store: others on this machine do not read it, whoever has made its folder."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fchmod(number, 0o600)
        finally:
            os.close(number)
    except OSError as error:
        raise StoreError(f"{path} cannot be read or written ({error.strerror})") from None
