"""Every layout of the same checkpoint is the same checkpoint: written, read back, and computed with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FROM_IMAGE

import frameloom
from frameloom import shapes
from frameloom.errors import OutputError, RequestError
from frameloom.models.clip import image_encoder_key
from frameloom.weights.convert import LAYOUTS, convert, convert_model, plan
from frameloom.weights.source import open_checkpoint
from frameloom.weights.tensors import read_tensor

KINDS = ["one expert", "two experts", "per-token timesteps", *FROM_IMAGE, "vace", "vace, two experts"]
SMALL = {"width": 32, "height": 32, "num_frames": 5, "steps": 2, "seed": 3}


def latents_of(model, kind="one expert", **options):
    picture = np.full((32, 32, 3), 90, np.uint8)
    given = {"image": picture} if kind in FROM_IMAGE else {}
    if kind == "first and last image":
        given["last_image"] = picture + 70
    with frameloom.load(model, device="cpu", **options) as engine:
        return engine.generate("a red circle", output="latents", **SMALL, **given)


def used_of(name, tensors):
    """What is computed with: files of CLIP may hold more, and longer names."""
    if name != "image_encoder":
        return tensors
    return {image_encoder_key(key): entry for key, entry in tensors.items() if image_encoder_key(key)}


def same_tensors(first, second) -> None:
    assert first.components.keys() == second.components.keys()
    for name in first.components:
        one, other = (used_of(name, which.components[name].tensors) for which in (first, second))
        assert one.keys() == other.keys()
        for key, entry in one.items():
            assert torch.equal(read_tensor(entry), read_tensor(other[key])), (name, key)


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_every_layout_makes_the_same_latents(kind, to, checkpoint_of, tmp_path):
    source = checkpoint_of(kind)
    files = convert(open_checkpoint(source), tmp_path / "out", to=to)
    assert files
    assert all(file.is_file() for file in files)
    same_tensors(open_checkpoint(source), open_checkpoint(tmp_path / "out"))
    assert torch.equal(latents_of(source, kind), latents_of(tmp_path / "out", kind))


@pytest.mark.parametrize("to", LAYOUTS)
def test_the_built_in_model_in_every_layout_makes_the_same_video(to, tmp_path):
    convert(open_checkpoint(shapes.PATH), tmp_path, to=to)
    videos = []
    for model in (None, tmp_path):
        with frameloom.load(model, device="cpu") as engine:
            videos.append(engine.generate("a red circle moving left", steps=2, num_frames=5))
    assert np.array_equal(videos[0].frames, videos[1].frames)


IN_TURN = """
import sys, torch, frameloom
def latents(model):
    with frameloom.load(model, device="cpu", exactness="bitwise") as engine:
        return engine.generate("a red circle moving left", steps=3, output="latents")
first, *others = map(latents, sys.argv[1:])
sys.exit(not all(torch.equal(first, other) for other in others))
"""


def test_where_weights_lie_in_memory_does_not_matter_to_who_calls_the_library(tmp_path):
    """Those of a mapped file begin anywhere, for which MKL sums in another order unless it is told not to."""
    for to in LAYOUTS:
        convert(open_checkpoint(shapes.PATH), tmp_path / to, to=to, dtype=torch.float32)
    environment = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    environment["PYTHONPATH"] = str(Path(frameloom.__file__).parents[1])
    assert (
        subprocess.run([sys.executable, "-c", IN_TURN, *(tmp_path / to for to in LAYOUTS)], env=environment).returncode
        == 0
    )


@pytest.mark.parametrize("to", LAYOUTS)
def test_there_and_back_again_every_file_is_the_same(to, checkpoint_of, tmp_path):
    source = open_checkpoint(checkpoint_of("two experts"))
    convert(source, tmp_path / "there", to=to)
    convert(open_checkpoint(tmp_path / "there"), tmp_path / "back", to="diffusers")
    back = open_checkpoint(tmp_path / "back")
    same_tensors(source, back)
    for name in ("pipeline", "boundary_ratio", "expand_timesteps", "scheduler", "defaults"):
        assert getattr(source, name) == getattr(back, name), name


def test_a_narrower_dtype_computes_what_the_source_computes_in_it(checkpoint_of, tmp_path):
    source = checkpoint_of("one expert")
    convert(open_checkpoint(source), tmp_path, to="single-file", dtype=torch.bfloat16)
    options = {"dtype": "bfloat16"}
    assert torch.equal(latents_of(source, **options), latents_of(tmp_path, **options))


def test_large_components_are_cut_into_shards_with_an_index(checkpoint_of, tmp_path, monkeypatch):
    monkeypatch.setattr("frameloom.weights.convert.SHARD_BYTES", 20_000)
    source = open_checkpoint(checkpoint_of("one expert"))
    for to in ("diffusers", "original"):
        files = convert(source, tmp_path / to, to=to)
        assert sum("-of-" in file.name for file in files) > 2
        same_tensors(source, open_checkpoint(tmp_path / to))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("at", [1, 5, 40])
def test_a_second_run_goes_on_where_the_first_was_ended(at, checkpoint_of, tmp_path):
    source = open_checkpoint(checkpoint_of("one expert"))
    calls = []

    def stop(name, done, total):
        calls.append(name)
        if len(calls) == at:
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, tmp_path, to="diffusers", on_bytes=stop)
    (partial,) = tmp_path.rglob("*.partial")
    assert not partial.with_suffix("").exists()
    kept = partial.read_bytes()
    convert(source, tmp_path, to="diffusers")
    assert partial.with_suffix("").read_bytes().startswith(kept)
    assert not list(tmp_path.rglob("*.partial"))
    same_tensors(source, open_checkpoint(tmp_path))


def test_a_run_that_is_done_writes_nothing_again(checkpoint_of, tmp_path):
    source = open_checkpoint(checkpoint_of("one expert"))
    times = [[file.stat().st_mtime_ns for file in convert(source, tmp_path, to="single-file")] for _ in range(2)]
    assert times[0] == times[1]


def test_what_another_dtype_left_is_written_anew(checkpoint_of, tmp_path):
    convert(open_checkpoint(checkpoint_of("one expert")), tmp_path, to="single-file", dtype=torch.bfloat16)
    source = open_checkpoint(checkpoint_of("one expert"))
    convert(source, tmp_path, to="single-file")
    same_tensors(source, open_checkpoint(tmp_path))


def test_a_disk_that_changes_what_was_written_is_noticed(checkpoint_of, tmp_path):
    source = open_checkpoint(checkpoint_of("one expert"))
    files = convert(source, tmp_path, to="single-file")
    with files[0].open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x55" * 5)
    with pytest.raises(OutputError, match="reads back otherwise"):
        convert(source, tmp_path, to="single-file")


def test_without_room_nothing_is_begun(checkpoint_of, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs 0\.\d\d GB and its disk has 0\.00 GB free"):
        convert(open_checkpoint(checkpoint_of("one expert")), tmp_path / "out", to="original")
    assert not list((tmp_path / "out").rglob("*.*"))


def test_other_files_in_the_way_are_refused_and_stay(checkpoint_of, tmp_path):
    source = open_checkpoint(checkpoint_of("one expert"))
    convert(open_checkpoint(checkpoint_of("two experts")), tmp_path / "two", to="diffusers")
    convert(open_checkpoint(checkpoint_of("per-token timesteps")), tmp_path / "other", to="single-file")
    for folder, to in (("two", "diffusers"), ("two", "single-file"), ("other", "single-file")):
        before = {file: file.read_bytes() for file in (tmp_path / folder).rglob("*") if file.is_file()}
        with pytest.raises(OutputError, match="of something else, or damaged; give a folder that is new"):
            convert(source, tmp_path / folder, to=to)
        assert before == {file: file.read_bytes() for file in (tmp_path / folder).rglob("*") if file.is_file()}


def test_the_parts_that_are_converted_are_not_overwritten(checkpoint_of, tmp_path):
    files = convert(open_checkpoint(checkpoint_of("one expert")), tmp_path, to="single-file")
    parts = {"transformer": files[0], "vae": files[1], "text_encoder": files[2], "tokenizer": tmp_path / "tokenizer"}
    before = files[0].read_bytes()
    with pytest.raises(OutputError, match="holds files that are converted; give another folder"):
        convert(open_checkpoint(None, parts=parts), tmp_path, to="single-file", dtype=torch.bfloat16)
    assert files[0].read_bytes() == before


def test_a_destination_without_a_name_is_refused(checkpoint_of):
    with pytest.raises(RequestError, match="the destination is empty"):
        convert_model(checkpoint_of("one expert"), "", to="original")


def test_onto_itself_or_a_file_is_refused(checkpoint_of, tmp_path):
    source = open_checkpoint(checkpoint_of("one expert"))
    with pytest.raises(OutputError, match="is the checkpoint itself"):
        convert(source, source.path, to="original")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        convert(source, tmp_path / "file", to="original")


def test_the_original_layout_has_the_names_of_the_original_code(checkpoint_of, tmp_path):
    source = open_checkpoint(checkpoint_of("two experts"))
    files = {str(file.relative_to(tmp_path)) for file in convert(source, tmp_path, to="original")}
    assert files == {
        "high_noise_model/diffusion_pytorch_model.safetensors",
        "low_noise_model/diffusion_pytorch_model.safetensors",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
    }
    config = json.loads((tmp_path / "low_noise_model" / "config.json").read_text())
    assert (config["model_type"], config["dim"], config["num_heads"]) == ("t2v", 32, 2)
    state = torch.load(tmp_path / "Wan2.1_VAE.pth", weights_only=True)
    assert "decoder.head.2.weight" in state
    targets = {target.component: target for target in plan(source, tmp_path, to="original")}
    assert "blocks.0.self_attn.q.weight" in targets["transformer_2"].tensors
