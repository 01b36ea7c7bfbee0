"""Every quantization type of GGUF, float8 and int8: the numbers that gguf's own reference reads, bit by bit."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_files import BY_GGUF, cast, in_blocks, numbers, rotation, scaled

from frameloom.errors import CheckpointError
from frameloom.ops import dequant
from frameloom.ops.dequant import BLOCK_TYPES, dequantise, turned
from frameloom.weights.header import BLOCKS


def raw(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def by_gguf(name: str, data: bytes) -> torch.Tensor:
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, BLOCK_TYPES[name].size_bytes)
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]).copy()).flatten()


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """A number that is none may have any bits."""
    assert found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan())
    kept = ~wanted.isnan()
    assert torch.equal(found[kept].view(torch.int32), wanted[kept].view(torch.int32))


def test_every_type_that_gguf_can_read_is_there_in_the_sizes_of_the_headers():
    readable = {kind.name for kind in gguf.quants._type_traits} - {"BF16"}
    assert set(BLOCK_TYPES) == readable
    assert {name: (kind.numbers, kind.size_bytes) for name, kind in BLOCK_TYPES.items()} == {
        name: size for name, size in BLOCKS.items() if name in readable
    }


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
def test_random_blocks_have_the_bits_of_the_reference(name, seed, count):
    data = np.random.default_rng(seed).bytes(count * BLOCK_TYPES[name].size_bytes)  # NaN and infinite scales among them
    found = dequantise(raw(data), name, shape=(count * BLOCK_TYPES[name].numbers,), dtype=torch.float32)
    assert_same_bits(found, by_gguf(name, data))


@pytest.mark.parametrize("byte", [0x00, 0x7C, 0x7F, 0x80, 0xFC, 0xFF])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_of_one_byte_have_the_bits_of_the_reference(name, byte):
    data = bytes([byte]) * BLOCK_TYPES[name].size_bytes
    found = dequantise(raw(data), name, shape=(BLOCK_TYPES[name].numbers,), dtype=torch.float32)
    assert_same_bits(found, by_gguf(name, data))


@pytest.mark.parametrize("name", BY_GGUF)
def test_what_gguf_quantized_comes_back_nearly(name):
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight = weight.round().clamp(-1, 1) if name.startswith("TQ") else weight
    stored = in_blocks(weight, name)
    found = dequantise(raw(stored.data), name, shape=(4, 256), dtype=torch.float32)
    assert (found - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_numbers_are_rounded_once_and_pieces_change_nothing(monkeypatch, name, dtype):
    count = 5
    data = np.random.default_rng(1).bytes(count * BLOCK_TYPES[name].size_bytes)
    shape = (count, BLOCK_TYPES[name].numbers)
    wide = by_gguf(name, data).view(shape)
    monkeypatch.setattr(dequant, "_ON_CPU", 512)  # two blocks at a time
    found = dequantise(raw(data), name, shape=shape, dtype=dtype)
    assert found.dtype == dtype
    assert_same_bits(found.float(), wide.to(dtype).float())


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "I8"])
@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_a_scale_multiplies_in_float32_and_is_rounded_once(monkeypatch, name, by_row, at_once):
    monkeypatch.setattr(dequant, "_ON_CPU", at_once)
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(2)) * 3
    stored = scaled(weight, name, by_row=by_row)
    scale = torch.frombuffer(bytearray(stored.scale.data), dtype=torch.float32)
    values = raw(stored.data).view({"I8": torch.int8, **FLOATS}[name]).view(6, 10)
    for dtype in (torch.float32, torch.bfloat16):
        found = dequantise(raw(stored.data), name, shape=(6, 10), dtype=dtype, scale=scale)
        assert torch.equal(found, (values.float() * scale.view(-1, 1)).to(dtype))
        assert (found.float() - weight).norm() < 0.1 * weight.norm()


FLOATS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("name", FLOATS)
def test_float8_without_a_scale_is_what_it_says(name):
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    found = dequantise(raw(cast(weight, name).data), name, shape=(3, 5), dtype=torch.bfloat16)
    assert torch.equal(found, weight.to(FLOATS[name]).to(torch.bfloat16))


def test_a_scale_goes_with_blocks_too():
    stored = in_blocks(torch.randn(2, 32, generator=torch.Generator().manual_seed(4)), "Q8_0")
    found = dequantise(raw(stored.data), "Q8_0", shape=(2, 32), dtype=torch.bfloat16, scale=torch.tensor([3.0]))
    assert torch.equal(found, (by_gguf("Q8_0", stored.data).view(2, 32) * 3).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["Q4_K", "F8_E4M3", "F32"])
def test_no_numbers_are_no_numbers(name):
    assert dequantise(raw(b""), name, shape=(0, 256), dtype=torch.bfloat16).shape == (0, 256)


@pytest.mark.parametrize("name", ["Q8_K", "Q8_1", "I64", "nonsense"])
def test_what_is_no_weight_is_refused_by_name(name):
    with pytest.raises(CheckpointError, match=f"stored as {name} cannot be read; take a file in one of F64, .*Q4_K"):
        dequantise(raw(bytes(292)), name, shape=(256,), dtype=torch.float32)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_rotated_rows_are_turned_back(monkeypatch, group, at_once):
    """Against the matrix itself; pieces change nothing, and turning twice is turning back."""
    weight = torch.randn(5, 768, generator=torch.Generator().manual_seed(5))
    stored = scaled(weight, "I8", by_row=True, rotated=group)
    monkeypatch.setattr(dequant, "_ON_CPU", at_once)
    scale = numbers(stored.scale).flatten()
    found = dequantise(raw(stored.data), "I8", shape=stored.shape, dtype=torch.float32, scale=scale, rotated=group)
    assert torch.equal(found, numbers(stored))
    assert (found - weight).norm() / weight.norm() < 0.02
    assert torch.equal(turned(torch.eye(group), group).double(), rotation(group))
    torch.testing.assert_close(turned(turned(weight, group), group), weight)
