"""Tensors that stay in their files: each is mapped when it is looked at, and let go when nobody holds what was seen.

Nothing is copied, and no more of a file is in memory than is looked at. A mapped file must not be cut short meanwhile.
"""

import mmap
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from frameloom.errors import CheckpointError
from frameloom.ops.quantized import QuantizedWeight
from frameloom.weights.header import TensorEntry
from frameloom.weights.tensors import DTYPES, MAPPED_BYTES, is_quantized, read_tensor

_POPULATE_READ: Final = 22  # madvise(2), Linux 5.14; Python 3.11 has no name for it


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """A tensor in its file. `quantized`: what its bytes mean, without the bytes; None where they are plain numbers."""

    entry: TensorEntry
    quantized: QuantizedWeight | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of what is seen: bytes of a quantized weight."""
        return torch.uint8 if self.quantized is not None else DTYPES[self.entry.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is seen."""
        return self.entry.shape if self.quantized is None else (self.entry.size_bytes,)

    @property
    def computes(self) -> bool:
        """Whether it can be computed with where it lies, as tensors are that stay mapped (weights/tensors.py)."""
        return self.entry.size_bytes >= MAPPED_BYTES and self.entry.offset % self.dtype.itemsize == 0

    def look(self, *, at_once: bool = True) -> Tensor:
        """The numbers as they are stored, on the CPU: in memory when this returns, or, not `at_once`, when touched.

        They are let go when nobody holds them any more. Raises CheckpointError where the file cannot be mapped.
        """
        entry = self.entry
        skipped = entry.offset % mmap.ALLOCATIONGRANULARITY
        seen = _mapped(entry, entry.offset - skipped, skipped + entry.size_bytes)
        if at_once:
            _bring(seen)
        raw_U8 = torch.frombuffer(seen, dtype=torch.uint8, offset=skipped, count=entry.size_bytes)
        if entry.offset % self.dtype.itemsize:
            raw_U8 = raw_U8.clone()
        return raw_U8.view(self.dtype).view(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TableWindow:
    """An embedding in its file, of which only the rows that are asked for are ever read."""

    window: Window

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (...) -> (..., D), on the device of `ids`."""
        seen, chosen = self.window.look(at_once=False), ids.cpu()
        if self.window.quantized is not None:
            return replace(self.window.quantized, raw_U8=seen).rows(chosen, dtype).to(ids.device)
        return seen[chosen].to(dtype).to(ids.device)


def window(entry: TensorEntry, device: torch.device) -> Window:
    """A tensor that is not read; what its numbers are multiplied by is, onto the device."""
    if not is_quantized(entry):
        return Window(entry=entry)
    scale = None if entry.scale is None else read_tensor(entry.scale, dtype=torch.float32).flatten().to(device)
    meaning = QuantizedWeight(
        raw_U8=torch.empty(0, dtype=torch.uint8),
        dtype_name=entry.dtype,
        shape=entry.shape,
        scale=scale,
        rotated=entry.rotated,
    )
    return Window(entry=entry, quantized=meaning)


def _mapped(entry: TensorEntry, start: int, count: int) -> mmap.mmap:
    """Bytes of a file; a copy of what is written to, for torch wants memory that may be written."""
    try:
        with entry.file.open("rb") as file:
            return mmap.mmap(file.fileno(), count, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as error:  # a file that is shorter than its header said is a ValueError
        raise CheckpointError(
            f"{entry.file} cannot be mapped for '{entry.name}' ({error}); download it again, or keep the weights in "
            "memory (residence=transformer=resident,text=resident)"
        ) from None


def _bring(seen: mmap.mmap) -> None:
    """Have all pages there, where the system can be asked for that; else each comes when it is touched."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    seen.madvise(mmap.MADV_WILLNEED)
    with suppress(OSError):  # a kernel that does not know it
        seen.madvise(_POPULATE_READ)
