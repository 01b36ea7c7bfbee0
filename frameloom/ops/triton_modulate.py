"""The functions of ops/modulate.py in Triton: each in one pass over a GPU's memory, in float32, rounded at the end.

Where the reference rounds a sum before it is normed, the norm here is that of the sum as it is before its rounding.
Tested on a CPU through Triton's interpreter (TRITON_INTERPRET=1).
"""

import torch
from torch import Tensor

from frameloom.ops.norm import Kind, check_kind
from frameloom.ops.triton_rows import empty_result, launch, operand, skips

try:
    import triton
    import triton.language as tl

    from frameloom.ops.triton_rows import load_channels, load_rows, normed_rows
except ImportError:  # a build of torch without it
    triton = None


def mul_add_triton(a: Tensor, k: float, b: Tensor, c: Tensor | float) -> Tensor:
    """a · (k + b) + c; see `mul_add`."""
    return _mul_add(a, k, b, c, like=a)


def add_gated_triton(x: Tensor, branch: Tensor, *, gate: Tensor) -> Tensor:
    """x + branch · gate; see `add_gated`."""
    return _mul_add(branch, 0.0, gate, x, like=x)


def _mul_add(a: Tensor, k: float, b: Tensor, c: Tensor | float, *, like: Tensor) -> Tensor:
    shape = like.shape
    added, number = (c, 0.0) if isinstance(c, Tensor) else (None, float(c))
    operands = *operand(a, shape), *operand(b, shape), *operand(added, shape)
    out = empty_result(shape, like)
    if not skips(like):
        launch(_mul_add_kernel, like, *operands, out, float(k), number)
    return out.to(like.dtype)


def norm_scale_shift_triton(
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
    _, normed = _add_norm(x, None, eps, gate=None, weight=weight, bias=bias, scale=scale, shift=shift, kind=kind)
    return normed


def add_norm_triton(
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
    return _add_norm(x, branch, eps, gate=gate, weight=weight, bias=bias, scale=scale, shift=shift, kind=kind)


def _add_norm(
    x: Tensor, branch: Tensor | None, eps: float, *, kind: Kind, weight: Tensor | None, bias: Tensor | None,
    **modulations: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_kind(kind)
    shape = x.shape
    tensors = x, branch, modulations["gate"], modulations["scale"], modulations["shift"]
    operands = [part for tensor in tensors for part in operand(tensor, shape)]
    out = empty_result(shape, x)
    summed = None if branch is None else torch.empty_like(out)
    if not skips(x):
        launch(_add_norm_kernel, x, *operands, weight, bias, summed, out, float(eps), RMS=kind == "rms")
    return x if summed is None else summed.to(x.dtype), out.to(x.dtype)


def norm_tanh_mul_add_triton(
    x: Tensor, branch: Tensor, gate: Tensor, eps: float, *, weight: Tensor | None = None, kind: Kind = "rms"
) -> Tensor:
    """x + tanh(gate) · norm(branch); see `norm_tanh_mul_add`."""
    check_kind(kind)
    shape = x.shape
    operands = [part for tensor in (x, branch, gate) for part in operand(tensor, shape)]
    out = empty_result(shape, x)
    if not skips(x):
        launch(_norm_tanh_kernel, x, *operands, weight, out, float(eps), RMS=kind == "rms")
    return out.to(x.dtype)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _mul_add_kernel(
        a: tl.tensor, a_batch: tl.tensor, a_stride: tl.tensor, a_every: tl.tensor,
        b: tl.tensor, b_batch: tl.tensor, b_stride: tl.tensor, b_every: tl.tensor,
        c: tl.tensor, c_batch: tl.tensor, c_stride: tl.tensor, c_every: tl.tensor,
        out: tl.tensor, k: tl.tensor, number: tl.tensor, rows: tl.tensor, length: tl.tensor, width: tl.tensor,
        BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ) -> None:  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        column = tl.arange(0, BLOCK_D)[None, :]
        mask = (row < rows)[:, None] & (column < width)
        y = load_rows(a, row, column, mask, length, a_batch, a_stride, a_every)
        y = y * (k + load_rows(b, row, column, mask, length, b_batch, b_stride, b_every))
        if c is not None:
            y = y + load_rows(c, row, column, mask, length, c_batch, c_stride, c_every)
        y = y + number
        tl.store(out + (row * width)[:, None] + column, y.to(out.dtype.element_ty), mask=mask)

    @triton.jit  # type: ignore[untyped-decorator]
    def _add_norm_kernel(
        x: tl.tensor, x_batch: tl.tensor, x_stride: tl.tensor, x_every: tl.tensor,
        branch: tl.tensor, branch_batch: tl.tensor, branch_stride: tl.tensor, branch_every: tl.tensor,
        gate: tl.tensor, gate_batch: tl.tensor, gate_stride: tl.tensor, gate_every: tl.tensor,
        scale: tl.tensor, scale_batch: tl.tensor, scale_stride: tl.tensor, scale_every: tl.tensor,
        shift: tl.tensor, shift_batch: tl.tensor, shift_stride: tl.tensor, shift_every: tl.tensor,
        weight: tl.tensor, bias: tl.tensor, summed: tl.tensor, out: tl.tensor, eps: tl.tensor,
        rows: tl.tensor, length: tl.tensor, width: tl.tensor,
        RMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ) -> None:  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        column = tl.arange(0, BLOCK_D)[None, :]
        mask = (row < rows)[:, None] & (column < width)
        target = (row * width)[:, None] + column
        value = load_rows(x, row, column, mask, length, x_batch, x_stride, x_every)
        if branch is not None:
            added = load_rows(branch, row, column, mask, length, branch_batch, branch_stride, branch_every)
            if gate is not None:
                added = added * load_rows(gate, row, column, mask, length, gate_batch, gate_stride, gate_every)
            value = value + added
            tl.store(summed + target, value.to(summed.dtype.element_ty), mask=mask)
        y = normed_rows(value, mask, width, eps, RMS)
        if weight is not None:
            y = y * load_channels(weight, column, width)
        if bias is not None:
            y = y + load_channels(bias, column, width)
        if scale is not None:
            y = y * (1.0 + load_rows(scale, row, column, mask, length, scale_batch, scale_stride, scale_every))
        if shift is not None:
            y = y + load_rows(shift, row, column, mask, length, shift_batch, shift_stride, shift_every)
        tl.store(out + target, y.to(out.dtype.element_ty), mask=mask)

    @triton.jit  # type: ignore[untyped-decorator]
    def _norm_tanh_kernel(
        x: tl.tensor, x_batch: tl.tensor, x_stride: tl.tensor, x_every: tl.tensor,
        branch: tl.tensor, branch_batch: tl.tensor, branch_stride: tl.tensor, branch_every: tl.tensor,
        gate: tl.tensor, gate_batch: tl.tensor, gate_stride: tl.tensor, gate_every: tl.tensor,
        weight: tl.tensor, out: tl.tensor, eps: tl.tensor, rows: tl.tensor, length: tl.tensor, width: tl.tensor,
        RMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ) -> None:  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        column = tl.arange(0, BLOCK_D)[None, :]
        mask = (row < rows)[:, None] & (column < width)
        value = load_rows(branch, row, column, mask, length, branch_batch, branch_stride, branch_every)
        y = normed_rows(value, mask, width, eps, RMS)
        if weight is not None:
            y = y * load_channels(weight, column, width)
        opening = load_rows(gate, row, column, mask, length, gate_batch, gate_stride, gate_every)
        decay = tl.exp(-2.0 * tl.abs(opening))  # tanh in a form that does not overflow
        tanh = tl.where(opening < 0.0, decay - 1.0, 1.0 - decay) / (1.0 + decay)
        y = load_rows(x, row, column, mask, length, x_batch, x_stride, x_every) + tanh * y
        tl.store(out + (row * width)[:, None] + column, y.to(out.dtype.element_ty), mask=mask)
