"""Writes weight files one tensor at a time, so that memory holds one, and so that a second run goes on.

A file is whole under its name, or it is not finished and has `.partial` behind its name. Nothing is written through a
link: what is new is written beside, and takes the name when it was read back.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from frameloom.errors import CheckpointError, OutputError
from frameloom.settings import LOGGER_NAME
from frameloom.weights.files import read_file
from frameloom.weights.header import TensorEntry, stored_bytes
from frameloom.weights.tensors import DTYPES

log = logging.getLogger(LOGGER_NAME)
_ALIGNMENT = 8  # bytes; the format asks that the tensors begin at a multiple
_PIECE_BYTES = 16 * 2**20
_ZIP_END_BYTES = 22  # of the record that a zip without a comment ends with

NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""The format's name of each dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A tensor that will be written: `dtype` by the format's name, and where it comes from."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return stored_bytes(self.dtype, self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A weight file that will be written: of which component, and its tensors under the names of its layout."""

    component: str
    path: Path
    tensors: Mapping[str, Planned]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.size_bytes for one in self.tensors.values())

    @property
    def is_pickle(self) -> bool:
        """Whether the file is torch's, a zip, and not safetensors."""
        return self.path.suffix == ".pth"

    @property
    def header(self) -> bytes:
        """What the safetensors file begins with: the target itself, or what a pickle is made of."""
        return _header(self.tensors, self.metadata)


def partial_of(path: Path) -> Path:
    """The name of a file while it is written."""
    return path.with_name(path.name + ".partial")


def mapped_of(path: Path) -> Path:
    """The safetensors file that a pickle is made of, which is then mapped into memory."""
    return path.with_name(path.name + ".safetensors.partial")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be made ({error.strerror}); give another folder") from None


def write_file(path: Path, content: bytes) -> None:
    """Have a small file of this content; nothing is written where there is one. Raises OutputError."""
    make_folder(path.parent)
    partial = partial_of(path)
    try:
        if path.is_file() and path.read_bytes() == content:
            return
        partial.unlink(missing_ok=True)  # it may be a link
        with partial.open("xb") as file:
            file.write(content)
        os.replace(partial, path)
    except OSError as error:
        raise _unwritten(path, error) from None


def write_weights(target: Target, on_bytes: Callable[[int], None]) -> None:
    """Write the file of `target`, or the rest of it where an earlier run of the same plan was ended.

    `on_bytes` gets the bytes of each tensor that is there. A file that is whole is not written again. Every tensor is
    read again and compared with its source. Raises OutputError: the disk is full, or what was read back differs.
    """
    make_folder(target.path.parent)
    try:
        if is_whole(target):
            _compare(target.path, target.tensors)
        else:
            if target.path.exists():
                log.warning("%s is damaged or of another dtype, and is written again", target.path)
            partial = (_write_pickle if target.is_pickle else _write_safetensors)(target, on_bytes)
            _compare(partial, target.tensors)
            os.replace(partial, target.path)
        if target.is_pickle and mapped_of(target.path).exists():
            mapped_of(target.path).unlink()
    except OSError as error:
        raise _unwritten(target.path, error) from None


def _unwritten(path: Path, error: Exception) -> OutputError:
    return OutputError(f"{path} cannot be written ({error}); run the same command again to go on")


def is_whole(target: Target) -> bool:
    """Whether there is a file that lists the tensors of `target`, and has the size it should have."""
    path = target.path
    if not path.is_file():
        return False
    if not target.is_pickle:
        header = target.header
        return path.stat().st_size == len(header) + target.size_bytes and _begins_with(path, header)
    try:
        return _lists(read_file(path).entries, target.tensors) and _ends_as_zip(path)
    except CheckpointError:
        return False


def _lists(entries: Mapping[str, TensorEntry], planned: Mapping[str, Planned]) -> bool:
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    return found == {name: (one.dtype, one.shape) for name, one in planned.items()}


def _ends_as_zip(path: Path) -> bool:
    """Whether nothing was appended to a zip: readers look for its last record also further ahead."""
    with path.open("rb") as file:
        file.seek(-_ZIP_END_BYTES, os.SEEK_END)
        return file.read().startswith(b"PK\5\6")


# --- safetensors, and the pickle that is made of it ---


def _write_safetensors(target: Target, on_bytes: Callable[[int], None]) -> Path:
    partial = partial_of(target.path)
    _write(partial, target, on_bytes)
    return partial


def _write_pickle(target: Target, on_bytes: Callable[[int], None]) -> Path:
    """The same as a zip of torch.save, which takes its tensors out of the mapped file."""
    mapped, partial = mapped_of(target.path), partial_of(target.path)
    _write(mapped, target, on_bytes)
    partial.unlink(missing_ok=True)  # it may be a link
    try:
        torch.save(load_file(mapped), partial)
    except RuntimeError as error:  # the kind that torch's writer raises where the disk is full
        raise _unwritten(target.path, error) from None
    return partial


def _header(planned: Mapping[str, Planned], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, one in planned.items():
        start, end = end, end + one.size_bytes
        entries[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _begins_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _write(partial: Path, target: Target, on_bytes: Callable[[int], None]) -> None:
    """Write a safetensors file, or the rest of it; one that cannot become what was planned is removed."""
    header = target.header
    goes_on = partial.is_file() and not partial.is_symlink() and _begins_with(partial, header)
    if not goes_on:
        partial.unlink(missing_ok=True)
    try:
        with partial.open("r+b" if goes_on else "xb", buffering=0) as file:
            if not goes_on:
                _write_all(file, memoryview(header))
            _write_tensors(file, target.tensors, start=len(header), on_bytes=on_bytes)
    except CheckpointError:
        partial.unlink()
        raise


def _write_tensors(
    file: FileIO, planned: Mapping[str, Planned], *, start: int, on_bytes: Callable[[int], None]
) -> None:
    """Write those tensors that the file, which has its header, does not hold yet."""
    done, end = os.fstat(file.fileno()).st_size, start
    for one in planned.values():
        begin, end = end, end + one.size_bytes
        if end > done:  # else an earlier run wrote all of it
            file.seek(begin)
            file.truncate()
            _write_all(file, _bytes(one))
        on_bytes(one.size_bytes)
    file.truncate(end)
    os.fsync(file.fileno())


def _bytes(one: Planned) -> memoryview:
    tensor = one.read()
    if NAMES[tensor.dtype] != one.dtype or tuple(tensor.shape) != one.shape:
        raise OutputError(f"a tensor is {tensor.dtype} {tuple(tensor.shape)} where {one.dtype} {one.shape} was planned")
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _write_all(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data[:_PIECE_BYTES]) :]


def _compare(path: Path, planned: Mapping[str, Planned]) -> None:
    """Raise OutputError where a file that was written holds other tensors than were planned."""
    differs = f"reads back otherwise than it was written; remove '{path}', check the disk, and run the command again"
    try:
        entries = read_file(path).entries
    except CheckpointError:
        entries = {}
    if not _lists(entries, planned):
        raise OutputError(f"{path} {differs}")
    with path.open("rb") as file:
        for name, one in planned.items():
            file.seek(entries[name].offset)
            wanted = _bytes(one)
            for start in range(0, len(wanted), _PIECE_BYTES):
                piece = wanted[start : start + _PIECE_BYTES]
                if file.read(len(piece)) != piece:
                    raise OutputError(f"'{name}' in {path} {differs}")
