"""Checkpoints that must be refused before their weights are read: wrong values, and parts that do not fit."""

import json
import shutil

import pytest
import torch

import frameloom
from frameloom.engine import modules
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.pipeline import stages
from frameloom.platform.device import memory_errors


@pytest.fixture
def edit(checkpoint_of, tmp_path, monkeypatch):
    """Copy a good checkpoint, change keys of one of its JSON files; reading weights from here on fails the test."""

    def change(file, *, kind="one expert", **values):
        folder = tmp_path / "model"
        shutil.copytree(checkpoint_of(kind), folder)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    def read_too_early(*_, **__):
        pytest.fail("weights were read")

    monkeypatch.setattr(modules, "load_module", read_too_early)
    return change


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", None),
        ("num_layers", "6"),
        ("num_layers", 0),
        ("num_layers", 10**7),
        ("num_attention_heads", None),
        ("patch_size", 2),
        ("patch_size", [1, 2]),
        ("patch_size", None),
        ("eps", "x"),
        ("eps", 0.0),
        ("eps", float("nan")),
        ("rope_max_seq_len", -1),
        ("in_channels", None),
        ("out_channels", "4"),
        ("freq_dim", 8.5),
        ("text_dim", -1),
        ("ffn_dim", 10**400),
        ("cross_attn_norm", "no"),
        ("image_dim", True),
    ],
)
def test_a_transformer_value_of_the_wrong_kind_is_one_sentence(field, value):
    with pytest.raises(frameloom.CheckpointError, match=rf"config\.json has {field} "):
        TransformerSpec.from_config({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim_mult", None),
        ("dim_mult", [1, "1"]),
        ("latents_mean", None),
        ("latents_mean", [None] * 16),
        ("latents_std", [0.0] * 16),
        ("latents_std", [float("nan")] * 16),
        ("temperal_downsample", None),
        ("temperal_downsample", [5, 1, 1]),
        ("patch_size", 0),
        ("patch_size", "2"),
        ("num_res_blocks", None),
        ("z_dim", None),
    ],
)
def test_a_vae_value_of_the_wrong_kind_is_one_sentence(field, value):
    with pytest.raises(frameloom.CheckpointError, match=rf"config\.json has {field} "):
        VaeSpec.from_config({field: value})


def test_null_out_channels_mean_as_many_as_go_in():
    assert TransformerSpec.from_config({"in_channels": 6, "out_channels": None}).out_channels == 6


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("transformer/config.json", {"in_channels": 8}, "transformer in_channels is 8, vae z_dim 4"),
        ("transformer/config.json", {"out_channels": 8}, "transformer out_channels is 8, vae z_dim 4"),
        ("transformer/config.json", {"text_dim": 32}, "transformer text_dim is 32, text_encoder d_model 24"),
        ("vae/config.json", {"out_channels": 4}, "vae out_channels is 4"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_weights_are_read(edit, file, values, words):
    with pytest.raises(frameloom.CheckpointError, match=f"{words}.*take all parts from one checkpoint"):
        frameloom.load(edit(file, **values))


@pytest.mark.parametrize(
    ("values", "words"),
    [({"text_dim": 32}, "transformer_2 text_dim is 32"), ({"patch_size": [1, 1, 2]}, "transformer_2 patch_size is")],
)
def test_experts_that_do_not_fit_are_refused_before_weights_are_read(edit, values, words):
    with pytest.raises(frameloom.CheckpointError, match=words):
        frameloom.load(edit("transformer_2/config.json", kind="two experts", **values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"flow_shift": 10**400}, "flow_shift=.*up to 1000000"),
        ({"num_train_timesteps": 10**400}, "num_train_timesteps=.*up to 1000000"),
    ],
)
def test_a_scheduler_is_judged_before_weights_are_read(edit, values, words):
    with pytest.raises(frameloom.CheckpointError, match=words):
        frameloom.load(edit("scheduler/scheduler_config.json", **values))


def test_a_text_encoder_that_cannot_place_its_tokens_is_refused(edit):
    values = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 8}
    with pytest.raises(frameloom.CheckpointError, match="max_distance 8; it must be above 8"):
        frameloom.load(edit("text_encoder/config.json", **values))


def test_a_tokenizer_without_padding_is_refused(edit, monkeypatch):
    folder = edit("tokenizer/tokenizer_config.json", pad_token=None)
    monkeypatch.undo()
    with pytest.raises(frameloom.CheckpointError, match="no pad_token"):
        frameloom.load(folder)


def test_a_weight_file_without_tensors_says_what_is_missing(edit, monkeypatch):
    folder = edit("transformer/config.json")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")
    monkeypatch.undo()
    with pytest.raises(frameloom.CheckpointError, match="patch_embedding"):
        frameloom.load(folder)


def test_an_own_default_beyond_all_measure_is_refused(edit):
    folder = edit("model_index.json")
    (folder / "frameloom.json").write_text(json.dumps({"guidance_scale": 10**400}))
    with pytest.raises(frameloom.CheckpointError, match="guidance_scale"):
        frameloom.describe(folder)


@pytest.mark.parametrize("name", ["", 5, b"path"])
def test_only_no_model_at_all_means_the_built_in_one(name):
    for use in (frameloom.load, frameloom.describe):
        with pytest.raises(frameloom.CheckpointError, match="names no model"):
            use(name)


def test_a_dtype_or_device_that_is_none_is_refused_before_the_checkpoint_is_looked_for():
    with pytest.raises(frameloom.RequestError, match="dtype"):
        frameloom.load("/nowhere/at/all", dtype="float8")
    with pytest.raises(frameloom.RequestError, match="device"):
        frameloom.load("/nowhere/at/all", device=None)


def test_failed_allocations_are_request_errors_and_nothing_else_is():
    said = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    for error in (MemoryError(), RuntimeError(said)):
        with (
            pytest.raises(frameloom.RequestError, match="not enough memory for a film; use a photo"),
            memory_errors("a film", "use a photo"),
        ):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("a film", "use a photo"):
        raise RuntimeError("shapes do not match")


def test_a_video_past_the_memory_is_one_sentence(checkpoint_of, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with frameloom.load(checkpoint_of()) as engine:
        monkeypatch.setattr(stages, "initial_noise", too_large)
        with pytest.raises(frameloom.RequestError, match="not enough memory for 5 frames of 64x32 on cpu; ask for a"):
            engine.generate("a cat", width=64, height=32, num_frames=5, steps=1)
