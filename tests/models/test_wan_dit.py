"""The DiT against the reference network of Diffusers, on small random checkpoints of every kind Wan ships."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from checkpoints import TRANSFORMER
from diffusers import WanTransformer3DModel

from frameloom.errors import CheckpointError, RequestError
from frameloom.models.dit_block import Attention, SelfAttention
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import ROPE_TABLES_KEPT, WanDiT

TEXT_TOKENS = 512  # the reference tells image from text by this very number
CLIP_TOKENS = 11


def small_spec(**changes):
    return TransformerSpec(**(TRANSFORMER | changes))


@dataclass(frozen=True)
class Case:
    """A spec, its latent (batch, frames, height, width), and whether each token has a timestep of its own."""

    spec: TransformerSpec
    size: tuple[int, int, int, int]
    per_token: bool = False


def with_clip(**changes):
    spec = small_spec(in_channels=9, image_dim=24, added_kv_proj_dim=1, **changes)
    return dataclasses.replace(spec, added_kv_proj_dim=spec.dim)


CASES = {
    "t2v": Case(small_spec(), (1, 3, 10, 14)),
    "t2v-batch": Case(small_spec(num_attention_heads=3, attention_head_dim=10, freq_dim=18), (3, 1, 6, 14)),
    "t2v-head128": Case(small_spec(num_attention_heads=1, attention_head_dim=128, eps=1e-3), (1, 5, 4, 6)),
    "t2v-patch144": Case(small_spec(patch_size=(1, 4, 4)), (3, 3, 8, 20)),
    "t2v-patch212": Case(small_spec(patch_size=(2, 1, 2), attention_head_dim=16), (1, 4, 5, 6)),
    "t2v-no-cross-norm": Case(small_spec(cross_attn_norm=False), (1, 3, 10, 14)),
    "i2v-clip": Case(with_clip(), (1, 3, 6, 14)),
    "i2v-clip-batch": Case(with_clip(num_attention_heads=3, cross_attn_norm=False), (3, 2, 6, 4)),
    "flf2v": Case(with_clip(pos_embed_seq_len=2 * CLIP_TOKENS), (1, 3, 6, 14)),
    "flf2v-batch": Case(with_clip(pos_embed_seq_len=2 * CLIP_TOKENS), (3, 2, 6, 4)),
    "i2v-22": Case(small_spec(in_channels=9), (1, 3, 6, 10)),
    "ti2v": Case(small_spec(in_channels=6, out_channels=6), (1, 3, 6, 10), per_token=True),
    "ti2v-batch": Case(small_spec(num_attention_heads=3), (3, 2, 4, 10), per_token=True),
}


def make_reference(spec, seed=0):
    """Random weights under which the prompt, the image and the timestep all matter."""
    torch.manual_seed(seed)
    reference = WanTransformer3DModel(**dataclasses.asdict(spec))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(random_parameter(name, parameter))
    return reference.eval()


def random_parameter(name, parameter):
    noise = torch.randn_like(parameter)
    if name.endswith("weight") and parameter.ndim == 1:
        return (3.0 if "attn2.norm" in name else 1.0) + 0.2 * noise  # sharp cross-attention
    if name.endswith("weight"):
        return noise * (2.0 if ".attn2." in name else 1.0) / parameter[0].numel() ** 0.5
    return 0.5 * noise


def make_inputs(case, seed=1):
    torch.manual_seed(seed)
    batch, frames, height, width = case.size
    spec = case.spec
    inputs = {
        "x": torch.randn(batch, spec.in_channels, frames, height, width),
        "timestep": random_timestep(case),
        "text": torch.randn(batch, TEXT_TOKENS, spec.text_dim),
        "image": None,
    }
    if spec.image_dim is not None:
        frames_given = 2 if spec.pos_embed_seq_len else 1
        inputs["image"] = torch.randn(frames_given * batch, CLIP_TOKENS, spec.image_dim)
    return inputs


def random_timestep(case):
    batch, *size = case.size
    if not case.per_token:
        return torch.tensor([999.0, 41.5, 500.25])[:batch]
    tokens = torch.Size(size).numel() // case.spec.patch_volume
    timestep = torch.tensor([[999.0], [41.5], [500.25]])[:batch].repeat(1, tokens)
    timestep[:, : tokens // size[0]] = 0  # the first latent frame is given, hence clean
    return timestep


def make_ours(reference, spec):
    ours = WanDiT(spec)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours.eval()


@torch.no_grad()
def run_ours(model, inputs):
    return model(inputs["x"], inputs["timestep"], inputs["text"], inputs["image"])


@torch.no_grad()
def run_reference(model, inputs, dtype=torch.float32):
    image = inputs["image"]
    return model(
        inputs["x"].to(dtype),
        inputs["timestep"],
        inputs["text"].to(dtype),
        None if image is None else image.to(dtype),
        return_dict=False,
    )[0]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.mark.parametrize("seed", [0, 7])
def test_equals_the_reference(case, seed):
    reference = make_reference(case.spec, seed)
    inputs = make_inputs(case, seed + 1)
    expected = run_reference(reference, inputs)
    velocity = run_ours(make_ours(reference, case.spec), inputs)
    assert velocity.shape == expected.shape == (inputs["x"].shape[0], case.spec.out_channels, *case.size[1:])
    assert relative(velocity, expected) <= 1e-5


def test_every_input_matters(case):
    model = make_ours(make_reference(case.spec), case.spec)
    inputs = make_inputs(case)
    others = {name: None if value is None else value.roll(1, -1) for name, value in inputs.items()}
    others["timestep"] = inputs["timestep"] * 0.5 + 100
    velocity = run_ours(model, inputs)
    for name in inputs:
        if inputs[name] is not None:
            changed = run_ours(model, inputs | {name: others[name]})
            assert relative(changed, velocity) > 1e-2, f"{name} hardly changes the output"


def test_each_sample_is_computed_on_its_own():
    case = CASES["flf2v-batch"]
    model = make_ours(make_reference(case.spec), case.spec)
    inputs = make_inputs(case)
    alone = {
        name: value[2 * value.shape[0] // 3 :]  # the last of three, with its two images
        for name, value in inputs.items()
    }
    assert relative(run_ours(model, alone), run_ours(model, inputs)[2:]) <= 1e-5


def test_first_and_last_image_may_come_joined():
    case = CASES["flf2v-batch"]
    model = make_ours(make_reference(case.spec), case.spec)
    inputs = make_inputs(case)
    joined = inputs | {"image": inputs["image"].reshape(3, 2 * CLIP_TOKENS, -1)}
    assert torch.equal(run_ours(model, joined), run_ours(model, inputs))


def test_one_timestep_for_all_equals_the_same_for_each_token():
    case = CASES["ti2v-batch"]
    model = make_ours(make_reference(case.spec), case.spec)
    inputs = make_inputs(case)
    shared = inputs["timestep"][:, -1]
    repeated = shared[:, None].expand_as(inputs["timestep"])
    expected = run_ours(model, inputs | {"timestep": shared})
    assert relative(run_ours(model, inputs | {"timestep": repeated}), expected) <= 1e-6


def test_state_dict_loads_in_the_reference(case):
    torch.manual_seed(3)
    ours = WanDiT(case.spec)
    reference = WanTransformer3DModel(**dataclasses.asdict(case.spec))
    reference.load_state_dict(ours.state_dict(), strict=True)
    inputs = make_inputs(case)
    assert relative(run_ours(ours, inputs), run_reference(reference, inputs)) <= 1e-5


@pytest.mark.parametrize("name", ["t2v", "t2v-head128", "i2v-clip", "flf2v-batch", "ti2v-batch"])
def test_bf16_is_as_accurate_as_the_reference(name, tmp_path):
    case = CASES[name]
    exact = make_reference(case.spec)
    exact.save_pretrained(tmp_path)
    narrow = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = load_in_bf16(exact.state_dict(), case.spec)
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in narrow.state_dict().items()}
    inputs = make_inputs(case)
    expected = run_reference(exact, inputs)
    velocity = run_ours(ours, inputs)
    assert velocity.dtype == ours.dtype == torch.bfloat16
    reference_error = relative(run_reference(narrow, inputs, torch.bfloat16), expected)
    assert 1e-4 < reference_error < 0.1  # a real bf16 run, and not noise
    assert relative(velocity, expected) <= 1.1 * reference_error


def load_in_bf16(state_dict, spec):
    with torch.device("meta"):
        model = WanDiT(spec)
    narrow = {k: v if WanDiT.keep_in_fp32(k) else v.bfloat16() for k, v in state_dict.items()}
    model.load_state_dict(narrow, strict=True, assign=True)
    return model.eval()


def test_the_fp32_parts_are_matched_by_whole_names():
    assert WanDiT.keep_in_fp32("condition_embedder.time_embedder.linear_1.weight")
    assert WanDiT.keep_in_fp32("blocks.3.norm2.bias")
    assert WanDiT.keep_in_fp32("scale_shift_table")
    assert not WanDiT.keep_in_fp32("blocks.3.attn1.norm_q.weight")
    assert not WanDiT.keep_in_fp32("condition_embedder.time_proj.weight")


def test_built_on_meta_and_assigned_it_runs(case):
    reference = make_reference(case.spec)
    with torch.device("meta"):
        model = WanDiT(case.spec)
    assert list(model.buffers()) == []
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(reference.state_dict(), strict=True, assign=True)
    inputs = make_inputs(case)
    assert torch.equal(run_ours(model, inputs), run_ours(make_ours(reference, case.spec), inputs))


def test_float64_is_float64_throughout():
    case = CASES["i2v-clip"]
    reference = make_reference(case.spec)
    expected = run_reference(reference, make_inputs(case))
    double = make_ours(reference, case.spec).double()
    velocity = run_ours(double, make_inputs(case))
    assert velocity.dtype == torch.float64
    assert relative(velocity, expected) <= 1e-5


@pytest.mark.parametrize(("name", "calls_per_block"), [("t2v", 2), ("i2v-clip", 3)])
def test_attend_can_be_replaced(name, calls_per_block):
    case = CASES[name]
    model = make_ours(make_reference(case.spec), case.spec)
    inputs = make_inputs(case)
    keys, expected = set(model.state_dict()), run_ours(model, inputs)
    calls = []

    def recorded(inner):
        def attend(q_BLHK, k_BSHK, v_BSHK, *bias):
            calls.append((q_BLHK.shape, k_BSHK.shape))
            return inner(q_BLHK, k_BSHK, v_BSHK, *bias)

        return attend

    modules = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(modules) == 2 * case.spec.num_layers
    assert sum(isinstance(module, SelfAttention) for module in modules) == case.spec.num_layers
    for module in modules:
        module.attend = recorded(module.attend)
    assert torch.equal(run_ours(model, inputs), expected)
    assert len(calls) == calls_per_block * case.spec.num_layers
    assert all(len(query) == 4 and query[2:] == key[2:] for query, key in calls)
    assert set(model.state_dict()) == keys


def test_run_blocks_can_be_replaced():
    case = CASES["i2v-clip"]
    model = make_ours(make_reference(case.spec), case.spec)
    inputs = make_inputs(case)
    keys, inner, seen = set(model.state_dict()), model.run_blocks, []

    def skip_the_last(blocks, x_BLD, step, prompts):
        seen.append((step, *prompts))
        return inner(blocks[:-1], x_BLD, step, prompts)

    expected = run_ours(model, inputs)
    model.run_blocks = skip_the_last
    shortened = run_ours(model, inputs)
    assert relative(shortened, expected) > 1e-2
    assert set(model.state_dict()) == keys
    ((step, prompt),) = seen
    tokens = 3 * 3 * 7
    assert [m.shape for m in step.modulation(1)] == [(1, 1, 64)] * 6
    assert step.rope.cos_LP.shape == step.rope.sin_LP.shape == (tokens, 16)
    assert len(prompt.of_blocks) == case.spec.num_layers
    assert prompt.of_blocks[0].text[0].shape == (1, TEXT_TOKENS, 2, 32)
    assert prompt.of_blocks[0].image[1].shape == (1, CLIP_TOKENS, 2, 32)


def test_rotary_tables_are_kept_but_bounded():
    case = CASES["t2v"]
    model = WanDiT(case.spec).eval()
    inputs = make_inputs(case)
    expected = run_ours(model, inputs)
    first = next(iter(model._rope_tables.values()))
    run_ours(model, inputs)
    assert next(iter(model._rope_tables.values())) is first
    for width in range(2, 2 * ROPE_TABLES_KEPT + 4, 2):
        run_ours(model, inputs | {"x": torch.randn(1, 4, 3, 4, width)})
    assert len(model._rope_tables) == ROPE_TABLES_KEPT
    assert torch.equal(run_ours(model, inputs), expected)


def test_training_after_inference_mode_uses_the_same_table():
    case = CASES["t2v"]
    model = WanDiT(case.spec)
    inputs = make_inputs(case)
    with torch.inference_mode():
        model(inputs["x"], inputs["timestep"], inputs["text"])
    model(inputs["x"], inputs["timestep"], inputs["text"]).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((3, 9, 14), "latent height 9 is not a multiple of 2 .*; use 8 or 10"),
        ((3, 10, 1), "latent width 1 is not a multiple of 2 .*; use 2"),
        ((3, 10, 34), "latent width 34 is past the last position .*; use 32 or less"),
        ((17, 10, 14), "latent frames 17 is past the last position .*; use 16 or less"),
    ],
)
def test_a_size_that_cannot_be_cut_is_refused_before_any_work(size, message):
    with torch.device("meta"):
        model = WanDiT(small_spec())
    with pytest.raises(RequestError, match=message):
        model.token_grid(*size)
    with pytest.raises(RequestError, match=message):
        model(torch.zeros(1, 4, *size), torch.zeros(1), torch.zeros(1, 5, 20))
    assert model.token_grid(3, 10, 14) == (3, 5, 7)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("t2v", {"x": torch.zeros(1, 5, 3, 10, 14)}, "5 channels; this checkpoint takes 4"),
        ("t2v", {"timestep": torch.zeros(2)}, r"shape \(2,\); give \(1,\) or \(1, 105\)"),
        ("ti2v", {"timestep": torch.zeros(1, 44)}, r"shape \(1, 44\); give \(1,\) or \(1, 45\)"),
        ("t2v", {"image": torch.zeros(1, 11, 24)}, "no CLIP image branch"),
        ("i2v-clip", {"image": None}, "needs CLIP image features"),
    ],
)
def test_inputs_that_do_not_fit_the_checkpoint_are_refused(name, change, message):
    case = CASES[name]
    with pytest.raises(RequestError, match=message):
        run_ours(WanDiT(case.spec), make_inputs(case) | change)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_head_dim": 31}, "attention_head_dim is 31"),
        ({"image_dim": 24}, "added_kv_proj_dim None; give null for both, or 64"),
        ({"added_kv_proj_dim": 64}, "image_dim None does not go with"),
        ({"image_dim": 24, "added_kv_proj_dim": 63}, "added_kv_proj_dim 63"),
    ],
)
def test_an_impossible_spec_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        WanDiT(small_spec(**changes))
