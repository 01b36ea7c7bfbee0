"""When a taken module computes as its own class does: what is looked at before every call, and said once."""

from collections.abc import Iterable
from types import MethodType

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_traced() -> bool:
    """Whether the call is being turned into a graph, where kernels and memories of ours have no place."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def refuses_input(module: nn.Module, *inputs: Tensor | None) -> str | None:
    """Why these inputs are not for ours, or None; the first of them decides on the dtype and the device."""
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
    if type(layer) not in kinds:
        return f"a layer is {type(layer).__name__}"
    return f"{type(layer).__name__} has hooks" if is_hooked(layer) else None


def first_reason(reasons: Iterable[str | None]) -> str | None:
    """The first that is one."""
    return next((reason for reason in reasons if reason), None)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does anything else than its class's forward."""
    return (
        any((module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks))
        or module._compiled_call_impl is not None
        or not _is_own(module, module.__dict__.get("forward"))
    )


def _is_own(module: nn.Module, forward: object) -> bool:
    """What is left of a hook that was removed is the forward of the class again."""
    if forward is None:
        return True
    is_bound = isinstance(forward, MethodType) and forward.__self__ is module
    return is_bound and getattr(forward, "__func__", None) is type(module).forward
