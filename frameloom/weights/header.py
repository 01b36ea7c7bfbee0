"""Reads what a checkpoint says of itself: JSON files and the headers of safetensors files, every promise checked.

All of it is untrusted: sizes are bounded, keys unique, extents inside the file. Torch-free; no tensor is read here.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frameloom.errors import CheckpointError

MAX_JSON_BYTES = 4 * 2**20  # the largest real one, the index of a 14B transformer, is about 0.1 MB
MAX_HEADER_BYTES = 16 * 2**20  # real headers stay under 0.3 MB; the format itself allows 100 MB

MAX_DIMS = 8  # a video convolution has 5; bounds what a product of sizes can cost
MAX_SIZE = 2**48  # of one dimension and of a whole tensor, in numbers
MAX_NAME = 512  # characters of a tensor's name; real ones stay under 200

# Bytes per number of the safetensors dtypes that occur in Wan checkpoints and LoRAs.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# GGUF block types: numbers per block, bytes per block (ggml-common.h and gguf's GGML_QUANT_SIZES).
BLOCKS: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 40),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q8_K": (256, 292), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18),
}  # fmt: skip


_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `size_bytes` bytes of little-endian `dtype`, `offset` bytes into `file`.

    `shape` is torch's order, in numbers, also where `dtype` is a block type. `scale` is the entry of what the stored
    numbers are multiplied by (one for all, or one per row), None where they mean themselves. `rotated`: the rows are
    stored rotated in groups of so many numbers (ops/dequant.py), 0: as they are.
    """

    name: str
    dtype: str  # a key of DTYPE_BYTES or of BLOCKS
    shape: tuple[int, ...]
    file: Path
    offset: int
    size_bytes: int
    scale: "TensorEntry | None" = None
    rotated: int = 0


def stored_bytes(dtype: str, shape: tuple[int, ...], *, where: str = "a tensor") -> int:
    """Bytes that a tensor of `shape` takes as `dtype`, a key of DTYPE_BYTES or of BLOCKS.

    Raises CheckpointError, which speaks of `where`.
    """
    if dtype not in DTYPE_BYTES and dtype not in BLOCKS:
        raise CheckpointError(f"{where} is stored as {dtype!r}; readable are {', '.join((*DTYPE_BYTES, *BLOCKS))}")
    if len(shape) > MAX_DIMS or not all(0 <= size <= MAX_SIZE for size in shape) or math.prod(shape) > MAX_SIZE:
        raise CheckpointError(f"{where} has {len(shape)} dimensions of a size that no weight has; download it again")
    numbers, size_bytes = BLOCKS[dtype] if dtype in BLOCKS else (1, DTYPE_BYTES[dtype])
    if math.prod(shape) % numbers:
        raise CheckpointError(f"{where}, of shape {shape}, is not whole {dtype} blocks of {numbers}; download it again")
    return math.prod(shape) // numbers * size_bytes


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of at most MAX_JSON_BYTES. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the checkpoint again")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, more than a configuration needs; download it again")
    return _parse_object(path.read_bytes(), where=path)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """List the tensors of one safetensors file without reading their data. Raises CheckpointError."""
    return read_safetensors(path)[0]


def read_safetensors(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of one safetensors file, their data unread, and what its `__metadata__` says. Raises CheckpointError.

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
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has metadata that are no texts; download it again")
    return entries, metadata


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


def checked_name(path: Path, name: str) -> str:
    """`name`, if it can be one of a tensor: short, and without control characters. Raises CheckpointError."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():  # lone surrogates are not printable either
        raise CheckpointError(f"{path} has a tensor with the impossible name {name[:40]!r}; download it again")
    return name


def shard_names(index: Path) -> list[str]:
    """The files that a *.safetensors.index.json lists, each once, sorted. Raises CheckpointError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for value in weight_map.values():  # file names from outside: only a plain name in this folder will do
        if not isinstance(value, str) or not _SHARD.fullmatch(value) or ".." in value:
            raise CheckpointError(f"{index} names the weight file {value!r}; only plain *.safetensors names are opened")
    return sorted(set(weight_map.values()))


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
    checked_name(path, name)
    damaged = CheckpointError(f"{path} has a damaged entry for '{name}'; download it again")
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise damaged from None
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise damaged
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{path} stores '{name}' as {dtype!r}; readable are {', '.join(DTYPE_BYTES)}")
    if len(shape) > MAX_DIMS or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
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
