"""What an attention backend is: the call, and as data what it needs, how exact it is and where its kernel comes from.

Shapes: B batch, L query tokens, S key tokens, H heads, K head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from frameloom.ops.registry import Exactness
from frameloom.platform.base import first_line

HALF_PRECISIONS = (torch.float16, torch.bfloat16)


class Attend(Protocol):
    """softmax(q kᵀ / √K + bias) v over all keys, per head: no dropout; dtype and device as given."""

    def __call__(self, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, bias_BS: Tensor | None = None, /) -> Tensor:
        """Return out_BLHK.

        The bias, float32, is added to the logits of each key, for all heads and queries alike: log(n) makes one key
        count as n, -inf takes it away. A query that is left without any key gets zeros.
        """
        ...


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def shapes_alone(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, bias_BS: Tensor | None = None, /) -> Tensor:
    """For the meta device, where torch's attention makes scores that the real one never holds."""
    return torch.empty_like(q_BLHK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where attention is to run, as far as it is known: what is None is not held against a backend.

    `capability` is CUDA's compute capability; other platforms have none.
    """

    platform: str
    head_dim: int | None = None
    dtype: torch.dtype | None = None
    capability: tuple[int, int] | None = None

    @property
    def known(self) -> bool:
        """Whether everything is known that an automatic choice needs."""
        return None not in (self.head_dim, self.dtype) and (self.platform != "cuda" or self.capability is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One way to compute attention by a kernel of another package, whose function `wrap` turns into ours.

    Its limits: the platforms, dtypes, the largest head dimension and what it must be a multiple of, and on CUDA the
    compute capability, from `capability_from` up to (not including) `capability_below`. None of them takes a bias.
    `faster` says why it is chosen without being asked for, where it applies; None: only by name.
    """

    name: str
    exactness: Exactness
    platforms: tuple[str, ...]
    package: str
    function: str
    wrap: Callable[[Callable[..., Any]], Kernel]
    hint: str
    dtypes: tuple[torch.dtype, ...] = HALF_PRECISIONS
    max_head_dim: int
    head_dim_step: int = 1
    capability_from: tuple[int, int] = (0, 0)
    capability_below: tuple[int, int] | None = None
    faster: str | None = None

    def refuses(self, place: Place) -> str | None:
        """Why it cannot be used there, or None. The package is looked up last: loading one takes seconds."""
        return self.out_of_place(place) or self.lacks()

    def out_of_place(self, place: Place) -> str | None:
        """Why no package would make it usable there, or None."""
        checks = (self._refuses_platform, self._refuses_capability, self._refuses_numbers)
        reasons = (check(place) for check in checks)
        return next((reason for reason in reasons if reason), None)

    def lacks(self) -> str | None:
        """Why its function is not on this machine, or None."""
        try:
            load_function(self.package, self.function)
        except ImportError as error:
            return str(error)
        return None

    def kernel(self) -> Kernel:
        """The kernel. Raises ImportError, which says why, where it is missing."""
        return self.wrap(load_function(self.package, self.function))

    def _refuses_platform(self, place: Place) -> str | None:
        if place.platform in self.platforms:
            return None
        return f"it is for {' and '.join(self.platforms)}, not {place.platform}"

    def _refuses_capability(self, place: Place) -> str | None:
        found = place.capability
        if found is None or place.platform != "cuda":  # ROCm numbers its architectures in the same field
            return None
        if found < self.capability_from:
            return f"it needs compute capability {_dotted(self.capability_from)} or higher, not {_dotted(found)}"
        if self.capability_below is not None and found >= self.capability_below:
            return f"it needs compute capability below {_dotted(self.capability_below)}, not {_dotted(found)}"
        return None

    def _refuses_numbers(self, place: Place) -> str | None:
        if place.dtype is not None and place.dtype not in self.dtypes:
            return f"it computes {' and '.join(map(_short, self.dtypes))}, not {_short(place.dtype)}"
        if place.head_dim is not None and place.head_dim > self.max_head_dim:
            return f"it takes head dimensions up to {self.max_head_dim}, not {place.head_dim}"
        if place.head_dim is not None and place.head_dim % self.head_dim_step:
            return f"it takes head dimensions that are multiples of {self.head_dim_step}, not {place.head_dim}"
        return None


def load_function(package: str, function: str) -> Callable[..., Any]:
    """A function of a package that Frameloom does not bring along. Raises ImportError with the reason in few words."""
    if find_spec(package) is None:
        raise ImportError(f"{package} is not installed")
    try:
        module = import_module(package)
    except Exception as error:  # a kernel built for another torch or driver may raise anything
        raise ImportError(f"{package} is installed but cannot be loaded ({first_line(error)})") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ImportError(f"{package} is installed but has no {function}; another version is needed")
    checked: Callable[..., Any] = found
    return checked


def only_output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The attention output of a kernel that returns it alone or before its statistics, depending on the version."""
    return result[0] if isinstance(result, tuple | list) else result


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
