"""Adapters beside a network's weights: as exact as merged ones, and gone without a trace when they are taken away."""

import copy
from dataclasses import replace

import pytest
import torch
from adapter_kinds import KINDS, a_difference, a_dora, a_dora_of_columns, a_loha, a_lokr, a_lora, for_all, random

from frameloom.models.adapters import Adapter, Adapters, Product, delta, merge
from frameloom.models.adapters_beside import attach, detach
from frameloom.models.dit_fast import DitChoices, LoopChoices, install
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.dit_ops import Ops
from frameloom.ops.linear import refuses_packed
from frameloom.ops.mlp import mlp_rows
from frameloom.ops.quantized import Linear, QuantizedWeight, hold

TOLERANCE = 1e-5
SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 24,
    "freq_dim": 16, "ffn_dim": 48, "num_layers": 2,
}  # fmt: skip
MODELS = {
    "t2v": TransformerSpec(**SMALL),
    "i2v": TransformerSpec(**SMALL | {"in_channels": 9, "image_dim": 20, "added_kv_proj_dim": 32}),
}


def make_dit(model="t2v", *, dtype=torch.float32):
    torch.manual_seed(0)
    dit = WanDiT(MODELS[model]).eval().requires_grad_(False)
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if dit.keep_in_fp32(name) else dtype)
    return dit


@torch.inference_mode()
def computed(dit):
    """What the network makes of one latent, prompt and, where it takes one, image."""
    generator = torch.Generator().manual_seed(7)
    x, text, image = (
        torch.randn(shape, generator=generator)
        for shape in ((1, dit.spec.in_channels, 2, 4, 6), (1, 9, 24), (1, 5, 20))
    )
    return dit(x, torch.tensor([500.0]), text, image if dit.spec.image_dim else None)


def with_merged(dit, sets):
    """A copy whose weights have taken the adapters in."""
    other = copy.deepcopy(dit)
    other.load_state_dict({name: merge(sets, name, value) for name, value in dit.state_dict().items()})
    return other


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_beside_the_weights_is_as_exact_as_merged_and_leaves_no_trace(model, make):
    dit = make_dit(model)
    before, bits = computed(dit), {name: value.clone() for name, value in dit.state_dict().items()}
    sets = [for_all(dit, make)]
    wanted = computed(with_merged(dit, sets))
    assert distance(wanted, before) > 0.01
    attach(dit, sets)
    assert distance(computed(dit), wanted) < TOLERANCE
    detach(dit)
    assert torch.equal(computed(dit), before)
    assert all(torch.equal(value, bits[name]) for name, value in dit.state_dict().items())


def test_several_apply_in_their_order_and_are_exchanged_at_once():
    dit = make_dit()
    first, second, third = for_all(dit, a_lora), for_all(dit, a_dora, strength=-0.3), for_all(dit, a_loha)
    for sets in ([first, second, third], [second, first], [third]):
        attach(dit, sets)
        assert distance(computed(dit), computed(with_merged(make_dit(), sets))) < TOLERANCE
    assert (
        distance(computed(with_merged(make_dit(), [first, second])), computed(with_merged(make_dit(), [second, first])))
        > 1e-3
    )
    attach(dit, [])
    assert torch.equal(computed(dit), computed(make_dit()))


@pytest.mark.parametrize("make", KINDS)
def test_in_bfloat16_it_is_no_further_from_the_truth_than_merged_weights(make):
    dit, exact = make_dit(dtype=torch.bfloat16), make_dit()
    exact.load_state_dict({name: value.float() for name, value in dit.state_dict().items()})
    sets = [for_all(dit, make, parameters=lambda name: name.startswith("blocks"))]
    truth = computed(with_merged(exact, sets))
    attach(dit, sets)
    beside, merged = computed(dit), computed(with_merged(make_dit(dtype=torch.bfloat16), sets))
    assert beside.dtype == torch.bfloat16
    assert distance(beside, truth) < 1.5 * distance(merged, truth)


def test_in_bfloat16_a_dora_may_lengthen_rows_by_less_than_bfloat16_tells_from_1():
    dit = make_dit(dtype=torch.bfloat16)
    name = "blocks.0.ffn.net.0.proj.weight"
    weight = dit.get_parameter(name).float()
    magnitude = 1.003 * weight.norm(dim=1, keepdim=True)
    dora = Adapter(factors=Product(a=torch.zeros(48, 1), b=torch.zeros(1, 32)), magnitude=magnitude)
    layer, _ = dit.blocks[0].ffn.layers
    layer.bias.data.zero_()
    x = torch.randn(4000, 32, dtype=torch.bfloat16)
    before = layer(x).double()
    attach(dit, [Adapters(name="", strength=1.0, changes={name: dora}, num_keys=1)])
    longer = (layer(x) * before).sum() / before.square().sum()
    assert float(longer) == pytest.approx(1.003, abs=5e-4)


def quantize(dit):
    """Hold every linear layer of the blocks as int8 with a scale per row."""
    for module in dit.blocks.modules():
        if isinstance(module, Linear):
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            raw = (module.weight / scale).round().to(torch.int8)
            weight = QuantizedWeight(
                raw_U8=raw.flatten().view(torch.uint8), dtype_name="I8", shape=tuple(raw.shape), scale=scale.flatten()
            )
            hold(module, weight, torch.float32)


def take_plain_weights(plain, dit):
    """Give a network the weights that another one holds as they are stored, expanded."""
    for name, module in plain.named_modules():
        held = dit.get_submodule(name)
        if isinstance(module, Linear) and held.stored is not None:
            module.weight.data = held.plain_weight()


@pytest.mark.parametrize("make", KINDS)
def test_quantized_weights_stay_as_they_are_stored(make):
    dit, plain = make_dit(), make_dit()
    sets = [for_all(dit, make)]
    quantize(dit)
    take_plain_weights(plain, dit)
    before = computed(dit)
    assert torch.equal(before, computed(plain))
    attach(dit, sets)
    assert distance(computed(dit), computed(with_merged(plain, sets))) < TOLERANCE
    detach(dit)
    assert torch.equal(computed(dit), before)


def test_a_lora_in_bfloat16_beside_float8_weights_is_as_exact_as_merged_into_expanded_ones():
    dit, plain = make_dit(dtype=torch.bfloat16), make_dit(dtype=torch.bfloat16)
    for module in dit.blocks.modules():
        if isinstance(module, Linear):
            raw = module.weight.to(torch.float8_e4m3fn)
            weight = QuantizedWeight(
                raw_U8=raw.flatten().view(torch.uint8), dtype_name="F8_E4M3", shape=tuple(raw.shape)
            )
            hold(module, weight, torch.bfloat16)
    take_plain_weights(plain, dit)
    exact = make_dit()
    exact.load_state_dict({name: value.float() for name, value in plain.state_dict().items()})
    narrow = {
        name: replace(adapter, factors=Product(a=adapter.factors.a.bfloat16(), b=adapter.factors.b.bfloat16()))
        for name, adapter in for_all(plain, a_lora).changes.items()
        if adapter.factors.b is not None
    }
    sets = [Adapters(name="", strength=1.0, changes=narrow, num_keys=len(narrow))]
    truth = computed(with_merged(exact, sets))
    attach(dit, sets)
    assert distance(computed(dit), truth) < 1.5 * distance(computed(with_merged(plain, sets)), truth)


def test_a_row_of_zeros_stays_one_whatever_length_it_is_given():
    nothing = Adapter(factors=Product(a=torch.zeros(2, 1), b=torch.zeros(1, 3)), magnitude=torch.full((2, 1), 5.0))
    weight = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    assert torch.equal(delta(nothing, weight), torch.zeros(2, 3))


WAYS = {
    "fused projections": DitChoices(fuses_qkv=True),
    "rows of the feed-forward": DitChoices(ops=Ops(mlp=mlp_rows)),
    "packed layers": DitChoices(packs_linear=True),
    "packed and fused": DitChoices(packs_linear=True, fuses_qkv=True),
    "packed feed-forward": DitChoices(packs_mlp=True),
    "all of them": DitChoices(packs_linear=True, fuses_qkv=True, packs_mlp=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", KINDS)
def test_the_fast_ways_of_a_network_keep_their_adapters(way, make):
    dit = make_dit()
    if (WAYS[way].packs_linear or WAYS[way].packs_mlp) and refuses_packed(dit.blocks[0].ffn.weights[0]):
        pytest.skip("this torch packs no weights")
    sets = [for_all(dit, make)]
    wanted = computed(with_merged(dit, sets))
    install(dit, WAYS[way])
    before = computed(dit)
    attach(dit, sets)
    assert distance(computed(dit), wanted) < TOLERANCE
    detach(dit)
    assert torch.equal(computed(dit), before)


@pytest.mark.parametrize("way", WAYS)
def test_several_at_once_in_the_fast_ways_of_a_network(way):
    dit = make_dit()
    if (WAYS[way].packs_linear or WAYS[way].packs_mlp) and refuses_packed(dit.blocks[0].ffn.weights[0]):
        pytest.skip("this torch packs no weights")
    sets = [for_all(dit, make, strength=0.4) for make in (a_loha, a_dora, a_lokr, a_dora_of_columns, a_difference)]
    wanted = computed(with_merged(dit, sets))
    install(dit, WAYS[way])
    before = computed(dit)
    attach(dit, sets)
    assert distance(computed(dit), wanted) < TOLERANCE
    attach(dit, [])
    assert torch.equal(computed(dit), before)


@pytest.mark.parametrize("tokens", [1 << 20, 5])
def test_a_feed_forward_of_quantized_weights_that_goes_by_rows_has_its_adapters(tokens, monkeypatch):
    monkeypatch.setattr("frameloom.ops.mlp._HIDDEN_BYTES", tokens * SMALL["ffn_dim"] * 4)
    dit, plain = make_dit(), make_dit()
    sets = [for_all(dit, a_dora)]
    quantize(dit)
    take_plain_weights(plain, dit)
    install(dit, WAYS["rows of the feed-forward"])
    attach(dit, sets)
    assert distance(computed(dit), computed(with_merged(plain, sets))) < TOLERANCE


def test_a_delta_is_float32_whatever_the_dtypes():
    weight = torch.randn(8, 6, dtype=torch.bfloat16)
    adapter = Adapter(factors=Product(a=random(8, 2).half(), b=random(2, 6).to(torch.float8_e4m3fn)), scale=2.0)
    assert delta(adapter, weight).dtype == torch.float32
    assert torch.equal(delta(adapter, weight), 2 * (adapter.factors.a.float() @ adapter.factors.b.float()))
    assert delta(adapter, weight.double()).dtype == torch.float64


def test_prompts_read_once_and_both_branches_at_once_see_the_adapters():
    dit = make_dit()
    sets = [for_all(dit, a_lora)]
    wanted = computed(with_merged(dit, sets))
    install(dit, DitChoices(loop=LoopChoices(prompt_once=True, shared_branches=True), collapses_padding=True))
    attach(dit, sets)
    assert distance(computed(dit), wanted) < TOLERANCE
