"""A live pipeline and its modules get other ways to compute, and their own back, by their class (as in torch's FSDP2).

A module stays the object it was, with its weights, its configuration, its hooks, and for all who hold it; its class
becomes one made of the class it had and of ours. Names and signatures stay: what saves, compiles, offloads or adapts it
finds what it knows.
"""

import copyreg
import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any, Protocol, runtime_checkable

from diffusers import DiffusionPipeline
from torch import nn

_HELD = "_frameloom"
_OURS = "_frameloom_mixin"


@runtime_checkable
class Held(Protocol):
    """What a taken module holds of ours."""

    def release(self) -> None:
        """Undo what was done to the module's weights, and let go what is held."""
        ...


def swap(module: nn.Module | DiffusionPipeline, mixin: type, held: Held) -> None:
    """Let a module, or a pipeline, work by the methods of `mixin`, which find `held` by `held_by`.

    TypeError the second time.
    """
    if is_swapped(module):
        raise TypeError(f"{type(module).__name__} is taken already")
    module.__dict__[_HELD] = held
    plain: Any = type(module)  # as such it can be hashed, which is not known of a type of modules
    _become(module, _joined(plain, mixin))


def unswap(module: nn.Module | DiffusionPipeline) -> bool:
    """Give a module or a pipeline its own class back; False where it has it."""
    if not is_swapped(module):
        return False
    held: Held = module.__dict__.pop(_HELD)
    _become(module, plain_class(type(module)))
    held.release()
    return True


def is_swapped(module: object) -> bool:
    """Whether a module computes by ours."""
    return hasattr(type(module), _OURS)


def held_by(module: object) -> Any:
    """What was handed to `swap` with a module."""
    return module.__dict__[_HELD]


def plain_class(kind: type) -> type:
    """The class that a swapped module had; others are their own."""
    return kind.__bases__[1] if hasattr(kind, _OURS) else kind


@functools.cache
def _joined(kind: type, mixin: type) -> type:
    """A class of the same name and place: what is written of it, such as a checkpoint's `_class_name`, stays true."""
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (mixin, kind), {**named, _OURS: mixin, "__reduce_ex__": _reduce_to_plain})


def _reduce_to_plain(module: Any, protocol: Any) -> Any:
    """Copies and pickles are of the plain class, and read where ours is not: made by the standard library."""
    state = {name: value for name, value in module.__dict__.items() if name != _HELD}
    return copyreg._reconstructor, (plain_class(type(module)), object, None), state  # type: ignore[attr-defined]


def _become(module: Any, kind: Any) -> None:
    """Change the class; hooks that were attached before, and hold the class's forward, get the new one."""
    before = getattr(type(module), "forward", None)
    module.__class__ = kind
    for holder, name in _forwards(module):
        kept = getattr(holder, name, None)
        if isinstance(kept, MethodType) and kept.__self__ is module and kept.__func__ is before:
            setattr(holder, name, MethodType(kind.forward, module))


def _forwards(module: Any) -> Iterator[tuple[object, str]]:
    """Where Accelerate's hooks and Diffusers' keep a module's forward."""
    for name in ("forward", "_old_forward"):
        if name in module.__dict__:
            yield module, name
    registry = module.__dict__.get("_diffusers_hook")
    for reference in getattr(registry, "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"
