"""silu(x / rms(x) · gamma) over channels in one pass over a GPU's memory; the function of ops/norm_silu.py in Triton.

Tested on a CPU through Triton's interpreter (TRITON_INTERPRET=1).
"""

import torch
from torch import Tensor

from frameloom.ops.layout import checked_frames, empty_frames

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without it
    triton = None

_BLOCK = 4096  # numbers that one program works on


def refuses_triton(x: Tensor) -> str | None:
    """Why `norm_silu_triton` cannot take x; None where it can."""
    if triton is None:
        return "triton is not installed"
    if x.device.type not in ("cuda", "meta") and not _interpreted():
        return f"it is for GPUs, not {x.device.type}"
    return None


def norm_silu_triton(x_BCTHW: Tensor, gamma_C: Tensor, out: Tensor | None = None) -> Tensor:
    """The chain, computed in float32 and rounded once. x (copied if need be) and out have dense frames."""
    x_BCTHW, out = checked_frames(x_BCTHW, out)
    if x_BCTHW.is_meta or x_BCTHW.numel() == 0:
        return out
    _, channels, frames, height, width = x_BCTHW.shape
    block_c = triton.next_power_of_2(channels)
    block_p = max(1, _BLOCK // block_c)
    pixels = height * width
    gamma_C = gamma_C.contiguous()
    # The interpreter cuts bfloat16 off where a GPU rounds to the nearest: there PyTorch does the rounding.
    target = empty_frames(gamma_C.float(), out.shape) if _interpreted() else out
    with torch.cuda.device_of(x_BCTHW):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        for x_CTHW, out_CTHW in zip(x_BCTHW, target, strict=True):
            _kernel[(triton.cdiv(frames * pixels, block_p),)](
                x_CTHW, out_CTHW, gamma_C, x_CTHW.stride(1), out_CTHW.stride(1), pixels, frames * pixels,
                channels**0.5, CHANNELS=channels, BLOCK_P=block_p, BLOCK_C=block_c,
            )  # fmt: skip
    return out if target is out else out.copy_(target)


def _interpreted() -> bool:
    return triton is not None and bool(triton.knobs.runtime.interpret)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(
        x: tl.tensor,
        out: tl.tensor,
        gamma: tl.tensor,
        x_stride: tl.tensor,
        out_stride: tl.tensor,
        pixels: tl.tensor,
        total: tl.tensor,
        root: tl.tensor,
        CHANNELS: tl.constexpr,  # Triton's constants are written so
        BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ) -> None:
        pixel = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
        channel = tl.arange(0, BLOCK_C)
        mask = (pixel < total)[:, None] & (channel < CHANNELS)[None, :]
        frame, inside = pixel // pixels, pixel % pixels
        source = (frame * x_stride + inside * CHANNELS)[:, None] + channel[None, :]
        target = (frame * out_stride + inside * CHANNELS)[:, None] + channel[None, :]
        value = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(gamma + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32) * root
        length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
        y = value / length[:, None] * gain[None, :]
        y = y / (1.0 + tl.exp(-y))
        tl.store(out + target, y.to(out.dtype.element_ty), mask=mask)
