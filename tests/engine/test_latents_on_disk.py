"""The latents of a job are decoded from its journal: while that is done no memory of their size is taken."""

import gc
import sys
from pathlib import Path

import pytest
import torch

import frameloom
from frameloom.engine import job
from frameloom.engine.journal import Journal

SIZE = {"width": 64, "height": 32, "num_frames": 13, "steps": 2, "seed": 5}
SHAPE = (1, 4, 4, 4, 8)
PROMPT = "a red circle moving left"

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what is mapped")


def mapped(name):
    """Address ranges where files of a name lie in the memory of this process."""
    lines = [line for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if line.endswith(f"/{name}")]
    bounds = [line.split()[0].split("-") for line in lines]
    return [range(int(first, 16), int(end, 16)) for first, end in bounds]


def latents_in_memory():
    """Whether the tensors that have the shape of the latents lie in the journal."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == SHAPE]
    return {any(x.data_ptr() in part for part in mapped("latents.safetensors")) for x in found}


def in_decode(found):
    """A progress callback that looks at the memory when the first frames are out."""

    def look(progress):
        if (progress.stage, progress.step) == ("decode", 1):
            found.update(latents_in_memory())

    return look


@linux
def test_a_job_is_decoded_from_its_journal_and_what_was_denoised_is_let_go(checkpoint_of, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        found = {}
        for name, is_kept in (("plain", False), ("kept", True)):
            found[name] = set()
            engine.generate_to(tmp_path / f"{name}.mp4", PROMPT, job=is_kept, progress=in_decode(found[name]), **SIZE)
    assert (tmp_path / "kept.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()
    assert found == {"plain": {False}, "kept": {True}}
    assert not mapped("latents.safetensors")


@linux
def test_a_resumed_job_is_decoded_from_its_journal(checkpoint_of, tmp_path, monkeypatch):
    monkeypatch.setenv("FRAMELOOM_JOBS", str(tmp_path / "jobs"))

    def end(progress):
        if progress.stage == "decode":
            raise KeyboardInterrupt

    found = set()
    with frameloom.load(checkpoint_of()) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.generate_to(tmp_path / "a.mp4", PROMPT, job=True, progress=end, **SIZE)
        engine.finish(job.find(None), progress=in_decode(found))
    assert found == {True}


def test_what_cannot_be_written_stays_in_memory(tmp_path, caplog):
    made = {"latents": torch.randn(SHAPE)}
    assert Journal(tmp_path / "missing", "job").on_disk("latents", lambda: made) is made
    assert caplog.text.count("cannot be written") == 1


def test_an_old_entry_that_is_damaged_and_cannot_be_replaced_is_not_taken(tmp_path, monkeypatch):
    journal, made = Journal(tmp_path, "job"), {"latents": torch.randn(SHAPE)}
    journal.write("latents", {"latents": torch.zeros(SHAPE)})
    path = tmp_path / "latents.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (tmp_path / ".latents.safetensors.partial").mkdir()  # where what was computed again is to be written
    assert journal.on_disk("latents", lambda: made) is made
