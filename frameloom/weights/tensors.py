"""Reads tensors of weight files, plain or as they are stored, with one staging buffer beside what is kept.

On a CPU, tensors that stay as they are stored lie in the mapped file: no copy is made, and processes that compute with
the same file share its memory. The others are read piece by piece. A file that is mapped must not be cut short while it
is in use; files are replaced whole (`os.replace`) by this package and by the hub's library.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage

from frameloom.errors import CheckpointError
from frameloom.ops.dequant import BLOCK_TYPES, NUMBERS, check_readable, dequantise
from frameloom.ops.quantized import QuantizedWeight
from frameloom.settings import LOGGER_NAME
from frameloom.weights.header import TensorEntry

log = logging.getLogger(LOGGER_NAME)

# Bytes read per step where a tensor is converted or goes to an accelerator; larger gains nothing measurable.
STAGING_BYTES = 16 * 2**20
MAPPED_BYTES = 1 << 16  # tensors from this size on are mapped, smaller ones read
_FLOAT8 = ("F8_E4M3", "F8_E5M2")

DTYPES: Mapping[str, torch.dtype] = {
    **NUMBERS,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Torch's dtype of each of safetensors', under its name there."""


def is_quantized(entry: TensorEntry) -> bool:
    """Whether a tensor is stored as something else than the numbers that are computed with."""
    return entry.dtype in BLOCK_TYPES or entry.scale is not None or entry.dtype in _FLOAT8


def check_dtype(entry: TensorEntry) -> None:
    """Raise CheckpointError for a tensor that is stored as nothing that weights are."""
    if entry.dtype not in DTYPES or entry.scale is not None:
        check_readable(entry.dtype)


def scale_fits(entry: TensorEntry) -> bool:
    """Whether what the numbers are multiplied by is one plain number, or one for each row."""
    scale = entry.scale
    if scale is None:
        return True
    is_plain = scale.dtype in DTYPES and DTYPES[scale.dtype].is_floating_point and scale.scale is None
    return is_plain and math.prod(scale.shape) in (1, *entry.shape[:1])


def rows_are_whole(entry: TensorEntry) -> bool:
    """Whether each row can be read for itself: it consists of whole blocks."""
    return entry.dtype not in BLOCK_TYPES or entry.shape[-1] % BLOCK_TYPES[entry.dtype].numbers == 0


def read_tensor(entry: TensorEntry, *, dtype: torch.dtype | None = None) -> Tensor:
    """One stored tensor on the CPU, plain; floating numbers become `dtype` (None: as stored, float32 if quantized).

    Raises CheckpointError where its file ends too early, OSError where it cannot be read.
    """
    check_dtype(entry)
    if not scale_fits(entry):
        raise CheckpointError(f"{entry.file} has a scale of another shape for '{entry.name}'; download it again")
    with entry.file.open("rb", buffering=0) as file:
        return Reader(dtype=dtype, device=torch.device("cpu")).plain(file, entry.name, entry)


def _staging() -> Tensor:
    return torch.empty(STAGING_BYTES, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reader:
    """How tensors are read: in which dtype, onto which device, what is kept of each, which stay as they are stored."""

    dtype: torch.dtype | None
    device: torch.device
    keep: Callable[[str], bool] | None = None
    take: Callable[[str, Tensor], Tensor] | None = None
    as_stored: frozenset[str] = frozenset()
    staging_U8: Tensor = field(default_factory=_staging)
    maps: bool = False

    def read_all(self, stored: Mapping[str, TensorEntry]) -> Iterable[tuple[str, Tensor | QuantizedWeight]]:
        """Yield the tensors in the order in which they lie on disk, each file opened once."""
        ordered = sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset))
        for path, group in itertools.groupby(ordered, key=lambda item: item[1].file):
            mapped = _mapped(path) if self.maps and self.device.type == "cpu" else None
            with path.open("rb", buffering=0) as file:
                for name, entry in group:
                    if name in self.as_stored:
                        yield name, self._as_stored(file, entry, mapped)
                    elif self.take is None:
                        yield name, self.plain(file, name, entry, mapped)
                    else:
                        yield name, self.take(name, self.plain(file, name, entry, mapped))  # no name holds it all

    def wanted_dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """What numbers of the dtype `stored` become."""
        if not stored.is_floating_point:
            return stored
        return torch.float32 if self.keep is not None and self.keep(name) else self.dtype or stored

    def plain(self, file: FileIO, name: str, entry: TensorEntry, mapped: UntypedStorage | None = None) -> Tensor:
        """The numbers of a tensor, as the module or its caller wants them; in `mapped`, its file, if they are there."""
        expands = entry.dtype in BLOCK_TYPES or entry.scale is not None
        wanted = self.wanted_dtype(name, torch.float32 if expands else DTYPES[entry.dtype])
        if mapped is not None and not expands and wanted == DTYPES[entry.dtype] and _can_map(entry, mapped):
            whole = torch.empty(0, dtype=torch.uint8).set_(mapped)
            return whole[entry.offset : entry.offset + entry.size_bytes].view(wanted).view(entry.shape)
        out = torch.empty(entry.shape, dtype=wanted, device=self.device)
        if expands:
            return _expand(file, entry, out, self.staging_U8, scale=self._scale(entry))
        return _read(file, entry, out, self.staging_U8)

    def _as_stored(self, file: FileIO, entry: TensorEntry, mapped: UntypedStorage | None) -> QuantizedWeight:
        raw = replace(entry, dtype="U8", shape=(entry.size_bytes,), scale=None, rotated=0)
        raw_U8 = self.plain(file, entry.name, raw, mapped)
        return QuantizedWeight(
            raw_U8=raw_U8,
            dtype_name=entry.dtype,
            shape=entry.shape,
            scale=self._scale(entry),
            rotated=entry.rotated,
        )

    def _scale(self, entry: TensorEntry) -> Tensor | None:
        """What the numbers of a tensor are multiplied by, (1,) or (rows,) float32."""
        if entry.scale is None:
            return None
        out = torch.empty(math.prod(entry.scale.shape), dtype=torch.float32, device=self.device)
        with entry.scale.file.open("rb", buffering=0) as file:
            scale = _read(file, entry.scale, out, self.staging_U8)
        if not torch.isfinite(scale).all():
            raise CheckpointError(
                f"{entry.scale.file} holds '{entry.scale.name}' that is no finite number; download it again"
            )
        return scale


def _mapped(path: Path) -> UntypedStorage | None:
    """All bytes of a file, in memory as they are touched; None, with a line in the log, where it cannot be mapped."""
    try:
        storage = UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
        assert isinstance(storage, UntypedStorage)
        return storage
    except (OSError, RuntimeError) as error:
        log.info("%s is read and not mapped: %s", path, next(iter(str(error).splitlines()), type(error).__name__))
        return None


def _can_map(entry: TensorEntry, mapped: UntypedStorage) -> bool:
    """Whether a tensor is large, lies where its numbers may lie, and in the file: reading says what is wrong if not."""
    is_there = entry.offset + entry.size_bytes <= mapped.nbytes()
    return is_there and entry.size_bytes >= MAPPED_BYTES and entry.offset % DTYPES[entry.dtype].itemsize == 0


def _expand(file: FileIO, entry: TensorEntry, out: Tensor, staging_U8: Tensor, *, scale: Tensor | None) -> Tensor:
    """Fill `out` with plain numbers: some blocks, or rows that each have a scale, at a time."""
    numbers, size_bytes = _unit(entry)
    file.seek(entry.offset)
    step = max(1, STAGING_BYTES // max(size_bytes, numbers * out.itemsize))
    units = out.view(-1, numbers)
    if size_bytes > len(staging_U8):
        staging_U8 = torch.empty(size_bytes, dtype=torch.uint8)
    for start in range(0, len(units), step):
        part = units[start : start + step]
        piece_U8 = staging_U8[: len(part) * size_bytes]
        _read_into(file, piece_U8, entry)
        factor = scale if scale is None or scale.numel() == 1 else scale[start : start + step]
        shape = len(part), numbers
        raw_U8 = piece_U8.to(out.device)
        part.copy_(dequantise(raw_U8, entry.dtype, shape=shape, dtype=out.dtype, scale=factor, rotated=entry.rotated))
    return out


def _unit(entry: TensorEntry) -> tuple[int, int]:
    """Numbers and bytes of the least that can be read: a block, else a row."""
    if entry.dtype in BLOCK_TYPES:
        return BLOCK_TYPES[entry.dtype].numbers, BLOCK_TYPES[entry.dtype].size_bytes
    numbers = max(1, math.prod(entry.shape[1:]))
    return numbers, numbers * DTYPES[entry.dtype].itemsize


def _read(file: FileIO, entry: TensorEntry, out: Tensor, staging_U8: Tensor) -> Tensor:
    """Fill `out` from the file: directly where nothing has to change, else piece by piece through staging."""
    file.seek(entry.offset)
    flat = out.view(-1)
    stored = DTYPES[entry.dtype]
    if out.device.type == "cpu" and out.dtype == stored:
        _read_into(file, flat, entry)
        return out
    staging = staging_U8.view(stored)
    for start in range(0, flat.numel(), staging.numel()):
        part = flat[start : start + staging.numel()]
        piece = staging[: part.numel()]
        _read_into(file, piece, entry)
        part.copy_(piece)
    return out


def _read_into(file: FileIO, flat: Tensor, entry: TensorEntry) -> None:
    """Fill a contiguous CPU tensor. One read returns at most 2 GiB on Linux, hence the loop."""
    left = memoryview(flat.view(torch.uint8).numpy().data)
    while left:
        count = file.readinto(left)
        if not count:
            raise CheckpointError(f"{entry.file} ends inside '{entry.name}'; download it again")
        left = left[count:]


def same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors are stored alike, and the same."""
    if (a.dtype, a.shape, a.scale is None, a.rotated) != (b.dtype, b.shape, b.scale is None, b.rotated):
        return False
    if a.scale is not None and b.scale is not None and not same_bytes(a.scale, b.scale):
        return False
    with a.file.open("rb") as file_a, b.file.open("rb") as file_b:
        file_a.seek(a.offset)
        file_b.seek(b.offset)
        sizes = (min(STAGING_BYTES, a.size_bytes - done) for done in range(0, a.size_bytes, STAGING_BYTES))
        return all(file_a.read(size) == file_b.read(size) for size in sizes)
