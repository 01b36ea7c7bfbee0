"""Starts the ranks of one machine, watches them, and ends them all when one fails. Torch-free.

A rank is watched by its exit code, by the beats of its heart (heart.py) and, on Linux, by what the kernel says of it: a
stopped process fails the run at once, one that computes or waits for a disk is alive however long it does not beat.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from frameloom.config import parallel_plan
from frameloom.errors import RequestError
from frameloom.parallel.heart import Ending
from frameloom.settings import LOOPBACK, Launched, master_port, rank_environment

MAX_RANKS: Final = 64
"""More processes on one machine are likelier a mistyped digit than a wish."""

_LOOK_S: Final = 0.2
_START_S: Final = 60.0  # until the first beat
_QUIET_S: Final = 3.0 if sys.platform == "linux" else 30.0  # elsewhere an import may hold the interpreter for seconds
_WORK: Final = 20  # 1/100 s of computing, or pages from a disk; a thread that waits for Python's lock takes some, too
_STOPPED_S: Final = 1.0
_PAUSED_S: Final = 1.0  # a look that takes so much longer: this process was stopped itself, and maybe all were
_SETTLE_S: Final = 0.3  # whoever fails with the first is heard, too
_LOST_SETTLE_S: Final = 1.5  # a rank that lost another may speak before that one
_TERM_S: Final = 0.2
_TIDY_S: Final = 2.5  # for rank 0, to remove what it had begun to write; its heart gives it a little less
_HOLD_S: Final = 1.0  # a line waits so long for rank 0 to say the same
_OTHERS: Final = "the other ranks were ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended: the exit code, and one sentence about the rank that failed, or nothing."""

    code: int
    message: str = ""


def _nothing(_: int) -> Sequence[int]:
    """What a rank is handed by those who say nothing of it."""
    return ()


def run_ranks(
    command: Sequence[str],
    count: int,
    *,
    say: Callable[[str], object],
    tidy: Callable[[int], object] | None = None,
    handed: Callable[[int], Sequence[int]] = _nothing,
) -> Outcome:
    """Run `command` as `count` ranks of one machine and wait for all to end; `say` gets the text of their errors.

    What is run starts a Heart (heart.py) with the descriptor that `settings.launched` names. Rank 0 has this process's
    standard output, the others have none. If a rank fails, dies, is stopped or hangs, all are ended. An exception here,
    KeyboardInterrupt among them, ends them too. `tidy` is called at the end with the process number that rank 0 had.
    `handed`: descriptors of this process that a rank is given besides, under the same numbers.
    Raises RequestError if the port is taken.
    """
    with _listening(master_port()) as store:
        run = _Run(count, say)
        try:
            for number in range(count):
                run.start(command, number, store, handed(number))
            store.close()
            return run.watch()
        finally:
            run.end()
            if tidy is not None and run.first_pid is not None:
                tidy(run.first_pid)


def count_ranks(gpus: int | None, plan: str, place: Launched | None) -> int:
    """How many ranks share the work: those of `--gpus`, else of `--parallel`, else those that were started already.

    Raises RequestError where these contradict each other, or the plan is not possible.
    """
    if place is not None and gpus not in (None, place.world_size):
        raise RequestError(f"--gpus {gpus} contradicts the {place.world_size} ranks that were started; leave it away")
    if gpus is not None and not 1 <= gpus <= MAX_RANKS:
        raise RequestError(f"--gpus {gpus} is not possible; use a whole number from 1 to {MAX_RANKS}")
    started = place.world_size if place is not None else gpus
    chosen = parallel_plan(plan, started)
    count = started or (1 if chosen is None else chosen.num_ranks)
    if place is None and count > MAX_RANKS:
        raise RequestError(f"{count} ranks on one machine are not possible; start them with torchrun, on several")
    return count


def _listening(port: int | None) -> socket.socket:
    """The socket that rank 0 will serve the store on: bound here, so that nobody can take the port in between."""
    store = socket.socket()
    try:
        if port is not None:
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended does not hold it
        store.bind((LOOPBACK, port or 0))
        store.listen()
    except OSError as error:
        store.close()
        why = f"port {port} (MASTER_PORT) cannot be used ({error.strerror})"
        raise RequestError(f"{why}; choose another, or unset MASTER_PORT and a free one is found") from error
    return store


@dataclass(slots=True, eq=False)
class _Rank:
    """A process that was started, and what is known of it.

    `failure` is what went wrong first, at `failed_at`; `said` if the rank told of it itself.
    """

    number: int
    process: subprocess.Popen[bytes]
    heart: int
    errors: int
    alive_at: float
    work: int = 0
    stopped_at: float | None = None
    words: bytes = b""
    failure: Ending | None = None
    failed_at: float = 0.0
    said: bool = False

    @property
    def running(self) -> bool:
        """Whether it has not been reaped."""
        return self.process.returncode is None

    @property
    def ended(self) -> bool:
        """Whether it is dead. It need not be reaped yet, so that nobody else can get its number."""
        if not self.running or not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self.process.poll() is not None
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def signal(self, *numbers: signal.Signals) -> None:
        """Send signals to it and to all that it started, unless it was reaped."""
        if self.running:
            for number in numbers:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of the dead
                    os.killpg(self.process.pid, number)

    def reap(self) -> int:
        """End what it left behind, and return its exit code: that of a signal is negative."""
        self.signal(signal.SIGKILL)
        return self.process.wait()

    def hear(self, data: bytes) -> None:
        """Take what came through the heart's pipe."""
        self.alive_at = time.monotonic()
        *lines, self.words = (self.words + data).split(b"\n")
        for ending in map(Ending.of_line, filter(None, lines)):
            if ending.code:
                self._fail(ending, said=True)

    def forgive(self, seconds: float) -> None:
        """Count time in which nobody looked as none."""
        self.alive_at += seconds
        self.stopped_at = None

    def look(self) -> None:
        """Find out whether it died, was stopped or hangs; what it said must have been heard."""
        now = time.monotonic()
        if self.ended:
            if code := self.reap():
                self._fail(Ending(code=max(code, 1), message=f"rank {self.number} {_death(code)}; {_OTHERS}"))
            return
        state, work = _kernel_says(self.process.pid)
        if state in ("R", "D") or work >= self.work + _WORK:
            self.alive_at, self.work = max(now, self.alive_at), work
        self.stopped_at = (self.stopped_at or now) if state == "T" else None
        if self.stopped_at is not None and now - self.stopped_at > _STOPPED_S:
            self._fail(Ending(code=1, message=f"rank {self.number} was stopped (SIGSTOP); {_OTHERS}"))
        elif now - self.alive_at > _QUIET_S:
            silence = f"gave no sign of life for {_QUIET_S:.0f} s"
            self._fail(Ending(code=1, message=f"rank {self.number} {silence}; {_OTHERS}"))

    def _fail(self, failure: Ending, *, said: bool = False) -> None:
        if self.failure is None:  # later ones follow from the first
            self.failure, self.failed_at, self.said = failure, time.monotonic(), said


def _death(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    known = -code in {int(number) for number in signal.Signals}
    name = signal.Signals(-code).name if known else f"signal {-code}"
    hint = " (as the system does when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _kernel_says(pid: int) -> tuple[str, int]:
    """The state of a process (R runs, D waits for a disk, T is stopped), and a count of its work; nothing if unknown.

    /proc/PID/stat, proc(5): after the name in parentheses come the state, and with it as field 3, the major page faults
    as field 12, and the time in user and in kernel mode as fields 14 and 15.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[9]) + int(fields[11]) + int(fields[12])


class _Voices:
    """What the ranks write to standard error: rank 0's as it comes, a line of another unless it was told already."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._told: deque[str] = deque(maxlen=1000)
        self._held: deque[tuple[float, int, str]] = deque()
        self._begun: defaultdict[int, bytes] = defaultdict(bytes)

    def hear(self, number: int, data: bytes) -> None:
        """Take what a rank wrote."""
        *lines, self._begun[number] = (self._begun[number] + data).split(b"\n")
        texts = [line.decode(errors="backslashreplace") for line in lines]
        if number == 0:
            self._say(data.decode(errors="backslashreplace"))  # at once: bars of progress end no line
            self._told.extend(texts)
        else:
            self._held.extend((time.monotonic(), number, text) for text in texts if text.strip())

    def tell(self, held_s: float = _HOLD_S) -> None:
        """Tell lines that were held so long: rank 0 will not say the same any more."""
        while self._held and time.monotonic() - self._held[0][0] >= held_s:
            _, number, text = self._held.popleft()
            if text not in self._told:
                self._say(f"[rank {number}] {text}\n")
                self._told.append(text)

    def finish(self) -> None:
        """Tell all that is left, and nothing any more."""
        for number in [number for number, begun in self._begun.items() if begun]:
            self.hear(number, b"\n")
        self.tell(0)
        self._say = lambda _: None

    def trace(self, number: int, trace: str) -> None:
        """Tell the traceback that a rank ended with."""
        self._say("".join(f"[rank {number}] {line}\n" for line in trace.splitlines()))


class _Run:
    """The ranks of a run, from their start to their end."""

    def __init__(self, count: int, say: Callable[[str], object]) -> None:
        self._count = count
        self._ranks: list[_Rank] = []
        self._voices = _Voices(say)
        self._pipes = selectors.DefaultSelector()

    def start(self, command: Sequence[str], number: int, store: socket.socket, handed: Sequence[int]) -> None:
        """Start one rank, in a session of its own: a Ctrl-C on the terminal reaches the launcher alone."""
        (heart, its_heart), (errors, its_errors) = os.pipe(), os.pipe()
        store_fd = store.fileno() if number == 0 else None
        port = store.getsockname()[1]
        try:
            process = subprocess.Popen(
                list(command),
                env=rank_environment(number, self._count, port=port, heart_fd=its_heart, store_fd=store_fd),
                pass_fds=[its_heart, *handed] if store_fd is None else [its_heart, store_fd, *handed],
                stdin=subprocess.DEVNULL,
                stdout=None if number == 0 else subprocess.DEVNULL,
                stderr=its_errors,
                start_new_session=True,
            )
        finally:
            os.close(its_heart)
            os.close(its_errors)
        rank = _Rank(number, process, heart, errors, alive_at=time.monotonic() + _START_S)
        self._ranks.append(rank)
        self._pipes.register(heart, selectors.EVENT_READ, rank.hear)
        self._pipes.register(errors, selectors.EVENT_READ, partial(self._voices.hear, number))

    def watch(self) -> Outcome:
        """Wait until all have ended, or one has failed and the others had a moment to say so too."""
        while True:
            begun = time.monotonic()
            self._listen(_LOOK_S)
            if (paused_s := time.monotonic() - begun - _LOOK_S) > _PAUSED_S:
                for rank in self._ranks:
                    rank.forgive(paused_s)
            running = [rank for rank in self._ranks if rank.running]
            if any(rank.ended for rank in running):
                self._listen(0)  # its last words
            for rank in running:
                rank.look()
            failed = [rank for rank in self._ranks if rank.failure is not None]
            if not failed and not running:
                return Outcome(code=0)
            if failed and (not running or self._settled(failed)):
                return self._outcome(failed)

    def end(self) -> None:
        """End every rank that runs. Rank 0 may tidy up; the others go first, so that it waits for none of them."""
        self._listen(0)
        self._voices.finish()  # what a rank says on its way out is no news
        for rank in self._ranks:
            self._close(rank.heart)  # which the heart of a rank takes for the end of the launcher, and ends its rank
            rank.signal(signal.SIGTERM, signal.SIGCONT)
        self._await(self._ranks, _TERM_S)
        for rank in self._ranks[1:]:
            rank.signal(signal.SIGKILL)
        self._await(self._ranks[:1], _TIDY_S)
        for rank in self._ranks:
            rank.reap()
        for rank in self._ranks:
            self._close(rank.errors)
        self._pipes.close()

    def _await(self, ranks: Sequence[_Rank], patience_s: float) -> None:
        until = time.monotonic() + patience_s
        while not all(rank.ended for rank in ranks) and time.monotonic() < until:
            self._listen(0.02)

    def _listen(self, patience_s: float) -> None:
        """Take what the ranks say; a pipe that has no writer any more is closed here, too."""
        if not self._pipes.get_map():
            time.sleep(patience_s)
        for key, _ in self._pipes.select(patience_s):
            if data := os.read(key.fd, 65536):
                key.data(data)
            else:
                self._close(key.fd)
        self._voices.tell()

    def _close(self, pipe: int) -> None:
        if pipe in self._pipes.get_map():
            self._pipes.unregister(pipe)
            os.close(pipe)

    @property
    def first_pid(self) -> int | None:
        """Of rank 0, if it was started."""
        return self._ranks[0].process.pid if self._ranks else None

    @staticmethod
    def _settled(failed: Sequence[_Rank]) -> bool:
        patience_s = _LOST_SETTLE_S if all(_is_lost(rank) for rank in failed) else _SETTLE_S
        return time.monotonic() - min(rank.failed_at for rank in failed) > patience_s

    def _outcome(self, failed: Sequence[_Rank]) -> Outcome:
        """The run's end: the words of the first that failed by itself."""
        culprit = min(failed, key=lambda rank: (_is_lost(rank), rank.failed_at))
        failure = culprit.failure or Ending(code=1)
        if failure.trace:
            self._voices.trace(culprit.number, failure.trace)
        if not failure.message or not culprit.said or self._ranks[0].failure == failure:
            return Outcome(code=failure.code, message=failure.message)
        return Outcome(code=failure.code, message=f"rank {culprit.number}: {failure.message}")


def _is_lost(rank: _Rank) -> bool:
    return rank.failure is not None and rank.failure.lost
