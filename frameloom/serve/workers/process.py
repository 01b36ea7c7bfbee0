"""A process of a worker, from its start to its end: the socket to it, its log, and a watch over it. Torch-free."""

import asyncio
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from frameloom.serve.config import ServeConfig
from frameloom.serve.workers.worker import Died, Outcome
from frameloom.settings import worker_environment
from frameloom.wire import (
    Beat,
    Cancel,
    Cancelled,
    Card,
    Done,
    Failed,
    Foresee,
    Foreseen,
    FrameError,
    Frames,
    Message,
    News,
    Ready,
    Run,
    Setup,
    Together,
    Unable,
    frame,
)

log = logging.getLogger(__name__)

State: TypeAlias = Literal["starting", "idle", "busy", "dead"]
_LOOK_S: Final = 0.25
_PAUSED_S: Final = 2.0  # a look that takes so much longer: the server itself was stopped, and its workers are forgiven
_LAST_WORDS_S: Final = 3.0  # from the end of the socket to the end of the process
_PIECE: Final = 65_536
_MAX_LINE: Final = 65_536  # characters of the log


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Attempt:
    """What is being made."""

    on_news: Callable[[News], object]
    over: "asyncio.Future[Outcome]"


class Process:
    """One worker, from its start to its end. All of it on one event loop.

    Attributes: `state`; `card` and `usual_seconds` as the worker says them; `unable`: why its engine cannot be built.
    `changed` is called when any of these changes.
    """

    def __init__(self, number: int, config: ServeConfig, changed: Callable[[], object]) -> None:
        self.number, self._config, self._changed = number, config, changed
        self.state: State = "starting"
        self.card: Card | None = None
        self.usual_seconds: float | None = None
        self.unable = ""
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._attempts: dict[tuple[str, int], _Attempt] = {}
        self._foreseen: dict[int, asyncio.Future[Foreseen | None]] = {}
        self._killed_for, self._said = "", ""
        self._heard_at, self._work = time.monotonic(), 0
        self._worked_at = self._heard_at  # when `_work` has changed, or an order was given

    @property
    def is_ready(self) -> bool:
        """Whether the engine is built, busy or not."""
        return self.state in ("idle", "busy")

    @property
    def pid(self) -> int | None:
        """The number of the process: the worker's, or that which has started its ranks."""
        return None if self._process is None else self._process.pid

    async def live(self) -> str:
        """Start the process and listen to it until it has ended; returns why it did."""
        ours, theirs = socket.socketpair()
        config, ranks = self._config, self._config.gpus_per_worker
        setup = Setup(
            socket=theirs.fileno(), name=config.name, model=config.model, parts=dict(config.parts),
            variant=config.variant, config=config.engine, ranks=ranks,
        )  # fmt: skip
        with theirs:
            self._process = process = await asyncio.create_subprocess_exec(
                *setup.command(),
                env=worker_environment(self.number, config.workers, ranks),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        if self._killed_for:  # while it was being started
            self._kill()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        beside = [asyncio.create_task(self._watch()), asyncio.create_task(self._read_log(process))]
        try:
            await self._listen(reader)
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(process.wait()), _LAST_WORDS_S)
        finally:
            self._kill()  # what it has started, too
            self._writer.close()
            code = await asyncio.shield(process.wait())
            with suppress(TimeoutError):
                await asyncio.wait_for(beside[1], 1)
            for task in beside:
                task.cancel()
            reason = self._killed_for or _death(code, self._said)
            self._end(reason)
        return reason

    async def run(self, order: Run, on_news: Callable[[News], object]) -> Outcome:
        """Have an idle worker carry out an order; `on_news` is told of its steps."""
        (over,) = self._begin(order, (order,), on_news)
        return await over

    def begin_together(
        self, orders: Sequence[Run], on_news: Callable[[News], object]
    ) -> "Sequence[asyncio.Future[Outcome]]":
        """Have an idle worker make several as one batch; the outcome of each comes by itself."""
        return self._begin(Together(runs=tuple(orders)), orders, on_news)

    def _begin(
        self, message: Run | Together, orders: Sequence[Run], on_news: Callable[[News], object]
    ) -> "Sequence[asyncio.Future[Outcome]]":
        loop = asyncio.get_running_loop()
        self._attempts = {
            (order.job, order.fence): _Attempt(on_news=on_news, over=loop.create_future()) for order in orders
        }
        self._worked_at = time.monotonic()
        self._become("busy")
        self._send(message)
        return [attempt.over for attempt in self._attempts.values()]

    def makes(self, job: str, fence: int) -> bool:
        """Whether this attempt is under way here."""
        return (job, fence) in self._attempts

    def cancel(self, job: str, fence: int) -> None:
        """Ask it to stop an attempt."""
        self._send(Cancel(job=job, fence=fence))

    async def foresee(self, question: Foresee) -> Foreseen | None:
        """What a request would take; None where it ends before it says so."""
        answer: asyncio.Future[Foreseen | None] = asyncio.get_running_loop().create_future()
        self._foreseen[question.number] = answer
        self._send(question)
        try:
            return await answer
        finally:
            self._foreseen.pop(question.number, None)

    def kill(self, reason: str) -> None:
        """End it, whatever it does."""
        self._killed_for = self._killed_for or reason
        self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        frames = Frames(from_worker=True)
        with suppress(ConnectionError):
            while data := await reader.read(_PIECE):
                self._heard_at = time.monotonic()
                try:
                    for message in frames.feed(data):
                        self._take(message)
                except FrameError as error:
                    self.kill(f"said what is no message ({error})")
                    return

    def _take(self, message: object) -> None:
        match message:
            case Ready():
                self.card, self.usual_seconds = message.card, message.usual_seconds
                self._become("idle" if self.state == "starting" else self.state)
            case Unable():
                self.unable = message.message
            case Beat() if message.work != self._work:
                self._work, self._worked_at = message.work, time.monotonic()
            case News() if (attempt := self._attempts.get((message.job, message.fence))) is not None:
                attempt.on_news(message)
            case Done() | Failed() | Cancelled() if self.makes(message.job, message.fence):
                self._over(message)
            case Foreseen() if (answer := self._foreseen.get(message.number)) is not None and not answer.done():
                answer.set_result(message)

    def _over(self, outcome: Done | Failed | Cancelled) -> None:
        """One attempt is; with the last of those that were asked for the worker is idle, unless it ends."""
        _set(self._attempts.pop((outcome.job, outcome.fence)), outcome)
        if isinstance(outcome, Failed) and outcome.ends:
            self._become("dead")
        elif not self._attempts:
            self._become("idle")

    def _end(self, reason: str) -> None:
        for answer in self._foreseen.values():
            if not answer.done():
                answer.set_result(None)
        attempts, self._attempts = self._attempts, {}
        for attempt in attempts.values():
            _set(attempt, Died(reason=reason))
        self._become("dead")

    def _become(self, state: State) -> None:
        self.state = state
        self._changed()

    async def _watch(self) -> None:
        """Kill it when it gives no sign of life, or makes no progress, for too long."""
        started_at = looked_at = time.monotonic()
        while not self._killed_for:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            if (paused_s := now - looked_at - _LOOK_S) > _PAUSED_S:
                started_at, self._heard_at = started_at + paused_s, self._heard_at + paused_s
                self._worked_at += paused_s
            looked_at = now
            if reason := self._fault(now, started_at):
                self.kill(reason)

    def _fault(self, now: float, started_at: float) -> str:
        patience = self._config.patience
        if self.state == "starting":
            return f"did not start within {patience.start_s:g} s" if now - started_at > patience.start_s else ""
        if now - self._heard_at > patience.beat_s:
            return f"gave no sign of life for {patience.beat_s:g} s"
        if self._attempts and now - self._worked_at > patience.progress_s:
            return f"made no progress for {patience.progress_s:g} s"
        return ""

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        """Make its log the server's own."""
        held = b""
        while process.stderr is not None and (data := await process.stderr.read(_PIECE)):
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                self._log(line.decode(errors="backslashreplace"))
            held = held[:_MAX_LINE]
        if held:
            self._log(held.decode(errors="backslashreplace"))

    def _log(self, line: str) -> None:
        try:
            told = json.loads(line)
            level, message, job, trace = told["level"], told["message"], told["job"], told.get("trace", "")
        except (ValueError, TypeError, KeyError):
            if line.strip():
                self._said = line.strip()
                log.warning("worker %d: %s", self.number, line, extra={"worker": self.number})
            return
        known = logging.getLevelNamesMapping().get(str(level).upper(), logging.WARNING)
        text = f"{message}\n{trace}" if trace else message
        log.log(known, "%s", text, extra={"worker": self.number, "job": job})


def _set(attempt: _Attempt, outcome: Outcome) -> None:
    if not attempt.over.done():
        attempt.over.set_result(outcome)


def _death(code: int, said: str) -> str:
    """How a process ended by itself, by its exit code and what it said last."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), as the system does when memory runs out"
    if code < 0:
        known = -code in {int(number) for number in signal.Signals}
        return f"was killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"ended with exit code {code}" + (f" ({said})" if said and code else "")
