"""How the ranks of a run share the weights of a network: what those must know who change weights that were read."""

import functools
from collections.abc import Callable

from torch import Tensor, nn

Undo = Callable[[], None]


class Division:
    """Here one process has all weights; parallel/tensor.py and parallel/weights.py say how several share them.

    `size`: ranks that a weight may be cut for, of which this is the one at `index`.
    """

    size: int = 1
    index: int = 0

    def axis(self, name: str) -> int | None:
        """Where the parameter `name` is cut for computing: 0 rows, 1 columns; None: every rank computes with all."""
        return None

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over the ranks that have the other parts, on each of them; all must call it, in the same order."""
        return x

    def whole(self, parameter: Tensor) -> Tensor:
        """All of a parameter that this rank computes with; likewise."""
        return parameter

    def exchange(self, owner: nn.Module, attribute: str, value: Tensor) -> Undo:
        """Let a module compute with another parameter, all of it; what is returned brings the old one back."""
        undo = functools.partial(setattr, owner, attribute, getattr(owner, attribute))
        setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
        return undo
