"""Numbers out of what files store for them: GGUF's blocks, and float8 or int8 with a scale. Plain torch, any device.

Everything is computed in float32, in the order of operations of gguf's own `dequantize`, whose bits these are, and
rounded once. What the bits of a block mean is laid down by llama.cpp (ggml-common.h, ggml-quants.c).
"""

# Shape suffixes: N blocks; S bytes of a block; B bytes; J groups of a block with a scale each; Q numbers of a group;
# I indices into a grid, each of which stands for 4 or 8 numbers.

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from frameloom.errors import CheckpointError
from frameloom.ops.grids import even_signs, grid

# Numbers made at a time: on a CPU they stay near the caches, elsewhere each operation takes a launch.
_ON_CPU, _ELSEWHERE = 1 << 18, 1 << 24
NUMBERS: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I8": torch.int8,
    }
)
"""Torch's dtype of numbers that may be weights, under safetensors' name for it."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """A block of `numbers` in `size_bytes`; `read` makes (N, size_bytes) uint8 to (N, numbers) float32."""

    numbers: int
    size_bytes: int
    read: Callable[[Tensor], Tensor]


def dequantise(
    raw_U8: Tensor,
    dtype_name: str,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scale: Tensor | None = None,
    rotated: int = 0,
) -> Tensor:
    """The bytes of one tensor (size_bytes,) as numbers of `shape` in `dtype`, on their device.

    `dtype_name`: a safetensors name or a GGUF block type. `scale`: what the numbers are multiplied by, one for all or
    one per row. `rotated`: each row (R, K) is turned back, in groups of so many numbers. Raises CheckpointError for
    a type that no weights have.
    """
    check_readable(dtype_name)
    if dtype_name not in BLOCK_TYPES:
        return _scaled(raw_U8.view(NUMBERS[dtype_name]).view(shape), scale, dtype, rotated)
    if scale is not None:
        return _scaled(dequantise(raw_U8, dtype_name, shape=shape, dtype=torch.float32), scale, dtype)
    kind = BLOCK_TYPES[dtype_name]
    blocks_NS = raw_U8.view(-1, kind.size_bytes)
    out = torch.empty(len(blocks_NS), kind.numbers, dtype=dtype, device=raw_U8.device)
    step = _at_once(out) // kind.numbers
    for part, piece in zip(torch.split(out, step), torch.split(blocks_NS, step), strict=True):
        part.copy_(kind.read(piece))
    return out.view(shape)


def check_readable(dtype_name: str) -> None:
    """Raise CheckpointError for what cannot be made numbers."""
    if dtype_name not in BLOCK_TYPES and dtype_name not in NUMBERS:
        known = ", ".join((*NUMBERS, *BLOCK_TYPES))
        raise CheckpointError(f"weights stored as {dtype_name} cannot be read; take a file in one of {known}")


def _scaled(stored: Tensor, scale: Tensor | None, dtype: torch.dtype, rotated: int = 0) -> Tensor:
    """stored · scale, turned back where it is rotated, in float32 until the end, some rows at a time."""
    if scale is None:
        return stored.to(dtype)
    num_rows = stored.shape[0] if stored.dim() else 1
    rows = stored.reshape(num_rows, math.prod(stored.shape[1:]))
    scale_R1 = scale.float().reshape(-1, 1).expand(num_rows, 1)
    out = torch.empty(rows.shape, dtype=dtype, device=stored.device)
    step = max(1, _at_once(out) // max(1, rows.shape[1]))
    split = functools.partial(torch.split, split_size_or_sections=step)
    for part, piece, factor in zip(split(out), split(rows), split(scale_R1), strict=True):
        plain = piece.float() * factor
        part.copy_(turned(plain, rotated) if rotated else plain)
    return out.view(stored.shape)


def turned(x: Tensor, group: int) -> Tensor:
    """x (..., K) times the regular Hadamard matrix of `group` rows, a power of 4, in groups of so many numbers.

    Its own inverse: the Kronecker product of as many H = (1, 1, 1, -1; 1, 1, -1, 1; 1, -1, 1, 1; -1, 1, 1, 1) / 2 as
    there are fours in `group`. H · x is half the sum of x's four numbers less these in reverse: additions in one order,
    so that no number depends on how many are computed together. ConvRot, https://arxiv.org/abs/2512.03673.
    """
    axes = range(-1, -1 - (group.bit_length() - 1) // 2, -1)
    y = x.reshape(-1, *(4 for _ in axes))
    for axis in axes:
        a, b, c, d = y.unbind(axis)
        half = ((a + b) + (c + d)) * 0.5
        y = torch.stack((half - d, half - c, half - b, half - a), axis)
    return y.reshape(x.shape)


def _at_once(out: Tensor) -> int:
    return _ON_CPU if out.device.type == "cpu" else _ELSEWHERE


# --- bits ---


def _fields(x: Tensor, bits: int) -> Tensor:
    """The fields of every byte, the lowest of all bytes first: (..., B) -> (..., 8 / bits, B)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
    fields: Tensor = (x.unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)
    return fields


def _in_turn(x_NB: Tensor, bits: int) -> Tensor:
    """The fields of every byte, byte after byte: (N, B) -> (N, B · 8 / bits)."""
    return _fields(x_NB, bits).transpose(1, 2).flatten(1)


def _parts(x_NB: Tensor, count: int) -> Tensor:
    """(N, B) -> (N, count, B / count)."""
    return x_NB.reshape(x_NB.shape[0], count, x_NB.shape[1] // count)


def _shifted(x: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Fields of a word: (...) int32 -> (..., number of shifts)."""
    return (x[..., None] >> torch.tensor(shifts, dtype=torch.int32, device=x.device)) & mask


def _half(blocks_NS: Tensor, start: int) -> Tensor:
    """The float16 at a byte of every block: (N, 1) float32."""
    return _words(blocks_NS, start, start + 2, torch.float16).float()


def _words(blocks_NS: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Bytes as wider words; copied, because they may begin anywhere."""
    return blocks_NS[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


def _shorts(blocks_NS: Tensor, start: int, stop: int) -> Tensor:
    """Bytes as unsigned words of 16 bits, in int32."""
    return _words(blocks_NS, start, stop, torch.int16).int() & 0xFFFF


def _nibbles(x_NB: Tensor) -> Tensor:
    """(N, B) -> (N, 2 B) float32: the low halves of all bytes, then the high ones."""
    return _fields(x_NB, 4).flatten(1).float()


def _quarters(x_NB: Tensor) -> Tensor:
    """64 bytes of four numbers each -> (N, 16, 16) float32."""
    return _fields(_parts(x_NB, 2), 2).reshape(-1, 16, 16).float()


def _levels(q: Tensor, levels: tuple[int, ...]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=q.device)[q.int()]


# --- blocks of 32 numbers with one scale ---


def _q4_0(b_NS: Tensor) -> Tensor:
    return _nibbles(b_NS[:, 2:]).sub_(8).mul_(_half(b_NS, 0))


def _q4_1(b_NS: Tensor) -> Tensor:
    return _nibbles(b_NS[:, 4:]).mul_(_half(b_NS, 0)).add_(_half(b_NS, 2))


def _q5_0(b_NS: Tensor) -> Tensor:
    return _nibbles(b_NS[:, 6:]).add_(_in_turn(b_NS[:, 2:6], 1), alpha=16).sub_(16).mul_(_half(b_NS, 0))


def _q5_1(b_NS: Tensor) -> Tensor:
    q_NQ = _nibbles(b_NS[:, 8:]).add_(_in_turn(b_NS[:, 4:8], 1), alpha=16)
    return q_NQ.mul_(_half(b_NS, 0)).add_(_half(b_NS, 2))


def _q8_0(b_NS: Tensor) -> Tensor:
    return b_NS[:, 2:].view(torch.int8).float().mul_(_half(b_NS, 0))


_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled


def _iq4_nl(b_NS: Tensor) -> Tensor:
    return _levels(_fields(b_NS[:, 2:], 4).flatten(1), _IQ4_LEVELS).mul_(_half(b_NS, 0))


def _mxfp4(b_NS: Tensor) -> Tensor:
    """The scale is half a power of two, by its exponent; the two smallest are subnormal."""
    e = b_NS[:, :1].int()
    half = torch.where(e < 2, 0x200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)
    return _levels(_fields(b_NS[:, 1:], 4).flatten(1), _FP4_LEVELS).mul_(half)


def _nvfp4(b_NS: Tensor) -> Tensor:
    """Four groups of 16, each with a scale in e4m3 whose sign is not read and whose NaN is zero."""
    x_NJ = b_NS[:, :4]
    exponent, mantissa = ((x_NJ >> 3) & 15).float(), (x_NJ & 7).float()
    normal = (mantissa / 8 + 1) * torch.exp2(exponent - 7)
    scale_NJ = torch.where(exponent == 0, mantissa * 2**-9, normal).mul_(0.5).masked_fill_(x_NJ == 0x7F, 0)
    q_NJQ = _levels(_fields(_parts(b_NS[:, 4:], 4), 4).flatten(2), _FP4_LEVELS)
    return q_NJQ.mul_(scale_NJ[..., None]).flatten(1)


# --- blocks of 256 numbers, in groups that have scales of few bits ---


def _q2_k(b_NS: Tensor) -> Tensor:
    scales_NJ = b_NS[:, :16]
    scale_NJ, least_NJ = _half(b_NS, 80) * (scales_NJ & 15), _half(b_NS, 82) * (scales_NJ >> 4)
    return _quarters(b_NS[:, 16:80]).mul_(scale_NJ[..., None]).sub_(least_NJ[..., None]).flatten(1)


def _q3_k(b_NS: Tensor) -> Tensor:
    low, high = _fields(b_NS[:, 96:104], 4), _fields(b_NS[:, 104:108], 2)
    scale_NJ = (low.flatten(1) | (high.flatten(1) << 4)).float().sub_(32).mul_(_half(b_NS, 108))
    top = _fields(b_NS[:, :32], 1).reshape(-1, 16, 16)
    return _quarters(b_NS[:, 32:96]).add_(top, alpha=4).sub_(4).mul_(scale_NJ[..., None]).flatten(1)


def _q4_k(b_NS: Tensor) -> Tensor:
    return _scale_and_least(b_NS, _fields(_parts(b_NS[:, 16:], 4), 4).flatten(1, 2).float())


def _q5_k(b_NS: Tensor) -> Tensor:
    q_NJQ = _fields(_parts(b_NS[:, 48:], 4), 4).flatten(1, 2).float()
    return _scale_and_least(b_NS, q_NJQ.add_(_fields(b_NS[:, 16:48], 1), alpha=16))


def _scale_and_least(b_NS: Tensor, q_NJQ: Tensor) -> Tensor:
    """Eight groups, each with a scale and a least value of six bits: four of each in whole bytes, four in parts."""
    scale, least, low = b_NS[:, 4:16].chunk(3, dim=1)
    scale_NJ = torch.cat((scale & 63, (low & 15) | ((scale >> 2) & 48)), dim=1) * _half(b_NS, 0)
    least_NJ = torch.cat((least & 63, (low >> 4) | ((least >> 2) & 48)), dim=1) * _half(b_NS, 2)
    return q_NJQ.mul_(scale_NJ[..., None]).sub_(least_NJ[..., None]).flatten(1)


def _q6_k(b_NS: Tensor) -> Tensor:
    low = _fields(_parts(b_NS[:, :128], 2), 4).reshape(-1, 16, 16)
    scale_NJ = b_NS[:, 192:208].view(torch.int8) * _half(b_NS, 208)
    return low.float().add_(_quarters(b_NS[:, 128:192]), alpha=16).sub_(32).mul_(scale_NJ[..., None]).flatten(1)


def _iq4_xs(b_NS: Tensor) -> Tensor:
    scale_NJ = (_in_turn(b_NS[:, 4:8], 4) | (_in_turn(b_NS[:, 2:4], 2) << 4)).float().sub_(32).mul_(_half(b_NS, 0))
    q_NJQ = _levels(_fields(_parts(b_NS[:, 8:], 8), 4).flatten(2), _IQ4_LEVELS)
    return q_NJQ.mul_(scale_NJ[..., None]).flatten(1)


# --- ternary numbers ---


def _tq1_0(b_NS: Tensor) -> Tensor:
    """Five numbers in a byte, as digits to the base 3 of a fraction: the products lose what is above it."""
    digits = [_ternary(b_NS[:, :32], 5), _ternary(b_NS[:, 32:48], 5), _ternary(b_NS[:, 48:52], 4)]
    return torch.cat(digits, dim=1).float().sub_(1).mul_(_half(b_NS, 52))


def _ternary(x_NB: Tensor, count: int) -> Tensor:
    powers = torch.tensor([3**i for i in range(count)], dtype=torch.uint8, device=x_NB.device)
    return ((x_NB[:, None] * powers[:, None]).flatten(1).short() * 3) >> 8


def _tq2_0(b_NS: Tensor) -> Tensor:
    return _quarters(b_NS[:, :64]).flatten(1).sub_(1).mul_(_half(b_NS, 64))


# --- points of a grid: an index stands for 4 or 8 numbers ---


def _on_grid(name: str, index_NI: Tensor, scale_NJ: Tensor, signs_NB: Tensor) -> Tensor:
    """Points times scale; where a bit of `signs_NB` is set, negative."""
    points = grid(name, index_NI.device)[index_NI.flatten(1)].reshape(*scale_NJ.shape, -1)
    return points.mul_(scale_NJ[..., None]).flatten(1).mul_(1 - 2 * _in_turn(signs_NB, 1).float())


def _signs_of(index: Tensor) -> Tensor:
    """Seven signs are stored, and the eighth makes their number even: (N, ...) -> a byte each, (N, B)."""
    return even_signs(index.device)[index].flatten(1)


def _iq2_xxs(b_NS: Tensor) -> Tensor:
    word_NJ = _words(b_NS, 2, 66, torch.int32)[:, 1::2]
    scale_NJ = _half(b_NS, 0) * (((word_NJ >> 28) & 15).float() + 0.5) * 0.25
    index = _parts(b_NS[:, 2:], 8)[..., :4].int()
    return _on_grid("IQ2_XXS", index, scale_NJ, _signs_of(_shifted(word_NJ, (0, 7, 14, 21), 127)))


def _iq2_xs(b_NS: Tensor) -> Tensor:
    word_NI = _shorts(b_NS, 2, 66)
    scale_NJ = _half(b_NS, 0) * (_in_turn(b_NS[:, 66:], 4).float() + 0.5) * 0.25
    return _on_grid("IQ2_XS", word_NI & 511, scale_NJ, _signs_of(word_NI >> 9))


def _iq2_s(b_NS: Tensor) -> Tensor:
    index_NI = b_NS[:, 2:34].int() | (_in_turn(b_NS[:, 66:74], 2).int() << 8)
    scale_NJ = _half(b_NS, 0) * (_in_turn(b_NS[:, 74:], 4).float() + 0.5) * 0.25
    return _on_grid("IQ2_S", index_NI, scale_NJ, b_NS[:, 34:66])


def _iq3_xxs(b_NS: Tensor) -> Tensor:
    word_NJ = _words(b_NS, 66, 98, torch.int32)
    scale_NJ = _half(b_NS, 0) * (((word_NJ >> 28) & 15).float() + 0.5) * 0.5
    return _on_grid("IQ3_XXS", b_NS[:, 2:66].int(), scale_NJ, _signs_of(_shifted(word_NJ, (0, 7, 14, 21), 127)))


def _iq3_s(b_NS: Tensor) -> Tensor:
    index_NI = b_NS[:, 2:66].int() | (_in_turn(b_NS[:, 66:74], 1).int() << 8)
    scale_NJ = _half(b_NS, 0) * (_in_turn(b_NS[:, 106:], 4).float() * 2 + 1)
    return _on_grid("IQ3_S", index_NI, scale_NJ, b_NS[:, 74:106])


def _iq1_s(b_NS: Tensor) -> Tensor:
    word_NJ = _shorts(b_NS, 34, 50)
    scale_NJ = _half(b_NS, 0) * (((word_NJ >> 12) & 7) * 2 + 1)
    index_NI = b_NS[:, 2:34].int() | (_shifted(word_NJ, (0, 3, 6, 9), 7).flatten(1) << 8)
    return _ternary_points(index_NI, scale_NJ, word_NJ >> 15)


def _iq1_m(b_NS: Tensor) -> Tensor:
    """The scale of the block is in pieces, four bits in each of the words that hold those of the groups."""
    words = _shorts(b_NS, 48, 56)
    pieces = (words >> 12) << torch.tensor((0, 4, 8, 12), dtype=torch.int32, device=words.device)
    scale_N1 = pieces.sum(1, keepdim=True).to(torch.int16).view(torch.float16).float()
    scale_NJ = scale_N1 * (_shifted(words, (0, 3, 6, 9), 7).flatten(1) * 2 + 1)
    high = _in_turn(b_NS[:, 32:48], 4).int()
    return _ternary_points(b_NS[:, :32].int() | ((high & 7) << 8), scale_NJ, high >> 3)


def _ternary_points(index_NI: Tensor, scale_NJ: Tensor, below: Tensor) -> Tensor:
    """Points of -1, 0 and 1, all moved up by an eighth, or down where `below`; then times scale."""
    shift = (0.125 - 0.25 * below.float()).repeat_interleave(index_NI.shape[1] // below.shape[1], 1)
    points = grid("IQ1", index_NI.device)[index_NI] + shift[..., None]
    return points.reshape(*scale_NJ.shape, -1).mul_(scale_NJ[..., None]).flatten(1)


BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(32, 18, _q4_0),
        "Q4_1": BlockType(32, 20, _q4_1),
        "Q5_0": BlockType(32, 22, _q5_0),
        "Q5_1": BlockType(32, 24, _q5_1),
        "Q8_0": BlockType(32, 34, _q8_0),
        "IQ4_NL": BlockType(32, 18, _iq4_nl),
        "MXFP4": BlockType(32, 17, _mxfp4),
        "NVFP4": BlockType(64, 36, _nvfp4),
        "Q2_K": BlockType(256, 84, _q2_k),
        "Q3_K": BlockType(256, 110, _q3_k),
        "Q4_K": BlockType(256, 144, _q4_k),
        "Q5_K": BlockType(256, 176, _q5_k),
        "Q6_K": BlockType(256, 210, _q6_k),
        "IQ4_XS": BlockType(256, 136, _iq4_xs),
        "TQ1_0": BlockType(256, 54, _tq1_0),
        "TQ2_0": BlockType(256, 66, _tq2_0),
        "IQ2_XXS": BlockType(256, 66, _iq2_xxs),
        "IQ2_XS": BlockType(256, 74, _iq2_xs),
        "IQ2_S": BlockType(256, 82, _iq2_s),
        "IQ3_XXS": BlockType(256, 98, _iq3_xxs),
        "IQ3_S": BlockType(256, 110, _iq3_s),
        "IQ1_S": BlockType(256, 50, _iq1_s),
        "IQ1_M": BlockType(256, 56, _iq1_m),
    }
)
"""GGUF's types of weights; those of activations (Q8_1, Q8_K) are in no file."""
