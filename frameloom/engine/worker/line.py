"""A worker's end of the socket to its server: orders come in and news go out, in threads of their own.

Torch-free: it is up before torch is imported. The end of the socket is the end of the worker.
"""

import os
import queue
import select
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from frameloom.wire import Beat, Cancel, Foresee, FrameError, Frames, Message, Run, Stop, Together, frame

_BEAT_S: Final = 1.0
_PIECE: Final = 65_536


class Line:
    """`own`: the socket; `further`: those of other ranks, which are asked the same. Only a worker that `beats` speaks.

    Attributes: `work` counts what is done, for the beats.
    """

    def __init__(self, own: socket.socket, *, further: Sequence[socket.socket] = (), beats: bool) -> None:
        self._own, self._further, self._beats = own, tuple(further), beats
        self._orders: queue.SimpleQueue[Run | Together | None] = queue.SimpleQueue()
        self._sending, self._changing = threading.Lock(), threading.Lock()
        self._current: dict[tuple[str, int], bool] = {}  # whether each was asked to stop
        self._foresee: Callable[[Foresee], object] | None = None
        self.work = 0

    def start(self) -> None:
        """Listen, and beat, from now on."""
        threading.Thread(target=self._listen, name="line", daemon=True).start()
        if self._beats:
            threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def answer_with(self, foresee: Callable[[Foresee], object]) -> None:
        """Who is asked what requests would take; it must not wait. Questions before are not answered."""
        self._foresee = foresee

    def next_order(self) -> Run | Together | None:
        """Wait for the next order; None: end."""
        return self._orders.get()

    def pass_on(self, order: Run) -> None:
        """Ask the other ranks the same."""
        for other in self._further:
            other.sendall(frame(order))

    def pass_end_on(self) -> None:
        """Tell the other ranks that there is no more to do."""
        for other in self._further:
            other.sendall(frame(Stop()))

    def done_with(self, order: Run) -> None:
        """An attempt is over: what is said of it now comes too late.

        To be called before that is told: an order that comes after it may have the same name, and can be cancelled.
        """
        with self._changing:
            self._current.pop((order.job, order.fence), None)

    def is_cancelled(self, order: Run) -> bool:
        """Whether an attempt that is under way was asked to stop."""
        return self._current.get((order.job, order.fence), False)

    @property
    def job(self) -> str | None:
        """The job that is worked on; several, with commas between them."""
        with self._changing:
            return ",".join(job for job, _ in self._current) or None

    def tell(self, message: Message) -> None:
        """Send a message. If nobody is there to read it, this process ends."""
        try:
            with self._sending:
                self._own.sendall(frame(message))
        except OSError:
            end_now()

    def _listen(self) -> None:
        frames = Frames(from_worker=False)
        try:
            while data := self._own.recv(_PIECE):
                for message in frames.feed(data):
                    self._take(message)
        except (OSError, FrameError):
            pass
        end_now()

    def _take(self, message: Message) -> None:
        match message:
            case Run() | Together():
                runs = (message,) if isinstance(message, Run) else message.runs
                with self._changing:
                    self._current = {(run.job, run.fence): False for run in runs}
                self._orders.put(message)
            case Cancel():
                with self._changing:
                    if (message.job, message.fence) in self._current:
                        self._current[message.job, message.fence] = True
            case Foresee():
                if self._foresee is not None:
                    self._foresee(message)
            case Stop():
                self._orders.put(None)

    def _beat(self) -> None:
        while True:
            self.tell(Beat(work=self.work))
            select.select([], [], [], _BEAT_S)


def end_now() -> NoReturn:
    """End this process, and what it has started, without another word."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
