"""GGUF files: the tensors and metadata that the gguf package reads, and one sentence for each way a file can lie."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from frameloom.errors import CheckpointError
from frameloom.weights.gguf import MAX_ARRAY, MAX_HEADER_BYTES, MAX_ITEMS, read_gguf
from frameloom.weights.header import BLOCKS, DTYPE_BYTES, stored_bytes

F32, Q8_0 = 0, 8  # types of tensors
U32, FLOAT, TEXT, ARRAY = 4, 6, 8, 9  # types of metadata


def write(path, tensors, *, endianess=gguf.GGUFEndian.LITTLE, alignment=32, **metadata):
    """Write arrays, or (bytes per row, type) pairs, with the gguf package; `metadata` are names of its add_ methods."""
    writer = GGUFWriter(path, "wan", endianess=endianess)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in metadata.items():
        getattr(writer, f"add_{kind}")(key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def content(entry):
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.size_bytes)


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def info(name="w", dims=(2,), *, kind=F32, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def pair(key="k", *, kind=U32, value=b"\1\0\0\0"):
    return string(key) + struct.pack("<I", kind) + value


def array(kind, count, values=b""):
    return struct.pack("<IQ", kind, count) + values


def raw(infos=(), pairs=(), *, version=3, magic=b"GGUF", counts=None, data=bytes(64)):
    """The bytes of a file, true or not."""
    header = magic + struct.pack("<IQQ", version, *(counts or (len(infos), len(pairs))))
    header += b"".join(pairs) + b"".join(infos)
    return header + bytes(-len(header) % 32) + data


# --- what the gguf package reads ---


@pytest.mark.parametrize("kind", [kind for kind in GGMLQuantizationType if kind.name in BLOCKS], ids=lambda k: k.name)
def test_block_types_lie_where_the_package_finds_them(tmp_path, kind):
    rng = np.random.default_rng(0)
    numbers, size = BLOCKS[kind.name]
    blocks = rng.integers(256, size=(5, 2 * size), dtype="u1")
    write(tmp_path / "x.gguf", {"a": np.ones(3, np.float32), "w": (blocks, kind)})
    (reference,) = (tensor for tensor in GGUFReader(tmp_path / "x.gguf").tensors if tensor.name == "w")
    found = read_gguf(tmp_path / "x.gguf")[0]["w"]
    assert (found.dtype, found.shape) == (kind.name, (5, 2 * numbers))
    assert found.shape == tuple(reversed(reference.shape.tolist()))
    assert (found.offset, found.size_bytes) == (reference.data_offset, reference.n_bytes)
    assert content(found) == reference.data.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int16", "int32", "int64"])
def test_plain_types_are_read_byte_for_byte(tmp_path, dtype):
    tensors = {f"{ndim}d": np.arange(2**ndim).reshape((2,) * ndim).astype(dtype) for ndim in range(1, 6)}
    write(tmp_path / "x.gguf", tensors)
    entries, _ = read_gguf(tmp_path / "x.gguf")
    assert {name: entry.shape for name, entry in entries.items()} == {name: t.shape for name, t in tensors.items()}
    assert all(content(entries[name]) == tensor.tobytes() for name, tensor in tensors.items())


def test_every_type_of_the_package_is_known_with_its_block():
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    ours = {name: (1, DTYPE_BYTES[name]) for name in sizes.keys() & DTYPE_BYTES.keys()} | dict(BLOCKS)
    assert {name: ours.get(name) for name in sizes} == sizes


def test_brain_floats_are_brain_floats(tmp_path):
    write(tmp_path / "x.gguf", {"w": (np.arange(12, dtype="u1").reshape(2, 6), GGMLQuantizationType.BF16)})
    found = read_gguf(tmp_path / "x.gguf")[0]["w"]
    assert (found.dtype, found.shape, content(found)) == ("BF16", (2, 3), bytes(range(12)))


def test_metadata_are_the_values_that_the_package_reads(tmp_path):
    values = {
        "u8": ("uint8", 255), "i8": ("int8", -128), "u16": ("uint16", 65535), "i16": ("int16", -1),
        "u32": ("uint32", 2**32 - 1), "i32": ("int32", -7), "u64": ("uint64", 2**64 - 1), "i64": ("int64", -(2**63)),
        "f32": ("float32", 0.5), "f64": ("float64", 1e-300), "yes": ("bool", True), "text": ("string", "Käse ▁"),
        "ints": ("array", [1, -2, 3]), "floats": ("array", [0.5, -1.5]), "words": ("array", ["", "▁a", "b"]),
        "bools": ("array", [True, False]), "bytes": ("array", b"\0\xff"),
    }  # fmt: skip
    write(tmp_path / "x.gguf", {"w": np.ones(2, np.float32)}, **values)
    _, found = read_gguf(tmp_path / "x.gguf")
    reader = GGUFReader(tmp_path / "x.gguf")
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found == {key: tuple(value) if isinstance(value, list) else value for key, value in expected.items()}
    assert found["general.architecture"] == "wan"


def test_the_tokenizer_of_a_text_encoder_is_read_whole(tmp_path):
    count = 300_000
    tokens = b"".join(struct.pack("<Q", 6) + b"%06d" % index for index in range(count))
    pairs = [
        pair("tokenizer.ggml.tokens", kind=ARRAY, value=array(TEXT, count, tokens)),
        pair("tokenizer.ggml.scores", kind=ARRAY, value=array(FLOAT, count, struct.pack(f"<{count}f", *range(count)))),
    ]
    (tmp_path / "x.gguf").write_bytes(raw([info()], pairs))
    _, metadata = read_gguf(tmp_path / "x.gguf")
    assert metadata["tokenizer.ggml.tokens"] == tuple(f"{index:06d}" for index in range(count))
    assert metadata["tokenizer.ggml.scores"] == tuple(range(count))


def test_a_reshaped_tensor_has_its_own_shape_again(tmp_path):
    kind = GGMLQuantizationType.Q4_K
    data = np.zeros((6, BLOCKS["Q4_K"][1]), np.uint8)
    write(tmp_path / "x.gguf", {"w": (data, kind)}, **{"comfy.gguf.orig_shape.w": ("array", [4, 3, 128])})
    found = read_gguf(tmp_path / "x.gguf")[0]["w"]
    assert (found.shape, found.size_bytes) == ((4, 3, 128), data.nbytes)
    assert stored_bytes(found.dtype, found.shape) == data.nbytes


def test_version_two_is_read_like_three(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw([info()], [pair()], version=2))
    entries, metadata = read_gguf(path)
    assert (entries["w"].shape, metadata) == ((2,), {"k": 1})


def test_tensors_keep_the_alignment_that_the_file_asks_for(tmp_path):
    write(tmp_path / "x.gguf", {"a": np.ones(3, np.float32), "b": np.ones(5, np.float32)}, alignment=256)
    entries, _ = read_gguf(tmp_path / "x.gguf")
    reference = {tensor.name: tensor.data_offset for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    assert {name: entry.offset for name, entry in entries.items()} == reference


# --- files that lie ---


def test_refuses_what_a_big_endian_machine_wrote(tmp_path):
    path = tmp_path / "x.gguf"
    write(path, {"w": np.ones(2, np.float32)}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match="for big-endian machines; get the little-endian one"):
        read_gguf(path)


LIES = {
    "version 1": (raw(version=1), "version 1; readable are 2 and 3"),
    "version 4": (raw(version=4), "version 4; readable are 2 and 3"),
    "version 0": (raw(version=0), "version 0; readable are 2 and 3"),
    "version swapped": (raw(version=3 << 24), "for big-endian machines"),
    "magic swapped": (raw(magic=b"FUGG", version=3 << 24), "for big-endian machines"),
    "nothing but magic": (b"GGUF", "cut off or damaged inside its header"),
    "cut in the counts": (raw()[:20], "cut off or damaged inside its header"),
    "more tensors than bytes": (raw(counts=(3, 0))[:24], "cut off or damaged"),
    "absurd tensors": (raw(counts=(2**64 - 1, 0)), f"where {MAX_ITEMS} are the most"),
    "absurd metadata": (raw(counts=(0, 2**63)), f"where {MAX_ITEMS} are the most"),
    "absurd text": (raw([], [struct.pack("<Q", 2**63) + b"x"]), "cut off or damaged"),
    "text that is none": (raw([], [struct.pack("<Q", 2) + b"\xff\xfe"]), "not UTF-8"),
    "name that is none": (raw([info("a\x1b[2J")]), "impossible name"),
    "empty name": (raw([info("")]), "impossible name"),
    "unknown metadata": (raw([], [pair(kind=13)]), "unknown type 13"),
    "array of arrays": (raw([], [pair(kind=ARRAY, value=array(ARRAY, 1, array(U32, 1)))]), "array of arrays"),
    "unknown array": (raw([], [pair(kind=ARRAY, value=array(99, 1))]), "unknown type 99"),
    "absurd array": (raw([], [pair(kind=ARRAY, value=array(U32, 2**62))]), f"where {MAX_ARRAY} are the most"),
    "array past the end": (raw([], [pair(kind=ARRAY, value=array(U32, 10**5))]), "cut off or damaged"),
    "key twice": (raw([], [pair(), pair()]), "the metadata key 'k' twice"),
    "name twice": (raw([info(), info(offset=32)]), "lists a tensor twice"),
    "too many dimensions": (raw([info(dims=(1,) * 9)]), "9 dimensions"),
    "absurd dimensions": (raw([string("w") + struct.pack("<I", 2**32 - 1)]), f"{2**32 - 1} dimensions"),
    "absurd size": (raw([info(dims=(2**40, 2**40))]), "of a size that no weight has"),
    "size that wraps": (raw([info(dims=(2**62, 4, 2**62))]), "of a size that no weight has"),
    "unknown type": (raw([info(kind=4)]), "as GGML type 4; readable are F32, F16"),
    "row of half a block": (raw([info(dims=(16, 2), kind=Q8_0)]), "not whole Q8_0 blocks of 32"),
    "unaligned": (raw([info(offset=4)]), "over another tensor or unaligned"),
    "one over another": (raw([info("v", (16,)), info("w", (2,), offset=32)]), "'w' over another tensor"),
    "past the end": (raw([info(offset=64)]), "cut off"),
    "offset that wraps": (raw([info(offset=2**64 - 32)]), "cut off"),
    "cut data": (raw([info()])[:-60], "cut off"),
    "alignment 0": (raw([info()], [pair("general.alignment", value=bytes(4))]), "aligns its tensors to 0"),
    "alignment 3": (raw([info()], [pair("general.alignment", value=b"\3\0\0\0")]), "aligns its tensors to 3"),
    "absurd alignment": (raw([info()], [pair("general.alignment", value=b"\0\0\0\x80")]), "a power of two is needed"),
    "text as alignment": (raw([info()], [pair("general.alignment", kind=TEXT, value=string("x"))]), "aligns its"),
    "other shape": (
        raw([info()], [pair("comfy.gguf.orig_shape.w", kind=ARRAY, value=array(U32, 1, b"\3\0\0\0"))]),
        "'w' an original shape of other size",
    ),
    "text as shape": (
        raw([info()], [pair("comfy.gguf.orig_shape.w", kind=TEXT, value=string("ab"))]),
        "'w' an original shape of other size",
    ),
}


@pytest.mark.parametrize(("file", "match"), LIES.values(), ids=LIES)
def test_refuses_a_file_that_lies(tmp_path, file, match):
    path = tmp_path / "x.gguf"
    path.write_bytes(file)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_refuses_a_header_without_end(tmp_path):
    path = tmp_path / "x.gguf"
    text = struct.pack("<Q", 40 * 2**20)
    with path.open("wb") as file:  # two texts of 40 MB that exist only as a length
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 2))
        for key in ("a", "b"):
            file.write(string(key) + struct.pack("<I", TEXT) + text)
            file.truncate(file.tell() + 40 * 2**20)
            file.seek(0, 2)
    with pytest.raises(CheckpointError, match=f"a header of more than {MAX_HEADER_BYTES} bytes"):
        read_gguf(path)
