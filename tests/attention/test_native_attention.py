"""Attention compiled for the CPU: the formula in float64, every shape and layout that reaches it."""

import pytest
import torch
from test_attention import formula

from frameloom.attention.backend import Place
from frameloom.attention.core import choose, sdpa
from frameloom.attention.native import NATIVE, attend_native
from frameloom.errors import RequestError
from frameloom.ops import native as compiled
from frameloom.ops.registry import BF16_SLACK, relative_error

MISSING = NATIVE.refuses(Place(platform="cpu", head_dim=64, dtype=torch.float32))
MISSING_HALF = NATIVE.refuses(Place(platform="cpu", head_dim=64, dtype=torch.bfloat16))
SHAPES = [  # batch, queries, keys, heads, head dimension
    (1, 1, 1, 1, 16),
    (2, 5, 7, 3, 32),
    (1, 8, 16, 1, 48),
    (3, 129, 191, 2, 64),
    (1, 300, 193, 2, 128),
    (1, 17, 1000, 1, 80),
    (2, 40, 33, 1, 256),
]
needs_kernel = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
needs_half = pytest.mark.skipif(MISSING_HALF is not None, reason=str(MISSING_HALF))


def random_qkv(shape, *, sharpness=3.0):
    batch, queries, keys, heads, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = sharpness * torch.randn(batch, queries, heads, dim, generator=generator)
    k, v = torch.randn(2, batch, keys, heads, dim, generator=generator)
    return q, k, v


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_equals_the_formula(shape):
    q, k, v = random_qkv(shape)
    out = attend_native(q, k, v)
    assert out.shape == q.shape
    assert relative_error(out, formula(q, k, v)) <= 2e-6


@needs_half
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_loses_no_more_than_torch_does(shape):
    q, k, v = (x.bfloat16() for x in random_qkv(shape))
    exact = formula(q, k, v)
    out = attend_native(q, k, v)
    assert out.dtype == torch.bfloat16
    floor = 2.0**-7 if exact.numel() < 1000 else 0.0  # two roundings of a handful of numbers
    assert relative_error(out, exact) <= max(BF16_SLACK * relative_error(sdpa(q, k, v), exact), floor)


@needs_half
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_of_one_product_and_odd_layouts_are_read_where_they_lie(dtype):
    qkv = torch.randn(2, 50, 3 * 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = (part.unflatten(-1, (2, 32)) for part in qkv.chunk(3, dim=-1))
    expected = attend_native(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(attend_native(q, k, v), expected)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(attend_native(*turned), expected)
    shifted = torch.empty(q.numel() + 1, dtype=dtype)[1:].view(q.shape).copy_(q)  # bfloat16: between two words
    assert torch.equal(attend_native(shifted, k, v), expected)


@needs_kernel
def test_logits_far_apart_and_keys_that_rise_overflow_nothing():
    q, k, v = random_qkv((1, 9, 400, 1, 16), sharpness=60.0)
    k = k * torch.linspace(0, 3, 400).view(1, -1, 1, 1)  # the highest logit comes late: what was summed shrinks
    out = attend_native(q, k, v)
    assert out.isfinite().all()
    assert relative_error(out, formula(q, k, v)) <= 1e-5


@needs_kernel
def test_without_keys_there_is_nothing_to_see():
    q, k, v = random_qkv((1, 3, 0, 2, 16))
    assert attend_native(q, k, v).eq(0).all()


@needs_kernel
def test_the_number_of_threads_changes_nothing():
    q, k, v = random_qkv((1, 300, 300, 2, 64))
    threads = torch.get_num_threads()
    expected = attend_native(q, k, v)
    try:
        torch.set_num_threads(1)
        assert torch.equal(attend_native(q, k, v), expected)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_by_name_it_is_used_or_refused():
    attend, reason = choose("native", platform="cpu", head_dim=64, dtype=torch.float32)
    assert reason == "native: asked for by name"
    q, k, v = random_qkv((1, 9, 9, 2, 64))
    assert torch.equal(attend(q, k, v), attend_native(q, k, v))
    _, reason = choose("native", platform="cpu", head_dim=64, dtype=torch.float32, because="measured")
    assert reason == "native: measured"
    for wrong, words in (
        ({"platform": "cuda"}, "it is for cpu, not cuda"),
        ({"head_dim": 40}, "multiples of 16, not 40"),
        ({"head_dim": 384}, "up to 256, not 384"),
        ({"dtype": torch.float16}, "float32 and bfloat16, not float16"),
    ):
        place = {"platform": "cpu", "head_dim": 64, "dtype": torch.float32} | wrong
        with pytest.raises(RequestError, match=words):
            choose("native", **place)


def test_a_cpu_without_the_instructions_or_a_compiler_is_told(monkeypatch):
    monkeypatch.setattr("frameloom.attention.native.cpu_flags", lambda: frozenset({"avx2"}))
    place = {"platform": "cpu", "head_dim": 64}
    assert NATIVE.refuses(Place(**place, dtype=torch.bfloat16)) == "this CPU has no avx512_bf16"
    monkeypatch.setattr("frameloom.attention.native.cpu_flags", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(
        "frameloom.attention.native.native", lambda source: compiled.Native(None, "no g++ on this machine")
    )
    assert NATIVE.refuses(Place(**place, dtype=torch.float32)) == "no g++ on this machine"
