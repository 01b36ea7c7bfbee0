"""What is made of a tensor and kept for as long as that tensor lives, and is as it was."""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")
State = tuple[Any, ...]


def state_of(tensors: Iterable[Tensor]) -> State | None:
    """What differs once one of these tensors is another, lies elsewhere, or was written to; None where nothing tells.

    Tensors of torch's inference mode do not count how often they were written to; tensors of other classes, such as
    quantized ones, may be made of several.
    """
    tensors = tuple(tensors)
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() for tensor in tensors):
        return None
    return tuple((x.data_ptr(), x._version, x.dtype, x.device, x.shape, x.stride()) for x in tensors)


class Remembered(Generic[Made]):
    """At most `size` values, each made of a tensor; the oldest goes first.

    The tensors are not kept alive, so a value must not hold the tensor it was made of, nor a view of it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: Any = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, source: Tensor, weights: Iterable[Tensor], make: Callable[[], Made]) -> Made:
        """What `make` gave for this tensor with these weights, as they are; made now where that is not known."""
        state = state_of((source, *weights))
        if state is None:
            return make()
        kept: tuple[State, Made] | None = self._kept.get(source)
        if kept is not None and kept[0] == state:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():  # so that a training step may use it too
            made = make()
        self._kept.pop(source, None)
        while len(self._kept) >= self._size:
            self._kept.pop(next(self._kept.keys()))
        self._kept[source] = (state, made)
        return made

    def known(self, source: Tensor) -> Made | None:
        """What was made of this tensor, if it is as it was then and no weights were needed."""
        kept: tuple[State, Made] | None = self._kept.get(source)
        return kept[1] if kept is not None and kept[0] == state_of((source,)) else None

    def put(self, source: Tensor, made: Made) -> None:
        """Keep what is known of a tensor."""
        self.get(source, (), lambda: made)

    def clear(self) -> None:
        """Let everything go."""
        self._kept.clear()
