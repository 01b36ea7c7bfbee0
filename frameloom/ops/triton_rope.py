"""Norm over all heads and rotary positions in one pass over a GPU's memory: `norm_rotate` of ops/rope.py in Triton.

Computed in float32 and rounded at the end; the reference rounds between the norm and the rotation, too.
Tested on a CPU through Triton's interpreter (TRITON_INTERPRET=1).
"""

from torch import Tensor

from frameloom.ops.rope import Layout, RotaryTable, angle_strides, check_rotation
from frameloom.ops.triton_rows import empty_result, launch, operand, skips

try:
    import triton
    import triton.language as tl

    from frameloom.ops.triton_rows import load_channels, load_rows
except ImportError:  # a build of torch without it
    triton = None


def norm_rotate_triton(
    x_BLD: Tensor, weight: Tensor, eps: float, table: RotaryTable, head_dim: int, *, layout: Layout = "interleaved"
) -> Tensor:
    """x_BLD -> x_BLHK, normed over D and turned; see `norm_rotate`."""
    check_rotation(x_BLD.shape, table, head_dim, layout)
    out = empty_result(x_BLD.shape, x_BLD)
    if not skips(x_BLD):
        launch(
            _norm_rotate_kernel, x_BLD, *operand(x_BLD, x_BLD.shape), weight.to(x_BLD.dtype), table.cos_LP,
            *angle_strides(table.cos_LP), table.sin_LP, *angle_strides(table.sin_LP), out, float(eps),
            HEAD=head_dim, HALVES=layout == "halves",
        )  # fmt: skip
    return out.to(x_BLD.dtype).view(*x_BLD.shape[:2], x_BLD.shape[2] // head_dim, head_dim)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _norm_rotate_kernel(
        x: tl.tensor, x_batch: tl.tensor, x_stride: tl.tensor, x_every: tl.tensor, weight: tl.tensor,
        cos: tl.tensor, cos_batch: tl.tensor, cos_head: tl.tensor, cos_stride: tl.tensor,
        sin: tl.tensor, sin_batch: tl.tensor, sin_head: tl.tensor, sin_stride: tl.tensor, out: tl.tensor,
        eps: tl.tensor, rows: tl.tensor, length: tl.tensor, width: tl.tensor,
        HEAD: tl.constexpr, HALVES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ) -> None:  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        column = tl.arange(0, BLOCK_D)[None, :]
        mask = (row < rows)[:, None] & (column < width)
        inside = column % HEAD
        if HALVES:
            second = inside >= HEAD // 2
            pair = inside % (HEAD // 2)
            partner = tl.where(second, column - HEAD // 2, column + HEAD // 2)
        else:
            second = inside % 2 == 1
            pair = inside // 2
            partner = tl.where(second, column - 1, column + 1)
        value = load_rows(x, row, column, mask, length, x_batch, x_stride, x_every)
        other = load_rows(x, row, partner, mask, length, x_batch, x_stride, x_every)  # from the cache
        scale = (1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps))[:, None]
        value = value * scale * load_channels(weight, column, width)
        other = other * scale * load_channels(weight, partner, width)
        sample, token, head = (row // length)[:, None], (row % length)[:, None], column // HEAD
        turn_c = sample * cos_batch + head * cos_head + token * cos_stride + pair
        turn_s = sample * sin_batch + head * sin_head + token * sin_stride + pair
        c = tl.load(cos + turn_c, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + turn_s, mask=mask, other=0.0).to(tl.float32)
        y = value * c + tl.where(second, other, -other) * s
        tl.store(out + (row * width)[:, None] + column, y.to(out.dtype.element_ty), mask=mask)
