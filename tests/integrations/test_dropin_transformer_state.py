"""Weights and prompts that change between two calls, in ways that torch counts and in ways that it does not."""

import copy

import pytest
import torch
from diffusers.training_utils import EMAModel
from tiny_transformers import TINY, compute, take

from frameloom.ops.registry import ROUNDING_FP32, relative_error

NAMES = pytest.mark.parametrize("name", ["wan", "wan with image", "skyreels", "vace"])


def agree(plain, model, inputs):
    """Both compute the same. What came out."""
    expected = compute(plain, inputs)
    assert relative_error(compute(model, inputs), expected) <= ROUNDING_FP32
    return expected


def pair(name):
    """The same transformer untouched and taken, both used once, and inputs that stay the same objects."""
    tiny = TINY[name]
    plain, model, inputs = tiny.make(), tiny.make(), tiny.inputs()
    assert take(model).taken
    return plain, model, inputs, agree(plain, model, inputs)


@NAMES
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_an_optimizer(name, fused):
    plain, model, inputs, before = pair(name)
    for network in (plain, model):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.02, fused=fused)
        network(**inputs).sample.square().mean().backward()
        optimizer.step()
    assert relative_error(agree(plain, model, inputs), before) > 1e-2


@NAMES
def test_averaged_weights_that_come_and_go(name):
    plain, model, inputs, before = pair(name)
    averages = [(EMAModel(network.parameters()), network) for network in (plain, model)]
    for average, network in averages:
        for shadow in average.shadow_params:
            shadow.mul_(1.5)
        average.store(network.parameters())
        average.copy_to(network.parameters())
    assert relative_error(agree(plain, model, inputs), before) > 1e-2
    for average, network in averages:
        average.restore(network.parameters())
    assert torch.equal(agree(plain, model, inputs), before)


@NAMES
@pytest.mark.parametrize(
    "place", ["blocks.0.attn2.to_k", "blocks.1.attn2.norm_k", "condition_embedder.text_embedder.linear_2"]
)
def test_numbers_that_are_written_past_torch_s_count(name, place):
    plain, model, inputs, before = pair(name)
    for network in (plain, model):
        weight = network.get_submodule(place).weight
        count = weight._version
        weight.data += 0.5 * torch.linspace(-1, 1, weight.numel()).reshape(weight.shape)
        assert weight._version == count
    assert relative_error(agree(plain, model, inputs), before) > 1e-3


@NAMES
def test_a_prompt_that_is_written_to_through_numpy(name):
    plain, model, inputs, _ = pair(name)
    kept = inputs["encoder_hidden_states"].numpy().copy()
    inputs["encoder_hidden_states"] = torch.from_numpy(kept)
    before = agree(plain, model, inputs)
    kept[:, :5] *= -2
    other = agree(plain, model, inputs)
    assert relative_error(other, before) > 1e-3
    kept[:, 100:110] = 1  # a longer one
    assert relative_error(agree(plain, model, inputs), other) > 1e-3


@NAMES
def test_tables_of_positions_that_are_written_to(name):
    plain, model, inputs, before = pair(name)
    for network in (plain, model):
        for table in network.rope.buffers():
            table.data.mul_(0.5)
    assert relative_error(agree(plain, model, inputs), before) > 1e-3


def test_a_text_of_another_length_beside_an_image():
    plain, model, inputs, _ = pair("wan with image")
    inputs["encoder_hidden_states"] = torch.cat((inputs["encoder_hidden_states"], torch.zeros(1, 8, 20)), dim=1)
    agree(plain, model, inputs)


def test_a_copy_shares_nothing():
    plain, model, inputs, before = pair("wan")
    other = copy.deepcopy(model)
    other.blocks[0].attn2.to_v.weight.data.neg_()
    assert torch.equal(agree(plain, model, inputs), before)
