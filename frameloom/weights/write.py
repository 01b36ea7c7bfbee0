"""Writes safetensors files one tensor at a time, so that memory holds one, and so that a second run goes on.

A file is whole under its name, or it is not finished and has `.partial` behind its name.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from frameloom.errors import OutputError
from frameloom.weights.header import TensorEntry, read_header, stored_bytes
from frameloom.weights.tensors import DTYPES

_ALIGNMENT = 8  # bytes; the format asks that the tensors begin at a multiple
_PIECE_BYTES = 16 * 2**20

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


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be made ({error.strerror}); give another folder") from None


def write_safetensors(
    path: Path, planned: Mapping[str, Planned], *, metadata: Mapping[str, str], on_bytes: Callable[[int], None]
) -> None:
    """Write `path`, or the rest of it where an earlier run of the same plan was ended; nothing where it is whole.

    `on_bytes` gets the bytes of each tensor that is there. Every tensor is then read again and compared with its
    source. Raises OutputError: the disk is full, or what was read back differs.
    """
    header = _header(planned, metadata)
    partial = path.with_name(path.name + ".partial")
    if not (path.is_file() and _begins_with(path, header)):
        try:
            _write(partial, header, planned, on_bytes)
            os.replace(partial, path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error}); run the same command again to go on") from None
    compare(path, read_header(path), planned)


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


def _write(partial: Path, header: bytes, planned: Mapping[str, Planned], on_bytes: Callable[[int], None]) -> None:
    goes_on = partial.is_file() and _begins_with(partial, header)
    with partial.open("r+b" if goes_on else "wb", buffering=0) as file:
        if not goes_on:
            _write_all(file, memoryview(header))
        done = os.fstat(file.fileno()).st_size
        end = len(header)
        for one in planned.values():
            start, end = end, end + one.size_bytes
            if end > done:  # else an earlier run wrote all of it
                file.seek(start)
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


def compare(path: Path, entries: Mapping[str, TensorEntry], planned: Mapping[str, Planned]) -> None:
    """Raise OutputError where a file that was written holds other tensors than were planned."""
    differs = f"reads back otherwise than it was written; remove '{path}', check the disk, and run the command again"
    if entries.keys() != planned.keys():
        raise OutputError(f"{path} {differs}")
    with path.open("rb") as file:
        for name, one in planned.items():
            file.seek(entries[name].offset)
            wanted = _bytes(one)
            for start in range(0, len(wanted), _PIECE_BYTES):
                piece = wanted[start : start + _PIECE_BYTES]
                if file.read(len(piece)) != piece:
                    raise OutputError(f"'{name}' in {path} {differs}")
