"""The log of the server: lines to read, or JSON for machines; each says which request, key, job and worker it is of.

Neither secrets nor prompts are said. Lines are written by a thread of their own: who reads them slowly does not slow
the server; what cannot be kept meanwhile is counted and left out. At the end all are written, unless nobody takes them.
"""

import json
import logging
import logging.handlers
import queue
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from frameloom.settings import LOGGER_NAME

Style = Literal["text", "json"]
FIELDS: Final = (
    "request", "key", "job", "fence", "attempt", "worker", "pid", "method", "path", "status", "ms", "code", "url",
)  # fmt: skip
"""What a line may say besides its message, handed over as `extra`, in this order."""
_KEPT: Final = 10_000  # lines that wait for the writer
_STALLED_S: Final = 2.0  # in which nobody has taken a line: at the end no more is waited for
_LOOK_S: Final = 0.2
_PIECE: Final = select.PIPE_BUF // 4  # characters that do not block a file that has room, whatever they are encoded as
_TOLD: Final = ("uvicorn.error", "asyncio")  # of these warnings and errors


@dataclass(slots=True)
class Talk:
    """A request while it is answered: its id, and whose it is and which job it speaks of, once that is known."""

    request: str
    key: str = ""
    job: str = ""


TALK: Final[ContextVar[Talk | None]] = ContextVar("TALK", default=None)
"""The request that is answered here; whoever learns whose it is writes it in."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then what is known of FIELDS."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as its line."""
        told = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_known(record),
        }
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """Time, level and message, then what is known of FIELDS; what could start a line of its own is escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as its line, and the trace of an error below it."""
        known = "".join(f" {name}={_escaped(str(value))}" for name, value in _known(record).items())
        line = f"{_time(record)} {record.levelname.lower():<7} {_escaped(record.getMessage())}{known}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Queued(logging.handlers.QueueHandler):
    """Hands records to the writing thread, with the request that they belong to."""

    lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Say which request it is, here, where that is known."""
        talk = TALK.get()
        for name in ("request", "key", "job") if talk is not None else ():
            if getattr(talk, name) and not hasattr(record, name):
                setattr(record, name, getattr(talk, name))
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Keep a record, or count one that is lost."""
        try:
            if self.lost:
                self.queue.put_nowait(_of_loss(self.lost))
                self.lost = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.lost += 1


class _Outlet:
    """What is written to a stream whenever that has room; nothing more once `gives_up` is set."""

    gives_up = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write it, or what of it was taken before this gives up."""
        for start in range(0, len(text), _PIECE):
            while not (self.gives_up or self._has_room()):
                pass
            if not self.gives_up:
                self._stream.write(text[start : start + _PIECE])
                self._stream.flush()

    def _has_room(self) -> bool:
        """Waits a moment for it."""
        try:
            return bool(select.select((), (self._stream,), (), _LOOK_S)[1])
        except (OSError, ValueError):  # a stream in memory; or one that is closed, which writing says
            return True


@contextmanager
def logging_to(stream: TextIO | None = None, *, style: Style = "text", level: int = logging.INFO) -> Iterator[None]:
    """Write the log of this process to a stream, by default standard error, until the end of the block."""
    outlet = _Outlet(stream or sys.stderr)
    writer = logging.StreamHandler(outlet)
    writer.setFormatter(JsonLines() if style == "json" else TextLines())
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_KEPT)
    handler = _Queued(lines)
    listener = logging.handlers.QueueListener(lines, writer)
    ours = logging.getLogger(LOGGER_NAME)
    loggers = [ours, *(logging.getLogger(name) for name in _TOLD)]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = [handler]
        logger.setLevel(level if logger is ours else logging.WARNING)
        logger.propagate = False
    listener.start()
    try:
        yield
    finally:
        for logger, handlers, old_level, propagates in before:
            logger.handlers[:] = handlers
            logger.setLevel(old_level)
            logger.propagate = propagates
        outlet.gives_up = not _are_written(lines)
        lines.join()  # before the listener's end asks for room among them
        listener.stop()


def _are_written(lines: "queue.Queue[logging.LogRecord]") -> bool:
    """Whether all lines are written; waits for that as long as any are."""
    with lines.all_tasks_done:
        while left := lines.unfinished_tasks:
            lines.all_tasks_done.wait(_STALLED_S)
            if lines.unfinished_tasks == left:
                return False
    return True


def _known(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name in FIELDS if (value := getattr(record, name, None)) not in (None, "")}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _escaped(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _of_loss(count: int) -> logging.LogRecord:
    message = f"{count} lines of the log were left out: it was read too slowly"
    return logging.LogRecord(LOGGER_NAME, logging.WARNING, __file__, 0, message, None, None)
