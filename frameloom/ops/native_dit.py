"""The functions of ops/modulate.py and ops/rope.py compiled for CPUs (ops/dit.cpp), each in one pass over memory.

Sums in float32; what the references round is rounded. Tensors as there, in float32 or bfloat16.
"""

import ctypes

import torch
from torch import Tensor

from frameloom.ops.modulate import tokens_per_entry
from frameloom.ops.native import address, kernels, native
from frameloom.ops.norm import Kind, check_kind
from frameloom.ops.rope import Layout, RotaryTable, angle_strides, check_rotation

_DTYPES = (torch.float32, torch.bfloat16)


class _Operand(ctypes.Structure):
    """As in ops/dit.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("every", ctypes.c_int64),
    )


class _Angles(ctypes.Structure):
    """As in ops/dit.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


def refuses_native_rows(x: Tensor, *_: object, **__: object) -> str | None:
    """Why these kernels cannot take x; None where they can."""
    if x.device.type not in ("cpu", "meta"):
        return f"it is for CPUs, not {x.device.type}"
    if reason := refuses_dtype(x.dtype):
        return reason
    if x.requires_grad and torch.is_grad_enabled():
        return "it gives no gradients"
    return None if native("dit").library else native("dit").reason


def refuses_dtype(dtype: torch.dtype) -> str | None:
    """Why these kernels cannot compute in a dtype; None where they can."""
    return None if dtype in _DTYPES else f"it is for float32 and bfloat16, not {dtype}"


def add_gated_native(x: Tensor, branch: Tensor, *, gate: Tensor) -> Tensor:
    """x + branch · gate; see `add_gated`."""
    summed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _add_norm(x, (branch, gate, None, None), None, None, summed, None, 0.0, "layer")
    return summed


def norm_scale_shift_native(
    x: Tensor,
    eps: float,
    *,
    scale: Tensor,
    shift: Tensor,
    kind: Kind = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """norm(x) · (1 + scale) + shift; see `norm_scale_shift`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _add_norm(x, (None, None, scale, shift), weight, bias, None, out, eps, kind)
    return out


def add_norm_native(
    x: Tensor,
    branch: Tensor,
    eps: float,
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    kind: Kind = "layer",
) -> tuple[Tensor, Tensor]:
    """x + branch · gate, and its norm scaled and shifted; see `add_norm`."""
    summed, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _add_norm(x, (branch, gate, scale, shift), weight, bias, summed, out, eps, kind)
    return summed, out


def norm_rotate_native(
    x_BLD: Tensor, weight: Tensor, eps: float, table: RotaryTable, head_dim: int, *, layout: Layout = "interleaved"
) -> Tensor:
    """x_BLD -> x_BLHK, normed over D and turned; see `norm_rotate`."""
    check_rotation(x_BLD.shape, table, head_dim, layout)
    out = torch.empty(x_BLD.shape, dtype=x_BLD.dtype, device=x_BLD.device)
    if out.numel() and not out.is_meta:
        rows = _dense(x_BLD, x_BLD.dtype)
        gain = _vector(weight.to(x_BLD.dtype))
        tables = [_dense(angles, torch.float32) for angles in table]
        angles = (_Angles * 2)(*(_Angles(address(part), *angle_strides(part)) for part in tables))
        operand = _operand(rows, tuple(rows.shape))
        kernels("dit").frameloom_norm_rotate(
            ctypes.byref(operand), address(gain), angles, address(out), *x_BLD.shape,
            head_dim, eps, int(layout == "halves"), int(x_BLD.dtype == torch.bfloat16),
        )  # fmt: skip
    return out.view(*x_BLD.shape[:2], -1, head_dim)


def _add_norm(
    x: Tensor,
    others: tuple[Tensor | None, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    summed: Tensor | None,
    out: Tensor | None,
    eps: float,
    kind: Kind,
) -> None:
    check_kind(kind)
    branch, *modulations = others
    shape = (x.shape[0], x.shape[1], x.shape[2])
    tensors = [_dense(x, x.dtype), *(_maybe(m, d) for m, d in ((branch, x.dtype), *((m, None) for m in modulations)))]
    operands = (_Operand * 5)(*(_operand(tensor, shape) for tensor in tensors))
    if x.is_meta or x.numel() == 0:
        return
    gain, offset = (None if vector is None else _vector(vector) for vector in (weight, bias))
    results = (None if tensor is None else address(tensor) for tensor in (gain, offset, summed, out))
    kernels("dit").frameloom_add_norm(operands, *results, *shape, eps, kind == "rms", x.dtype == torch.bfloat16)


def _maybe(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if x is None else _dense(x, dtype or torch.float32)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype, its channels side by side."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _vector(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _operand(m: Tensor | None, shape: tuple[int, ...]) -> _Operand:
    """Where a token's entry of m is found. Raises RequestError for a shape that does not fit."""
    if m is None:
        return _Operand(None, 0, 0, 1)
    every = tokens_per_entry(m, shape)
    data = None if m.is_meta else address(m)
    return _Operand(data, 0 if m.shape[0] == 1 else m.stride(0), m.stride(1), every)
