"""Reads what a checkpoint says of itself: JSON files and the headers of safetensors files, every promise checked.

All of it is untrusted: sizes are bounded, keys unique, extents inside the file. Torch-free; no tensor is read here.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frameloom.errors import CheckpointError

MAX_JSON_BYTES = 4 * 2**20  # the largest real one, the index of a 14B transformer, is about 0.1 MB
MAX_HEADER_BYTES = 16 * 2**20  # real headers stay under 0.3 MB; the format itself allows 100 MB

# Bytes per element of the safetensors dtypes that occur in Wan checkpoints.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `size_bytes` bytes of little-endian `dtype`, `offset` bytes into `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size_bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of at most MAX_JSON_BYTES. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the checkpoint again")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, more than a configuration needs; download it again")
    return _parse_object(path.read_bytes(), where=path)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """List the tensors of one safetensors file without reading their data. Raises CheckpointError.

    Format: 8 bytes header length (little endian), a JSON header, then the tensors without gaps
    (https://huggingface.co/docs/safetensors, "Format"). Every promise of the header is held against the file.
    """
    if not path.is_file():  # a link to nothing, a folder, or a pipe that would never end
        raise CheckpointError(f"{path} is missing or no regular file; download it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
        length = int.from_bytes(head[:8], "little")
        if head[8:] != b"{" or length > MAX_HEADER_BYTES:
            raise CheckpointError(_what_instead(path, head))
        if 8 + length > size:
            raise CheckpointError(f"{path} is cut off inside its header ({size} bytes); download it again")
        file.seek(8)
        header = _parse_object(file.read(length), where=path)
    entries = tensor_entries(path, header, start=8 + length)
    _check_extent(path, entries.values(), start=8 + length, size=size)
    return entries


def tensor_entries(path: Path, header: Mapping[str, Any], *, start: int) -> dict[str, TensorEntry]:
    """The tensors that a parsed header lists, each entry checked; `start` is where the data begin in the file."""
    return {key: _entry(path, key, info, start=start) for key, info in header.items() if key != "__metadata__"}


def read_tensors(
    files: Iterable[Path], read: Callable[[Path], Mapping[str, TensorEntry]] = read_header
) -> dict[str, TensorEntry]:
    """List the tensors of several safetensors files, each name once. Raises CheckpointError."""
    found: dict[str, TensorEntry] = {}
    for file in files:
        for key, entry in read(file).items():
            if key in found:
                raise CheckpointError(f"'{key}' is in both {found[key].file} and {file}; remove the older download")
            found[key] = entry
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object without repeated keys: two readers could otherwise see two different files."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated key")
    return found


def _parse_object(text: bytes, *, where: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{where} holds no readable JSON; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}, an object is needed; download it again")
    return value


def _what_instead(path: Path, head: bytes) -> str:
    """Sentence about a file that is named safetensors and is none, by its first bytes."""
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return f"{path} is a PyTorch pickle in spite of its name, which can run code; convert it to safetensors"
    if head.startswith(b"version "):
        return f"{path} is only a Git LFS pointer; fetch the real file with 'git lfs pull'"
    if head.startswith(b"GGUF"):
        return f"{path} is a GGUF file in spite of its name; give a checkpoint in safetensors"
    return f"{path} is not a safetensors file (no valid header); download it again"


def _entry(path: Path, name: str, info: Any, *, start: int) -> TensorEntry:
    damaged = CheckpointError(f"{path} has a damaged entry for '{name}'; download it again")
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise damaged from None
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise damaged
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{path} stores '{name}' as {dtype!r}; readable are {', '.join(DTYPE_BYTES)}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise damaged
    return TensorEntry(name=name, dtype=dtype, shape=shape, file=path, offset=start + begin, size_bytes=end - begin)


def _check_extent(path: Path, entries: Iterable[TensorEntry], *, start: int, size: int) -> None:
    """The tensors follow one another without gap or overlap and end with the file."""
    end = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size_bytes)):
        if entry.offset != end:
            raise CheckpointError(
                f"{path} has a damaged header ('{entry.name}' overlaps or leaves a gap); download it again"
            )
        end += entry.size_bytes
    if size != end:
        kind = "cut off" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} is {kind} ({size} of {end} bytes); download it again")
