"""Attention to blocks of keys, put together again: equal to attention to all of them, whatever the cut."""

import math

import pytest
import torch
from test_attention import formula, tokens

from frameloom.attention.blockwise import Partial, attend_block, by_formula, merge
from frameloom.attention.core import sdpa
from frameloom.ops.registry import BF16_SLACK, ROUNDING_FP32, relative_error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def in_blocks(q, k, v, cuts):
    """Attention to k and v cut at the given places, put together from the last block to the first."""
    blocks = zip(k.tensor_split(cuts, 1), v.tensor_split(cuts, 1), strict=True)
    parts = [attend_block(q, *block) for block in blocks]
    whole = parts.pop()
    while parts:
        whole = merge(whole, parts.pop())
    return whole


def log_sum(q, k):
    logits = torch.einsum("blhk,bshk->bhls", q.double(), k.double()) / q.shape[-1] ** 0.5
    return logits.logsumexp(-1)


@pytest.mark.parametrize("cuts", [(), (3,), (1, 4), (0, 5, 5), (0, 7)])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (3, 10), (2, 33), (2, 128)])
def test_blocks_put_together_equal_the_formula(heads, head_dim, cuts):
    q, k, v = tokens(2, 9, 7, heads, head_dim)
    whole = in_blocks(q * 3, k, v, cuts)
    assert relative_error(whole.out_BLHK, formula(q * 3, k, v)) < ROUNDING_FP32
    assert relative_error(whole.lse_BHL, log_sum(q * 3, k)) < ROUNDING_FP32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_tells_how_much_it_weighs_in_wide_numbers(dtype):
    q, k, v = tokens(2, 5, 40, 3, 16, dtype)
    part = attend_block(q, k, v)
    assert part.lse_BHL.dtype == torch.promote_types(dtype, torch.float32)
    assert part.out_BLHK.shape == q.shape
    assert relative_error(part.lse_BHL, log_sum(q, k)) < ROUNDING_FP32
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else ROUNDING_FP32
    assert relative_error(part.out_BLHK, formula(q, k, v)) < rounding


def test_in_bfloat16_every_block_is_rounded_once_and_their_sum_once():
    q, k, v = tokens(2, 64, 400, 3, 128, torch.bfloat16)
    exact = formula(q, k, v)
    whole = in_blocks(q, k, v, (90, 200, 310)).out_BLHK
    assert whole.dtype == torch.float32
    once = relative_error(sdpa(q, k, v), exact)
    assert relative_error(whole, exact) <= BF16_SLACK * once
    assert relative_error(whole.bfloat16(), exact) <= math.sqrt(2) * once  # two roundings, independent of each other


def test_far_logits_neither_overflow_nor_vanish():
    q, k, v = tokens(1, 6, 8, 2, 16)
    k[:, :4] *= 100  # exp() of these logits is infinite, and that of the others nothing beside it
    whole = in_blocks(q * 10, k, v, (4,))
    assert relative_error(whole.out_BLHK, formula(q * 10, k, v)) < ROUNDING_FP32


def test_a_block_without_keys_weighs_nothing():
    q, k, v = tokens(2, 5, 4, 3, 16)
    nothing = attend_block(q, k[:, :0], v[:, :0])
    assert not nothing.out_BLHK.any()
    assert nothing.lse_BHL.eq(-math.inf).all()
    some = attend_block(q, k, v)
    for both in (merge(nothing, some), merge(some, nothing)):
        assert torch.equal(both.out_BLHK, some.out_BLHK)
        assert torch.equal(both.lse_BHL, some.lse_BHL)
    neither = merge(nothing, nothing)
    assert torch.equal(neither.out_BLHK, nothing.out_BLHK)
    assert torch.equal(neither.lse_BHL, nothing.lse_BHL)


def test_no_query_gets_no_answer():
    q, k, v = tokens(2, 0, 4, 3, 16)
    part = merge(attend_block(q, k, v), attend_block(q, k, v))
    assert part.out_BLHK.shape == (2, 0, 3, 16)
    assert part.lse_BHL.shape == (2, 3, 0)


def test_a_key_that_is_left_out_is_noticed():
    q, k, v = tokens(2, 9, 40, 3, 16)
    first, second = attend_block(q, k[:, :20], v[:, :20]), attend_block(q, k[:, 21:], v[:, 21:])
    assert relative_error(merge(first, second).out_BLHK, formula(q, k, v)) > 1e-2
    unweighted = Partial(second.out_BLHK, second.lse_BHL.zero_())
    assert relative_error(merge(first, unweighted).out_BLHK, formula(q, k, v)) > 1e-2


def test_heads_may_lie_in_any_order():
    q, k, v = tokens(2, 5, 7, 4, 8)
    apart = [x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for x in (q, k, v)]
    assert torch.equal(attend_block(*apart).out_BLHK, attend_block(q, k, v).out_BLHK)


@pytest.mark.parametrize("most_logits", [1, 60, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula_in_pieces_equals_the_kernel(dtype, most_logits):
    q, k, v = tokens(2, 9, 7, 3, 16, dtype)
    out, lse = by_formula(*(x.transpose(1, 2) for x in (q, k, v)), most_logits=most_logits)
    assert out.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(out.transpose(1, 2), formula(q, k, v)) < 1e-6
    assert relative_error(lse, log_sum(q, k)) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("head_dim", [16, 60, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_blocks_put_together_equal_the_formula(dtype, head_dim):
    q, k, v = (x.cuda() for x in tokens(2, 45, 100, 3, head_dim, dtype))
    whole = in_blocks(q, k, v, (7, 70))
    bound = ROUNDING_FP32 if dtype == torch.float32 else 5e-3
    assert relative_error(whole.out_BLHK, formula(q, k, v)) < bound
    assert relative_error(whole.lse_BHL, log_sum(q, k)) < 1e-5
