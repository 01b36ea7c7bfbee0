"""The rename tables: whole networks there and back, and the same names as Diffusers' own converters."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from published import CLIP_BRANCH, UMT5, clip, transformer, umt5, vae

from frameloom.weights.keymap import (
    CLIP_ORIGINAL,
    CLIP_TRANSFORMERS,
    DIT_DIFFUSERS,
    DIT_ORIGINAL,
    UMT5_LLAMA_CPP,
    UMT5_ORIGINAL,
    UMT5_TRANSFORMERS,
    key_map,
    vae_21,
    vae_22,
)

SMALL_DIT = {"num_attention_heads": 1, "ffn_dim": 8, "num_layers": 12}
IMAGES = {**CLIP_BRANCH, "added_kv_proj_dim": 128, "in_channels": 36}
DITS = {
    "text": SMALL_DIT,
    "image": SMALL_DIT | IMAGES,
    "first and last frame": SMALL_DIT | IMAGES | {"pos_embed_seq_len": 514},
    "VACE": SMALL_DIT | {"vace_layers": [0, 4, 8], "vace_in_channels": 96},
}
NARROW = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
VAE_2_2 = {**NARROW, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}


def there_and_back(table, natives):
    """The stored names of a network's native ones, after checking that each leads back."""
    stored = {native: table.from_native(native) for native in natives}
    assert None not in stored.values(), [native for native, name in stored.items() if name is None]
    assert len(set(stored.values())) == len(stored)
    assert {table.to_native(name): name for name in stored.values()} == stored
    return stored


@pytest.mark.parametrize("kind", DITS)
def test_every_tensor_of_a_transformer_has_one_name_in_either_layout(kind):
    natives = transformer(**DITS[kind])
    there_and_back(DIT_ORIGINAL, natives)
    assert all(there_and_back(DIT_DIFFUSERS, natives)[name] == name for name in natives)


@pytest.mark.parametrize("kind", ["text", "image", "VACE"])  # of the positions of FLF2V Diffusers' converter knows not
def test_original_names_of_a_transformer_are_those_that_diffusers_converts(kind):
    stored = there_and_back(DIT_ORIGINAL, transformer(**DITS[kind]))
    marks = {name: torch.tensor(index) for index, name in enumerate(stored.values())}
    found = convert_wan_transformer_to_diffusers(dict(marks))
    assert {native: marks[name] for native, name in stored.items()} == found


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("dim_mult", [[1, 2, 4, 4], [1, 2, 2], [1, 1, 2, 2, 2]])
def test_every_tensor_of_either_vae_has_one_name_in_either_layout(blocks, dim_mult):
    temporal = [False, *[True] * (len(dim_mult) - 2)]
    shape = {"num_res_blocks": blocks, "dim_mult": dim_mult, "temperal_downsample": temporal}
    there_and_back(vae_21(num_res_blocks=blocks, num_stages=len(dim_mult)), vae(**NARROW, **shape))
    there_and_back(vae_22(num_res_blocks=blocks), vae(**VAE_2_2, **shape))


def test_original_names_of_vae_2_1_are_those_that_diffusers_converts():
    stored = there_and_back(vae_21(), vae(**NARROW))
    assert len(stored) == 194
    marks = {name: torch.tensor(index) for index, name in enumerate(stored.values())}
    assert {native: marks[name] for native, name in stored.items()} == convert_wan_vae_to_diffusers(dict(marks))


def test_original_names_of_vae_2_2_are_those_of_its_nested_stages():
    stored = there_and_back(vae_22(), vae(**VAE_2_2))
    residual = {f"residual.{leaf}" for leaf in ("0.gamma", "2.weight", "2.bias", "3.gamma", "6.weight", "6.bias")}
    shortcut = {"shortcut.weight", "shortcut.bias"}
    resample, time = {"resample.1.weight", "resample.1.bias"}, {"time_conv.weight", "time_conv.bias"}
    expected = set()
    for way, side, blocks, wider, times in (
        ("down", "encoder", 2, (1, 2), (1, 2)),
        ("up", "decoder", 3, (2, 3), (0, 1)),
    ):
        for stage in range(4):
            for block in range(blocks):
                leaves = residual | (shortcut if block == 0 and stage in wider else set())
                expected |= {f"{side}.{way}samples.{stage}.{way}samples.{block}.{leaf}" for leaf in leaves}
            leaves = (resample if stage < 3 else set()) | (time if stage in times else set())
            expected |= {f"{side}.{way}samples.{stage}.{way}samples.{blocks}.{leaf}" for leaf in leaves}
    assert {name for name in stored.values() if "samples" in name} == expected
    assert len(stored) == 196


def test_every_tensor_of_the_text_encoder_has_one_name_in_every_layout():
    natives = umt5(num_layers=12, d_model=8, d_kv=8, d_ff=8, num_heads=1, vocab_size=8)
    for table in (UMT5_ORIGINAL, UMT5_LLAMA_CPP, UMT5_TRANSFORMERS):
        there_and_back(table, natives)
    assert UMT5["num_layers"] > 10, "numbers of two digits occur in the published model, and above"


@pytest.mark.parametrize(
    ("original", "llama_cpp", "native"),
    [
        ("token_embedding", "token_embd", "shared"),
        ("norm", "enc.output_norm", "encoder.final_layer_norm"),
        ("blocks.11.norm1", "enc.blk.11.attn_norm", "encoder.block.11.layer.0.layer_norm"),
        ("blocks.11.attn.q", "enc.blk.11.attn_q", "encoder.block.11.layer.0.SelfAttention.q"),
        (
            "blocks.11.pos_embedding.embedding",
            "enc.blk.11.attn_rel_b",
            "encoder.block.11.layer.0.SelfAttention.relative_attention_bias",
        ),
        ("blocks.11.ffn.gate.0", "enc.blk.11.ffn_gate", "encoder.block.11.layer.1.DenseReluDense.wi_0"),
        ("blocks.11.ffn.fc1", "enc.blk.11.ffn_up", "encoder.block.11.layer.1.DenseReluDense.wi_1"),
        ("blocks.11.ffn.fc2", "enc.blk.11.ffn_down", "encoder.block.11.layer.1.DenseReluDense.wo"),
    ],
)
def test_the_text_encoder_is_named_as_in_its_three_layouts(original, llama_cpp, native):
    assert UMT5_ORIGINAL.to_native(f"{original}.weight") == f"{native}.weight"
    assert UMT5_LLAMA_CPP.to_native(f"{llama_cpp}.weight") == f"{native}.weight"


def test_every_tensor_that_is_used_of_the_image_encoder_has_one_name_in_either_layout():
    natives = [name for name in clip(num_hidden_layers=12) if not name.startswith("visual_projection")]
    stored = there_and_back(CLIP_ORIGINAL, natives)
    there_and_back(CLIP_TRANSFORMERS, natives)
    layer = "vision_model.encoder.layers.11"
    assert stored[f"{layer}.self_attn.k_proj.bias"] == "visual.transformer.11.attn.to_qkv.bias[1]"
    assert stored[f"{layer}.mlp.fc2.weight"] == "visual.transformer.11.mlp.2.weight"
    assert stored["vision_model.pre_layrnorm.weight"] == "visual.pre_norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks",
        "blocks.{i}.modulation",
        "blocks.01.modulation",
        "blocks.-1.modulation",
        "blocks.99999.modulation",
        "blocks.0.modulation.x",
        "blocks.0.norm1.weight",
        "head.modulation.0.x",
    ],
)
def test_a_name_that_the_layout_has_not_is_none(name):
    assert DIT_ORIGINAL.to_native(name) is None


def test_tables_cannot_be_changed_and_have_no_name_twice():
    with pytest.raises(TypeError):
        DIT_ORIGINAL.natives["x"] = "y"
    with pytest.raises(AssertionError, match="two names"):
        key_map("x", [("a", "c"), ("b", "c")])
