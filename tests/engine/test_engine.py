"""The engine as a library: what it refuses, what it reports, and the dtypes it computes in."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch

import frameloom
from frameloom.platform import host
from frameloom.platform.device import choose_device, choose_dtype
from frameloom.types import Progress

SIZE = {"width": 64, "height": 32, "num_frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def engine(checkpoint_of):
    with frameloom.load(checkpoint_of()) as engine:
        yield engine


def test_progress_counts_every_stage(engine):
    news = []
    engine.generate("a cat", progress=news.append, **SIZE)
    assert news == [
        *(Progress(stage="text", step=i, total=1) for i in range(2)),
        *(Progress(stage="denoise", step=i, total=2) for i in range(3)),
        *(Progress(stage="decode", step=frames, total=5) for frames in (0, 1, 5)),
    ]


def test_the_video_says_how_it_was_made(engine):
    video = engine.generate("a cat", seed=3, **SIZE)
    assert video.metadata["prompt"] == "a cat"
    assert video.metadata["seed"] == 3
    assert video.metadata["seconds"].keys() == {"text", "denoise", "decode"}
    assert json.dumps(video.metadata)
    assert video.fps == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widht": 64}, "did you mean 'width'"),
        ({"output": "pixels"}, "'video' or 'latents'"),
        ({"width": 64.0}, "whole number"),
        ({"num_frames": True}, "whole number"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"guidance_scale": "5"}, "guidance scale"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1"),
        ({"negative_prompt": 3}, "negative prompt"),
        ({"seed": 2**63}, "seed"),
        ({"width": 8192 * 2}, "8192"),
        ({"num_frames": 8}, "use 5 or 9"),
        ({"guidance_scale": 10**400}, "guidance scale"),
        ({"guidance_scale_2": 3.0}, "second expert"),
    ],
)
def test_bad_options_are_request_errors(engine, options, words):
    with pytest.raises(frameloom.RequestError, match=words):
        engine.generate("a cat", **(SIZE | options))


@pytest.mark.parametrize("prompt", ["", [], ["a", " "], 3, [3], None])
def test_bad_prompts_are_request_errors(engine, prompt):
    with pytest.raises(frameloom.RequestError, match="prompt is"):
        engine.generate(prompt, **SIZE)


def test_latents_and_frames_of_the_wrong_shape_are_request_errors(engine):
    for latents in (torch.zeros(4, 2, 4, 4), torch.zeros(1, 5, 2, 4, 4), torch.zeros(1, 4, 0, 4, 4), "latents"):
        with pytest.raises(frameloom.RequestError, match=r"give \(1, 4, T, H, W\)"):
            engine.decode(latents)
    for frames in (np.zeros((5, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8), np.zeros((5, 32, 32, 4), np.uint8)):
        with pytest.raises(frameloom.RequestError, match="uint8"):
            engine.encode(frames)
    with pytest.raises(frameloom.RequestError, match="use 5"):
        engine.encode(np.zeros((6, 32, 32, 3), np.uint8))


def test_numbers_of_numpy_and_a_seed_of_none_are_welcome(engine):
    small = {name: np.int64(value) for name, value in SIZE.items()}
    video = engine.generate("a cat", seed=None, guidance_scale=np.float32(5), fps=np.float64(8), **small)
    assert np.array_equal(video.frames, engine.generate("a cat", seed=0, **SIZE).frames)
    assert json.dumps(video.metadata)


def test_latents_belong_to_the_caller(engine):
    video = engine.generate("a cat", **SIZE)
    for latents in (engine.generate("a cat", output="latents", **SIZE), engine.encode(video.frames)):
        latents.add_(1)
        latents.requires_grad_().sum().backward()
        assert latents.grad is not None


def test_bad_latents_are_the_callers_and_frames_may_be_read_only(engine):
    with pytest.raises(frameloom.RequestError, match="no finite numbers"):
        engine.decode(torch.full((1, 4, 1, 4, 4), float("nan")))
    for odd in (torch.int64, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(frameloom.RequestError, match="of floats"):
            engine.decode(torch.zeros(1, 4, 1, 4, 4).to(odd))
    with pytest.raises(frameloom.RequestError, match="of no memory"):
        engine.decode(torch.empty(1, 4, 1, 4, 4, device="meta"))
    with pytest.raises(frameloom.RequestError, match=r"of layout torch\.sparse_coo"):
        engine.decode(torch.zeros(1, 4, 1, 4, 4).to_sparse())
    with pytest.raises(frameloom.RequestError, match="no array"):
        engine.encode([[1], [1, 2]])
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    frames.setflags(write=False)
    assert engine.encode(frames).shape == (1, 4, 1, 4, 4)


def test_a_size_past_the_position_table_is_told_in_pixels(checkpoint_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_of(), folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_max_seq_len": 4}))
    with frameloom.load(folder) as engine:
        for options, words in (({"width": 80}, "width 80 .*use 64 or less"), ({"num_frames": 17}, "use 13 or less")):
            with pytest.raises(frameloom.RequestError, match=words):
                engine.resolve("a cat", **(SIZE | options))
        assert engine.generate("a cat", **(SIZE | {"num_frames": 13, "steps": 1})).num_frames == 13


def test_a_closed_engine_says_so(checkpoint_of):
    engine = frameloom.load(checkpoint_of())
    engine.close()
    with pytest.raises(frameloom.RequestError, match="closed"):
        engine.generate("a cat")


def test_every_error_of_ours_is_a_frameloom_error_with_an_exit_code():
    for name in ("RequestError", "CheckpointError", "OutputError", "InputError"):
        error = getattr(frameloom, name)
        assert issubclass(error, frameloom.FrameloomError)
        assert error.exit_code == 2
    assert frameloom.InternalError.exit_code == 1


def test_channels_and_not_the_name_of_the_pipeline_tell_what_a_checkpoint_starts_from(checkpoint_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_of(), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanImageToVideoPipeline"}))
    with frameloom.load(folder) as engine:
        assert engine.resolve("a cat", **SIZE).image is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_asked_for_dtype_is_used_throughout(checkpoint_of, dtype):
    with frameloom.load(checkpoint_of(), dtype=dtype) as engine:
        pipeline = engine._open
        assert pipeline.experts[0].dtype == getattr(torch, dtype)
        assert next(pipeline.vae.parameters()).dtype == getattr(torch, dtype)
        assert engine.generate("a cat", **SIZE).frames.shape == (5, 32, 64, 3)


def test_bfloat16_stays_near_float32(checkpoint_of, engine):
    exact = engine.generate("a cat", output="latents", seed=1, **SIZE)
    with frameloom.load(checkpoint_of(), dtype="bfloat16") as rough_engine:
        rough = rough_engine.generate("a cat", output="latents", seed=1, **SIZE)
    assert 1e-5 < (rough - exact).norm() / exact.norm() < 0.05


def test_auto_keeps_the_vae_in_float32_and_says_why(checkpoint_of, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_of(), folder)
    (folder / "frameloom.json").write_text('{"dtype": "bfloat16", "steps": 3}')
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    with caplog.at_level("INFO", logger="frameloom"), frameloom.load(folder) as engine:
        assert engine._open.experts[0].dtype == torch.bfloat16
        assert next(engine._open.vae.parameters()).dtype == torch.float32
        assert engine.defaults.steps == 3
    assert "dtype bfloat16 (VAE float32)" in caplog.text
    assert "device cpu" in caplog.text


def test_auto_dtypes_depend_on_what_the_device_computes_well(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu, preferred=torch.float16)[0] == torch.float32
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"avx2"}))
    assert choose_dtype("auto", cpu, preferred=torch.bfloat16)[0] == torch.float32
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    assert choose_dtype("auto", cpu, preferred=torch.bfloat16)[0] == torch.bfloat16
    assert choose_dtype("float16", cpu, preferred=torch.float32)[0] == torch.float16
    assert choose_device("cpu")[0] == cpu


def test_equal_latents_are_equal_frames_in_whatever_order_they_lie(engine):
    z = torch.randn(1, 4, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    expected = engine.decode(z)
    for other in (z.contiguous(memory_format=torch.channels_last_3d), z.transpose(3, 4).contiguous().transpose(3, 4)):
        assert np.array_equal(engine.decode(other), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_no_numbers_are_told_and_spoil_no_frame_before_them(engine, caplog, value):
    good = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[:, :, 2, 1, 1] = value
    with caplog.at_level(logging.WARNING, "frameloom"):
        frames = engine.decode(bad)
    assert np.abs(frames[:5].astype(int) - engine.decode(good)[:5]).max() <= 1
    assert not frames[5:].any()
    assert "the video is black from frame 6 on" in caplog.text
    assert "4 of 192 values of the latents are no finite numbers" in caplog.text


def test_a_decoder_that_overflows_is_an_error_not_a_black_video(checkpoint_of):
    with frameloom.load(checkpoint_of()) as engine:
        engine._open.vae.decoder.conv_out.bias.fill_(float("nan"))
        with pytest.raises(frameloom.InternalError, match="no numbers"):
            engine.generate("a cat", **SIZE)
