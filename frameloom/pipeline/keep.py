"""What a pipeline asks of whoever keeps its results, so that a run that ended early need not compute them again."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from frameloom.sampling.flow import SamplerState

Tensors = Mapping[str, Tensor]


class Keeper(Protocol):
    """Keeps what a request computes, and has what an earlier run of the same request computed."""

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives, now or in an earlier run; on whichever device."""
        ...

    def choice(self, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The same of what was chosen: numbers, texts and truth values."""
        ...

    def walked(self) -> tuple[Tensor, SamplerState] | None:
        """The latents and the state after the last step that was kept; None: begin with the first."""
        ...

    def walk(self, latents_BCTHW: Tensor, state: SamplerState) -> None:
        """A step is done. Neither of them is ever written to."""
        ...


class Forgets:
    """Keeps nothing."""

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives."""
        return make()

    def choice(self, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """What `make` gives."""
        return make()

    def walked(self) -> tuple[Tensor, SamplerState] | None:
        """Nothing."""
        return None

    def walk(self, latents_BCTHW: Tensor, state: SamplerState) -> None:
        """Nothing is done."""


FORGETS = Forgets()
