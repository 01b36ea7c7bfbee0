"""The rewrites of the WanVAE's single operations, each with its reference and its example inputs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.ops import norm_silu, triton_norm_silu, winograd
from frameloom.ops.conv import DirectConv, PhaseUpsampledConv, PointwiseConv, UnfoldedConv, UpsampledConv
from frameloom.ops.registry import Rewrite, Sizes

Prepared = Callable[[Tensor, int], Tensor]
_HALF_AND_SINGLE = (torch.float32, torch.bfloat16)


def _frames(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, past: int = 0) -> Tensor:
    """x (B, C, T + past, H, W) with its channels innermost."""
    generator = torch.Generator().manual_seed(sizes.seed)
    shape = (sizes.batch, sizes.frames + past, sizes.height, sizes.width, sizes.in_channels)
    return torch.randn(shape, generator=generator).to(device, dtype).permute(0, 4, 1, 2, 3)


def _weights(sizes: Sizes, kernel: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sizes.seed + 1)
    weight = torch.randn(sizes.out_channels, sizes.in_channels, *kernel, generator=generator)
    bias = torch.randn(sizes.out_channels, generator=generator)
    return (weight / weight[0].numel() ** 0.5).to(device, dtype), bias.to(device, dtype)


def _convolution(*kernel: int) -> Callable[[Sizes, torch.dtype, torch.device], tuple[Any, ...]]:
    def example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        x = _frames(sizes, dtype, device, past=kernel[0] - 1 if len(kernel) == 3 else 0)
        return (x, *_weights(sizes, kernel, dtype, device), kernel[-1] // 2)

    return example


def _norm_example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(sizes.seed + 1)
    gamma = torch.rand(sizes.in_channels, generator=generator) + 0.5
    return _frames(sizes, dtype, device), gamma.to(device, dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, pad_rows: int) -> Tensor:
    return F.conv3d(x.contiguous(), weight, bias, padding=(0, pad_rows, weight.shape[4] // 2))


def _prepared(kind: Callable[[Tensor, Tensor], Prepared]) -> Callable[..., Tensor]:
    return lambda x, weight, bias, pad_rows: kind(weight, bias)(x, pad_rows)


def never(*_: object) -> None:
    """Applies wherever the reference does."""


def _needs_cpu_or_cuda(weight: Tensor) -> str | None:
    if weight.device.type in ("cpu", "cuda", "meta"):
        return None
    return f"nobody has measured it on {weight.device.type}"


def _needs_float32(weight: Tensor) -> str | None:
    if weight.dtype == torch.float32:
        return None
    return f"weights that were added are rounded again, in {weight.dtype} by more than the class allows"


def _not_one_pixel(weight: Tensor) -> str | None:
    return None if weight.ndim == 5 and set(weight.shape[3:]) == {1} else "the kernel sees more than one pixel"


NORM_SILU_TILED = Rewrite(
    name="vae.norm_silu_tiled",
    exactness="rounding",
    replaces="RMSNorm and SiLU over the whole activation, six passes over memory",
    reference=norm_silu.norm_silu,
    fast=norm_silu.norm_silu_tiled,
    refuses=never,
    example=_norm_example,
    because="the same operations; the gain is multiplied with sqrt(channels) first, half precisions are rounded once",
    dtypes=_HALF_AND_SINGLE,
)
NORM_SILU_NATIVE = Rewrite(
    name="vae.norm_silu_native",
    exactness="rounding",
    replaces=NORM_SILU_TILED.replaces,
    reference=norm_silu.norm_silu,
    fast=norm_silu.norm_silu_native,
    refuses=lambda x, gamma: norm_silu.refuses_native(x),
    example=_norm_example,
    because="sums in another order, and an exponential that is right to one unit in the last place",
)
NORM_SILU_TRITON = Rewrite(
    name="vae.norm_silu_triton",
    exactness="rounding",
    replaces=NORM_SILU_TILED.replaces,
    reference=norm_silu.norm_silu,
    fast=triton_norm_silu.norm_silu_triton,
    refuses=lambda x, gamma: triton_norm_silu.refuses_triton(x),
    example=_norm_example,
    because=NORM_SILU_TILED.because,
    dtypes=_HALF_AND_SINGLE,
)
CHANNELS_LAST = Rewrite(
    name="vae.channels_last",
    exactness="rounding",
    replaces="convolutions of activations whose columns are innermost in memory",
    reference=_plain,
    fast=_prepared(DirectConv),
    refuses=lambda x, weight, *_: _needs_cpu_or_cuda(weight),
    example=_convolution(3, 3, 3),
    because="the library sums in another order for another memory order",
    dtypes=_HALF_AND_SINGLE,
)
POINTWISE = Rewrite(
    name="vae.pointwise_linear",
    exactness="rounding",
    replaces="convolutions over one pixel, with one time tap or several",
    reference=_plain,
    fast=_prepared(PointwiseConv),
    refuses=lambda x, weight, *_: _not_one_pixel(weight),
    example=_convolution(3, 1, 1),
    because="the same products, summed by matrix products",
    dtypes=_HALF_AND_SINGLE,
)
UNFOLDED = Rewrite(
    name="vae.conv3d_unfold",
    exactness="rounding",
    replaces="3D convolutions, by a 2D convolution over frames with the time taps side by side as channels",
    reference=_plain,
    fast=_prepared(UnfoldedConv),
    refuses=lambda x, weight, *_: None if weight.shape[2] > 1 else "the kernel has one time tap",
    example=_convolution(3, 3, 3),
    because="the same products, summed in another order",
    dtypes=_HALF_AND_SINGLE,
)
WINOGRAD = Rewrite(
    name="vae.conv_winograd",
    exactness="rounding",
    replaces="3x3x3 convolutions, with a sixth of the multiplications",
    reference=_plain,
    fast=_prepared(winograd.WinogradConv),
    refuses=lambda x, weight, *_: winograd.refuses(weight),
    example=_convolution(3, 3, 3),
    because="going to the points and back loses a bit (96 channels: error 1.2e-6, a direct sum's is 0.4e-6 to 0.9e-6)",
    dtypes=_HALF_AND_SINGLE,
)
WINOGRAD_PLAIN = Rewrite(
    name="vae.conv_winograd_plain",
    exactness="rounding",
    replaces="3x3x3 convolutions, with a quarter of the multiplications, without a compiler",
    reference=_plain,
    fast=_prepared(winograd.PlainWinogradConv),
    refuses=lambda x, weight, *_: winograd.refuses_plain(weight),
    example=_convolution(3, 3, 3),
    because=WINOGRAD.because,
    dtypes=_HALF_AND_SINGLE,
)
PHASES = Rewrite(
    name="vae.upsample_phases",
    exactness="rounding",
    replaces="nearest-neighbour doubling followed by a 3x3 convolution, with 4 multiplications for 9",
    reference=_prepared(UpsampledConv),
    fast=_prepared(PhaseUpsampledConv),
    refuses=lambda x, weight, *_: _needs_float32(weight),
    example=_convolution(3, 3),
    because="weights that meet the same pixel are added first, in float64, and rounded once",
)
UPSAMPLED_WINOGRAD = Rewrite(
    name="vae.upsample_winograd",
    exactness="rounding",
    replaces="nearest-neighbour doubling followed by a 3x3 convolution, with a quarter of the multiplications",
    reference=_prepared(UpsampledConv),
    fast=_prepared(winograd.UpsampledWinogradConv),
    refuses=lambda x, weight, *_: winograd.refuses_upsampled(weight),
    example=_convolution(3, 3),
    because=WINOGRAD.because,
    dtypes=_HALF_AND_SINGLE,
)
OPERATIONS = (
    CHANNELS_LAST,
    POINTWISE,
    UNFOLDED,
    WINOGRAD,
    WINOGRAD_PLAIN,
    PHASES,
    UPSAMPLED_WINOGRAD,
    NORM_SILU_TILED,
    NORM_SILU_NATIVE,
    NORM_SILU_TRITON,
)
