"""The operations a denoiser is made of, as one value that it holds, and which provider of each is right where."""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from frameloom.errors import RequestError
from frameloom.ops import dit_rewrites as rewrites
from frameloom.ops import mlp, modulate, native_dit, patch, rope, triton_modulate, triton_rope
from frameloom.ops.native import native
from frameloom.ops.registry import Decision, Policy, Rewrite
from frameloom.ops.triton_rows import has_triton, refuses_rows
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)
TRITON_PLATFORMS = ("cuda", "rocm")
COMPILED_PLATFORMS = ("musa", "xpu")  # where there is no kernel of ours
_DEFAULT = Policy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ops:
    """One provider of each operation; by default the references. Every provider is called as its reference is."""

    norm_scale_shift: Callable[..., Tensor] = modulate.norm_scale_shift
    add_gated: Callable[..., Tensor] = modulate.add_gated
    add_norm: Callable[..., tuple[Tensor, Tensor]] = modulate.add_norm
    norm_rotate: Callable[..., Tensor] = rope.norm_rotate
    patch_embed: Callable[..., Tensor] = patch.patch_conv
    mlp: Callable[..., Tensor] = mlp.mlp


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiler:
    """The rewrite that compiles chains of elementwise operations, and how: `apply(ops, insisted)`."""

    rewrite: Rewrite
    apply: Callable[[Ops, bool], Ops]
    refuses: Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A kernel that is asked before every call; where it cannot take the inputs the reference computes, and one line
    in the log says so. A kernel that was insisted on raises RequestError instead.
    """

    name: str
    fast: Callable[..., Any]
    reference: Callable[..., Any]
    refuses: Callable[..., str | None] = refuses_rows
    insisted: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the reference."""
        reason = self.refuses(*args, **kwargs)
        if reason is None:
            return self.fast(*args, **kwargs)
        if self.insisted:
            raise RequestError(f"rewrite {self.name}=on is not possible here: {reason}; leave it out")
        _tell(self.name, reason)
        return self.reference(*args, **kwargs)


@functools.cache
def _tell(name: str, reason: str) -> None:
    log.warning("%s is not used: %s", name, reason)


_TRITON: Mapping[str, tuple[Rewrite, Callable[..., Any]]] = MappingProxyType(
    {
        "norm_scale_shift": (rewrites.NORM_SCALE_SHIFT_TRITON, triton_modulate.norm_scale_shift_triton),
        "add_gated": (rewrites.MUL_ADD_TRITON, triton_modulate.add_gated_triton),
        "add_norm": (rewrites.ADD_NORM_TRITON, triton_modulate.add_norm_triton),
        "norm_rotate": (rewrites.NORM_ROTATE_TRITON, triton_rope.norm_rotate_triton),
    }
)
_NATIVE: Mapping[str, tuple[Rewrite, Callable[..., Any]]] = MappingProxyType(
    {
        "add_gated": (rewrites.ADD_GATED_NATIVE, native_dit.add_gated_native),
        "norm_scale_shift": (rewrites.NORM_SCALE_SHIFT_NATIVE, native_dit.norm_scale_shift_native),
        "add_norm": (rewrites.ADD_NORM_NATIVE, native_dit.add_norm_native),
        "norm_rotate": (rewrites.NORM_ROTATE_NATIVE, native_dit.norm_rotate_native),
    }
)
_EVERYWHERE: Mapping[str, tuple[Rewrite, Callable[..., Tensor]]] = MappingProxyType(
    {
        "patch_embed": (rewrites.PATCH_LINEAR, patch.patch_embed),
        "mlp": (rewrites.MLP_ROWS, mlp.mlp_rows),
    }
)


def ops_for(
    platform_name: str,
    *,
    policy: Policy = _DEFAULT,
    compiler: Compiler | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Ops, tuple[Decision, ...]]:
    """The operations for a platform (cuda, rocm, musa, npu, xpu, mps, cpu), and a decision for every rewrite.

    Triton's kernels on cuda and rocm; C++ on the CPU where there is a compiler; chains compiled by torch on musa and
    xpu, elsewhere only if they are insisted on; plain on the others. Raises RequestError for a rewrite that was
    insisted on and is not possible.
    """
    told = []
    compiled = _choose_compiled(platform_name, policy, compiler)
    chosen: dict[str, Any] = {}
    for kernels, refuses, refuses_inputs in (
        (_TRITON, _refuses_triton, refuses_rows),
        (_NATIVE, _refuses_native, native_dit.refuses_native_rows),
    ):
        for field, (rewrite, fast) in kernels.items():
            refusal = refuses(platform_name, dtype) or _outdone(rewrite, policy, compiled)
            decision = policy.decide(rewrite, refusal)
            if decision.used:
                reference, insisted = getattr(Ops(), field), policy.insists(rewrite)
                chosen[field] = Checked(
                    name=rewrite.name, fast=fast, reference=reference, refuses=refuses_inputs, insisted=insisted
                )
            told.append(decision)
    told.append(policy.decide(rewrites.NORM_TANH_MUL_ADD_TRITON, "no network here gates its branches by a tanh"))
    for field, (rewrite, fast) in _EVERYWHERE.items():
        decision = policy.decide(rewrite, None)
        if decision.used:
            chosen[field] = fast
        told.append(decision)
    ops = Ops()
    if compiler is not None and compiled is not None:
        told.append(compiled)
        ops = compiler.apply(ops, policy.insists(compiler.rewrite)) if compiled.used else ops
    return replace(ops, **chosen), tuple(told)


def _choose_compiled(platform_name: str, policy: Policy, compiler: Compiler | None) -> Decision | None:
    """None where nothing can be compiled with."""
    if compiler is None:
        return None
    reason = compiler.refuses(platform_name)
    insisted = policy.insists(compiler.rewrite)
    if reason is None and platform_name not in COMPILED_PLATFORMS and not insisted:
        reason = f"on {platform_name} only when it is asked for by name"
    return policy.decide(compiler.rewrite, reason)


def _refuses_triton(platform_name: str, _: torch.dtype) -> str | None:
    if platform_name not in TRITON_PLATFORMS:
        return f"Triton's kernels are for {' and '.join(TRITON_PLATFORMS)}, not {platform_name}"
    return None if has_triton() else "triton is not installed"


def _refuses_native(platform_name: str, dtype: torch.dtype) -> str | None:
    if platform_name != "cpu":
        return f"it is for CPUs, not {platform_name}"
    if reason := native_dit.refuses_dtype(dtype):
        return reason
    return None if native("dit").library else native("dit").reason


def _outdone(rewrite: Rewrite, policy: Policy, compiled: Decision | None) -> str | None:
    """Compiled chains were asked for by name: they go first."""
    if compiled is not None and compiled.used and not policy.insists(rewrite):
        return f"{compiled.name} is used instead"
    return None
