"""What a rank owes its launcher: signs of life, word of how it ended, and an end of its own when the launcher is gone.

Torch-free: the heart beats before torch is imported. Words are lines on a pipe: an empty one is a beat, one of JSON an
Ending. Under torchrun there is no such pipe: ranks that die are torchrun's business, and one that hangs is found by the
others when their exchange times out.
"""

import contextlib
import json
import os
import select
import signal
import threading
import time
from dataclasses import asdict, dataclass
from typing import Final, Self

from frameloom.parent import when_parent_dies

BEAT_S: Final = 0.5
TIDY_S: Final = 2.0  # a rank that lost its launcher may use these to remove what it had begun to write
_MAX_TRACE: Final = 20_000  # characters; a pipe holds 65,536 bytes, and the end must never wait for a reader

# How torch says that another rank is gone: class names, as its module may not be imported here, and words of gloo's.
_LOST_KINDS: Final = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"})
_LOST_WORDS: Final = (
    "closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Timed out waiting", "caused pair closure",
    "Socket Timeout",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a process ends: its exit code, one sentence or nothing, and the traceback of what nobody expected.

    `lost`: it fails because another rank is gone, whose own words are the ones to read.
    """

    code: int
    message: str = ""
    trace: str = ""
    lost: bool = False

    def line(self) -> bytes:
        """The ending as it goes through the pipe."""
        return json.dumps({**asdict(self), "trace": self.trace[-_MAX_TRACE:]}).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Self:
        """The ending that `line` was made of."""
        return cls(**json.loads(line))


class Heart:
    """Beats into the pipe `fd` from a thread of its own, from `start` on.

    `tidies`: this process writes the video, and is asked to end (SIGTERM) before it is ended when the launcher is gone;
    any other has nothing to tidy and ends at once.
    """

    def __init__(self, fd: int, *, tidies: bool) -> None:
        self._fd = fd
        self._tidies = tidies
        self._sending = threading.Lock()

    def start(self) -> None:
        """Beat from now on; call it in the main thread."""
        os.set_inheritable(self._fd, False)
        # The kernel ends a rank that hangs with its launcher. One that must tidy up it only wakes, were it stopped.
        when_parent_dies(signal.SIGCONT if self._tidies else signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._send(b"\n")
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def tell(self, ending: Ending) -> None:
        """Say how this process will end; a launcher that is gone need not know."""
        with contextlib.suppress(OSError):
            self._send(ending.line())

    def _beat(self) -> None:
        reader = select.poll()
        reader.register(self._fd, 0)  # errors alone: the launcher closed its end
        with contextlib.suppress(OSError):
            while not reader.poll(BEAT_S * 1000):
                self._send(b"\n")
        self._end()

    def _send(self, line: bytes) -> None:
        with self._sending:
            os.write(self._fd, line)

    def _end(self) -> None:
        if self._tidies:
            # Sent to the process, a thread of torch's might take it, and the main thread would sleep on.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            time.sleep(TIDY_S)
        if os.getpgrp() == os.getpid():  # a group of its own: what this process started ends with it
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def is_lost(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    if isinstance(error, ConnectionError) or type(error).__name__ in _LOST_KINDS:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_WORDS)
