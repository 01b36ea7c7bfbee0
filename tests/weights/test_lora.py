"""Files of adapters: every dialect makes the weights that its formula, written out here in float64, makes."""

import json
import logging

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from frameloom.config import lora as parsed
from frameloom.errors import CheckpointError, RequestError
from frameloom.models.adapters import merge
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.vace import VaceDiT
from frameloom.models.wan_dit import WanDiT
from frameloom.types import Lora
from frameloom.weights.lora import read_loras
from frameloom.weights.lora_keys import expert_of

WIDTH, HIDDEN, RANK, STRENGTH = 32, 48, 3, 0.7
SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 24,
    "freq_dim": 16, "ffn_dim": HIDDEN, "num_layers": 2,
}  # fmt: skip
MODELS = {
    "t2v": TransformerSpec(**SMALL),
    "i2v": TransformerSpec(**SMALL | {"in_channels": 9, "image_dim": 20, "added_kv_proj_dim": WIDTH}),
}
# Linear layers of one block and around the blocks: the original name, and the native one.
OF_BLOCK = {
    **{f"self_attn.{part}": f"attn1.to_{part}" for part in "qkv"},
    **{f"cross_attn.{part}": f"attn2.to_{part}" for part in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
OF_IMAGE = {"cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj"}
AROUND = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
AROUND_IMAGE = {
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}
# Prefix, whether names are original, what stands between their parts, the endings of the two factors.
DIALECTS = {
    "peft": ("base_model.model.", False, ".", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("transformer.", False, ".", ".lora_A.weight", ".lora_B.weight"),
    "diffusers, old": ("unet.", False, ".", "_lora.down.weight", "_lora.up.weight"),
    "comfyui": ("diffusion_model.", True, ".", ".lora_down.weight", ".lora_up.weight"),
    "all in one": ("model.diffusion_model.", True, ".", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_unet_", True, "_", ".lora_down.weight", ".lora_up.weight"),
    "videox-fun": ("lora_unet__", True, "_", ".lora_down.weight", ".lora_up.weight"),
    "kohya on diffusers": ("lora_unet_", False, "_", ".lora_down.weight", ".lora_up.weight"),
    "lightx2v": ("", True, ".", ".lora_down.weight", ".lora_up.weight"),
    "diffsynth": ("pipe.dit.", True, ".", ".lora_A.default.weight", ".lora_B.default.weight"),
    "bare": ("model.", True, ".", ".lora_A", ".lora_B"),
    "linear layer": ("diffusion_model.", True, ".", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "lora.down": ("transformer.", False, ".", ".lora.down.weight", ".lora.up.weight"),
}


def layers_of(model):
    """Native names of all linear layers, by the original ones."""
    images = model == "i2v"
    found = AROUND | (AROUND_IMAGE if images else {})
    for block in range(SMALL["num_layers"]):
        parts = OF_BLOCK | (OF_IMAGE if images else {})
        found |= {f"blocks.{block}.{original}": f"blocks.{block}.{native}" for original, native in parts.items()}
    return found


@pytest.fixture(scope="module")
def weights():
    """Random weights of each model, by name."""
    found = {}
    for model, spec in MODELS.items():
        with on_meta():
            shapes = {name: tuple(value.shape) for name, value in WanDiT(spec).state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        found[model] = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return found


@pytest.fixture
def write(tmp_path):
    def save(tensors, name="lora.safetensors", **metadata):
        path = tmp_path / name
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata or None)
        return path

    return save


def shapes_of(weights):
    return {name: tuple(value.shape) for name, value in weights.items()}


def read(path, weights, *, strength=STRENGTH, **options):
    (found,) = read_loras([Lora(path=str(path), strength=strength)], shapes_of(weights), **options)
    return found


def random(*shape, dtype=torch.float32):
    return (torch.randn(*shape) / 4).to(dtype)


def assert_changed(adapters, weights, expected):
    """The named weights have become those expected (float64, rounded once), and the others are as they were."""
    sets = adapters if isinstance(adapters, list) else [adapters]
    for name, weight in weights.items():
        found = merge(sets, name, weight)
        if name not in expected:
            assert found is weight, name
            continue
        assert found.dtype == weight.dtype
        assert found.shape == weight.shape
        wanted = expected[name]
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 1e-6, (name, float(error))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_of_lora_changes_every_linear_layer(dialect, model, weights, write):
    prefix, is_original, dot, down_ending, up_ending = DIALECTS[dialect]
    torch.manual_seed(1)
    tensors, expected = {}, {}
    for index, (original, native) in enumerate(layers_of(model).items()):
        weight = weights[model][f"{native}.weight"]
        rank = 1 + index % 4  # ranks differ between layers
        down, up = random(rank, weight.shape[1], dtype=torch.bfloat16), random(weight.shape[0], rank)
        name = prefix + (original if is_original else native).replace(".", dot)
        tensors |= {name + down_ending: down, name + up_ending: up}
        scale = 1.0
        if index % 3:
            scale = 0.5 * index / rank
            tensors[f"{name}.alpha"] = torch.tensor(0.5 * index)
        expected[f"{native}.weight"] = weight.double() + STRENGTH * scale * (up.double() @ down.double())
    adapters = read(write(tensors), weights[model])
    assert adapters.unused == ()
    assert adapters.num_keys == len(tensors)
    assert_changed(adapters, weights[model], expected)


@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
def test_what_diffusers_makes_of_a_file_changes_the_same_weights(dialect, weights, write):
    prefix, _, dot, down_ending, up_ending = DIALECTS[dialect]
    convert = {
        "kohya": lora_conversion_utils._convert_musubi_wan_lora_to_diffusers,
        "comfyui": lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers,
    }[dialect]
    tensors = {}
    for original, native in layers_of("i2v").items():
        if original.startswith("blocks."):
            outputs, inputs = weights["i2v"][f"{native}.weight"].shape
            name = prefix + original.replace(".", dot)
            tensors |= {name + down_ending: random(RANK, inputs), name + up_ending: random(outputs, RANK)}
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    ours = read(write(tensors), weights["i2v"])
    theirs = read(write(convert(dict(tensors)), "converted.safetensors"), weights["i2v"])
    assert ours.unused == theirs.unused == ()
    assert ours.changes.keys() == theirs.changes.keys()
    for name in ours.changes:
        found, wanted = (merge([adapters], name, weights["i2v"][name]) for adapters in (ours, theirs))
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5), name


def tucker(core, left, right):
    """sum over m, n of core[m, n, ...] left[m, o] right[n, i]."""
    return torch.einsum("mn...,mo,ni->oi...", core, left, right)


def test_loha_of_layers_and_of_the_patches(weights, write):
    weights, q, patches = weights["t2v"], "blocks.1.attn1.to_q.weight", "patch_embedding.weight"
    one, two = (random(WIDTH, RANK).double() for _ in "12")
    three, four = (random(RANK, WIDTH).double() for _ in "34")
    a, b = (random(RANK, WIDTH).double() for _ in "ab")
    c, d = (random(RANK, 4).double() for _ in "cd")
    t1, t2 = (random(RANK, RANK, 1, 2, 2).double() for _ in "12")
    root, conv = "lora_unet_blocks_1_self_attn_q", "lora_unet_patch_embedding"
    tensors = {
        f"{root}.hada_w1_a": one, f"{root}.hada_w1_b": three, f"{root}.hada_w2_a": two, f"{root}.hada_w2_b": four,
        f"{root}.alpha": torch.tensor(2.0),
        f"{conv}.hada_w1_a": a, f"{conv}.hada_w1_b": c, f"{conv}.hada_t1": t1,
        f"{conv}.hada_w2_a": b, f"{conv}.hada_w2_b": d, f"{conv}.hada_t2": t2,
    }  # fmt: skip
    expected = {
        q: weights[q].double() + STRENGTH * 2 / RANK * (one @ three) * (two @ four),
        patches: weights[patches].double() + STRENGTH * tucker(t1, a, c) * tucker(t2, b, d),
    }
    adapters = read(write(tensors), weights)
    assert adapters.unused == ()
    assert_changed(adapters, weights, expected)


LOKR = {
    "both whole": {"lokr_w1": (4, 8), "lokr_w2": (12, 4)},
    "second in factors": {"lokr_w1": (4, 8), "lokr_w2_a": (12, RANK), "lokr_w2_b": (RANK, 4)},
    "first in factors": {"lokr_w1_a": (4, RANK), "lokr_w1_b": (RANK, 8), "lokr_w2": (12, 4)},
    "both in factors": {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (12, 2), "lokr_w2_b": (2, 4)},
}


@pytest.mark.parametrize("form", LOKR)
def test_lokr_of_a_layer_in_every_form(form, weights, write):
    weights, name = weights["t2v"], "blocks.0.ffn.net.0.proj.weight"
    parts = {part: random(*shape) for part, shape in LOKR[form].items()}
    wide = {part: value.double() for part, value in parts.items()}
    first = wide["lokr_w1"] if "lokr_w1" in wide else wide["lokr_w1_a"] @ wide["lokr_w1_b"]
    second = wide["lokr_w2"] if "lokr_w2" in wide else wide["lokr_w2_a"] @ wide["lokr_w2_b"]
    ranks = [parts[part].shape[0] for part in ("lokr_w2_b", "lokr_w1_b") if part in parts]
    scale = 5.0 / ranks[0] if ranks else 1.0  # LyCORIS: without factors alpha means nothing
    tensors = {f"diffusion_model.blocks.0.ffn.0.{part}": value for part, value in parts.items()}
    tensors["diffusion_model.blocks.0.ffn.0.alpha"] = torch.tensor(5.0)
    adapters = read(write(tensors), weights)
    assert adapters.unused == ()
    product = (first[:, None, :, None] * second[None, :, None, :]).reshape(HIDDEN, WIDTH)
    assert_changed(adapters, weights, {name: weights[name].double() + STRENGTH * scale * product})


def test_lokr_and_lora_with_a_core_of_the_patches(weights, write):
    weights, name = weights["t2v"], "patch_embedding.weight"
    w1, a, b, t2 = random(8, 2), random(RANK, 4), random(RANK, 2), random(RANK, RANK, 1, 2, 2)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t2}
    second = tucker(t2.double(), a.double(), b.double())
    product = torch.einsum("ab,cdthw->acbdthw", w1.double(), second).reshape(weights[name].shape)
    adapters = read(write({f"patch_embedding.{part}": value for part, value in parts.items()}), weights)
    assert_changed(adapters, weights, {name: weights[name].double() + STRENGTH * product})

    up, down, mid = random(WIDTH, RANK, 1, 1, 1), random(RANK, 4, 1, 1, 1), random(RANK, RANK, 1, 2, 2)
    parts = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid}
    product = tucker(mid.double(), up.double().flatten(1).T, down.double().flatten(1))
    adapters = read(write({f"patch_embedding.{part}": value for part, value in parts.items()}), weights)
    assert_changed(adapters, weights, {name: weights[name].double() + STRENGTH * product})


def test_lora_of_the_patches_as_a_convolution(weights, write):
    weights, name = weights["i2v"], "patch_embedding.weight"
    up, down = random(WIDTH, RANK, 1, 1, 1), random(RANK, 9, 1, 2, 2)
    tensors = {"transformer.patch_embedding.lora_B.weight": up, "transformer.patch_embedding.lora_A.weight": down}
    product = (up.double().flatten(1) @ down.double().flatten(1)).view(weights[name].shape)
    adapters = read(write(tensors), weights)
    assert_changed(adapters, weights, {name: weights[name].double() + STRENGTH * product})


MAGNITUDES = {
    "dora_scale": (".dora_scale", (HIDDEN, 1), 1),
    "peft": (".lora_magnitude_vector.weight", (HIDDEN,), 1),
    "of columns": (".dora_scale", (1, WIDTH), 0),
}


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_dora_gives_the_sum_its_lengths(kind, weights, write):
    ending, shape, axis = MAGNITUDES[kind]
    weights, native = weights["t2v"], "blocks.0.ffn.net.0.proj"
    up, down, magnitude = random(HIDDEN, RANK), random(RANK, WIDTH), 1 + random(*shape).abs()
    root = "base_model.model." + native
    tensors = {
        f"{root}.lora_B.weight": up, f"{root}.lora_A.weight": down, root + ending: magnitude,
        f"{root}.alpha": torch.tensor(6.0),
    }  # fmt: skip
    weight = weights[f"{native}.weight"].double()
    direction = weight + 6 / RANK * up.double() @ down.double()
    lengths = direction.square().sum(axis, keepdim=True).sqrt()
    wanted = magnitude.double().reshape(lengths.shape) * direction / lengths
    adapters = read(write(tensors), weights)
    assert adapters.unused == ()
    assert_changed(adapters, weights, {f"{native}.weight": weight + STRENGTH * (wanted - weight)})


@pytest.mark.parametrize("shape", [(WIDTH,), (WIDTH, 1), (1, WIDTH), (1, 1), ()])
def test_a_norm_has_no_dora(shape, weights, write):
    parts = {"lora_up.weight": random(WIDTH, 2), "lora_down.weight": random(2, 1), "dora_scale": torch.ones(shape)}
    tensors = {f"blocks.0.norm3.{part}": value for part, value in parts.items()} | bias_of("")
    told = read(write(tensors), weights["t2v"]).unused
    assert len(told) == 3
    assert all("its magnitude is" in line for line in told)


def test_whole_weights_are_set_and_norms_of_lycoris_are_differences(weights, write):
    weights = weights["t2v"]
    value, w_norm, b_norm = random(WIDTH, WIDTH), random(WIDTH), random(WIDTH)
    root = "lora_unet_blocks_0_"
    tensors = {
        f"{root}self_attn_k.set_weight": value, f"{root}norm3.w_norm": w_norm, f"{root}norm3.b_norm": b_norm
    }  # fmt: skip
    names = "blocks.0.attn1.to_k.weight", "blocks.0.norm2.weight", "blocks.0.norm2.bias"
    k, weight, bias = (weights[name].double() for name in names)
    expected = k + STRENGTH * (value - k), weight + STRENGTH * w_norm, bias + STRENGTH * b_norm
    adapters = read(write(tensors), weights)
    assert adapters.unused == ()
    assert_changed(adapters, weights, dict(zip(names, expected, strict=True)))


def distilled(weights):
    """58 keys of one block and around it, as LightX2V's distilled files have them; and the weights they make."""
    block, native = "diffusion_model.blocks.0", "blocks.0"
    tensors, expected = {}, {}

    def adds(key, name, difference):
        tensors[key] = difference
        expected[name] = weights[name].double() + STRENGTH * difference.double()

    pairs = {f"{block}.{o}": f"{native}.{n}" for o, n in (OF_BLOCK | OF_IMAGE).items()}
    for original, name in pairs.items():
        adds(f"{original}.diff_b", f"{name}.bias", random(*weights[f"{name}.bias"].shape))
    pairs["diffusion_model.text_embedding.0"] = AROUND["text_embedding.0"]
    for original, name in pairs.items():
        outputs, inputs = weights[f"{name}.weight"].shape
        up, down = random(outputs, RANK), random(RANK, inputs)
        tensors |= {f"{original}.lora_up.weight": up, f"{original}.lora_down.weight": down}
        product = STRENGTH * up.double() @ down.double()
        expected[f"{name}.weight"] = weights[f"{name}.weight"].double() + product
    norms = {
        **{f"{block}.self_attn.norm_{part}": f"{native}.attn1.norm_{part}" for part in "qk"},
        **{f"{block}.cross_attn.norm_{part}": f"{native}.attn2.norm_{part}" for part in "qk"},
        f"{block}.cross_attn.norm_k_img": f"{native}.attn2.norm_added_k",
    }
    for original, name in norms.items():
        adds(f"{original}.diff", f"{name}.weight", random(*weights[f"{name}.weight"].shape))
    adds(f"{block}.diff_m", f"{native}.scale_shift_table", random(1, 6, WIDTH))
    image = "condition_embedder.image_embedder"
    both = {
        f"{block}.norm3": f"{native}.norm2",
        "diffusion_model.patch_embedding": "patch_embedding",
        "diffusion_model.head.head": "proj_out",
        "diffusion_model.img_emb.proj.0": f"{image}.norm1",
        "diffusion_model.img_emb.proj.1": f"{image}.ff.net.0.proj",
        "diffusion_model.img_emb.proj.3": f"{image}.ff.net.2",
        "diffusion_model.img_emb.proj.4": f"{image}.norm2",
    }
    for original, name in both.items():
        adds(f"{original}.diff", f"{name}.weight", random(*weights[f"{name}.weight"].shape))
        adds(f"{original}.diff_b", f"{name}.bias", random(*weights[f"{name}.bias"].shape))
    return tensors, expected


def test_a_distilled_file_of_58_keys_applies_all_of_them(weights, write, caplog):
    tensors, expected = distilled(weights["i2v"])
    assert len(tensors) == 58
    with caplog.at_level(logging.INFO):
        adapters = read(write(tensors), weights["i2v"])
    assert "58 of 58 keys" in caplog.text
    assert adapters.describe()["keys_used"] == 58
    assert_changed(adapters, weights["i2v"], expected)


def test_blocks_of_vace_have_their_loras_and_are_missed_where_there_are_none(weights, write):
    with on_meta():
        vace = VaceDiT(VaceSpec(**SMALL, vace_layers=(0,), vace_in_channels=6))
    shapes = {name: tuple(value.shape) for name, value in vace.state_dict().items()}
    names = {"before_proj": "proj_in", "after_proj": "proj_out", "self_attn.q": "attn1.to_q"}
    tensors = {f"vace_blocks.0.{name}.diff": random(WIDTH, WIDTH) for name in names}
    path = write({f"diffusion_model.{name}": value for name, value in tensors.items()} | bias_of("diffusion_model."))
    (adapters,) = read_loras([Lora(path=str(path))], shapes)
    assert adapters.unused == ()
    for name, native in names.items():
        stored = adapters.changes[f"vace_blocks.0.{native}.weight"].factors.a
        assert torch.equal(stored, tensors[f"vace_blocks.0.{name}.diff"])
    told = read(path, weights["t2v"]).unused
    assert len(told) == 3
    assert all(line.endswith(": this model has no VACE blocks") for line in told)


def test_what_does_not_fit_is_told_by_name_and_the_rest_applies(weights, write, caplog):
    caplog.set_level(logging.INFO, "frameloom")
    tensors, expected = distilled(weights["i2v"])
    tensors |= {
        "lora_te_text_model_encoder.lora_up.weight": random(4, 4),
        "something.else": random(3),
        "diffusion_model.blocks.7.ffn.0.diff_b": random(HIDDEN),
        "diffusion_model.blocks.1.ffn.0.lora_up.weight": random(HIDDEN, 2),
        "diffusion_model.blocks.1.ffn.2.alpha": torch.tensor(1.0),
        "diffusion_model.blocks.1.norm3.alpha": torch.tensor(1.0),
        "diffusion_model.blocks.1.norm3.diff": random(WIDTH + 1),
        "diffusion_model.blocks.1.self_attn.q.lora_up.weight": random(WIDTH, 2),
        "diffusion_model.blocks.1.self_attn.q.lora_down.weight": random(3, WIDTH),
        "diffusion_model.blocks.1.self_attn.norm_q.diff_b": random(WIDTH),
    }
    t2v = weights["t2v"]
    expected = {name: value for name, value in expected.items() if name in t2v and name != "patch_embedding.weight"}
    for name in expected:
        expected[name] = expected[name] - weights["i2v"][name].double() + t2v[name].double()
    adapters = read(write(tensors), t2v)
    assert_changed(adapters, t2v, expected)
    told = dict(line.split(": ", 1) for line in adapters.unused)
    assert told["diffusion_model.patch_embedding.diff"] == "it is for 32x9x1x2x2, and this model has 32x4x1x2x2"
    assert told["diffusion_model.img_emb.proj.0.diff"] == "this model has no image branch"
    assert told["lora_te_text_model_encoder.lora_up.weight"] == "it is for the text encoder, which stays as it is"
    assert told["something.else"] == "it is of no kind of adapter that is known"
    assert told["diffusion_model.blocks.7.ffn.0.diff_b"] == "this model has no such layer"
    assert told["diffusion_model.blocks.1.ffn.0.lora_up.weight"] == "its other half (lora_A or lora_down) is not there"
    assert told["diffusion_model.blocks.1.ffn.2.alpha"] == "what it belongs to is not there"
    assert told["diffusion_model.blocks.1.norm3.diff"] == "it is for 33, and this model has 32"
    assert told["diffusion_model.blocks.1.self_attn.q.lora_up.weight"] == "its factors do not fit each other"
    assert told["diffusion_model.blocks.1.self_attn.norm_q.diff_b"] == "this model has no such parameter"
    assert adapters.num_keys == len(tensors)
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert f"and {len(told) - 12} more" in warned[0].getMessage()
    assert all(f"{key}: {reason}" in caplog.text for key, reason in told.items())


def test_factors_in_float8_are_multiplied_by_their_scale(weights, write):
    weights, name, root = weights["t2v"], "blocks.0.attn1.to_q.weight", "diffusion_model.blocks.0.self_attn.q"
    up, down = (value.to(torch.float8_e4m3fn) for value in (random(WIDTH, RANK), random(RANK, WIDTH)))
    tensors = {f"{root}.lora_up.weight": up, f"{root}.lora_up.scale_weight": torch.tensor(0.25)}
    adapters = read(write({**tensors, f"{root}.lora_down.weight": down}), weights)
    assert adapters.unused == ()
    expected = weights[name].double() + STRENGTH * 0.25 * up.double() @ down.double()
    assert_changed(adapters, weights, {name: expected})


def test_several_are_added_up_and_rounded_once(weights, write):
    weights, name = weights["t2v"], "blocks.0.attn1.to_q.weight"
    wide, strengths = weights[name].bfloat16(), (0.5, -0.25, 1.0)
    files, total = [], wide.double()
    for index, strength in enumerate(strengths):
        up, down = random(WIDTH, RANK), random(RANK, WIDTH)
        root = ("diffusion_model.blocks.0.self_attn.q", "lora_unet_blocks_0_self_attn_q", "blocks.0.attn1.to_q")[index]
        tensors = {f"{root}.lora_up.weight": up, f"{root}.lora_down.weight": down}
        files.append(Lora(path=str(write(tensors, f"{index}.safetensors")), strength=strength))
        total = total + strength * up.double() @ down.double()
    found = merge(read_loras(files, shapes_of(weights)), name, wide)
    exact = total.to(torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found != exact).float().mean() < 0.01  # where float32 lies on the other side of the middle
    assert torch.allclose(found.float(), exact.float(), rtol=2**-7)


def test_a_dora_after_another_lora_takes_the_weight_that_this_one_leaves(weights, write):
    weights, name = weights["t2v"], "blocks.0.attn1.to_q.weight"
    root = "blocks.0.self_attn.q"
    first, magnitude = random(WIDTH, WIDTH), 1 + random(WIDTH, 1).abs()
    up, down = random(WIDTH, RANK), random(RANK, WIDTH)
    plain = write({f"{root}.diff": first}, "first.safetensors")
    dora = {f"{root}.lora_up.weight": up, f"{root}.lora_down.weight": down, f"{root}.dora_scale": magnitude}
    sets = [read(plain, weights, strength=1.0), read(write(dora), weights)]
    before = weights[name].double() + first.double()
    direction = before + up.double() @ down.double()
    wanted = magnitude.double() * direction / direction.square().sum(1, keepdim=True).sqrt()
    assert_changed(sets, weights, {name: before + STRENGTH * (wanted - before)})


SETTINGS = {
    "plain": ({"lora_alpha": 6.0, "r": 3}, 2.0),
    "pattern": ({"lora_alpha": 6, "alpha_pattern": {"blocks.0.attn1.to_q": 12, "to_k": 99}}, 4.0),
    "rank stabilised": ({"lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
    "no alpha": ({"r": 3}, 1.0),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("place", ["metadata", "beside"])
def test_settings_of_peft_say_the_scale_where_there_is_no_alpha(case, place, weights, write, tmp_path):
    weights, name = weights["t2v"], "blocks.0.attn1.to_q.weight"
    config, scale = SETTINGS[case]
    up, down = random(WIDTH, RANK), random(RANK, WIDTH)
    prefix = "transformer." if place == "metadata" else "base_model.model."
    root = f"{prefix}blocks.0.attn1.to_q"
    tensors = {f"{root}.lora_B.weight": up, f"{root}.lora_A.weight": down}
    if place == "metadata":
        flat = {f"transformer.{key}": value for key, value in config.items()}
        path = write(tensors, lora_adapter_metadata=json.dumps(flat))
    else:
        path = write(tensors, "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapters = read(path, weights)
    expected = weights[name].double() + STRENGTH * scale * up.double() @ down.double()
    assert_changed(adapters, weights, {name: expected})


def test_a_bias_of_peft_is_scaled_with_its_lora(weights, write):
    weights = weights["t2v"]
    up, down, bias = random(WIDTH, RANK), random(RANK, WIDTH), random(WIDTH)
    root = "blocks.0.attn1.to_q"
    endings = {"lora_B.weight": up, "lora_A.weight": down, "lora_B.bias": bias, "alpha": torch.tensor(6)}
    adapters = read(write({f"transformer.{root}.{ending}": value for ending, value in endings.items()}), weights)
    expected = {
        f"{root}.weight": weights[f"{root}.weight"].double() + STRENGTH * 2 * up.double() @ down.double(),
        f"{root}.bias": weights[f"{root}.bias"].double() + STRENGTH * 2 * bias.double(),
    }
    assert_changed(adapters, weights, expected)


# --- two experts ---


def bias_of(prefix, value=1.0):
    return {f"{prefix}blocks.0.attn1.to_q.diff_b": torch.full((WIDTH,), value)}


def given_to(experts, lora, weights):
    """Which of the experts a LoRA changes."""
    return [expert for expert in experts if read_loras([lora], shapes_of(weights), expert=expert)]


BOTH = ("high", "low")


def test_experts_are_told_apart_by_the_user_by_names_and_by_prefixes(weights, write):
    weights = weights["t2v"]
    plain = write(bias_of("transformer."), "style.safetensors")
    high = write(bias_of(""), "wan_HighNoise_style.safetensors")
    second = write(bias_of("transformer_2."), "second.safetensors")
    both = write(bias_of("transformer.") | bias_of("transformer_2.", 2.0), "both.safetensors")
    assert given_to(BOTH, Lora(path=str(plain)), weights) == ["high", "low"]
    assert given_to(BOTH, Lora(path=str(plain), expert="low"), weights) == ["low"]
    assert given_to(BOTH, Lora(path=str(high)), weights) == ["high"]
    assert given_to(BOTH, Lora(path=str(high), expert="low"), weights) == ["low"]
    assert given_to(BOTH, Lora(path=str(second)), weights) == ["low"]
    assert given_to(BOTH, Lora(path=str(second), expert="high"), weights) == ["high"]
    for expert, value in (("high", 1.0), ("low", 2.0)):
        (adapters,) = read_loras([Lora(path=str(both))], shapes_of(weights), expert=expert)
        assert adapters.unused == ()
        assert adapters.num_keys == 1
        assert torch.equal(
            merge([adapters], "blocks.0.attn1.to_q.bias", torch.zeros(WIDTH)), torch.full((WIDTH,), value)
        )
    (adapters,) = read_loras([Lora(path=str(both), expert="low")], shapes_of(weights), expert="low")
    assert adapters.unused == ("transformer.blocks.0.attn1.to_q.diff_b: it is for another noise expert",)


def test_a_folder_with_a_file_for_each_expert(weights, write, tmp_path):
    weights = weights["t2v"]
    for expert in BOTH:
        write(bias_of("", 1.0 + (expert == "low")), f"{expert}_noise_model.safetensors")
    for expert, value in (("high", 1.0), ("low", 2.0)):
        (adapters,) = read_loras([Lora(path=str(tmp_path))], shapes_of(weights), expert=expert)
        found = merge([adapters], "blocks.0.attn1.to_q.bias", torch.zeros(WIDTH))
        assert found[0] == value
    with pytest.raises(CheckpointError, match="holds 2 safetensors files"):
        read_loras([Lora(path=str(tmp_path))], shapes_of(weights))


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("high_noise_model.safetensors", "high"),
        ("Wan2.2-I2V-LowNoise.safetensors", "low"),
        ("wan22_t2v_LOW_v2", "low"),
        ("wan2.2_t2v_A14b_high_noise_lora_rank64", "high"),
        ("flow_highlight_slowly", None),
        ("high_and_low", None),
        ("style", None),
    ],
)
def test_names_of_files_say_for_which_expert_they_are(name, expert):
    assert expert_of(name) == expert


def test_an_expert_is_not_asked_of_a_model_that_has_one(weights, write):
    path = write(bias_of(""))
    with pytest.raises(RequestError, match="this model has but one"):
        read_loras([Lora(path=str(path), expert="high")], shapes_of(weights["t2v"]))


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors", Lora(path="a.safetensors")),
        ("a.safetensors:0.8", Lora(path="a.safetensors", strength=0.8)),
        ("high:a.safetensors", Lora(path="a.safetensors", expert="high")),
        ("low:/x/a b.safetensors:-1", Lora(path="/x/a b.safetensors", strength=-1.0, expert="low")),
        ("high:2:0.5", Lora(path="2", strength=0.5, expert="high")),
        ("a.safetensors:5e-1", Lora(path="a.safetensors", strength=0.5)),
    ],
)
def test_a_lora_is_written_in_one_word(text, lora):
    assert parsed(text) == lora


def test_a_file_whose_name_ends_like_a_strength_is_that_file(tmp_path):
    path = f"{tmp_path}/a:0.8"
    assert parsed(path) == Lora(path=f"{tmp_path}/a", strength=0.8)
    (tmp_path / "a:0.8").touch()
    assert parsed(path) == Lora(path=path)
    assert parsed(f"low:{path}:0.5") == Lora(path=path, strength=0.5, expert="low")


@pytest.mark.parametrize("text", ["", "high:"])
def test_what_names_no_lora_is_said(text):
    with pytest.raises(RequestError, match="names no file"):
        parsed(text)


@pytest.mark.parametrize("strength", ["21", "-20.5", "1e3", "nan", "-inf", "Infinity", "1e999"])
def test_a_strength_that_no_one_can_mean_is_refused(strength):
    with pytest.raises(RequestError, match=r"of LoRA 'a\.safetensors' is not possible; use a number from -20 to 20"):
        parsed(f"a.safetensors:{strength}")


# --- damage ---

Q = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_up.weight": torch.ones(WIDTH, RANK), f"{Q}.lora_down.weight": torch.ones(RANK, WIDTH)}
DAMAGES = {
    "NaN": (
        {**PAIR, f"{Q}.lora_up.weight": torch.full((WIDTH, RANK), torch.nan)},
        "lora_up.weight' with values that are no finite numbers",
    ),
    "infinite": ({f"{Q}.diff_b": torch.full((WIDTH,), torch.inf)}, "no finite numbers"),
    "rank 0": ({f"{Q}.lora_up.weight": torch.ones(WIDTH, 0), f"{Q}.lora_down.weight": torch.ones(0, WIDTH)}, "empty"),
    "alpha 0": ({**PAIR, f"{Q}.alpha": torch.tensor(0.0)}, "no one can mean"),
    "alpha huge": ({**PAIR, f"{Q}.alpha": torch.tensor(1e9)}, "no one can mean"),
    "alpha infinite": ({**PAIR, f"{Q}.alpha": torch.tensor(torch.inf)}, "no finite numbers"),
    "alphas": ({**PAIR, f"{Q}.alpha": torch.ones(2)}, "one is needed"),
    "integers": ({f"{Q}.diff_b": torch.ones(WIDTH, dtype=torch.int64)}, "as I64; give a LoRA in bfloat16"),
    "twice": ({**PAIR, "lora_unet_blocks_0_self_attn_q.lora_up.weight": torch.ones(WIDTH, RANK)}, "one thing twice"),
    "two ways": ({**PAIR, f"{Q}.diff": torch.ones(WIDTH, WIDTH)}, "in two ways"),
    "two biases": ({**PAIR, f"{Q}.diff_b": torch.ones(WIDTH), f"{Q}.lora_B.bias": torch.ones(WIDTH)}, "in two ways"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_contradicts_itself_is_said_in_a_sentence(damage, weights, write):
    tensors, said = DAMAGES[damage]
    with pytest.raises(CheckpointError, match=said):
        read(write(tensors), weights["t2v"])


def test_a_lora_that_torch_saved_is_read_too_and_a_missing_one_is_said(weights, tmp_path):
    torch.save(PAIR, tmp_path / "lora.pt")
    assert read(tmp_path / "lora.pt", weights["t2v"]).unused == ()
    with pytest.raises(CheckpointError, match="does not exist"):
        read(tmp_path / "none.safetensors", weights["t2v"])


def halves(name):
    return {key: value for key, value in PAIR.items() if name in key}


OF_TEXT = {
    f"{prefix}encoder_block_0_q.{part}.weight": torch.ones(4, 4)
    for prefix in ("lora_te_", "text_encoder.")
    for part in ("lora_up", "lora_down")
}
UNUSED = {
    "no key at all": ({}, "holds no tensors; download it again"),
    "no up half": (
        halves("down"),
        r"none of the 1 keys .* can be used, such as '.*lora_down.weight': its other half \(lora_B or lora_up\) is not",
    ),
    "no down half": (halves("up"), r"its other half \(lora_A or lora_down\) is not there; give a whole LoRA"),
    "text encoder": (
        OF_TEXT,
        "none of the 4 keys .* such as 'lora_te_.*': it is for the text encoder, which stays as it is; give",
    ),
    "numbers": ({"embedding": torch.ones(2)}, "such as 'embedding': it is of no kind of adapter that is known"),
    "more layers": (
        {key.replace("blocks.0", "blocks.2"): value for key, value in PAIR.items()},
        "width 32 with 2 layers; it seems to be for one of width 32 with 3 layers",
    ),
}


@pytest.mark.parametrize("case", UNUSED)
def test_a_file_of_which_nothing_is_used_says_why(case, weights, write):
    tensors, said = UNUSED[case]
    with pytest.raises(CheckpointError, match=said):
        read(write(tensors), weights["t2v"])


def test_keys_for_the_text_encoder_beside_others_are_told_by_name(weights, write):
    adapters = read(write(PAIR | OF_TEXT), weights["t2v"])
    why = "it is for the text encoder, which stays as it is"
    assert adapters.unused == tuple(f"{key}: {why}" for key in sorted(OF_TEXT))
    assert adapters.changes.keys() == {"blocks.0.attn1.to_q.weight"}


WHOLE = {
    "transformer": "blocks.0.self_attn.q.weight",
    "vae": "vae.decoder.middle.1.to_qkv.weight",
    "text-encoder": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "image-encoder": "vision_model.embeddings.class_embedding",
}


@pytest.mark.parametrize("option", WHOLE)
def test_a_whole_network_is_no_lora_and_has_an_option_of_its_own(option, weights, write):
    path = write({WHOLE[option]: torch.ones(2, 2)})
    name = "VAE" if option == "vae" else option.replace("-", " ")
    said = f"holds a whole {name} and is no LoRA; give it with --{option}$"
    with pytest.raises(CheckpointError, match=said):
        read(path, weights["t2v"])
    with pytest.raises(CheckpointError, match="a whole transformer and VAE and is no LoRA; give it with --model"):
        read(write({WHOLE[name]: torch.ones(2) for name in ("transformer", "vae")}), weights["t2v"])


def test_a_lora_of_another_model_is_said_to_be_one(weights, write):
    tensors = {}
    for block in range(30):
        for part in ("self_attn.q", "cross_attn.k_img"):
            root = f"diffusion_model.blocks.{block}.{part}"
            tensors |= {f"{root}.lora_up.weight": random(1536, 1), f"{root}.lora_down.weight": random(1, 1536)}
    said = (
        r"none of the 120 keys .* width 32 with 2 layers; .* width 1536 \(Wan 2.1 1.3B\) with 30 layers, with an image"
    )
    with pytest.raises(CheckpointError, match=said):
        read(write(tensors), weights["t2v"])
    with pytest.raises(CheckpointError, match=r"another kind of model, as it has 'double_blocks"):
        read(write({"double_blocks.0.x.lora_up.weight": random(4, 4)}), weights["t2v"])


@pytest.mark.parametrize(
    "settings", ['{"transformer.lora_alpha": "x"}', "[1]", "{", '{"transformer.alpha_pattern": [1]}']
)
def test_settings_that_cannot_be_read_are_said(settings, weights, write):
    with pytest.raises(CheckpointError, match=r"settings of PEFT|cannot be read"):
        read(write(PAIR, lora_adapter_metadata=settings), weights["t2v"])


ENDINGS = (
    ".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".alpha", ".dora_scale", ".diff", ".diff_b", ".diff_m",
    ".hada_w1_a", ".hada_w1_b", ".hada_t1", ".hada_w2_a", ".hada_w2_b", ".lokr_w1", ".lokr_w2_a", ".lokr_w2_b",
    ".lokr_t2", ".set_weight", ".lora_B.bias", ".odd",
)  # fmt: skip
MODULES = ("patch_embedding", "blocks.0.self_attn.q", "blocks.1.norm3", "blocks.0", "head", "nowhere")
SHAPES = st.lists(st.sampled_from((1, 2, RANK, 4, WIDTH, HIDDEN)), max_size=5)


@pytest.fixture(scope="module")
def shapes(weights):
    return shapes_of(weights["t2v"])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(MODULES), st.sampled_from(ENDINGS)), SHAPES.filter(lambda s: len(s) < 4), max_size=8
    )
)
def test_parts_of_any_shapes_are_used_told_or_refused(shapes, write, parts):
    tensors = {module + ending: torch.ones(shape) for (module, ending), shape in parts.items()}
    try:
        (adapters,) = read_loras([Lora(path=str(write(tensors)))], shapes)
    except CheckpointError:
        return
    for name in adapters.changes:
        assert merge([adapters], name, torch.ones(shapes[name])).shape == shapes[name]
    assert adapters.num_keys == len(tensors)
