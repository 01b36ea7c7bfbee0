"""Networks without numbers: made for their shapes, or to be filled from a checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext


@contextmanager
def on_meta() -> Iterator[None]:
    """Within, modules are made on the meta device, and nothing is drawn for them.

    There is nothing to draw there, but torch computes the shape of the draw in Python, and for that imports its
    compiler, which takes as long as importing torch itself.
    """
    with _OfThread(torch.device("meta")), _Undrawn():
        yield


class _OfThread(DeviceContext):
    """The device of this thread alone: torch's own context also tells those who compile, whatever their thread.

    A plan that is made beside a video would else have its kernels compiled anew.
    """

    def __enter__(self) -> Any:
        return TorchFunctionMode.__enter__(self)  # type: ignore[no-untyped-call]

    def __exit__(self, *ending: Any) -> Any:
        return TorchFunctionMode.__exit__(self, *ending)  # type: ignore[no-untyped-call]


class _Undrawn(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
