"""Lists the tensors of a PyTorch file (`.pth`, `.pt`: a zip of one pickle and the raw numbers), running nothing of it.

Torch-free; no tensor is read here. The pickle is read by `torch_pickle`.
"""

import itertools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from frameloom.errors import CheckpointError
from frameloom.weights.header import DTYPE_BYTES, MAX_DIMS, TensorEntry, checked_name, stored_bytes
from frameloom.weights.torch_pickle import View, read_pickle

MAX_PART_BYTES = 4 * 2**20  # of the pickle and of the zip's directory; the text encoder of Wan has 0.1 MB of each
_NESTED = ("state_dict", "model", "module")  # where training programs put the state dict beside other things
_MAX_NESTING = 4
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # a zip member's own header: signature, length of its name and of its extras


def read_torch(path: Path) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """The tensors of one PyTorch file, their data unread, and the plain values beside them. Raises CheckpointError.

    The file is a zip, as `torch.save` writes it since PyTorch 1.6. A state dict under "state_dict", "model" or "module"
    is taken from there. Tensors that share memory share their place in the file.
    """
    with _Archive(path) as archive:
        if archive.has("constants.pkl"):
            raise CheckpointError(f"{path} is a TorchScript program; give its weights: save its state_dict()")
        if archive.has("byteorder") and archive.read("byteorder") != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine; save it again on a little-endian one")
        state = _state_dict(path, read_pickle(path, archive.read("data.pkl")))
        views = {name: value for name, value in state.items() if isinstance(value, View)}
        keys = {view.storage.key for view in views.values()}
        places = {key: archive.place(f"data/{key}") for key in keys}
    _check_apart(path, places)
    entries = {name: _entry(path, name, view, place=places[view.storage.key]) for name, view in views.items()}
    return entries, {name: value for name, value in state.items() if name not in views}


# --- the state dict ---


def _state_dict(path: Path, value: Any) -> dict[str, Any]:
    """The state dict: `value` itself, or what lies in it under one of the usual names."""
    for _ in range(_MAX_NESTING):
        if not isinstance(value, dict):
            break
        if any(isinstance(item, View) for item in value.values()):
            return _only_tensors(path, value)
        value = next((value[key] for key in _NESTED if key in value), None)
    raise CheckpointError(f"{path} holds no state dict; save the model's state_dict() alone")


def _only_tensors(path: Path, state: dict[Any, Any]) -> dict[str, Any]:
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, View | str | int | float | None):
            raise CheckpointError(
                f"{path} holds {str(name)[:80]!r} among its weights, which is no tensor; save the state_dict() alone"
            )
    return state


def _entry(path: Path, name: str, view: View, *, place: "_Place") -> TensorEntry:
    checked_name(path, name)
    if len(view.shape) > MAX_DIMS or len(view.shape) != len(view.stride):
        raise CheckpointError(f"{path} has a damaged entry for '{name}'; download it again")
    size_bytes = stored_bytes(view.dtype, view.shape, where=f"'{name}' in {path}")
    if not _is_contiguous(view):
        raise CheckpointError(f"{path} stores '{name}' out of order (by strides); save it again after .contiguous()")
    skipped = view.offset * DTYPE_BYTES[view.dtype]
    held = min(view.storage.size * DTYPE_BYTES[view.storage.dtype], place.end - place.start)
    if skipped + size_bytes > held:
        raise CheckpointError(f"{path} has less of '{name}' than it says; download it again")
    return TensorEntry(
        name=name,
        dtype=view.dtype,
        shape=view.shape,
        file=path,
        offset=place.start + skipped,
        size_bytes=size_bytes,
    )


def _is_contiguous(view: View) -> bool:
    """Whether the numbers lie in the order of their indices; the stride along a single one says nothing."""
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size > 1 and stride != step:
            return 0 in view.shape
        step *= size
    return True


# --- the zip ---


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Bytes of the file from `start` to `end`."""

    start: int
    end: int


class _Sparing(FileIO):
    """A file of which nobody reads much at once: a zip's directory is as long as the zip says."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_PART_BYTES:
            raise zipfile.BadZipFile("directory too long")
        return super().read(size)


class _Archive:
    """A zip file whose members were stored as they are, by their names inside its only folder."""

    def __init__(self, path: Path) -> None:
        self._file = _Sparing(path)
        try:
            members = zipfile.ZipFile(self._file).infolist()
            self._members = {member.filename.partition("/")[2]: member for member in members}
            if len(self._members) != len(members):
                raise zipfile.BadZipFile("two members of one name")
        except Exception:  # BadZipFile, and whatever else damaged bytes make of the standard library
            self._file.close()
            raise CheckpointError(f"{path} is cut off or a damaged zip file; download it again") from None
        self._path, self._size = path, path.stat().st_size

    def __enter__(self) -> "_Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """All of a small member. Its checksum is not asked: torch can be told to write none."""
        place = self.place(name)
        size = place.end - place.start
        if size > MAX_PART_BYTES:
            raise CheckpointError(f"{self._path} has {size} bytes of '{name}', too many; convert it to safetensors")
        self._file.seek(place.start)
        return self._file.read(size)

    def place(self, name: str) -> _Place:
        """Where a member's bytes lie."""
        member = self._members.get(name)
        if member is None:
            raise CheckpointError(f"{self._path} is a zip without PyTorch's {name[:80]!r}; give a file of torch.save")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise CheckpointError(f"{self._path} was compressed or encrypted; save it again with torch.save")
        start = self._begin(member.header_offset)
        if start is None:
            raise CheckpointError(f"{self._path} has no {name[:80]!r} where it says; download it again")
        if start + member.file_size > self._size or member.file_size != member.compress_size:
            raise CheckpointError(f"{self._path} is cut off inside {name[:80]!r}; download it again")
        return _Place(start=start, end=start + member.file_size)

    def _begin(self, header_offset: int) -> int | None:
        """Where the bytes of a member begin, None if there is none at `header_offset`."""
        if not 0 <= header_offset <= self._size - _LOCAL_HEADER.size:
            return None
        self._file.seek(header_offset)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        return header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes if signature == b"PK\3\4" else None


def _check_apart(path: Path, places: Mapping[str, _Place]) -> None:
    ordered = sorted(places.values(), key=lambda place: (place.start, place.end))
    for before, after in itertools.pairwise(ordered):
        if after.start < before.end:
            raise CheckpointError(f"{path} has storages that overlap; download it again")
