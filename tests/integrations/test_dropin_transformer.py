"""Transformers of Diffusers whose blocks compute by ours: the numbers of the untouched ones, class by class."""

import copy
import gc

import pytest
import torch
from tiny_transformers import TEXT_TOKENS, TINY, WORDS, compute, give_back, take

from frameloom.integrations.diffusers.swap import held_by, is_swapped
from frameloom.ops.registry import BF16_SLACK, ROUNDING_FP32, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*should be kept in float32.*")
NAMES = pytest.mark.parametrize("name", TINY)
WITH_OUR_FORWARD = "wan", "wan with image", "wan with times of tokens", "chronoedit"


@NAMES
@pytest.mark.parametrize("batch", [1, 2])
def test_float32_is_the_untouched_transformer_but_for_rounding(name, batch):
    tiny = TINY[name]
    model, inputs = tiny.make(), tiny.inputs(batch=batch)
    expected = compute(model, inputs)
    entry = take(model)
    assert entry.taken
    assert f"{4 if name == 'vace' else 2} blocks by" in entry.what
    first, second = compute(model, inputs), compute(model, inputs)
    assert relative_error(first, expected) <= ROUNDING_FP32
    assert torch.equal(first, second)


@NAMES
def test_the_report_says_where_padding_is_computed_once(name):
    said = "of a text's padding one position is computed, where the text is on the CPU"
    assert said in take(TINY[name].make()).what
    assert said not in take(TINY[name].make(), "bitwise").what


@NAMES
def test_bfloat16_loses_no_more_than_the_untouched_transformer(name):
    tiny = TINY[name]
    wide = tiny.make()
    narrow = tiny.make(dtype=torch.bfloat16)
    for parameter, stored in zip(wide.parameters(), narrow.parameters(), strict=True):
        parameter.data = stored.data.float()  # the reference: the same weights, computed without rounding
    inputs = tiny.inputs(dtype=torch.bfloat16)
    exact = compute(wide, {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    plain = relative_error(compute(narrow, inputs), exact)
    take(narrow)
    assert relative_error(compute(narrow, inputs), exact) <= BF16_SLACK * plain


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_has_the_very_bits(name, dtype):
    tiny = TINY[name]
    model, inputs = tiny.make(dtype=dtype), tiny.inputs(batch=2, dtype=dtype)
    expected = compute(model, inputs)
    take(model, "bitwise")
    for _ in range(2):
        assert torch.equal(compute(model, inputs), expected)


@NAMES
def test_given_back_it_is_what_it_was(name):
    tiny = TINY[name]
    model, inputs = tiny.make(), tiny.inputs()
    expected, kinds = compute(model, inputs), [type(module) for module in model.modules()]
    before = {key: (value.data_ptr(), value.stride()) for key, value in model.state_dict().items()}
    take(model)
    compute(model, inputs)
    assert {key: (value.data_ptr(), value.stride()) for key, value in model.state_dict().items()} == before
    give_back(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(compute(model, inputs), expected)


@NAMES
def test_every_part_of_every_block_is_ours(name):
    model = TINY[name].make()
    take(model)
    for block in [*model.blocks, *getattr(model, "vace_blocks", ())]:
        assert all(is_swapped(part) for part in (block, block.attn1, block.attn2, block.ffn))
    assert is_swapped(model.rope)
    assert is_swapped(model.condition_embedder.text_embedder)
    assert is_swapped(model) == (name.startswith("wan") or name == "chronoedit")


@NAMES
def test_nothing_is_left_to_diffusers_but_what_is_listed(name, caplog):
    tiny = TINY[name]
    model = tiny.make()
    take(model)
    with caplog.at_level("INFO", logger="frameloom"):
        compute(model, tiny.inputs())
    said = [line for line in caplog.messages if "as Diffusers has it" in line]
    masked = ["SkyReelsV2Attention computes as Diffusers has it: there is a mask on the attention"]
    assert said == (masked if name == "skyreels by blocks of frames" else [])


@pytest.mark.parametrize("name", WITH_OUR_FORWARD)
def test_another_text_at_the_same_place_is_another_text(name):
    tiny = TINY[name]
    model, inputs = tiny.make(), tiny.inputs()
    plain = copy.deepcopy(model)
    take(model)
    text = inputs["encoder_hidden_states"]
    compute(model, inputs)
    text[:, :WORDS].mul_(-1)
    assert relative_error(compute(model, inputs), compute(plain, inputs)) <= ROUNDING_FP32
    text[:, WORDS : WORDS + 5] = 1.0  # a longer one
    assert relative_error(compute(model, inputs), compute(plain, inputs)) <= ROUNDING_FP32
    others = tiny.inputs(seed=2)
    assert relative_error(compute(model, others), compute(plain, others)) <= ROUNDING_FP32


@pytest.mark.parametrize("name", WITH_OUR_FORWARD)
@pytest.mark.parametrize(("exactness", "read"), [("rounding", WORDS + 1), ("bitwise", TEXT_TOKENS)])
def test_of_the_padding_one_position_is_computed_and_as_many_are_handed_on(name, exactness, read):
    tiny = TINY[name]
    model, inputs = tiny.make(), tiny.inputs()
    take(model, exactness)
    seen = []
    model.blocks[1].attn2.to_k.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))
    model.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[1].shape[1]))
    compute(model, inputs)
    images = 0 if "encoder_hidden_states_image" not in inputs else 7
    assert seen == [TEXT_TOKENS + images, read]


@pytest.mark.parametrize("name", ["wan", "wan with times of tokens", "chronoedit", "skyreels"])
def test_latents_of_other_sizes_have_other_positions(name):
    tiny = TINY[name]
    model, inputs = tiny.make(), tiny.inputs()
    plain = copy.deepcopy(model)
    take(model)
    sizes = [(3, 6, 10), (2, 6, 10), (3, 10, 6), (1, 6, 4), (4, 2, 2), (3, 2, 8)]
    for frames, height, width in (*sizes, sizes[0]):
        x = torch.randn(1, inputs["hidden_states"].shape[1], frames, height, width)
        times = (
            inputs["timestep"] if inputs["timestep"].ndim == 1 else torch.full((1, frames * height * width // 4), 9.0)
        )
        given = inputs | {"hidden_states": x, "timestep": times}
        assert relative_error(compute(model, given), compute(plain, given)) <= ROUNDING_FP32


def test_nothing_of_a_text_is_held_after_a_forward():
    tiny = TINY["wan with image"]
    model = tiny.make()
    take(model)
    paddings = held_by(model.blocks[0].attn2).ways.paddings
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(len(paddings)))
    compute(model, tiny.inputs())
    gc.collect()
    assert seen == [2]
    assert len(paddings) == 0


def test_weights_that_changed_are_read_again():
    tiny = TINY["wan"]
    model, inputs = tiny.make(), tiny.inputs()
    plain = copy.deepcopy(model)
    take(model)
    compute(model, inputs)
    for network in (model, plain):
        with torch.no_grad():
            network.blocks[1].attn2.to_k.weight.mul_(-2)
            network.condition_embedder.text_embedder.linear_1.bias.add_(1)
    assert relative_error(compute(model, inputs), compute(plain, inputs)) <= ROUNDING_FP32
    for network in (model, plain):
        network.to(torch.bfloat16)
    inputs = tiny.inputs(dtype=torch.bfloat16)
    assert relative_error(compute(model, inputs).float(), compute(plain, inputs).float()) <= 1e-2
