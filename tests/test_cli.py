"""The command line: what it writes, what it says, and one sentence and exit code 2 for whatever cannot be done."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import frameloom
from frameloom.cli.ending import fate, last_words
from frameloom.pipeline.reader import read_frames
from frameloom.pipeline.target import check_output

SMALL = ["--width", "64", "--height", "32", "--frames", "5", "--steps", "2"]


@pytest.fixture
def broken(checkpoint_of, tmp_path):
    """A copy of a good checkpoint, to be damaged by the test."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_of(), folder)
    return folder


def refused(result, *words):
    """One sentence on standard error, exit code 2, no traceback."""
    code, out, err = result
    assert code == 2, (out, err)
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if not line.startswith("[frameloom]")]
    assert len(lines) == 1, err
    assert lines[0].startswith("frameloom: ")
    for word in words:
        assert word in lines[0], (word, lines[0])


# --- what it makes ---


def test_generates_a_video_and_a_record(run, checkpoint_of, tmp_path):
    out = tmp_path / "a.mp4"
    code, text, err = run("generate", "a red circle", "--model", checkpoint_of(), "-o", out, "--json", *SMALL)
    record = json.loads(text)
    assert (code, err) == (0, "")
    assert Path(record["output"]) == out
    assert record["seconds"].keys() == {"load", "text", "denoise", "decode", "encode"}
    assert record["peak_memory_bytes"] > 10e6
    frames, fps = read_frames(out)
    assert frames.shape == (5, 32, 64, 3)
    assert fps == 16


def test_the_table_names_every_stage(run, checkpoint_of, tmp_path):
    code, text, err = run("generate", "a cat", "--model", checkpoint_of(), "-o", tmp_path / "a.gif", *SMALL)
    assert code == 0
    for word in ("text", "denoise", "s/step", "decode", "encode", "peak memory", "denoising: 2/2", "a.gif"):
        assert word in text.replace("\n", ""), (word, text)
    assert "device cpu: " in err
    assert "dtype float32" in err


def test_quiet_says_nothing(run, checkpoint_of, tmp_path):
    out = tmp_path / "frames"
    assert run("generate", "a cat", "--model", checkpoint_of(), "-o", out, "-q", *SMALL) == (0, "", "")
    assert sorted(path.name for path in out.iterdir()) == [f"{i:04d}.png" for i in range(5)]


def test_the_same_request_gives_the_same_bytes(run, checkpoint_of, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        assert run("generate", "a cat", "--model", checkpoint_of(), "-o", tmp_path / name, "-q", *SMALL)[0] == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_command_line_and_api_make_the_same_frames(run, checkpoint_of, tmp_path):
    run("generate", "a cat", "--model", checkpoint_of(), "-o", tmp_path / "f", "-q", "--seed", "5", *SMALL)
    with frameloom.load(checkpoint_of()) as engine:
        video = engine.generate("a cat", width=64, height=32, num_frames=5, steps=2, seed=5)
    assert np.array_equal(read_frames(tmp_path / "f")[0], video.frames)


def test_inspect_reads_no_weights(run, checkpoint_of):
    code, text, _ = run("inspect", checkpoint_of("two experts"), "--json")
    facts = json.loads(text)
    assert code == 0
    parts = {part["name"]: part for part in facts["components"]}
    assert parts.keys() == {"text_encoder", "transformer", "transformer_2", "vae"}
    assert parts["vae"]["dtypes"] == ["F32"]
    assert parts["vae"]["bytes"] == 4 * parts["vae"]["parameters"]
    assert facts["boundary_ratio"] == 0.875
    assert facts["defaults"]["flow_shift"] == 3.0
    code, text, _ = run("inspect", checkpoint_of())
    assert code == 0
    assert "Wan 2.1 T2V (2 layers, 32 wide)" in text


# --- what it refuses ---

BAD_REQUESTS = {
    "width": (["--width", "60"], ["width 60", "16", "48 or 64"]),
    "height": (["--height", "7"], ["height 7", "16"]),
    "zero width": (["--width", "0"], ["width 0"]),
    "huge height": (["--height", "99999999"], ["height 99999999", "8192"]),
    "frames": (["--frames", "6"], ["6 frames", "5 or 9"]),
    "no frames": (["--frames", "0"], ["frames 0"]),
    "steps": (["--steps", "0"], ["steps 0", "from 1"]),
    "negative steps": (["--steps", "-3"], ["steps -3"]),
    "guidance": (["--guidance", "nan"], ["guidance scale nan", "number"]),
    "infinite guidance": (["--guidance", "inf"], ["guidance scale inf"]),
    "guidance 2": (["--guidance-2", "nan"], ["guidance scale 2 nan"]),
    "flow shift": (["--flow-shift", "-1"], ["flow shift -1"]),
    "seed": (["--seed", "-1"], ["seed -1"]),
    "fps": (["--fps", "0"], ["fps 0"]),
    "device": (["--device", "cuda:99"], ["cuda:99", "cpu"]),
    "odd device": (["--device", "toaster"], ["toaster", "cpu"]),
    "dtype": (["--dtype", "float8"], ["float8", "bfloat16"]),
    "no number": (["--steps", "many"], ["--steps", "integer"]),
    "unknown option": (["--stepz", "3"], ["--stepz"]),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_one_sentence(case, run, checkpoint_of, tmp_path):
    options, words = BAD_REQUESTS[case]
    out = tmp_path / "a.mp4"
    refused(run("generate", "a cat", "--model", checkpoint_of(), "-o", out, *SMALL, *options), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_an_empty_prompt_is_refused(prompt, run, checkpoint_of, tmp_path):
    refused(run("generate", prompt, "--model", checkpoint_of(), "-o", tmp_path / "a.mp4"), "prompt is empty")


def test_an_unknown_model_path_is_refused(run, tmp_path):
    refused(run("generate", "a cat", "--model", tmp_path / "nowhere", "-o", tmp_path / "a.mp4"), "nowhere")
    refused(run("inspect", tmp_path / "nowhere"), "nowhere")


def test_a_folder_without_model_index_is_refused(run, tmp_path):
    refused(run("generate", "a cat", "--model", tmp_path, "-o", tmp_path / "a.mp4"), "model_index.json")


def _remove_weights(folder):
    next((folder / "transformer").glob("*.safetensors")).unlink()


def _truncate_weights(folder):
    path = next((folder / "vae").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_instead(folder):
    path = next((folder / "vae").glob("*.safetensors"))
    torch.save({"a": torch.zeros(3)}, path)


def _unknown_scheduler(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "DDIMScheduler"}))


def _slashes_in_index(folder):
    path = next((folder / "transformer").glob("*.safetensors"))
    path.rename(folder / "weights.safetensors")
    index = {"metadata": {}, "weight_map": {"proj_out.weight": "../weights.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _other_width(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 64}))


DAMAGE = {
    "missing weights": (_remove_weights, ["transformer"]),
    "truncated weights": (_truncate_weights, ["safetensors"]),
    "a pickle named safetensors": (_pickle_instead, ["safetensors"]),
    "unknown scheduler": (_unknown_scheduler, ["DDIMScheduler", "UniPCMultistepScheduler"]),
    "slashes in the index": (_slashes_in_index, ["weights.safetensors"]),
    "another width": (_other_width, ["ffn"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_one_sentence(case, run, broken, tmp_path):
    damage, words = DAMAGE[case]
    damage(broken)
    out = tmp_path / "a.mp4"
    refused(run("generate", "a cat", "--model", broken, "-o", out, *SMALL), *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("missing/a.mp4", ["missing"]),
        ("a.avi", [".avi", "mp4"]),
        ("a%.png", ["%"]),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(output, words, run, tmp_path):
    refused(run("generate", "a cat", "--model", "no/such", "-o", tmp_path / output), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that even root cannot write to")
def test_an_output_folder_that_is_not_writable_is_refused(run):
    refused(run("generate", "a cat", "-o", "/proc/a.mp4"), "/proc")


# --- interruption ---


@pytest.mark.parametrize(("is_replaced", "said"), [(False, "nothing was written"), (True, "had been written to")])
def test_an_interrupt_after_the_file_is_in_place_does_not_deny_it(is_replaced, said, tmp_path):
    target = check_output(str(tmp_path / "a.mp4"))
    target.path.write_bytes(b"an older video")
    before = target.written()

    def interrupted() -> None:
        with last_words(lambda: fate(target, before, 0.0)):
            if is_replaced:
                (tmp_path / "new").write_bytes(b"a newer video")
                os.replace(tmp_path / "new", target.path)
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        interrupted()
    assert stop.value.code == 130
    assert said in stop.value.ending.message


def test_a_working_folder_that_is_gone_is_one_sentence(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; {sys.executable} -m frameloom generate 'a cat' --gpus 2 --device cpu -o {tmp_path}/a.mp4"
    environment = {**os.environ, "PYTHONPATH": str(Path(frameloom.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", command], cwd=gone, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("frameloom: the working folder has been removed; change to one that exists\n")


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 143, "terminated")],
)
def test_a_signal_leaves_no_half_file(sent, code, word, checkpoint_of, tmp_path):
    command = [sys.executable, "-m", "frameloom", "generate", "a cat", "--model", str(checkpoint_of())]
    command += ["-o", str(tmp_path / "a.mp4"), *SMALL, "--steps", "900"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "reading the prompt" not in (line := process.stdout.readline()):
        assert line, process.stderr and process.stderr.read()
    time.sleep(0.2)
    process.send_signal(sent)
    _, err = process.communicate(timeout=240)
    assert process.returncode == code
    assert "Traceback" not in err
    assert word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "a.mp4", "--quality", "500"], "quality 500"),
        (["-o", "a.gif", "--quality", "50"], "only mp4 and webm"),
        (["-o", "a.gif", "--fps", "60"], "in a gif"),
        (["--steps", "0"], "steps 0"),
        (["--frames", "0"], "frames 0"),
        (["--guidance", "nan"], "guidance scale nan"),
        (["--seed", "-1"], "seed -1"),
    ],
)
def test_what_no_checkpoint_could_do_is_refused_before_one_is_opened(arguments, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frameloom, "load", lambda *_, **__: pytest.fail("a checkpoint was opened"))
    refused(run("generate", "a cat", "--model", "owner/name", *arguments), words)
    assert not list(tmp_path.iterdir())


def test_a_default_rate_too_fast_for_a_gif_is_refused_before_the_work(run, broken, tmp_path):
    (broken / "frameloom.json").write_text('{"fps": 60}')
    said = run("generate", "a cat", "--model", broken, "-o", tmp_path / "a.gif", *SMALL)
    refused(said, "60.0 frames per second", "in a gif")
    assert "denoising" not in said[1]


def test_an_empty_model_name_is_not_the_built_in_model(run, tmp_path):
    refused(run("generate", "a red circle", "--model", "", "-o", tmp_path / "a.mp4"), "names no model")
    refused(run("inspect", ""), "names no model")


def test_brackets_in_names_are_no_markup(run, broken, tmp_path):
    (tmp_path / "d[").mkdir()
    for name in ("clip[final].mp4", "d[/b].mp4"):
        code, out, _ = run("generate", "a cat", "--model", broken, "-o", tmp_path / name, *SMALL)
        assert code == 0
        assert str(tmp_path / name) in out
    (broken / "frameloom.json").write_text('{"negative_prompt": "[/x]"}')
    code, out, _ = run("inspect", broken)
    assert code == 0
    assert "[/x]" in out


def test_a_name_the_terminal_cannot_show_is_told_in_escapes(checkpoint_of, tmp_path):
    command = [sys.executable, "-m", "frameloom", "generate", "a cat", "--model", str(checkpoint_of()), *SMALL]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "-o", "\u7ea2.mp4"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "\\u7ea2.mp4" in done.stdout
    assert (tmp_path / "\u7ea2.mp4").is_file()


def test_the_version_and_the_bare_command(run):
    assert run("--version") == (0, f"frameloom {frameloom.__version__}\n", "")
    code, out, err = run()
    assert code == 2
    assert "generate" in out
    assert err == ""


# --- what may be computed otherwise ---


def test_explain_says_what_was_chosen_and_why(run, tmp_path, checkpoint_of):
    base = ["generate", "a cat", "--model", checkpoint_of(), "-o", tmp_path / "a.mp4", *SMALL]
    code, out, _ = run(*base, "--explain", "--rewrite", "vae.conv_winograd=off")
    assert code == 0
    assert "vae.conv_winograd off: switched off by name" in out
    assert "vae.channels_last on: " in out
    code, out, _ = run(*base, "--explain", "--json", "--exactness", "bitwise")
    assert code == 0
    assert "vae.channels_last off: it is rounding, and bitwise was asked for" in json.loads(out)["rewrites"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--exactness", "perfect"], ["bitwise, rounding, lossy"]),
        (["--rewrite", "vae.band=on"], ["did you mean 'vae.bands'"]),
        (["--rewrite", "vae.channels_last=off", "--rewrite", "vae.upsample_phases=on"], ["not possible here", "leave"]),
        (["--vae-memory", "lots"], ["write auto, or bytes"]),
        (["--vae-memory", "1000"], ["needs at least", "budget"]),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_and_nothing_is_written(run, tmp_path, checkpoint_of, options, words):
    target = tmp_path / "a.mp4"
    refused(run("generate", "a cat", "--model", checkpoint_of(), "-o", target, *SMALL, *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_bitwise_and_fast_make_the_same_video_but_for_rounding(run, tmp_path, checkpoint_of):
    videos = []
    for exactness in ("bitwise", "rounding"):
        folder = tmp_path / exactness
        base = ["generate", "a cat", "--model", checkpoint_of(), "-o", folder, *SMALL]
        assert run(*base, "--exactness", exactness)[0] == 0
        videos.append(read_frames(folder)[0].astype(int))
    assert np.abs(videos[0] - videos[1]).max() <= 1
