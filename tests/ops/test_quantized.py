"""Layers that hold their weights as stored give the bits of layers that hold them plain."""

import pytest
import torch
import torch.nn.functional as F
from quantized_files import in_blocks, scaled
from torch import nn

from frameloom.ops.quantized import Embedding, Linear, QuantizedWeight, hold, is_quantized, largest_plain_bytes

KINDS = ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "F8_E4M3", "I8", "I8 by row"]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def weight_of(kind, *shape):
    name, _, by_row = kind.partition(" ")
    stored = scaled(randn(*shape), name, by_row=bool(by_row)) if name in ("F8_E4M3", "I8") else in_blocks(
        randn(*shape), name
    )  # fmt: skip
    scale = None if stored.scale is None else torch.frombuffer(bytearray(stored.scale.data), dtype=torch.float32)
    raw_U8 = torch.frombuffer(bytearray(stored.data), dtype=torch.uint8)
    return QuantizedWeight(raw_U8=raw_U8, dtype_name=stored.dtype, shape=shape, scale=scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_has_the_bits_of_the_plain_one(kind, dtype, bias):
    layer, weight = Linear(256, 24, bias=bias).to(dtype), weight_of(kind, 24, 256)
    plain = weight.plain(dtype)
    x = randn(2, 7, 256).to(dtype)
    wanted = F.linear(x, plain, layer.bias)
    hold(layer, weight, dtype)
    assert torch.equal(layer(x), wanted)
    assert layer.weight is None
    assert (layer.stored, layer.dtype) == (weight, dtype)
    assert torch.equal(layer.plain_weight(), plain)


def test_a_plain_layer_is_its_weight():
    layer = Linear(4, 3)
    assert layer.stored is None
    assert layer.plain_weight() is layer.weight
    assert layer.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_has_the_bits_of_the_plain_one(kind, dtype):
    table, weight = Embedding(30, 256), weight_of(kind, 30, 256)
    ids = torch.tensor([[29, 0, 7], [7, 7, 1]])
    wanted = F.embedding(ids, weight.plain(dtype))
    hold(table, weight, dtype)
    assert torch.equal(table(ids), wanted)
    assert table(ids[:, :0]).shape == (2, 0, 256)


def test_only_the_bytes_as_stored_are_held():
    weight = weight_of("I8 by row", 24, 256)
    assert weight.nbytes == 24 * 256 + 24 * 4
    layer = Linear(256, 24)
    hold(layer, weight, torch.float32)
    layer(randn(3, 256))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert {tensor.dtype for tensor in (layer.kernel.weight.raw_U8,)} == {torch.uint8}


def test_a_network_tells_what_it_holds_as_stored():
    network = nn.Sequential(Linear(256, 24), Linear(24, 256), nn.Linear(256, 256))
    assert not is_quantized(network)
    assert largest_plain_bytes(network) == 0
    hold(network[0], weight_of("Q8_0", 24, 256), torch.bfloat16)
    assert is_quantized(network)
    assert largest_plain_bytes(network) == 24 * 256 * 2
