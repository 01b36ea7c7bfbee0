"""Any weight file is opened by its first bytes, and random damage to one is a sentence or harmless."""

import contextlib
import io
import json
import os
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from frameloom.errors import CheckpointError
from frameloom.weights import files
from frameloom.weights.files import read_file
from frameloom.weights.header import MAX_DIMS, stored_bytes

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}


def gguf_bytes(folder):
    path = folder / "written.gguf"
    writer = GGUFWriter(path, "wan")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("a.weight", TENSORS["a.weight"].numpy())
    writer.add_tensor("q", np.zeros((2, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def torch_bytes():
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The bytes of a small file of each kind."""
    return {
        "safetensors": save(TENSORS, metadata={"format": "pt", "ss_network_dim": "8"}),
        "gguf": gguf_bytes(tmp_path_factory.mktemp("gguf")),
        "torch": torch_bytes(),
    }


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "torch"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf", "x.pth", "x"])
def test_what_a_file_is_its_content_decides(tmp_path, contents, kind, name):
    path = tmp_path / name
    path.write_bytes(contents[kind])
    found = read_file(path)
    assert (found.path, found.kind) == (path, kind)
    entry = found.entries["a.weight"]
    assert (entry.dtype, entry.shape, entry.scale) == ("F32", (2, 3), None)
    with path.open("rb") as file:
        file.seek(entry.offset)
        assert file.read(entry.size_bytes) == TENSORS["a.weight"].numpy().tobytes()


def test_metadata_are_what_the_file_says_beside_its_tensors(tmp_path, contents):
    told = {}
    for kind, content in contents.items():
        (tmp_path / kind).write_bytes(content)
        told[kind] = dict(read_file(tmp_path / kind).metadata)
    assert told == {
        "safetensors": {"format": "pt", "ss_network_dim": "8"},
        "gguf": {"general.architecture": "wan", "tokenizer.ggml.tokens": ("a", "b")},
        "torch": {},
    }


@pytest.mark.parametrize("dtype", ["float8_e8m0fnu", "uint16", "uint32", "uint64", "bool"])
def test_the_rarer_dtypes_of_safetensors_are_listed(tmp_path, dtype):
    save_file({"w": torch.ones(3).to(getattr(torch, dtype))}, tmp_path / "x")
    entry = read_file(tmp_path / "x").entries["w"]
    assert entry.size_bytes == stored_bytes(entry.dtype, (3,)) == 3 * getattr(torch, dtype).itemsize


def test_a_text_path_does_as_well(tmp_path, contents):
    (tmp_path / "x").write_bytes(contents["gguf"])
    assert read_file(str(tmp_path / "x")).path == tmp_path / "x"


# --- what else lies where weights should be ---


def legacy():
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty; download it again"),
        (legacy(), "a bare pickle, as before PyTorch 1.6"),
        (pickle.dumps({"a": 1}, protocol=4), "a bare pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "only a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not the file it speaks of"),
        (b'{"weight_map": {}}', "is JSON text; give the weight file it belongs to"),
        (b"hello", "neither safetensors, GGUF nor PyTorch"),
        (bytes(64), "neither safetensors, GGUF nor PyTorch"),
        ((2**40).to_bytes(8, "little") + b"{}", "neither safetensors, GGUF nor PyTorch"),
        ((100).to_bytes(8, "little") + b"{}", "cut off inside its header"),
    ],
)
def test_says_what_a_file_is_that_holds_no_weights(tmp_path, content, match):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_file(path)
    assert str(path) in str(caught.value)
    assert caught.value.__cause__ is None


def test_refuses_folders_pipes_and_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, match in {
        tmp_path: "is a folder; give a weight file in it",
        tmp_path / "pipe": "is no regular file",
        tmp_path / "none": "does not exist",
        tmp_path / "link": "does not exist",
        tmp_path / ("x" * 5000): "cannot be read",
    }.items():
        with pytest.raises(CheckpointError, match=match):
            read_file(path)


def test_reports_a_file_it_may_not_read(tmp_path, contents, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x").write_bytes(contents["gguf"])
    monkeypatch.setattr(files, "_kind", refuse)  # chmod does not stop root, who runs many test machines
    with pytest.raises(CheckpointError, match="check the path and its permissions"):
        read_file(tmp_path / "x")


@pytest.mark.parametrize("metadata", [3, ["a"], {"a": 1}, {"a": {"b": "c"}}])
def test_refuses_metadata_that_are_no_texts(tmp_path, metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="metadata that are no texts"):
        read_file(tmp_path / "x")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"a\x1b[2J": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "impossible name"),
        ({"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "impossible name"),
        ({"n" * 10_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "impossible name"),
        ({"w": {"dtype": "F32", "shape": [2] * 300_000 + [0], "data_offsets": [0, 0]}}, "damaged entry for 'w'"),
    ],
)
def test_refuses_names_and_shapes_that_no_tensor_has(tmp_path, entries, match):
    text = json.dumps(entries).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_file(tmp_path / "x")
    assert len(str(caught.value).encode()) < 500


@pytest.mark.parametrize(
    ("dtype", "shape", "match"),
    [
        ("Q4_K", (3, 100), "not whole Q4_K blocks of 256"),
        ("Q4_7", (256,), "is stored as 'Q4_7'; readable are F64"),
        ("F32", (1,) * (MAX_DIMS + 1), "9 dimensions of a size that no weight has"),
        ("F32", (2**30, 2**30), "of a size that no weight has"),
    ],
)
def test_a_size_that_cannot_be_stored_is_a_sentence(dtype, shape, match):
    with pytest.raises(CheckpointError, match=f"a tensor.* {match}|a tensor {match}"):
        stored_bytes(dtype, shape)


# --- random damage ---


def survives(path, content):
    """Opening `content` gives a list of tensors or a sentence, in little memory."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            found = read_file(path)
            assert all(entry.offset + entry.size_bytes <= len(content) for entry in found.entries.values())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 * 2**20


fuzz = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KINDS = st.sampled_from(["safetensors", "gguf", "torch"])


@fuzz
@given(kind=KINDS, data=st.data())
def test_a_file_cut_anywhere(tmp_path, contents, kind, data):
    content = contents[kind]
    survives(tmp_path / "x", content[: data.draw(st.integers(0, len(content) - 1))])


@settings(fuzz, max_examples=180)
@given(kind=KINDS, data=st.data())
def test_a_file_with_changed_bytes(tmp_path, contents, kind, data):
    content = bytearray(contents[kind])
    places = st.integers(0, len(content) - 1)
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)):
        content[place] = byte
    survives(tmp_path / "x", bytes(content))


@settings(fuzz, max_examples=180)
@given(kind=KINDS, number=st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]), data=st.data())
def test_a_file_with_an_absurd_number_anywhere(tmp_path, contents, kind, number, data):
    content = contents[kind]
    size = data.draw(st.sampled_from([2, 4, 8]))
    place = data.draw(st.integers(0, len(content) - size))
    absurd = (number % 2 ** (8 * size)).to_bytes(size, "little")
    survives(tmp_path / "x", content[:place] + absurd + content[place + size :])


STARTS = st.sampled_from([b"GGUF\3\0\0\0", b"PK\3\4", b"PK\5\6", b"\2\0\0\0\0\0\0\0{"])


@fuzz
@given(start=STARTS, rest=st.binary(max_size=200))
def test_a_file_of_noise(tmp_path, start, rest):
    survives(tmp_path / "x", start + rest)
