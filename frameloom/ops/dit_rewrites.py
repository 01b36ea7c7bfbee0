"""The rewrites of the denoiser's operations, each with its reference and its example inputs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.ops import modulate, native_dit, patch, rope, triton_modulate, triton_rope
from frameloom.ops.linear import PackedLinear, PackedMlp, refuses_packed
from frameloom.ops.mlp import mlp, mlp_in_pieces
from frameloom.ops.registry import Rewrite, Sizes
from frameloom.ops.triton_rows import interpreted, refuses_rows

Example = Callable[[Sizes, torch.dtype, torch.device], tuple[Any, ...]]
EPS = 1e-6
_HALF_AND_SINGLE = (torch.float32, torch.bfloat16)
_INTERPRETED_TOKENS = 16  # of a frame: Triton's interpreter takes milliseconds for each
_FULL_HEAD = 64  # pairs


def _generator(sizes: Sizes) -> torch.Generator:
    return torch.Generator().manual_seed(sizes.seed)


def _frame_tokens(sizes: Sizes) -> int:
    tokens = sizes.height * sizes.width
    return min(tokens, _INTERPRETED_TOKENS) if interpreted() else tokens


def _width(sizes: Sizes) -> int:
    """1536, that of Wan's 1.3B, where both counts of channels are 96."""
    return max(8, sizes.in_channels * min(sizes.out_channels, 16))


def _modulations(sizes: Sizes, generator: torch.Generator, device: torch.device, count: int) -> list[Tensor]:
    """float32 tensors per sample, per frame and per token in turns; the seed says which comes first."""
    frames, tokens = sizes.frames, _frame_tokens(sizes)
    shapes = ((1,), (frames, 1), (frames * tokens,))
    chosen = [shapes[(sizes.seed + i) % len(shapes)] for i in range(count)]
    return [torch.randn(sizes.batch, *shape, _width(sizes), generator=generator).to(device) for shape in chosen]


def modulated_example(num_streams: int, num_modulations: int) -> Example:
    """Streams (B, L, D) of the dtype, then modulations of every kind, then a weight and a bias (D,)."""

    def example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        generator, width = _generator(sizes), _width(sizes)
        shape = (sizes.batch, sizes.frames * _frame_tokens(sizes), width)
        streams = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(num_streams)]
        modulations = _modulations(sizes, generator, device, num_modulations)
        weight, bias = (torch.rand(2, width, generator=generator) + 0.5).to(device)
        return *streams, *modulations, weight, bias

    return example


def rotary_example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """x (B, L, D), a weight (D,), a table and the head dimension; 12 heads of 128 where there are 96 channels."""
    generator, head_dim = _generator(sizes), 2 * min(sizes.out_channels, _FULL_HEAD)
    grid = (sizes.frames, 1, _frame_tokens(sizes))
    width = head_dim * -(-sizes.in_channels // 8)
    x = torch.randn(sizes.batch, grid[0] * grid[2], width, generator=generator)
    weight = torch.rand(width, generator=generator) + 0.5
    return x.to(device, dtype), weight.to(device, dtype), rope.rotary_table(grid, head_dim, device=device), head_dim


def _patch_example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    generator, kernel = _generator(sizes), (1, 2, 2)
    x = torch.randn(sizes.batch, sizes.in_channels, sizes.frames, sizes.height, sizes.width, generator=generator)
    weight = torch.randn(sizes.out_channels, sizes.in_channels, *kernel, generator=generator)
    bias = torch.randn(sizes.out_channels, generator=generator)
    return x.to(device, dtype), (weight / weight[0].numel() ** 0.5).to(device, dtype), bias.to(device, dtype), kernel


def _mlp_example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    generator, width, hidden = _generator(sizes), sizes.in_channels, 4 * sizes.in_channels + 1
    shapes = ((sizes.batch, sizes.frames * sizes.height * sizes.width, width), (hidden, width), (hidden,))
    tensors = [torch.randn(shape, generator=generator) for shape in (*shapes, (width, hidden), (width,))]
    scales = (1.0, width**-0.5, 1.0, hidden**-0.5, 1.0)
    return tuple((tensor * scale).to(device, dtype) for tensor, scale in zip(tensors, scales, strict=True))


def _a_third_at_a_time(x: Tensor, *weights: Tensor) -> Tensor:
    return mlp_in_pieces(x, *weights, rows=max(1, x.shape[0] * x.shape[1] // 3))


def _packed(x: Tensor, w1: Tensor, b1: Tensor, *_: Tensor) -> Tensor:
    return PackedLinear(w1, b1)(x)


def _packed_mlp(x: Tensor, *weights: Tensor) -> Tensor:
    return PackedMlp(*weights)(x)


def both(results: tuple[Tensor, Tensor]) -> Tensor:
    """Two results of one shape as one tensor."""
    return torch.stack(results)


def _never(*_: object) -> None:
    """Applies wherever the reference does."""


def _triton(name: str, replaces: str, example: Example, reference: Callable[..., Tensor], fast: Callable[..., Tensor],
            ) -> Rewrite:  # fmt: skip
    return Rewrite(
        name=f"dit.{name}_triton",
        exactness="rounding",
        replaces=replaces,
        reference=reference,
        fast=fast,
        refuses=refuses_rows,
        example=example,
        because="the same operations in float32, sums in another order; nothing is rounded before the end",
        dtypes=_HALF_AND_SINGLE,
    )


def _ways(call: Callable[..., Tensor], reference: object, fast: object) -> Mapping[str, Callable[..., Tensor]]:
    """What a rewrite's inputs go through: `call(function, *inputs)` for both functions."""
    return MappingProxyType(
        {
            "reference": lambda *inputs: call(reference, *inputs),
            "fast": lambda *inputs: call(fast, *inputs),
        }
    )


def _native(name: str, triton: Rewrite, fast: Callable[..., Tensor], **changes: Any) -> Rewrite:
    """The counterpart on CPUs of a Triton kernel: the same function, the same inputs."""
    return replace(
        triton,
        name=f"dit.{name}_native",
        fast=fast,
        refuses=native_dit.refuses_native_rows,
        because="the same operations in float32, sums in another order",
        **changes,
    )


MUL_ADD_TRITON = _triton(
    "mul_add",
    "a · (k + b) + c and the gated sum of a residual, an operation at a time",
    modulated_example(1, 2),
    **_ways(lambda f, a, b, c, *_: f(a, 1.0, b, c), modulate.mul_add, triton_modulate.mul_add_triton),
)
NORM_SCALE_SHIFT_TRITON = _triton(
    "norm_scale_shift",
    "layer norm or RMS norm, then scale and shift, an operation at a time",
    modulated_example(1, 2),
    **_ways(
        lambda f, x, scale, shift, *_: f(x, EPS, scale=scale, shift=shift),
        modulate.norm_scale_shift,
        triton_modulate.norm_scale_shift_triton,
    ),
)
ADD_NORM_TRITON = _triton(
    "add_norm",
    "the gated sum of a residual, then its norm, scale and shift, an operation at a time",
    modulated_example(2, 3),
    **_ways(
        lambda f, x, branch, gate, scale, shift, weight, bias: both(
            f(x, branch, EPS, gate=gate, weight=weight, bias=bias, scale=scale, shift=shift)
        ),
        modulate.add_norm,
        triton_modulate.add_norm_triton,
    ),
)
NORM_TANH_MUL_ADD_TRITON = _triton(
    "norm_tanh_mul_add",
    "the norm of a branch, gated by a tanh and added to the residual, an operation at a time",
    modulated_example(2, 1),
    **_ways(
        lambda f, x, branch, gate, weight, _: f(x, branch, gate, EPS, weight=weight),
        modulate.norm_tanh_mul_add,
        triton_modulate.norm_tanh_mul_add_triton,
    ),
)


def _rotated(run: Callable[..., Tensor], x: Tensor, weight: Tensor, table: rope.RotaryTable, head_dim: int) -> Tensor:
    """As Wan turns queries and keys, in halves, and as LTX-2 does: in halves by angles of each sample and head."""
    of_heads = _table_of_heads(table, x.shape[0], x.shape[2] // head_dim)
    ways: Any = ((table, "interleaved"), (table, "halves"), (of_heads, "halves"))
    return torch.cat([run(x, weight, EPS, angles, head_dim, layout=layout) for angles, layout in ways])


def _table_of_heads(table: rope.RotaryTable, batch: int, heads: int) -> rope.RotaryTable:
    """(B, H, L, P): every sample and head has the tokens' angles in another order; as LTX-2 has them in memory."""
    turned = [torch.stack([angles.roll(1 + i, dims=0) for i in range(batch * heads)], dim=1) for angles in table]
    cos, sin = (angles.view(-1, batch, heads, angles.shape[-1]).permute(1, 2, 0, 3) for angles in turned)
    return rope.RotaryTable(cos, sin)


NORM_ROTATE_TRITON = _triton(
    "norm_rotate",
    "RMS norm of queries and keys over all heads, then their rotation, an operation at a time",
    rotary_example,
    **_ways(_rotated, rope.norm_rotate, triton_rope.norm_rotate_triton),
)
_gated = _ways(lambda f, x, branch, gate, *_: f(x, branch, gate=gate), modulate.add_gated, native_dit.add_gated_native)
ADD_GATED_NATIVE = _native(
    "add_gated",
    MUL_ADD_TRITON,
    _gated["fast"],
    reference=_gated["reference"],
    example=modulated_example(2, 1),
    replaces="the gated sum of a residual, an operation at a time",
)
NORM_SCALE_SHIFT_NATIVE = _native(
    "norm_scale_shift",
    NORM_SCALE_SHIFT_TRITON,
    lambda x, scale, shift, *_: native_dit.norm_scale_shift_native(x, EPS, scale=scale, shift=shift),
)
ADD_NORM_NATIVE = _native(
    "add_norm",
    ADD_NORM_TRITON,
    lambda x, branch, gate, scale, shift, weight, bias: both(
        native_dit.add_norm_native(x, branch, EPS, gate=gate, weight=weight, bias=bias, scale=scale, shift=shift)
    ),
)
NORM_ROTATE_NATIVE = _native(
    "norm_rotate",
    NORM_ROTATE_TRITON,
    lambda *inputs: _rotated(native_dit.norm_rotate_native, *inputs),
)
PATCH_LINEAR = Rewrite(
    name="dit.patch_linear",
    exactness="rounding",
    replaces="the patch embedding, a 3D convolution of disjoint patches, by a matrix product",
    reference=patch.patch_conv,
    fast=patch.patch_embed,
    refuses=_never,
    example=_patch_example,
    because="the same products, summed in another order",
    dtypes=_HALF_AND_SINGLE,
)
MLP_ROWS = Rewrite(
    name="dit.mlp_rows",
    exactness="rounding",
    replaces="the feed-forward of all tokens at once, whose wide activation then exists whole",
    reference=mlp,
    fast=_a_third_at_a_time,
    refuses=_never,
    example=_mlp_example,
    because="the library may sum in another order for another number of rows",
    dtypes=_HALF_AND_SINGLE,
)
LINEAR_PACKED = Rewrite(
    name="dit.linear_packed",
    exactness="rounding",
    replaces="linear layers whose weights are laid out anew for each product",
    reference=lambda x, w1, b1, *_: F.linear(x, w1, b1),
    fast=_packed,
    refuses=lambda x, w1, *_: refuses_packed(w1),
    example=_mlp_example,
    because="oneDNN sums in another order than MKL",
    dtypes=(torch.float32, torch.bfloat16),
)
MLP_PACKED = Rewrite(
    name="dit.mlp_packed",
    exactness="rounding",
    replaces="the feed-forward in three operations; its GELU becomes the end of the first product",
    reference=mlp,
    fast=_packed_mlp,
    refuses=lambda x, w1, *_: refuses_packed(w1),
    example=_mlp_example,
    because="oneDNN sums in another order than MKL, and GELU is taken before the sums are rounded",
    dtypes=(torch.float32, torch.bfloat16),
)
OPERATIONS = (
    MUL_ADD_TRITON,
    NORM_SCALE_SHIFT_TRITON,
    ADD_NORM_TRITON,
    NORM_TANH_MUL_ADD_TRITON,
    NORM_ROTATE_TRITON,
    ADD_GATED_NATIVE,
    NORM_SCALE_SHIFT_NATIVE,
    ADD_NORM_NATIVE,
    NORM_ROTATE_NATIVE,
    PATCH_LINEAR,
    MLP_ROWS,
    LINEAR_PACKED,
    MLP_PACKED,
)
