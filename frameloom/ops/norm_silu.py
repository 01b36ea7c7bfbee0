"""silu(x / rms(x) · gamma) over channels, the chain before every convolution of the WanVAE's residual blocks.

Shapes: x and out (B, C, T, H, W), gamma (C,); any layout unless said otherwise. Reference: Diffusers' WanRMS_norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.ops.layout import checked_frames
from frameloom.ops.native import address, kernels, native

_TILE = 1 << 16  # numbers a pass of the tiled form works on: they stay in the cache between its four operations


def norm_silu(x_BCTHW: Tensor, gamma_C: Tensor, out: Tensor | None = None) -> Tensor:
    """The chain as the reference computes it: half precisions are normalised in float32 and rounded after each step."""
    wide = x_BCTHW.float() if x_BCTHW.dtype in (torch.float16, torch.bfloat16) else x_BCTHW
    unit = F.normalize(wide, dim=1).to(x_BCTHW.dtype)
    y = F.silu(unit * x_BCTHW.shape[1] ** 0.5 * gamma_C.view(1, -1, 1, 1, 1))
    return y if out is None else out.copy_(y)


def norm_silu_tiled(x_BCTHW: Tensor, gamma_C: Tensor, out: Tensor | None = None) -> Tensor:
    """The chain in tiles that fit the cache; rounded once, from float32. x and out have dense frames."""
    x_BCTHW, out = checked_frames(x_BCTHW, out)
    if x_BCTHW.is_meta:
        return out
    gain = gamma_C.to(torch.promote_types(gamma_C.dtype, torch.float32)) * x_BCTHW.shape[1] ** 0.5
    for source, target in zip(_frames(x_BCTHW), _frames(out), strict=True):
        rows = max(1, _TILE // max(1, source.shape[1]))
        for start in range(0, source.shape[0], rows):
            tile = source[start : start + rows].to(gain.dtype)
            length = torch.linalg.vector_norm(tile, dim=1, keepdim=True).clamp_min_(1e-12)
            target[start : start + rows] = F.silu(tile.div(length).mul_(gain), inplace=True)
    return out


def norm_silu_native(x_BCTHW: Tensor, gamma_C: Tensor, out: Tensor | None = None) -> Tensor:
    """The chain in one pass over memory, for float32 on a CPU with a compiler. x and out have dense frames."""
    x_BCTHW, out = checked_frames(x_BCTHW, out)
    if x_BCTHW.is_meta:
        return out
    library = native().library
    assert library is not None, "chosen without asking `refuses_native`"
    gamma_C = gamma_C.contiguous()
    channels, pixels = x_BCTHW.shape[1], x_BCTHW.shape[3] * x_BCTHW.shape[4]
    for x_CTHW, out_CTHW in zip(x_BCTHW, out, strict=True):
        kernels().frameloom_norm_silu(
            address(x_CTHW, torch.float32), x_CTHW.stride(1), address(out_CTHW, torch.float32), out_CTHW.stride(1),
            address(gamma_C, torch.float32),
            x_CTHW.shape[1], pixels, channels,
        )  # fmt: skip
    return out


def refuses_native(x_BCTHW: Tensor) -> str | None:
    """Why `norm_silu_native` cannot take x; None where it can."""
    if x_BCTHW.device.type != "cpu" or x_BCTHW.dtype != torch.float32:
        return f"it is for float32 on a CPU, not {x_BCTHW.dtype} on {x_BCTHW.device.type}"
    return None if native().library else native().reason


def _frames(x_BCTHW: Tensor) -> list[Tensor]:
    """Each frame as (pixels, C), views."""
    return [frame.flatten(0, 1) for video in x_BCTHW.permute(0, 2, 3, 4, 1) for frame in video]
