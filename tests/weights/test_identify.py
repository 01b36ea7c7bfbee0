"""What a set of tensors is: every published model in every layout, scales, one sentence for what is none of them."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import (
    CLIP,
    TRANSFORMERS,
    UMT5,
    VAES,
    clip,
    listed,
    published_transformer,
    transformer,
    umt5,
    vae,
)
from safetensors.torch import save_file

from frameloom.errors import CheckpointError
from frameloom.models.clip import build_image_encoder
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.umt5 import Umt5Encoder, Umt5Spec
from frameloom.models.vace import make_dit
from frameloom.models.wan_vae import WanVAE
from frameloom.weights.header import read_header
from frameloom.weights.identify import identify
from frameloom.weights.keymap import CLIP_ORIGINAL, DIT_ORIGINAL, UMT5_LLAMA_CPP, UMT5_ORIGINAL, vae_21, vae_22
from frameloom.weights.tensors import read_tensor

WHERE = "model.safetensors"
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 24, "ffn_dim": 48, "num_layers": 2}
NARROW = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}


def stored(table, natives):
    """The names and shapes of a network as a layout has them."""
    return {table.from_native(name): shape for name, shape in natives.items()}


def only(shapes, **options):
    """The one part of a file with tensors of these shapes."""
    (part,) = identify(listed(shapes), where=WHERE, **options)
    return part


def clip_original(natives):
    """The original's names: queries, keys and values in one, more dimensions, and a head of which nothing is used."""
    shapes = {"visual.head": (1280, 1024), "log_scale": (), "textual.token_embedding.weight": (8, 8)}
    for name, shape in stored(CLIP_ORIGINAL, {n: s for n, s in natives.items() if "visual_proj" not in n}).items():
        whole, _, third = name.partition("[")
        shapes[whole] = (3 * shape[0], *shape[1:]) if third else shape
    shapes["visual.cls_embedding"] = (1, 1, *shapes["visual.cls_embedding"])
    shapes["visual.pos_embedding"] = (1, *shapes["visual.pos_embedding"])
    return shapes


def description(kind, config):
    return {"frameloom": json.dumps({"kind": kind, "config": config})}


TOLD = description("transformer", SMALL)


# --- published models ---


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_every_published_transformer_is_known_by_its_tensors_in_either_layout(model):
    natives = published_transformer(model)
    config = {"in_channels": 16, "out_channels": 16} | TRANSFORMERS[model]
    for layout, shapes in (("original", stored(DIT_ORIGINAL, natives)), ("diffusers", natives)):
        part = only(shapes)
        assert (part.kind, part.layout, part.model) == ("transformer", layout, model)
        assert (part.left_over, part.vocabulary) == ((), None)
        assert {name: entry.shape for name, entry in part.tensors.items()} == natives
        assert TransformerSpec.from_config(part.config) == TransformerSpec.from_config(config)


@pytest.mark.parametrize("model", VAES)
def test_either_vae_is_known_by_its_tensors_in_either_layout(model):
    natives = vae(**VAES[model])
    for layout, shapes in (
        ("original", stored(vae_22() if VAES[model] else vae_21(), natives)),
        ("diffusers", natives),
    ):
        part = only(shapes)
        assert (part.kind, part.layout, part.model, part.left_over) == ("vae", layout, model, ())
        assert {name: entry.shape for name, entry in part.tensors.items()} == natives
        spec = VaeSpec.from_config(part.config)
        expected = VaeSpec.from_config(
            VAES[model] | {"latents_mean": spec.latents_mean, "latents_std": spec.latents_std}
        )
        assert spec == expected
        assert (spec.latents_mean[0], spec.latents_std[-1]) == ((-0.2289, 0.7744) if VAES[model] else (-0.7571, 1.9160))


@pytest.mark.parametrize(
    ("layout", "table"), [("original", UMT5_ORIGINAL), ("llama.cpp", UMT5_LLAMA_CPP), ("transformers", None)]
)
def test_the_text_encoder_is_known_in_all_three_layouts(layout, table):
    natives = umt5()
    part = only(natives if table is None else stored(table, natives))
    assert (part.kind, part.layout, part.model, part.left_over) == ("text_encoder", layout, "UMT5-XXL", ())
    assert {name: entry.shape for name, entry in part.tensors.items()} == natives
    assert Umt5Spec.from_config(part.config, where=WHERE) == Umt5Spec(**UMT5)


def test_the_image_encoder_is_known_in_either_layout():
    natives = clip()
    used = {name: shape for name, shape in natives.items() if "visual_projection" not in name}
    for layout, shapes in (("original", clip_original(natives)), ("transformers", natives)):
        part = only(shapes)
        assert (part.kind, part.layout, part.model, part.left_over) == ("image_encoder", layout, "CLIP ViT-H/14", ())
        assert {name: entry.shape for name, entry in part.tensors.items()} == used
        assert {key: part.config[key] for key in part.config.keys() & CLIP.keys()} == {
            key: value for key, value in CLIP.items() if key != "projection_dim"
        }
        built = build_image_encoder(part.config).state_dict()
        assert {f"vision_model.{name}": tuple(tensor.shape) for name, tensor in built.items()} == used


def test_queries_keys_and_values_of_the_original_clip_are_thirds_of_one_tensor(tmp_path):
    stacked = torch.arange(3 * 80 * 80, dtype=torch.float32).view(240, 80)
    natives = clip(hidden_size=80, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
    shapes = clip_original(natives)
    name = "visual.transformer.0.attn.to_qkv.weight"
    tensors = {key: stacked if key == name else torch.zeros(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "clip.safetensors")
    (part,) = identify(read_header(tmp_path / "clip.safetensors"), where=WHERE)
    for index, letter in enumerate("qkv"):
        entry = part.tensors[f"vision_model.encoder.layers.0.self_attn.{letter}_proj.weight"]
        data = entry.file.read_bytes()[entry.offset : entry.offset + entry.size_bytes]
        found = torch.frombuffer(bytearray(data), dtype=torch.float32).view(entry.shape)
        assert torch.equal(found, stacked[80 * index : 80 * index + 80])


def built(make):
    with on_meta():
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


def test_what_is_found_fills_the_network_that_is_made_of_it():
    """Every tensor of our own modules, by name and shape, and none besides."""
    for natives in (
        transformer(**SMALL),
        transformer(**SMALL, in_channels=36, image_dim=24, added_kv_proj_dim=32, pos_embed_seq_len=514),
        transformer(**SMALL, vace_layers=[0, 1], vace_in_channels=96),
    ):
        part = only(stored(DIT_ORIGINAL, natives), metadata=TOLD)
        spec = TransformerSpec.from_config(part.config)
        assert {name: entry.shape for name, entry in part.tensors.items()} == built(lambda spec=spec: make_dit(spec))
    for config in VAES.values():
        part = only(vae(**config))
        spec = VaeSpec.from_config(part.config)
        assert {name: entry.shape for name, entry in part.tensors.items()} == built(lambda spec=spec: WanVAE(spec))
    part = only(stored(UMT5_ORIGINAL, umt5()))
    found = built(lambda: Umt5Encoder(Umt5Spec.from_config(part.config, where=WHERE)))
    del found["encoder.embed_tokens.weight"]
    assert {name: entry.shape for name, entry in part.tensors.items()} == found


# --- files of several networks, prefixes ---


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "module.net."]
)
def test_whatever_stands_before_the_names_is_no_matter(prefix):
    natives = published_transformer("Wan 2.1 T2V 1.3B")
    part = only({prefix + name: shape for name, shape in stored(DIT_ORIGINAL, natives).items()})
    assert part.tensors.keys() == natives.keys()
    assert part.left_over == ()


@pytest.mark.parametrize("text", ["text_encoders.umt5xxl.transformer.", "cond_stage_model.", "text_encoder."])
@pytest.mark.parametrize("pixels", ["vae.", "first_stage_model."])
def test_a_file_of_everything_holds_every_network(text, pixels):
    dit, text_encoder = published_transformer("Wan 2.1 T2V 1.3B"), umt5(vocab_size=256)
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in stored(DIT_ORIGINAL, dit).items()}
    shapes |= {f"{pixels}{name}": shape for name, shape in stored(vae_21(), vae()).items()}
    shapes |= {f"{text}{name}": shape for name, shape in text_encoder.items()}
    shapes |= {f"clip_vision.{name}": shape for name, shape in clip().items()}
    extra = {f"{text}scaled_fp8": (0,), f"{text}logit_scale": (), f"{text}x.y": (1,), "model.diffusion_model.z": (2,)}
    entries = listed(shapes | extra)
    spiece = replace(entries[f"{text}x.y"], name="text_encoders.spiece_model", dtype="U8")
    parts = {part.kind: part for part in identify({**entries, spiece.name: spiece}, where=WHERE)}
    assert parts.keys() == {"transformer", "vae", "text_encoder", "image_encoder"}
    assert parts["text_encoder"].tensors.keys() == text_encoder.keys()
    assert parts["text_encoder"].vocabulary is spiece
    assert parts["text_encoder"].left_over == (f"{text}x.y",)
    assert parts["transformer"].left_over == ("model.diffusion_model.z",)
    assert parts["vae"].left_over == parts["image_encoder"].left_over == ()


def test_nothing_is_dropped_in_silence():
    shapes = stored(DIT_ORIGINAL, published_transformer("Wan 2.1 T2V 1.3B"))
    part = only(shapes | {"blocks.0.self_attn.extra.weight": (1,), "blocks.30.norm9.bias": (1,), "scaled_fp8": (0,)})
    assert part.left_over == ("blocks.0.self_attn.extra.weight", "blocks.30.norm9.bias")


def test_the_tokenizer_of_a_gguf_file_is_its_metadata():
    metadata = {"tokenizer.ggml.tokens": ("<pad>",), "general.architecture": "t5encoder"}
    assert only(stored(UMT5_LLAMA_CPP, umt5()), metadata=metadata).vocabulary is metadata


def test_a_model_of_other_channels_is_named_after_them():
    """Such as Wan Fun Control, which has a CLIP branch, too."""
    part = only(transformer(**SMALL, in_channels=48, image_dim=24, added_kv_proj_dim=32), metadata=TOLD)
    assert part.model == "Wan of 48 channels in and 16 out (2 layers, 32 wide)"


def test_the_table_of_tokens_may_have_its_second_name_alone():
    natives = umt5(num_layers=2)
    shapes = {name.replace("shared.", "encoder.embed_tokens."): shape for name, shape in natives.items()}
    part = only(shapes)
    assert part.tensors.keys() == natives.keys()
    assert only(shapes | natives).left_over == ()


def test_dimensions_that_writers_of_gguf_fold_or_drop_are_unfolded():
    natives = published_transformer("Wan 2.1 FLF2V 14B")
    shapes = stored(DIT_ORIGINAL, natives)
    shapes["patch_embedding.weight"] = (5120 * 36, 1, 2, 2)
    shapes["head.modulation"] = (2, 5120)
    shapes["img_emb.emb_pos"] = (514, 1280)
    part = only(shapes)
    assert {name: entry.shape for name, entry in part.tensors.items()} == natives


# --- what shapes do not say ---


def test_a_width_that_is_no_multiple_of_128_needs_a_description():
    natives = transformer(**SMALL, freq_dim=32)
    with pytest.raises(CheckpointError, match="32 wide, and no description says how many heads"):
        only(natives)
    part = only(natives, metadata=description("transformer", SMALL | {"eps": 1e-5}))
    assert TransformerSpec.from_config(part.config).num_attention_heads == 2
    assert (part.config["eps"], part.config["freq_dim"]) == (1e-5, 32)
    assert part.model == "Wan 2.1 T2V (2 layers, 32 wide)"


def test_a_config_beside_the_file_may_be_in_the_words_of_the_original_code():
    original = {
        "_class_name": "WanModel", "model_type": "t2v", "text_len": 512, "dim": 32, "num_heads": 2, "ffn_dim": 48,
        "num_layers": 2, "in_dim": 16, "out_dim": 16, "freq_dim": 256, "eps": 1e-6,
    }  # fmt: skip
    part = only(stored(DIT_ORIGINAL, transformer(**SMALL)), config=original)
    assert TransformerSpec.from_config(part.config) == TransformerSpec(**SMALL)
    with pytest.raises(CheckpointError, match="num_layers 2 by its tensors, but 30 by its description"):
        only(transformer(**SMALL), config=original | {"num_layers": 30})
    with pytest.raises(CheckpointError, match="heads must divide the width"):
        only(transformer(**SMALL), config=original | {"num_heads": 3})


def test_a_config_of_another_network_beside_the_file_is_no_matter():
    assert only(vae(), config={"dim": 5120, "num_heads": 40, "num_layers": 40}).model == "Wan VAE 2.1"


def test_the_statistics_of_unusual_latents_must_be_told():
    with pytest.raises(CheckpointError, match="4 latent channels, whose mean and deviation only its config knows"):
        only(vae(**NARROW))
    spec = VaeSpec.from_config(only(vae(**NARROW), metadata=description("vae", NARROW)).config)
    assert (spec.base_dim, spec.latents_mean, spec.decoder_base_dim) == (8, (0.5,) * 4, None)
    told = NARROW | {"decoder_base_dim": 8}
    assert only(vae(**told), metadata=description("vae", told)).config["decoder_base_dim"] == 8


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dim_mult", [[1, 2, 2], [1, 2, 2, 2]])
@pytest.mark.parametrize("residual", [False, True])
def test_vaes_of_other_depths_are_read_from_their_tensors(blocks, dim_mult, residual):
    shape = {"num_res_blocks": blocks, "dim_mult": dim_mult, "temperal_downsample": [True] * (len(dim_mult) - 1)}
    folded = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2} if residual else {}
    natives = vae(**NARROW, **shape, **folded)
    table = vae_22(num_res_blocks=blocks) if residual else vae_21(num_res_blocks=blocks, num_stages=len(dim_mult))
    for shapes in (natives, stored(table, natives)):
        part = only(shapes, metadata=description("vae", NARROW))
        assert part.tensors.keys() == natives.keys()
        assert VaeSpec.from_config(part.config) == VaeSpec.from_config(NARROW | shape | folded)


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "1", "null", "[" * 100_000, json.dumps({"kind": "vae", "config": {}}), '{"kind": 1, "config": 1}'],
)
def test_a_damaged_description_is_one_sentence(text):
    with pytest.raises(CheckpointError, match="convert it again"):
        only(transformer(**SMALL), metadata={"frameloom": text})


def test_vace_layers_at_uneven_distances_must_be_told():
    natives = transformer(**SMALL | {"num_layers": 5}, vace_layers=[0, 3], vace_in_channels=96)
    told = SMALL | {"num_layers": 5}
    with pytest.raises(CheckpointError, match="2 VACE blocks for 5 layers"):
        only(natives, metadata=description("transformer", told))
    part = only(natives, metadata=description("transformer", told | {"vace_layers": [0, 3]}))
    assert TransformerSpec.from_config(part.config).vace_layers == (0, 3)
    with pytest.raises(CheckpointError, match="2 VACE blocks, but vace_layers"):
        only(natives, metadata=description("transformer", told | {"vace_layers": [0, 1, 2]}))


# --- scales ---

MODULE = "blocks.0.self_attn.q"


def scaled(path, extra, *, weight=torch.float8_e4m3fn, metadata=None):
    """A small transformer file whose first weight is stored as `weight`, with `extra` tensors beside."""
    shapes = stored(DIT_ORIGINAL, transformer(**SMALL | {"num_attention_heads": 1, "attention_head_dim": 128}))
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tensors[f"{MODULE}.weight"] = torch.zeros(128, 128).to(weight)
    save_file(tensors | extra, path, metadata=metadata)
    (part,) = identify(read_header(path), metadata=metadata or {}, where=str(path))
    return part


def marked(**words):
    return torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)


FP8 = marked(format="float8_e4m3fn")


@pytest.mark.parametrize(
    "extra",
    [
        {
            f"{MODULE}.scale_weight": torch.tensor(2.0),
            "scaled_fp8": torch.zeros(0),
            f"{MODULE}.scale_input": torch.ones(1),
        },
        {
            f"{MODULE}.weight_scale": torch.tensor([2.0]),
            f"{MODULE}.comfy_quant": FP8,
            f"{MODULE}.input_scale": torch.ones(1),
        },
        {f"{MODULE}.weight_scale": torch.ones(128, 1)},
        {f"{MODULE}.weight_scale": torch.ones(128)},
    ],
)
def test_scales_old_and_new_go_with_their_weights(tmp_path, extra):
    part = scaled(tmp_path / "fp8.safetensors", extra)
    entry = part.tensors["blocks.0.attn1.to_q.weight"]
    assert (entry.dtype, entry.scale.dtype, entry.scale.name.startswith(MODULE)) == ("F8_E4M3", "F32", True)
    assert [name for name, entry in part.tensors.items() if entry.scale] == ["blocks.0.attn1.to_q.weight"]
    assert part.left_over == ()


def test_a_weight_that_is_marked_and_has_no_scale_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=f"lacks the scales of {MODULE}.weight; download it again"):
        scaled(tmp_path / "fp8.safetensors", {f"{MODULE}.comfy_quant": FP8})


def test_an_old_file_is_told_which_weights_have_no_scale(tmp_path, caplog):
    scaled(tmp_path / "a.safetensors", {"scaled_fp8": torch.zeros(0)})
    assert f"has no scales for {MODULE}.weight: they count as 1" in caplog.text
    caplog.clear()
    scaled(tmp_path / "b.safetensors", {})
    scaled(tmp_path / "c.safetensors", {"scaled_fp8": torch.zeros(0), f"{MODULE}.scale_weight": torch.ones(1)})
    assert not caplog.text


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused_when_it_is_read(tmp_path, number):
    part = scaled(tmp_path / "fp8.safetensors", {f"{MODULE}.scale_weight": torch.tensor([number])})
    with pytest.raises(CheckpointError, match=rf"holds '{MODULE}.scale_weight' that is no finite number"):
        read_tensor(part.tensors["blocks.0.attn1.to_q.weight"])


def test_whole_numbers_need_a_scale(tmp_path):
    path = tmp_path / "int8.safetensors"
    extra = {f"{MODULE}.weight_scale": torch.ones(128, 1), f"{MODULE}.comfy_quant": marked(format="int8_tensorwise")}
    assert scaled(path, extra, weight=torch.int8).tensors["blocks.0.attn1.to_q.weight"].scale is not None
    with pytest.raises(CheckpointError, match="as I8 without a scale"):
        scaled(path, {}, weight=torch.int8)
    with pytest.raises(CheckpointError, match="as U8, which is not readable"):
        scaled(path, {}, weight=torch.uint8)


def test_the_metadata_may_say_what_the_numbers_are(tmp_path):
    for told, said in (
        ("float8_e4m3fn", None),
        ("nvfp4", "as 'nvfp4'"),
        ("float8_e5m2", "says that it is float8_e5m2"),
    ):
        metadata = {"_quantization_metadata": json.dumps({"layers": {MODULE: {"format": told}}})}
        extra = {f"{MODULE}.weight_scale": torch.tensor(1.0)}
        if said is None:
            assert scaled(tmp_path / "x.safetensors", extra, metadata=metadata).left_over == ()
        else:
            with pytest.raises(CheckpointError, match=said):
                scaled(tmp_path / "x.safetensors", extra, metadata=metadata)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        *(
            ({".comfy_quant": marked(format=kind, convrot=True, convrot_groupsize=size)}, said)
            for kind, size, said in (
                ("float8_e4m3fn", 16, "float8_e4m3fn rotated in groups of 16; readable is int8_tensorwise"),
                ("int8_tensorwise", 32, "says that it is int8_tensorwise"),
            )
        ),
        ({".comfy_quant": marked(format="mxfp8")}, f"stores '{MODULE}' as 'mxfp8'"),
        ({".comfy_quant": marked(format=["x"])}, "is not readable"),
        ({".comfy_quant": marked(none=1)}, f"stores '{MODULE}' as None"),
        ({".comfy_quant": torch.zeros(5000, dtype=torch.uint8)}, "damaged"),
        ({".comfy_quant": torch.ones(9, dtype=torch.uint8)}, "no readable JSON"),
        ({".weight_scale": torch.ones(2, 2)}, "one scale for a weight or one per row"),
        ({".weight_scale": torch.ones(1, 128)}, "one scale for a weight or one per row"),
        ({".weight_scale": torch.ones(1, dtype=torch.int32)}, "take it as F32"),
        ({".weight_scale": torch.ones(1), ".weight_scale_2": torch.ones(1)}, "packed in a way"),
        ({".weight_scale_inv": torch.ones(1, 1)}, "packed in a way"),
    ],
)
def test_scales_that_mean_something_else_are_refused(tmp_path, extra, said):
    with pytest.raises(CheckpointError, match=said):
        scaled(tmp_path / "fp8.safetensors", {MODULE + key: tensor for key, tensor in extra.items()})


@pytest.mark.parametrize("size", [0, 1, 8, 100, 16.0, True, "16", None, -4, 4**9])
def test_rotations_in_groups_that_make_no_sense_are_refused(tmp_path, size):
    extra = {f"{MODULE}.comfy_quant": marked(format="int8_tensorwise", convrot=True, convrot_groupsize=size)}
    extra |= {f"{MODULE}.weight": torch.ones(128, 128, dtype=torch.int8), f"{MODULE}.weight_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"rotated in groups of .*; readable is"):
        scaled(tmp_path / "int8.safetensors", extra)


def test_a_rotated_weight_without_a_scale_is_refused(tmp_path):
    extra = {f"{MODULE}.comfy_quant": marked(format="int8_tensorwise", convrot=True, convrot_groupsize=16)}
    extra |= {f"{MODULE}.weight": torch.ones(128, 128, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=f"lacks the scales of {MODULE}.weight"):
        scaled(tmp_path / "int8.safetensors", extra)


# --- what is no network of Wan's ---


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "holds no tensors"),
        (["some.tensor"], "no network of Wan's (it has 'some.tensor'"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "is a LoRA"),
        (["lora_unet_blocks_0_self_attn_q.lora_down.weight"], "is a LoRA"),
        (["blocks.0.norm3.diff", "blocks.0.norm3.diff_b"], "is a LoRA"),
        (["blocks.0.self_attn.q.hada_w1_a"], "is a LoRA"),
        (["vace_blocks.0.before_proj.weight", "vace_patch_embedding.weight"], "the VACE part of a model alone"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux or HunyuanVideo"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["model.diffusion_model.input_blocks.1.0.in_layers.0.weight"], "Stable Diffusion model"),
        (["encoder.down.0.block.0.norm1.weight"], "VAE of Stable Diffusion"),
        (["decoder.mid_block.attentions.0.to_q.weight"], "VAE of Stable Diffusion"),
        (["transformer_blocks.0.attn1.to_q.weight", "patchify_proj.weight"], "LTX-Video"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "CLIP text encoder"),
        (["model.layers.0.self_attn.q_proj.weight"], "language model"),
        (["blocks.0.self_attn.q.weight", "casual_audio_encoder.x.weight"], "S2V"),
        (["blocks.0.self_attn.q.weight", "face_adapter.x.weight"], "Wan Animate"),
        (["multitalk_audio_proj.x.weight"], "MultiTalk"),
        (["m.blocks.0.cam_encoder.weight"], "more in its blocks"),
        (["blocks.0.self_attn.q.weight", "model.control_adapter.conv.weight"], "camera control"),
        (
            [
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "encoder.block.1.layer.0.SelfAttention.q.weight",
            ],
            "holds a T5 text encoder",
        ),
        (["enc.blk.0.attn_rel_b.weight", "enc.blk.1.attn_q.weight"], "holds a T5 text encoder"),
    ],
)
def test_a_file_that_is_something_else_is_told_what_it_seems_to_be(names, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        only(dict.fromkeys(names, (2, 2)))


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("patch_embedding.weight", "lacks 'patch_embedding.weight'"),
        ("head.head.weight", "lacks 'proj_out.weight'"),
        ("blocks.0.ffn.0.weight", "lacks 'blocks.0.ffn.net.0.proj.weight'"),
    ],
)
def test_a_part_of_a_network_is_told_what_it_lacks(lacking, said):
    shapes = stored(DIT_ORIGINAL, published_transformer("Wan 2.1 T2V 1.3B"))
    del shapes[lacking]
    with pytest.raises(CheckpointError, match=re.escape(said)):
        only(shapes)


def test_a_small_clip_is_not_the_one_of_wan():
    with pytest.raises(CheckpointError, match="1024 wide; Wan's is CLIP ViT-H/14"):
        only(clip(hidden_size=1024))


def test_two_networks_of_a_kind_in_one_file_are_refused():
    shapes = stored(DIT_ORIGINAL, published_transformer("Wan 2.1 T2V 1.3B"))
    both = {f"{expert}.{name}": shape for expert in ("high", "low") for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match="two of the kind transformer"):
        only(both)


NETWORKS = [
    stored(DIT_ORIGINAL, transformer(**SMALL)),
    transformer(**SMALL, vace_layers=[0, 1], vace_in_channels=96),
    stored(vae_21(), vae()),
    vae(**VAES["Wan VAE 2.2"]),
    stored(UMT5_LLAMA_CPP, umt5(num_layers=2)),
    clip_original(clip(num_hidden_layers=2)),
]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_tensors_at_all_are_a_network_or_one_sentence(data):
    """A network that has lost some tensors, and others of which have shapes of any kind: zeros, too large, too many."""
    shapes = dict(data.draw(st.sampled_from(NETWORKS)))
    names = st.sampled_from(sorted(shapes))
    for name in data.draw(st.lists(names, max_size=3)):
        shapes.pop(name, None)
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 16, 128, 2**40]), max_size=5)
    for name in data.draw(st.lists(names, max_size=5)):
        shapes[name] = tuple(data.draw(sizes.filter(lambda shape: math.prod(shape) <= 2**45)))
    metadata = data.draw(st.sampled_from([{}, TOLD, description("vae", NARROW)]))
    try:
        parts = identify(listed(shapes), metadata=metadata, where=WHERE)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert [part.kind for part in parts] == sorted({part.kind for part in parts})
