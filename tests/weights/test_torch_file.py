"""PyTorch files: every tensor where torch.load finds it, nothing run, and one sentence for what is no state dict."""

import collections
import io
import os
import pickle
import struct
import zipfile

import pytest
import torch
from torch import nn

from frameloom.errors import CheckpointError
from frameloom.weights.torch_file import MAX_PART_BYTES, read_torch

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def content(entry):
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.size_bytes)


def stored(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(path, state):
    """Every tensor of `state` is listed with its shape and bytes, and nothing else is."""
    entries, metadata = read_torch(path)
    assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert {name: content(entry) for name, entry in entries.items()} == {n: stored(t) for n, t in state.items()}
    return entries, metadata


# --- what torch.save writes ---


@pytest.mark.parametrize(("dtype", "name"), DTYPES.items(), ids=str)
def test_every_dtype_lies_where_torch_finds_it(tmp_path, dtype, name):
    state = {"v": torch.ones(3), "w": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.ones(()).to(dtype)}
    torch.save(state, tmp_path / "x.pth")
    entries, _ = check(tmp_path / "x.pth", torch.load(tmp_path / "x.pth", weights_only=True))
    assert [entries[key].dtype for key in state] == ["F32", name, name]


def test_a_module_state_with_parameters_and_buffers(tmp_path):
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "x.pth")  # an OrderedDict with the attribute _metadata
    check(tmp_path / "x.pth", module.state_dict())
    torch.save(dict(module.named_parameters()), tmp_path / "p.pth")
    check(tmp_path / "p.pth", dict(module.named_parameters()))


def test_tensors_that_share_memory_share_their_place(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {"base": base, "tied": base, "rows": base[2:], "one": base[1, 3], "flat": base.view(-1)[5:7]}
    torch.save(state, tmp_path / "x.pth")
    entries, _ = check(tmp_path / "x.pth", state)
    start = entries["base"].offset
    assert {name: entry.offset - start for name, entry in entries.items()} == {
        "base": 0, "tied": 0, "rows": 48, "one": 36, "flat": 20,
    }  # fmt: skip


def test_a_single_row_and_no_row_are_in_order_whatever_their_strides(tmp_path):
    rows = torch.arange(12.0).reshape(3, 4)
    state = {"row": rows[1:2], "column": torch.arange(3.0)[:, None].mT, "none": torch.ones(0, 4).mT}
    torch.save(state, tmp_path / "x.pth")
    check(tmp_path / "x.pth", state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(tmp_path, protocol):
    state = {f"blocks.{index}.weight": torch.full((2,), index) for index in range(300)}  # memo beyond 256 entries
    torch.save(collections.OrderedDict(state), tmp_path / "x.pth", pickle_protocol=protocol)
    check(tmp_path / "x.pth", state)


@pytest.mark.parametrize("names", [("state_dict",), ("model",), ("module",), ("model", "module")])
def test_a_nested_state_dict_is_taken(tmp_path, names):
    state = value = {"w": torch.ones(2, 3)}
    for name in reversed(names):
        value = {"epoch": 3, "optimizer": {"lr": [0.1]}, name: value}
    torch.save(value, tmp_path / "x.pth")
    check(tmp_path / "x.pth", state)


def test_plain_values_beside_the_tensors_are_told(tmp_path):
    plain = {"alpha": 8.0, "rank": 4, "kind": "lora", "tied": True, "no": None}
    torch.save({"w": torch.ones(2), **plain}, tmp_path / "x.pt")
    _, metadata = read_torch(tmp_path / "x.pt")
    assert metadata == plain


def test_the_same_with_and_without_checksums(tmp_path):
    state = {"w": torch.arange(5)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    check(tmp_path / "x.pth", state)


def test_any_name_of_the_folder_inside(tmp_path):
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(5)}, buffer)  # from memory it is "archive", from a file the file's own name
    (tmp_path / "x.pth").write_bytes(buffer.getvalue())
    check(tmp_path / "x.pth", {"w": torch.arange(5)})


# --- what must not run, and what is no state dict ---


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def zipped(pickled, *, data=None, compression=zipfile.ZIP_STORED):
    """A zip like torch.save's around a pickle that torch.save did not write."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, text in (data or {}).items():
            archive.writestr(f"x/{name}", text)
    return buffer.getvalue()


def test_runs_nothing(tmp_path):
    witness = tmp_path / "witness"
    torch.save({"w": torch.ones(2), "evil": Calls(os.mkdir, str(witness))}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"asks for 'posix.mkdir', which weights do not need and which could run"):
        read_torch(tmp_path / "x.pth")
    assert not witness.exists()


@pytest.mark.parametrize(
    "value",
    [
        Calls(bytearray, 2**40),  # torch.load(weights_only=True) would build it
        Calls(eval, "1"),
        torch.ones(2).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        nn.Linear(2, 2),
    ],
    ids=["memory", "code", "sparse", "complex", "module"],
)
def test_refuses_by_name_what_no_state_dict_asks_for(tmp_path, value):
    torch.save({"w": torch.ones(2), "other": value}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"asks for '\w+[\w.]*', which weights do not need"):
        read_torch(tmp_path / "x.pth")


class Storage:
    """What torch.save replaces by a persistent id."""

    def __init__(self, *identity):
        self.identity = identity


def archive(state, *, data=None):
    """A file whose pickle names storages freely: {name: (identity of a storage, offset, shape, stride)}."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.identity if isinstance(value, Storage) else None

        def reducer_override(self, value):
            if isinstance(value, Calls):
                return value.__reduce__()
            return NotImplemented

    buffer = io.BytesIO()
    tensors = {
        name: Calls(torch._utils._rebuild_tensor_v2, Storage(*identity), *rest, False, collections.OrderedDict())
        for name, (identity, *rest) in state.items()
    }
    Pickler(buffer, protocol=2).dump(tensors)
    return zipped(buffer.getvalue(), data=data or {"data/0": bytes(16)})


def floats(size=4, key="0", *, tag="storage", kind=torch.FloatStorage):
    return tag, kind, key, "cpu", size


LIES = {
    "no storage": (archive({"w": (floats(tag="code"), 0, (4,), (1,))}), "no readable list of tensors"),
    "storage of minus one": (archive({"w": (floats(size=-1), 0, (4,), (1,))}), "no readable list of tensors"),
    "key that is none": (archive({"w": (floats(key=((),)), 0, (4,), (1,))}), "no readable list of tensors"),
    "missing member": (archive({"w": (floats(key="7"), 0, (4,), (1,))}), "a zip without PyTorch's 'data/7'"),
    "key that leaves": (archive({"w": (floats(key="../../etc"), 0, (4,), (1,))}), "a zip without PyTorch's"),
    "view beyond the storage": (archive({"w": (floats(size=3), 0, (4,), (1,))}), "less of 'w' than it says"),
    "view that begins late": (archive({"w": (floats(), 1, (4,), (1,))}), "less of 'w' than it says"),
    "storage beyond the member": (archive({"w": (floats(size=9), 0, (9,), (1,))}), "less of 'w' than it says"),
    "absurd shape": (archive({"w": (floats(size=2**62), 0, (2**62,), (1,))}), "of a size that no weight has"),
    "too many dimensions": (archive({"w": (floats(), 0, (1,) * 9, (1,) * 9)}), "damaged entry for 'w'"),
    "strides of another shape": (archive({"w": (floats(), 0, (4,), (1, 1))}), "damaged entry for 'w'"),
    "minus one rows": (archive({"w": (floats(), 0, (-1,), (1,))}), "no readable list of tensors"),
    "shape that is none": (archive({"w": (floats(), 0, "abcd", (1,))}), "no readable list of tensors"),
    "name that is none": (archive({"a\x1b[2J": (floats(), 0, (4,), (1,))}), "impossible name"),
    "not torch's": (zipped(b"x", data={"other": b""})[:0] + zipped(pickle.dumps({})), "no state dict"),
    "number as file": (zipped(pickle.dumps(3, 2)), "no state dict"),
    "empty pickle": (zipped(b""), "no readable list of tensors"),
    "cut pickle": (zipped(pickle.dumps({"a": 1}, 2)[:-2]), "no readable list of tensors"),
    "itself": (zipped(b"\x80\x02}q\0X\5\0\0\0modelh\0s."), "no state dict"),
    "same key twice": (zipped(b"\x80\x02}(X\1\0\0\0aK\1X\1\0\0\0aK\2u."), "no readable list of tensors"),
    "deep tuple as key": (zipped(b"\x80\x02})" + b"\x85" * 100_000 + b"K\1s."), "no readable list of tensors"),
    "memo beyond memory": (zipped(b"\x80\x02}r\xff\xff\xff\xff."), "no state dict"),
    "call of a text": (zipped(b"\x80\x02X\1\0\0\0a)R."), "no readable list of tensors"),
    "old opcode": (zipped(b"I1\n."), "asks for the opcode INT"),
    "bytes of any size": (zipped(b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"."), "no readable list of tensors"),
    "huge pickle": (zipped(bytes(MAX_PART_BYTES + 1)), "bytes of 'data.pkl', too many"),
    "compressed": (zipped(bytes(10_000), compression=zipfile.ZIP_DEFLATED), "compressed or encrypted; save it again"),
    "TorchScript": (zipped(b"", data={"constants.pkl": b""}), r"TorchScript program; give its weights"),
    "big endian": (zipped(b"", data={"byteorder": b"big"}), "written on a big-endian machine"),
    "no pickle": (b"PK\5\6" + bytes(18), "a zip without PyTorch's 'data.pkl'"),
    "not a zip": (b"PK\3\4" + bytes(100), "cut off or a damaged zip file"),
}


@pytest.mark.parametrize(("file", "match"), LIES.values(), ids=LIES)
def test_refuses_a_file_that_lies(tmp_path, file, match):
    path = tmp_path / "x.pth"
    path.write_bytes(file)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_torch(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [torch.ones(2), [torch.ones(2)], {"ema": {"w": torch.ones(2)}}, {}])
def test_refuses_what_is_no_state_dict(tmp_path, value):
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"holds no state dict; save the model's state_dict\(\) alone"):
        read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize("state", [{"w": torch.ones(2), "more": [1]}, {"w": torch.ones(2), 3: torch.ones(2)}])
def test_refuses_what_is_no_tensor_among_weights(tmp_path, state):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="among its weights, which is no tensor"):
        read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize("tensor", [torch.ones(3, 2).mT, torch.ones(1).expand(4), torch.ones(6)[::2]])
def test_refuses_numbers_out_of_order(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"'w' out of order \(by strides\); save it again after .contiguous\(\)"):
        read_torch(tmp_path / "x.pth")


def test_refuses_two_members_of_one_name(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        file = zipped(b"", data={"data.pkl": b""})
    (tmp_path / "x.pth").write_bytes(file)
    with pytest.raises(CheckpointError, match="a damaged zip file"):
        read_torch(tmp_path / "x.pth")


def test_refuses_storages_that_overlap(tmp_path):
    """A bomb: many storages that are all the same bytes."""
    file = archive(
        {"v": (floats(), 0, (4,), (1,)), "w": (floats(key="1"), 0, (4,), (1,))},
        data={"data/0": bytes(16), "data/1": bytes(16)},
    )
    with zipfile.ZipFile(io.BytesIO(file)) as opened:
        first, second = (struct.pack("<I", opened.getinfo(f"x/data/{key}").header_offset) for key in "01")
    directory = file.index(b"PK\1\2")
    (tmp_path / "x.pth").write_bytes(file[:directory] + file[directory:].replace(second, first))
    with pytest.raises(CheckpointError, match="storages that overlap"):
        read_torch(tmp_path / "x.pth")


def test_a_storage_beyond_four_gigabytes_is_found(tmp_path):
    path = tmp_path / "x.pth"
    small = io.BytesIO(archive({"w": (floats(), 1, (3,), (1,))}))
    with zipfile.ZipFile(small) as given, zipfile.ZipFile(path, "w") as large:
        large.writestr("x/data.pkl", given.read("x/data.pkl"))
        large.start_dir = 5 * 2**30  # where the next member goes; the hole takes no room on the disk
        large.writestr("x/data/0", torch.arange(4.0).numpy().tobytes())
    entries, _ = check(path, {"w": torch.arange(1.0, 4.0)})
    assert entries["w"].offset > 5 * 2**30


def test_refuses_a_member_outside_of_the_file(tmp_path):
    file = archive({"w": (floats(), 0, (4,), (1,))})
    end = file.index(b"PK\5\6")
    for offset in (0, 2**31):  # the directory would begin elsewhere, and every member with it
        (tmp_path / "x.pth").write_bytes(file[: end + 16] + struct.pack("<I", offset) + file[end + 20 :])
        with pytest.raises(CheckpointError, match=r"has no 'data.pkl' where it says|a damaged zip file"):
            read_torch(tmp_path / "x.pth")


def test_refuses_a_directory_as_long_as_it_likes(tmp_path):
    """The end of a zip says how long the list of its members is, and that much would be read."""
    path = tmp_path / "x.pth"
    size = 2**31
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(size)
        file.seek(0, 2)
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, size - 4, 4, 0))
    with pytest.raises(CheckpointError, match="cut off or a damaged zip file"):
        read_torch(path)
