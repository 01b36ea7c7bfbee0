"""Where a conversion is written: nothing foreign is lost, one process at a time, and every refusal is one sentence."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from frameloom.errors import CheckpointError, OutputError
from frameloom.weights.convert import convert, convert_model
from frameloom.weights.source import open_checkpoint
from frameloom.weights.tensors import read_tensor

LOCK = ".frameloom-convert.lock"


@pytest.fixture
def source(checkpoint_of):
    return open_checkpoint(checkpoint_of("one expert"))


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def put(file, content: bytes = b"precious"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@contextmanager
def files_of_at_most(size_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- what is foreign ---

PLACES = [
    ("original", "Wan2.1_VAE.pth"),
    ("original", "Wan2.1_VAE.pth.partial"),
    ("original", "config.json"),
    ("original", "google/umt5-xxl/tokenizer.json"),
    ("diffusers", "model_index.json"),
    ("diffusers", "vae/config.json.partial"),
    ("single-file", "vae/vae.safetensors.partial"),
]


@pytest.mark.parametrize(("to", "name"), PLACES)
def test_a_foreign_file_at_any_place_is_refused_before_anything_is_written(to, name, source, tmp_path):
    put(tmp_path / name)
    with pytest.raises(OutputError, match=f"holds '{name}' of something else"):
        convert(source, tmp_path, to=to)
    assert contents(tmp_path) == {name: b"precious"}


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "vae/vae.safetensors"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_where_a_file_belongs_is_refused(make, name, source, tmp_path):
    (tmp_path / name).parent.mkdir()
    make(tmp_path / name)
    with pytest.raises(OutputError, match=f"holds '{name}' of something else"):
        convert(source, tmp_path, to="single-file")
    assert contents(tmp_path) == {}


def test_a_file_where_a_folder_belongs_is_refused(source, tmp_path):
    put(tmp_path / "tokenizer")
    with pytest.raises(OutputError, match="holds 'tokenizer' of something else"):
        convert(source, tmp_path, to="single-file")
    assert contents(tmp_path) == {"tokenizer": b"precious"}


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "vae/vae.safetensors.partial", "Wan2.1_VAE.pth.partial"])
def test_nothing_is_written_through_a_link(name, source, tmp_path):
    to = "original" if name.startswith("Wan") else "single-file"
    elsewhere = put(tmp_path / "elsewhere")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(OutputError, match="of something else"):
        convert(source, tmp_path / "out", to=to)
    assert link.is_symlink()
    assert elsewhere.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "vae/vae.safetensors", "vae/vae.safetensors.partial"])
def test_a_link_to_an_empty_file_gives_way_to_a_file(name, source, tmp_path):
    elsewhere = put(tmp_path / "elsewhere", b"")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    convert(source, tmp_path / "out", to="single-file")
    assert not link.is_symlink()
    assert elsewhere.read_bytes() == b""


def test_a_tokenizer_that_lies_in_the_destination_stays_as_it_is(source, tmp_path):
    transformer, vae, text_encoder = convert(source, tmp_path / "parts", to="single-file")
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "parts" / "tokenizer", out / "tokenizer")
    before = contents(out)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "tokenizer": out / "tokenizer"}
    convert_model(None, out, to="diffusers", parts=parts)
    assert contents(out).items() >= before.items()
    assert open_checkpoint(out).pipeline == source.pipeline


# --- what is its own ---


def test_own_files_that_are_damaged_are_written_again(source, tmp_path, caplog):
    transformer, vae, text_encoder = convert(source, tmp_path, to="single-file")
    before = contents(tmp_path)
    os.truncate(transformer, transformer.stat().st_size // 2)
    put(vae, vae.read_bytes() + b"more")
    put(text_encoder, b"")
    put(tmp_path / "tokenizer" / "tokenizer.json", before["tokenizer/tokenizer.json"][:100])
    convert(source, tmp_path, to="single-file")
    assert contents(tmp_path) == before
    assert caplog.text.count("is written again") == 3


@pytest.mark.parametrize("damage", [lambda whole: whole + b"more", lambda whole: whole[:-100]], ids=["more", "less"])
def test_a_pickle_of_another_size_is_refused(damage, source, tmp_path):
    convert(source, tmp_path, to="original")
    file = tmp_path / "Wan2.1_VAE.pth"
    damaged = put(file, damage(file.read_bytes())).read_bytes()
    with pytest.raises(OutputError, match=r"holds 'Wan2.1_VAE.pth' of something else, or damaged; .* or move it away"):
        convert(source, tmp_path, to="original")
    assert file.read_bytes() == damaged


def test_an_empty_pickle_is_written_again(source, tmp_path):
    convert(source, tmp_path, to="original")
    before = contents(tmp_path)
    put(tmp_path / "Wan2.1_VAE.pth", b"")
    convert(source, tmp_path, to="original")
    assert contents(tmp_path) == before


class StoppedError(Exception):
    pass


def test_a_run_that_was_ended_within_a_pickle_is_gone_on_with(source, tmp_path):
    convert(source, tmp_path / "whole", to="original")

    def stop(name, done, total):
        if name == "Wan2.1_VAE.pth" and done > total // 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, tmp_path / "out", to="original", on_bytes=stop)
    put(tmp_path / "out" / "Wan2.1_VAE.pth.partial", b"what torch had written of it")
    convert(source, tmp_path / "out", to="original")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_a_pickle_was_made_from_is_removed_also_by_a_later_run(source, tmp_path):
    convert(source, tmp_path, to="original")
    leftover = put(tmp_path / "Wan2.1_VAE.pth.safetensors.partial", b"")
    convert(source, tmp_path, to="original")
    assert not leftover.exists()


# --- numbers that the dtype has no place for ---


def with_number(folder, component: str, number: float, to: Path):
    """A copy of a checkpoint, with another first number in a weight of a network; and the name of that weight."""
    shutil.copytree(folder, to)
    tensors = open_checkpoint(to).components[component].tensors
    entry = next(entry for entry in tensors.values() if len(entry.shape) == 2 and entry.dtype == "F32")
    with entry.file.open("r+b") as file:
        file.seek(entry.offset)
        file.write(torch.tensor([number]).numpy().tobytes())
    return open_checkpoint(to), entry.name


@pytest.mark.parametrize(("component", "to"), [("transformer", "diffusers"), ("text_encoder", "original")])
def test_a_number_too_large_for_float16_is_an_error_and_leaves_no_file(component, to, checkpoint_of, tmp_path):
    source, name = with_number(checkpoint_of("one expert"), component, -1e6, tmp_path / "source")
    said = rf"'{name}' in .* holds numbers up to 1e\+06, and float16 ends at 65504; take bfloat16 or float32"
    with pytest.raises(CheckpointError, match=said):
        convert(source, tmp_path / "out", to=to, dtype=torch.float16)
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert convert(source, tmp_path / "other", to=to, dtype=torch.bfloat16)


def test_an_infinity_that_was_stored_stays_one(checkpoint_of, tmp_path):
    source, name = with_number(checkpoint_of("one expert"), "text_encoder", float("inf"), tmp_path / "source")
    convert(source, tmp_path / "out", to="diffusers", dtype=torch.float16)
    stored = open_checkpoint(tmp_path / "out").components["text_encoder"].tensors[name]
    assert read_tensor(stored).flatten()[0] == float("inf")


# --- one process at a time ---


def test_a_second_run_into_the_same_folder_is_told_who_writes_there(source, tmp_path):
    said = []

    def convert_too(name, done, total):
        if not said:
            with pytest.raises(OutputError) as caught:
                convert(source, tmp_path, to="single-file")
            said.append(str(caught.value))

    convert(source, tmp_path, to="single-file", on_bytes=convert_too)
    assert f"is being written by another process ({os.getpid()}); wait for its end" in said[0]
    assert not (tmp_path / LOCK).exists()


HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
)


def test_a_process_that_was_killed_holds_nothing(source, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(OutputError, match="is being written by another process; wait"):  # it wrote no number
            convert(source, tmp_path, to="single-file")
        assert contents(tmp_path) == {LOCK: b""}
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert convert(source, tmp_path, to="single-file")
    assert not (tmp_path / LOCK).exists()


def test_where_nothing_can_be_locked_the_log_says_so(source, tmp_path, caplog):
    (tmp_path / LOCK).mkdir()
    with caplog.at_level("INFO"):
        assert convert(source, tmp_path, to="single-file")
    assert f"{tmp_path} cannot be locked" in caplog.text


# --- disks and paths ---


@pytest.mark.parametrize("to", ["diffusers", "original", "single-file"])
def test_a_finished_conversion_is_checked_again_without_room_for_a_byte(to, source, tmp_path, monkeypatch):
    files = convert(source, tmp_path, to=to)
    before = contents(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with files_of_at_most(0):
        assert convert(source, tmp_path, to=to) == files
    assert contents(tmp_path) == before


def test_a_disk_that_is_full_at_the_tokenizer_is_one_sentence(source, tmp_path):
    convert(source, tmp_path, to="single-file")
    before = contents(tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    with files_of_at_most(50), pytest.raises(OutputError, match=r"tokenizer.json cannot be written \(.*run the same"):
        convert(source, tmp_path, to="single-file")
    convert(source, tmp_path, to="single-file")
    assert contents(tmp_path) == before


def loop(folder):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def to_nothing(folder):
    (folder / "link").symlink_to(folder / "nothing")
    return folder / "link"


IMPOSSIBLE = {
    "long": (lambda folder: folder / ("x" * 300), "can be no folder"),
    "zero": (lambda folder: f"{folder}/a\0b", r"a\\x00b' can be no folder"),
    "loop": (loop, "can be no folder"),
    "link": (to_nothing, "is a link to nothing"),
    "within a file": (lambda folder: put(folder / "file") / "out", "can be no folder"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_destination_that_can_be_no_folder_is_one_sentence(kind, checkpoint_of, tmp_path):
    make, said = IMPOSSIBLE[kind]
    with pytest.raises(OutputError, match=said):
        convert_model(checkpoint_of("one expert"), make(tmp_path), to="original")
