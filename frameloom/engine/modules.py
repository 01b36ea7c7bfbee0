"""Turns a network on the meta device into a loaded one: its weights, and the backend of its attention."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from frameloom.attention.core import choose, cuda_capability
from frameloom.errors import InternalError, RequestError
from frameloom.models.encoders import TIED
from frameloom.settings import LOGGER_NAME
from frameloom.weights.checkpoint import Component
from frameloom.weights.load import Leave, Quantized, load_module

log = logging.getLogger(LOGGER_NAME)


def quantized_of(name: str) -> Quantized:
    """What becomes of quantized weights: they stay as they are stored, or become plain. Raises RequestError."""
    if name == "keep":
        return "keep"
    if name == "expand":
        return "expand"
    raise RequestError(
        f"quantized {name!r} is unknown; use keep (weights stay as they are stored) or expand (they become plain once)"
    )


def fill(
    model: nn.Module,
    component: Component,
    dtype: torch.dtype,
    device: torch.device,
    *,
    keep: Callable[[str], bool] | None = None,
    tied: bool = False,
    rename: Callable[[str], str | None] | None = None,
    take: Callable[[str, Tensor], Tensor] | None = None,
    quantized: Quantized = "expand",
    leave: Leave | None = None,
) -> None:
    """Read the weights of a component into a model, in `dtype` (parameters that `keep` names stay in float32).

    `rename`: the module's name of a stored tensor, None to leave it out. `take`: what is kept of each tensor as it is
    read. `leave`: what is left in its file.
    """
    report = load_module(
        model,
        component,
        dtype=dtype,
        device=device,
        keep=keep,
        tied=TIED if tied else None,
        rename=rename,
        take=take,
        quantized=quantized,
        leave=leave,
    )
    log.debug("%s: %d tensors, %d bytes", component.name, report.num_tensors, report.size_bytes)


def set_attention(
    model: nn.Module,
    kind: type[nn.Module],
    *,
    expected: int,
    name: str = "auto",
    platform: str = "cpu",
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
    biased: bool = False,
    because: str | None = None,
) -> str:
    """Give every attention module its backend, and count them: one skipped in silence would be a bug.

    One backend serves the whole network; `choose` explains the rest, except the device, which is that of the weights.
    Returns what was chosen and why. Raises RequestError for a backend that was named and cannot be used.
    """
    modules = [module for module in model.modules() if isinstance(module, kind)]
    if len(modules) != expected:
        raise InternalError(
            f"{type(model).__name__} has {len(modules)} attention modules where {expected} were expected"
        )
    capability = cuda_capability(next(model.parameters()).device, platform)
    attend, reason = choose(
        name, platform=platform, head_dim=head_dim, dtype=dtype, biased=biased, capability=capability, because=because
    )
    for module in modules:
        module.attend = attend  # type: ignore[assignment]  # an attribute, not a submodule
    log.debug("attention of %d modules in %s: %s", expected, type(model).__name__, reason)
    return reason
