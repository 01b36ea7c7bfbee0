import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.attention.core import sdpa
from frameloom.ops.registry import BF16_SLACK, ROUNDING_FP32, relative_error


def formula(q_BLHK, k_BSHK, v_BSHK, bias_BS=None):
    logits = torch.einsum("blhk,bshk->bhls", q_BLHK.double(), k_BSHK.double()) / q_BLHK.shape[-1] ** 0.5
    if bias_BS is not None:
        logits = logits + bias_BS.double()[:, None, None]
    return torch.einsum("bhls,bshk->blhk", logits.softmax(-1), v_BSHK.double())


def tokens(batch, queries, keys, heads, head_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, heads, head_dim) for count in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 33),
    biased=st.booleans(),
)
def test_sdpa_equals_the_formula(batch, queries, keys, heads, head_dim, biased):
    q, k, v = tokens(batch, queries, keys, heads, head_dim)
    bias = torch.linspace(-3, 3, batch * keys).view(batch, keys) if biased else None
    out = sdpa(q, k, v, bias)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert relative_error(out, formula(q, k, v, bias)) < ROUNDING_FP32


def test_sdpa_takes_views_with_strides_of_any_kind():
    packed = torch.randn(2, 6, 3, 3, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.unbind(2)
    q, k = q.transpose(1, 2).contiguous().transpose(1, 2), k.flip(1)
    bias = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).t()
    assert relative_error(sdpa(q, k, v, bias), formula(q, k, v, bias)) < ROUNDING_FP32
    low = [x.bfloat16() for x in (q, k, v)]
    assert relative_error(sdpa(*low, bias), formula(*low, bias)) < 5e-3


def test_a_key_with_the_bias_log_n_counts_as_n_equal_keys():
    q, k, v = tokens(2, 5, 4, 3, 16)
    bias = torch.zeros(2, 4)
    bias[:, -1] = math.log(7)
    many_k, many_v = (torch.cat([x, x[:, -1:].expand(-1, 6, -1, -1)], dim=1) for x in (k, v))
    assert relative_error(sdpa(q, k, v, bias), formula(q, many_k, many_v)) < ROUNDING_FP32


def test_a_key_with_the_bias_minus_infinity_is_not_there():
    q, k, v = tokens(2, 5, 4, 3, 16)
    bias = torch.zeros(2, 4)
    bias[0, 1:] = -math.inf  # the first sample sees one key, the second all
    out = sdpa(q, k, v, bias)
    assert relative_error(out[:1], formula(q[:1], k[:1, :1], v[:1, :1])) < ROUNDING_FP32
    assert relative_error(out[1:], formula(q[1:], k[1:], v[1:])) < ROUNDING_FP32


def padded_prompt(dtype, scale=3.0):
    """Sharp queries, 23 words, and one key for 489 equal paddings; what repeating that key gives in `dtype`."""
    q, k, v = tokens(2, 64, 24, 4, 128, dtype, seed=3)
    q = q * scale
    bias = torch.zeros(2, 24)
    bias[:, -1] = math.log(489)
    return q, k, v, bias, [torch.cat([x, x[:, -1:].expand(-1, 488, -1, -1)], dim=1) for x in (k, v)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_bias_loses_no_more_than_the_keys_it_stands_for(dtype):
    q, k, v, bias, many = padded_prompt(dtype)
    exact = formula(q, k, v, bias)
    assert relative_error(exact, formula(q, *many)) < 1e-6
    out = sdpa(q, k, v, bias)
    assert out.dtype == dtype
    assert relative_error(out, exact) <= BF16_SLACK * relative_error(sdpa(q, *many), exact)


def test_a_bias_rounded_to_bfloat16_would_lose_more():
    q, k, v, bias, _ = padded_prompt(torch.bfloat16)
    exact = formula(q, k, v, bias)
    rounded = sdpa(q, k, v, bias.bfloat16())
    assert relative_error(rounded, exact) > BF16_SLACK * relative_error(sdpa(q, k, v, bias), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_queries_leave_no_seam(dtype, monkeypatch):
    q, k, v = tokens(2, 11, 5, 3, 8, dtype)
    bias = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    whole = sdpa(q, k, v, bias)
    monkeypatch.setattr("frameloom.attention.core._WIDE_BLOCK", 3 * 2 * 3 * 8)  # three rows of all samples
    assert relative_error(sdpa(q, k, v, bias), whole) < 1e-6
    monkeypatch.setattr("frameloom.attention.core._WIDE_BLOCK", 1)
    assert relative_error(sdpa(q, k, v, bias), whole) < 1e-6


def test_float64_stays_float64():
    q, k, v = tokens(1, 5, 4, 2, 6, torch.float64)
    bias = torch.randn(1, 4)
    assert relative_error(sdpa(q, k, v, bias), formula(q, k, v, bias)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_any_key_to_see_the_result_is_zeros(dtype):
    q, k, v = tokens(2, 5, 4, 3, 16, dtype)
    assert sdpa(q, k, v, torch.full((2, 4), -math.inf)).abs().max() == 0
    assert sdpa(q, k[:, :0], v[:, :0]).abs().max() == 0
    assert sdpa(q, k[:, :0], v[:, :0], torch.zeros(2, 0)).abs().max() == 0
    assert sdpa(q[:, :0], k, v, torch.zeros(2, 4)).shape == (2, 0, 3, 16)
