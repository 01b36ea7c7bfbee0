"""Lists the tensors of a GGUF file (versions 2 and 3, little endian) and its metadata, every promise checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Torch-free; no tensor is read here.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from frameloom.errors import CheckpointError
from frameloom.weights.header import MAX_DIMS, TensorEntry, checked_name, stored_bytes

MAX_HEADER_BYTES = 64 * 2**20  # a text encoder's tokenizer makes 8 MB of it
MAX_ARRAY = 2**20  # values of one array; the tokenizer of umt5 has 256,384 tokens
MAX_ITEMS = 2**16  # tensors, and metadata; a 14B transformer has 1,095 tensors
_MAX_ALIGNMENT = 2**20

# Numbers of the metadata types, as `struct` writes them; beside them there are texts and arrays.
_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_TEXT, _ARRAY = 8, 9

# Numbers of the tensor types (enum ggml_type); 4, 5, 31 to 33 and 36 to 38 were given up.
_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def read_gguf(path: Path) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """The tensors of one GGUF file, their data unread, and its metadata. Raises CheckpointError.

    Metadata are Python numbers, texts and tuples of them. A tensor that was stored in another shape because its rows
    were no whole blocks (`comfy.gguf.orig_shape.*`) is listed in its own.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(path, file, size)
        _check_version(cursor)
        num_tensors, num_values = cursor.count(MAX_ITEMS), cursor.count(MAX_ITEMS)
        metadata = _metadata(cursor, num_values)
        infos = [_entry(cursor, metadata) for _ in range(num_tensors)]
    alignment = _alignment(path, metadata)
    start = math.ceil(cursor.position / alignment) * alignment
    entries = {info.name: replace(info, offset=start + info.offset) for info in infos}
    if len(entries) != len(infos):
        raise CheckpointError(f"{path} lists a tensor twice; download it again")
    _check_extent(path, entries.values(), start=start, size=size, alignment=alignment)
    return entries, metadata


class _Cursor:
    """Reads one value after another, none beyond the end of the file or of what a header may take."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.position = path, 0
        self._file, self._size = file, size

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > self._size:
            raise CheckpointError(
                f"{self.path} is cut off or damaged inside its header ({self._size} bytes); download it again"
            )
        if end > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.path} has a header of more than {MAX_HEADER_BYTES} bytes; download it again")
        self.position = end
        return self._file.read(size)

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def count(self, most: int) -> int:
        found: int = self.number("Q")
        if found > most:
            raise CheckpointError(
                f"{self.path} counts {found} things where {most} are the most; download it again, it is damaged"
            )
        return found

    def text(self) -> str:
        try:
            return self.take(int.from_bytes(self.take(8), "little")).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path} holds a text that is not UTF-8; download it again") from None


def _check_version(cursor: _Cursor) -> None:
    magic, version = cursor.take(4), cursor.number("I")
    if magic == b"FUGG" or (magic == b"GGUF" and version and version % 2**16 == 0):
        raise CheckpointError(f"{cursor.path} is a GGUF file for big-endian machines; get the little-endian one")
    if magic != b"GGUF":
        raise CheckpointError(f"{cursor.path} is no GGUF file; download it again")
    if version not in (2, 3):
        raise CheckpointError(f"{cursor.path} is GGUF of version {version}; readable are 2 and 3: get a newer file")


# --- metadata ---


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text()
        if key in found:
            raise CheckpointError(f"{cursor.path} has the metadata key {key[:40]!r} twice; download it again")
        found[key] = _value(cursor, cursor.number("I"))
    return found


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == _TEXT:
        return cursor.text()
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _ARRAY:
        return _array(cursor, cursor.number("I"))
    raise CheckpointError(f"{cursor.path} has metadata of the unknown type {kind}; download it again")


def _array(cursor: _Cursor, kind: int) -> tuple[Any, ...]:
    count = cursor.count(MAX_ARRAY)
    if kind == _TEXT:
        return tuple(cursor.text() for _ in range(count))
    if kind in _SCALARS:
        return cursor.numbers(_SCALARS[kind], count)
    raise CheckpointError(f"{cursor.path} has an array of arrays or of the unknown type {kind}; download it again")


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", 32)
    if type(found) is not int or not 0 < found <= _MAX_ALIGNMENT or found & (found - 1):
        raise CheckpointError(f"{path} aligns its tensors to {found!r}; a power of two is needed, download it again")
    return found


# --- tensors ---


def _entry(cursor: _Cursor, metadata: Mapping[str, Any]) -> TensorEntry:
    """One tensor; its offset still counts from where the tensors begin."""
    name = checked_name(cursor.path, cursor.text())
    num_dims = cursor.number("I")
    if num_dims > MAX_DIMS:
        raise CheckpointError(f"{cursor.path} gives '{name}' {num_dims} dimensions; download it again")
    stored = tuple(reversed(cursor.numbers("Q", num_dims)))  # the file names the fastest dimension first
    dtype = _TYPES.get(kind := cursor.number("I"))
    if dtype is None:
        raise CheckpointError(
            f"{cursor.path} stores '{name}' as GGML type {kind}; readable are {', '.join(_TYPES.values())}"
        )
    where = f"'{name}' in {cursor.path}"
    stored_bytes(dtype, stored[-1:], where=where)  # each row is whole blocks
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=_own_shape(cursor.path, name, stored, metadata=metadata),
        file=cursor.path,
        offset=cursor.number("Q"),
        size_bytes=stored_bytes(dtype, stored, where=where),
    )


def _own_shape(path: Path, name: str, stored: tuple[int, ...], *, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape before the tensor was stored: `stored`, if the metadata know of no other."""
    own = metadata.get(f"comfy.gguf.orig_shape.{name}", stored)
    sizes = own if isinstance(own, tuple) and len(own) <= MAX_DIMS else (None,)
    if not all(type(size) is int and size >= 0 for size in sizes) or math.prod(sizes) != math.prod(stored):
        raise CheckpointError(f"{path} gives '{name}' an original shape of other size; download it again")
    return sizes


def _check_extent(path: Path, entries: Iterable[TensorEntry], *, start: int, size: int, alignment: int) -> None:
    """The tensors lie aligned, one after another, in the file; padding may lie between them."""
    end = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size_bytes)):
        if entry.offset < end or entry.offset % alignment:
            raise CheckpointError(f"{path} has '{entry.name}' over another tensor or unaligned; download it again")
        end = entry.offset + entry.size_bytes
    if end > size:
        raise CheckpointError(f"{path} is cut off ({size} of {end} bytes); download it again")
