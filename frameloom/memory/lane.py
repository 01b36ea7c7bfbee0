"""The way of weights to a device: at once on a CPU; on an accelerator through pinned memory, beside what it computes.

Of accelerators none was at hand: what is said here follows torch's documentation of streams and events.
"""

from typing import Any, Final, Protocol

import torch
from torch import Tensor

from frameloom.platform.base import Platform
from frameloom.platform.device import platform_of

_PIECE_BYTES: Final = 64 * 2**20  # of each of the two pieces on their way to a device
PINNED_BYTES: Final = 2 * _PIECE_BYTES
"""Of the host's memory, by a way to an accelerator."""


class Lane(Protocol):
    """The way from the host to where a device computes. `pinned_bytes`: of the host's memory that it pins."""

    @property
    def pinned_bytes(self) -> int:
        """Bytes."""
        ...

    def copy(self, out: Tensor, seen: Tensor, /) -> None:
        """Begin to fill `out`, on the device, with numbers on the host, in the dtype of `out`."""
        ...

    def mark(self) -> Any:
        """A point after all that this lane has begun."""
        ...

    def computed(self) -> Any:
        """A point after all that the device was given to compute so far."""
        ...

    def after(self, point: Any, /) -> None:
        """Let the lane begin nothing before a point of `computed`."""
        ...

    def wait(self, point: Any, /) -> None:
        """Let the device compute nothing that it is given from now on before a point of `mark`."""
        ...

    def drain(self) -> None:
        """Wait until nothing is on its way and nothing computes."""
        ...


class AtOnce:
    """The lane of a device that does things in order: what was copied is there."""

    pinned_bytes = 0

    def copy(self, out: Tensor, seen: Tensor, /) -> None:
        """Fill `out`."""
        out.copy_(seen)

    def mark(self) -> None:
        """Nothing is under way."""

    def computed(self) -> None:
        """Nothing is under way."""

    def after(self, point: None, /) -> None:
        """Now is after everything."""

    def wait(self, point: None, /) -> None:
        """Now is after everything."""

    def drain(self) -> None:
        """Nothing is under way."""


class Ferry:
    """The lane of an accelerator: through two pinned pieces, on a queue of its own."""

    def __init__(
        self, device: torch.device, platform: Platform | None = None, *, piece_bytes: int = _PIECE_BYTES
    ) -> None:
        self._device, self._platform, self._piece_bytes = device, platform or platform_of(device), piece_bytes
        self._queue = self._platform.stream(device.index)
        self._pinned = [self._platform.pinned(piece_bytes) for _ in range(2)]
        self._sent: list[Any] = [None, None]
        self.pinned_bytes = 2 * piece_bytes

    def copy(self, out: Tensor, seen: Tensor, /) -> None:
        """Piece by piece; the host waits for a pinned piece until its last copy has left it."""
        flat, numbers = out.view(-1), seen.view(-1)
        step = self._piece_bytes // out.itemsize
        for start in range(0, len(flat), step):
            if self._sent[0] is not None:
                self._sent[0].synchronize()
            target = flat[start : start + step]
            piece = self._pinned[0].view(out.dtype)[: len(target)]
            piece.copy_(numbers[start : start + step])
            with self._platform.on(self._queue):
                target.copy_(piece, non_blocking=True)
            self._sent[0] = self.mark()
            self._pinned.reverse()
            self._sent.reverse()

    def mark(self) -> Any:
        """An event in the lane's queue."""
        event = self._platform.event()
        assert event is not None
        event.record(self._queue)
        return event

    def computed(self) -> Any:
        """An event in the queue that computes."""
        event = self._platform.event()
        assert event is not None
        event.record(self._platform.current(self._device.index))
        return event

    def after(self, point: Any, /) -> None:
        """The lane's queue waits, the host does not."""
        assert self._queue is not None
        self._queue.wait_event(point)

    def wait(self, point: Any, /) -> None:
        """The computing queue waits, the host does not."""
        queue = self._platform.current(self._device.index)
        assert queue is not None
        queue.wait_event(point)

    def drain(self) -> None:
        """Wait for all queues."""
        self._platform.synchronise(self._device.index)


def lane_to(device: torch.device) -> Lane:
    """The way to a device."""
    has_queues = device.type not in ("cpu", "mps")
    return Ferry(device) if has_queues else AtOnce()
