"""What the Triton kernels over rows share: a row is a token, all of whose channels one program holds at once.

Shapes: (B, L, D) with D up to 8192. An operand may be a modulation as in ops/modulate.py, read where it lies.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from frameloom.ops.modulate import tokens_per_entry

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without it
    triton = None

MOST_CHANNELS = 8192
_BLOCK = 4096  # numbers that one program works on, more only where one row has more
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses_rows(x: Tensor, *others: object, **named: object) -> str | None:
    """Why a kernel over rows cannot take these arguments, x first; None where it can."""
    if triton is None:
        return "triton is not installed"
    if x.device.type not in ("cuda", "meta") and not interpreted():
        return f"it is for GPUs, not {x.device.type}"
    if x.shape[-1] > MOST_CHANNELS:
        return f"rows of {x.shape[-1]} channels are longer than {MOST_CHANNELS}"
    for tensor in (x, *_tensors((*others, *named.values()))):
        if reason := _refuses_operand(tensor, x.device):
            return reason
    return None


def _refuses_operand(tensor: Tensor, device: torch.device) -> str | None:
    if tensor.device != device:
        return f"its operands are on {device} and {tensor.device}"
    if tensor.dtype not in _DTYPES:
        return f"it computes in float32, which is not for {tensor.dtype}"
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return "the channels of an operand do not lie side by side"
    if tensor.requires_grad and torch.is_grad_enabled():
        return "it gives no gradients"
    return None


def _tensors(values: Sequence[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):  # a rotary table
            yield from _tensors(value)


def has_triton() -> bool:
    """Whether this build of torch brings Triton."""
    return triton is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def operand(m: Tensor | None, shape: Sequence[int]) -> tuple[Tensor | None, int, int, int]:
    """What `load_rows` needs to find a token's entry of m, for tokens of a shape (B, L, D)."""
    if m is None:
        return None, 0, 0, 1
    every = tokens_per_entry(m, shape)
    return m, 0 if m.shape[0] == 1 else m.stride(0), m.stride(1), every


def empty_result(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for a result in the dtype of `like`.

    The interpreter cuts bfloat16 off where a GPU rounds to the nearest: there it is float32, for PyTorch to round.
    """
    return torch.empty(shape, dtype=torch.float32 if interpreted() else like.dtype, device=like.device)


def launch(kernel: Any, like: Tensor, *arguments: object, **constants: object) -> None:
    """Run a kernel over the rows of a tensor (B, L, D), on its device."""
    rows, width = like.shape[0] * like.shape[1], like.shape[2]
    block_d = triton.next_power_of_2(width)
    block_r = max(1, _BLOCK // block_d)
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        kernel[(triton.cdiv(rows, block_r),)](
            *arguments, rows, like.shape[1], width, **constants,
            BLOCK_R=block_r, BLOCK_D=block_d, num_warps=8 if block_d > _BLOCK else 4,
        )  # fmt: skip


def skips(x: Tensor) -> bool:
    """Whether there is nothing to compute: memory is being planned, or there is no token."""
    return x.is_meta or x.numel() == 0


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def load_rows(
        pointer: tl.tensor,
        row: tl.tensor,
        column: tl.tensor,
        mask: tl.tensor,
        length: tl.tensor,
        batch_stride: tl.tensor,
        stride: tl.tensor,
        every: tl.tensor,
    ) -> tl.tensor:
        """(rows, columns) float32 of an operand; `every` tokens in a row share an entry."""
        entry = (row // length) * batch_stride + ((row % length) // every) * stride
        return tl.load(pointer + entry[:, None] + column, mask=mask, other=0.0).to(tl.float32)

    @triton.jit  # type: ignore[untyped-decorator]
    def load_channels(pointer: tl.tensor, column: tl.tensor, width: tl.tensor) -> tl.tensor:
        """(1, columns) float32 of a vector (D,)."""
        return tl.load(pointer + column, mask=column < width, other=0.0).to(tl.float32)

    @triton.jit  # type: ignore[untyped-decorator]
    def normed_rows(
        value: tl.tensor, mask: tl.tensor, width: tl.tensor, eps: tl.tensor, RMS: tl.constexpr
    ) -> tl.tensor:
        """Rows divided by their root mean square, or first freed of their mean; zero outside of the mask."""
        if not RMS:
            value = tl.where(mask, value - (tl.sum(value, axis=1) / width)[:, None], 0.0)
        mean_square = tl.sum(value * value, axis=1) / width
        return value * (1.0 / tl.sqrt(mean_square + eps))[:, None]
