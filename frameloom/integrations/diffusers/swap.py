"""A live pipeline and its modules get other ways to compute, and their own back, by their class (as in torch's FSDP2).

A module stays the object it was, with its weights, its configuration, its hooks, and for all who hold it; its class
becomes one made of the class it had and of ours. Names and signatures stay: what saves, compiles, offloads or adapts it
finds what it knows.
"""

import copy
import copyreg
import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MappingProxyType, MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import DiffusionPipeline
from torch import nn

from frameloom.errors import RequestError

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
    """Give a module or a pipeline its own class back; False where it has it. RequestError as in `check_uncovered`."""
    if not is_swapped(module):
        return False
    check_uncovered(module)
    held: Held = module.__dict__.pop(_HELD)
    _become(module, plain_class(type(module)))
    held.release()
    return True


def check_uncovered(module: object) -> None:
    """Raise RequestError where a class was put on top of ours since, as FSDP2 and torch's parametrizations do."""
    if is_swapped(module) and _OURS not in vars(type(module)):
        raise RequestError(
            f"a {plain_class(type(module)).__name__} cannot be restored: the class {type(module).__name__} was put on "
            "top of it after it was accelerated; undo that first"
        )


def is_swapped(module: object) -> bool:
    """Whether a module computes by ours."""
    return hasattr(type(module), _OURS)


def held_by(module: object) -> Any:
    """What was handed to `swap` with a module."""
    return module.__dict__[_HELD]


def plain_class(kind: type) -> type:
    """The class that a swapped module had, whatever was put on top since; others are their own."""
    ours = next((each for each in kind.__mro__ if _OURS in vars(each)), None)
    return ours.__bases__[1] if ours is not None else kind


class _EqualToPlain(type):
    """The class of our classes: where a library looks one up, or compares it, it finds the class that it stands for.

    So `DiffusionPipeline.from_pipe` takes a taken component over, and registries by class know it. What is put on top
    of ours is a class of its own.
    """

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, type) and _stands_for(cls) is _stands_for(other)

    def __hash__(cls) -> int:
        shown = _stands_for(cls)
        return type.__hash__(cls) if shown is cls else hash(shown)


def _stands_for(kind: type) -> type:
    return plain_class(kind) if _OURS in vars(kind) else kind


@functools.cache
def _joined(kind: type, mixin: type) -> type:
    """A class of the same name and place: what is written of it, such as a checkpoint's `_class_name`, stays true."""
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    above = type(kind)
    meta: type = _EqualToPlain if above is type else type(above.__name__, (_EqualToPlain, above), {})
    joined: type = meta(kind.__name__, (mixin, kind), {**named, _OURS: mixin, **_COPIES, **_guarded(kind, mixin)})
    return joined


def _guarded(kind: type, mixin: type) -> dict[str, Any]:
    """The methods of a mixin that stand for those of a class."""
    parents = [parent for parent in reversed(mixin.__mro__) if parent not in kind.__mro__]
    methods = {name: found for parent in parents for name, found in vars(parent).items() if hasattr(kind, name)}
    return {
        name: _while_taken(mixin, name, found) for name, found in methods.items() if isinstance(found, FunctionType)
    }


def _while_taken(mixin: type, name: str, ours: FunctionType) -> Callable[..., Any]:
    """A method that is ours while a module is taken, and its own class's from then on.

    Whoever kept it, bound, calls it still: a wrapper around a forward, a thread in which a module is restored.
    """

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, mixin):
            if torch.compiler.is_compiling():  # whose graphs do not end within a `try`
                return ours(self, *args, **kwargs)
            held = self.__dict__.get(_HELD)
            try:
                return ours(self, *args, **kwargs)
            except (KeyError, TypeError):  # of `held_by`, and of `super()`
                if held is not None and self.__dict__.get(_HELD) is held:
                    raise
        return getattr(plain_class(type(self)), name)(self, *args, **kwargs)

    return method


def _reduce_to_plain(module: Any, protocol: Any) -> Any:
    """Copies and pickles are of the plain class, and read where ours is not: made by the standard library."""
    kind = type(module)
    if _OURS not in vars(kind):  # whose class is on top decides
        return object.__reduce_ex__(module, protocol)
    return copyreg._reconstructor, (plain_class(kind), object, None), _state(module)  # type: ignore[attr-defined]


def _copy_to_plain(module: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, of the plain class; hooks in it that hold the module's forward hold the copy's."""
    kind = type(module)
    is_top = _OURS in vars(kind)
    twin: Any = object.__new__(plain_class(kind) if is_top else kind)
    memo[id(module)] = twin
    state = copy.deepcopy(_state(module) if is_top else module.__dict__, memo)
    twin.__setstate__(state) if hasattr(twin, "__setstate__") else twin.__dict__.update(state)
    if is_top:
        _bind_forwards(twin, getattr(kind, "forward", None))
    return twin


_COPIES = MappingProxyType({"__reduce_ex__": _reduce_to_plain, "__deepcopy__": _copy_to_plain})


def _state(module: Any) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name != _HELD}


def _become(module: Any, kind: Any) -> None:
    """Change the class; hooks that were attached before, and hold the class's forward, get the new one."""
    before = getattr(type(module), "forward", None)
    module.__class__ = kind
    _bind_forwards(module, before)


def _bind_forwards(module: Any, before: Any) -> None:
    """Where the forward is kept that the class had, keep the one that it has."""
    kind: Any = type(module)
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
