"""When a taken module computes as its own class does: what is looked at before every call, and said once."""

import functools
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FunctionType, MappingProxyType, MethodType
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _contextlib

from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HOMES: Mapping[str, str] = MappingProxyType(
    {
        "diffusers": f"{Path(str(diffusers.__file__)).parent}{os.sep}",
        "torch": f"{Path(nn.__file__).parent}{os.sep}",  # what torch.compile makes of a method is not from there
    }
)
_NUMBER = re.compile(r"\d[\d.]*")
_METHODS_KNOWN = 1024  # whose origin is remembered


class Told:
    """What the log was told: each line once, whatever its numbers. `level`: that of `logging`."""

    def __init__(self, level: int = logging.INFO) -> None:
        self._level = level
        self._lines: set[str] = set()

    def tell(self, line: str) -> None:
        """Tell it, but where another line was told that differs in its numbers alone, such as those of free bytes."""
        kind = _NUMBER.sub("0", line)
        if kind not in self._lines:
            self._lines.add(kind)
            log.log(self._level, "%s", line)

    def tell_plain(self, kind: str, reason: str) -> None:
        """Say that the plain class computes, and why."""
        self.tell(f"{kind} computes as Diffusers has it: {reason}")


def is_diffusers_own(kind: type, name: str) -> bool:
    """Whether a class has this method as Diffusers, or for its layers torch, wrote it: not a subclass's, not a patch.

    A wrapper counts with what it wraps. False where there is no such method.
    """
    method = getattr(kind, name, None)
    return method is not None and _is_own_method(kind, name, method)


@functools.lru_cache(_METHODS_KNOWN)
def _is_own_method(kind: type, name: str, found: object) -> bool:
    """`found` is what the class has now: looking it up is cheap, where it is from is looked at once."""
    owner = next(parent for parent in kind.__mro__ if name in vars(parent))
    method = vars(owner)[name]
    method = method.__func__ if isinstance(method, staticmethod | classmethod) else method
    home = _HOMES.get(owner.__module__.partition(".")[0])
    return home is not None and isinstance(method, FunctionType) and _is_written_in(method, home)


def refuses_method(kind: type, name: str) -> str | None:
    """Why what a class does may be something else than is known of it, or None."""
    return None if is_diffusers_own(kind, name) else f"{kind.__name__}.{name} is not as Diffusers has it"


def _is_written_in(function: FunctionType, home: str) -> bool:
    """`torch.no_grad` as a decorator is a function of torch's."""
    if not function.__code__.co_filename.startswith((home, _contextlib.__file__)):
        return False
    wrapped = (cell.cell_contents for cell in function.__closure__ or ())
    return all(_is_written_in(inner, home) for inner in wrapped if isinstance(inner, FunctionType))


def is_traced() -> bool:
    """Whether the call is being turned into a graph, torch's or CUDA's: ours choose by what a call comes with.

    Of CUDA it is not asked before CUDA is used, which this does not begin.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    is_used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_used and torch.cuda.is_current_stream_capturing()


def is_transformed() -> bool:
    """Whether tensors may carry more than their values: tangents, or the levels of torch.func (grad, jvp, vmap)."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def refuses_input(module: nn.Module, *inputs: Tensor | None) -> str | None:
    """Why these inputs are not for ours, or None; the first of them decides on the dtype and the device."""
    if is_transformed():
        return "a transform of torch.func, or forward-mode differentiation, is going on"
    given = [x for x in inputs if x is not None]
    first = given[0]
    if strange := next((type(x).__name__ for x in given if type(x) not in (Tensor, nn.Parameter)), None):
        return f"the input is a {strange}"
    if first.is_meta or first.dtype not in _DTYPES:
        return f"the input is {'without values' if first.is_meta else first.dtype}"
    if torch.is_autocast_enabled(first.device.type):
        return "autocast is on"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*given, *module.parameters())):
        return "gradients are recorded"
    return None


def refuses_weights(weights: Iterable[Tensor | None], x: Tensor, *, same_dtype: bool = False) -> str | None:
    """Why weights that are read here, and not by the layer they belong to, cannot be; None where they can."""
    for weight in weights:
        if weight is None:
            continue
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _DTYPES:
            return "a weight is quantized"
        if weight.device != x.device:
            return f"a weight is on {weight.device}, what it is for on {x.device}"
        if same_dtype and weight.dtype != x.dtype:
            return f"a weight is {weight.dtype}, what it is for {x.dtype}"
    return None


def refuses_layer(layer: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Why a layer has to be called, and its weights may not be used without it; None where it is plain."""
    kind: Any = type(layer)
    if kind not in kinds:
        return f"a layer is {kind.__name__}"
    if is_hooked(layer):
        return f"{kind.__name__} has hooks"
    if not _methods(kind).isdisjoint(vars(layer)):
        return f"a method of a {kind.__name__} was replaced"
    return refuses_method(kind, "forward")


@functools.lru_cache(_METHODS_KNOWN)
def _methods(kind: type) -> frozenset[str]:
    """The names of what a class does beside its forward, which is looked at as hooks are."""
    return frozenset(name for name in dir(kind) if isinstance(getattr(kind, name, None), FunctionType)) - {"forward"}


def has_affine(norm: nn.Module) -> bool:
    """Whether a layer's norm has a weight or a bias."""
    return not (norm.weight is norm.bias is None)


def first_reason(reasons: Iterable[str | None]) -> str | None:
    """The first that is one."""
    return next((reason for reason in reasons if reason), None)


def has_global_hooks() -> bool:
    """Whether torch calls somebody's hooks with every module there is."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def is_hooked(module: object) -> bool:
    """Whether a call of the module does anything else than its class's forward."""
    if not isinstance(module, nn.Module):  # a function, or what wraps a module
        return True
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return True
    if has_global_hooks():
        return True
    if module._compiled_call_impl is not None:
        return True
    forward = module.__dict__.get("forward")
    return forward is not None and not _is_own(module, forward)


def _is_own(module: nn.Module, forward: object) -> bool:
    """What is left of a hook that was removed is the forward of the class again."""
    is_bound = isinstance(forward, MethodType) and forward.__self__ is module
    return is_bound and getattr(forward, "__func__", None) is type(module).forward
