"""Measures the memory that a computation would take, by running it on the meta device, where tensors have no data."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that comes into being while it is on, until it is let go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for leaf in args:
            if isinstance(leaf, torch.Tensor):
                self._known.add(leaf.untyped_storage())  # a view of what was there before is nothing new
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, count: int) -> None:
        self.live -= count


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` have at one time; what it was given does not count."""
    meter = _Meter()
    with meter:
        run()
    return meter.peak


def amount(count: float) -> str:
    """Bytes for people."""
    if count < 1e5:
        return f"{count:.0f} bytes"
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
