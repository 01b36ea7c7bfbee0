"""Fills a module that was built on the meta device from weight files, strictly and one tensor at a time.

Host memory: the weights, plain or as they are stored, plus one staging buffer. Files are read with plain `readinto`,
not mapped: a mapped page stays in the resident set until it is unmapped, and if a mapped file shrinks the process is
killed (SIGBUS), where a short read is an error with a sentence.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from frameloom.errors import CheckpointError, InternalError, RequestError
from frameloom.ops.dequant import BLOCK_TYPES, check_readable, dequantise
from frameloom.ops.quantized import Embedding, Linear, QuantizedWeight, hold
from frameloom.weights.checkpoint import Component
from frameloom.weights.header import TensorEntry, read_tensors

# Bytes read per step where a tensor is converted or goes to an accelerator; larger gains nothing measurable.
STAGING_BYTES = 16 * 2**20
_LISTED = 10  # names per kind in an error message
Quantized = Literal["keep", "expand"]
_FLOAT8 = ("F8_E4M3", "F8_E5M2")

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Torch's dtype of each of safetensors', under its name there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """Tensors and bytes that the module now holds, and the stored names that `rename` dropped."""

    num_tensors: int
    size_bytes: int
    dropped: tuple[str, ...]


def load_module(
    module: nn.Module,
    source: Component | Iterable[str | os.PathLike[str]],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep: Callable[[str], bool] | None = None,
    rename: Callable[[str], str | None] | None = None,
    tied: Mapping[str, str] | None = None,
    take: Callable[[str, Tensor], Tensor] | None = None,
    quantized: Quantized = "expand",
) -> LoadReport:
    """Replace every parameter and persistent buffer of `module` by the stored tensor of the same name.

    Floating tensors become `dtype` (None: as stored), those whose name satisfies `keep` float32; integers
    stay as they are. `rename` maps a stored name to the module's, None drops it. `tied` maps an alias to the
    name it shares memory with: one of the two may be absent; if both are stored they must be equal.
    `take` gets each tensor as it is read, under its name in the module, and returns what is kept of it, in memory of
    its own: never more than the parts and one whole tensor exist. Parameters come back without gradient.
    `quantized`: GGUF's blocks, float8 and what has a scale become plain numbers ("expand"), or stay as they are stored
    where a layer can compute with that ("keep": `Linear` and `Embedding` of ops/quantized.py).
    Raises CheckpointError before anything is loaded, naming what is missing, unexpected or does not fit; RequestError
    if something is to be taken of weights that stay as stored.
    """
    try:
        where, entries = _stored(source)
        renamed, dropped = _rename(entries, rename, where=where)
        slots = module.state_dict(keep_vars=True)
        _check_buildable(module, slots)
        aliases = dict(tied or {})
        stored = _untie(renamed, aliases, where=where)
        _check_fit(stored, {name: slots[name] for name in slots if name not in aliases}, where=where)
        as_stored = _holdable(module, stored) if quantized == "keep" else frozenset()
        if as_stored and take is not None:
            raise RequestError(
                f"the weights of {where} stay quantized and can neither be divided over ranks nor have a LoRA merged "
                "into them; expand them (quantized=expand), or leave out tp, fsdp and merging"
            )
        reader = _Reader(
            dtype=dtype,
            device=torch.device(device),
            keep=keep or _none,
            take=take or _all_of_it,
            as_stored=as_stored,
            staging_U8=torch.empty(STAGING_BYTES, dtype=torch.uint8),
        )
        size_bytes = _fill(module, reader, stored)
    except OSError as error:
        raise CheckpointError(f"the weights cannot be read ({error}); check the files and their disk") from None
    for alias, name in aliases.items():
        _share(module, alias, name)
    _move_buffers(module, torch.device(device))
    return LoadReport(num_tensors=len(stored), size_bytes=size_bytes, dropped=dropped)


def is_quantized(entry: TensorEntry) -> bool:
    """Whether a tensor is stored as something else than the numbers that are computed with."""
    return entry.dtype in BLOCK_TYPES or entry.scale is not None or entry.dtype in _FLOAT8


def held_bytes(component: Component, dtype: torch.dtype, quantized: Quantized) -> int:
    """Bytes that the weights of a component take once they are loaded, about: small ones may stay in float32."""
    return sum(
        entry.size_bytes if quantized == "keep" and is_quantized(entry) else math.prod(entry.shape) * dtype.itemsize
        for entry in component.tensors.values()
    )


def read_tensor(entry: TensorEntry, *, dtype: torch.dtype | None = None) -> Tensor:
    """One stored tensor on the CPU, plain; floating numbers become `dtype` (None: as stored, float32 if quantized).

    Raises CheckpointError where its file ends too early, OSError where it cannot be read.
    """
    _check_dtype(entry)
    if not _scale_fits(entry):
        raise CheckpointError(f"{entry.file} has a scale of another shape for '{entry.name}'; download it again")
    reader = _Reader(
        dtype=dtype,
        device=torch.device("cpu"),
        keep=_none,
        take=_all_of_it,
        as_stored=frozenset(),
        staging_U8=torch.empty(STAGING_BYTES, dtype=torch.uint8),
    )
    with entry.file.open("rb", buffering=0) as file:
        return reader.plain(file, entry.name, entry)


# --- names ---


def _stored(source: Component | Iterable[str | os.PathLike[str]]) -> tuple[str, Mapping[str, TensorEntry]]:
    """A name for messages, and the stored tensors."""
    if isinstance(source, Component):
        return str(source.folder), source.tensors
    files = [Path(file) for file in source]
    return ", ".join(map(str, files)), read_tensors(files)


def _rename(
    entries: Mapping[str, TensorEntry], rename: Callable[[str], str | None] | None, *, where: str
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """Stored tensors under the module's names, and the stored names that were dropped."""
    if rename is None:
        return dict(entries), ()
    found: dict[str, TensorEntry] = {}
    dropped = []
    for key, entry in entries.items():
        name = rename(key)
        if name is None:
            dropped.append(key)
        elif name in found:
            raise CheckpointError(f"{where} stores '{name}' twice, as '{found[name].name}' and '{key}'; keep one")
        else:
            found[name] = entry
    return found, tuple(dropped)


def _untie(stored: Mapping[str, TensorEntry], aliases: Mapping[str, str], *, where: str) -> dict[str, TensorEntry]:
    """`stored` without aliases: each shared tensor is there once, under its main name."""
    found = dict(stored)
    for alias, name in aliases.items():
        entry = found.pop(alias, None)
        if entry is None:
            continue
        if name in found and not _same_bytes(entry, found[name]):
            raise CheckpointError(f"{where} stores '{alias}' and '{name}' with different values; they must be equal")
        found.setdefault(name, entry)
    return found


def _check_buildable(module: nn.Module, slots: Mapping[str, Tensor]) -> None:
    """No file can fill a buffer that is not persistent: its builder has to."""
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in slots]
    if lost:
        raise InternalError(
            f"{type(module).__name__} left {_names(lost)} on the meta device; its builder must fill them"
        )


def _check_fit(stored: Mapping[str, TensorEntry], slots: Mapping[str, Tensor], *, where: str) -> None:
    for entry in stored.values():
        _check_dtype(entry)
    missing = [name for name in slots if name not in stored]
    unexpected = [name for name in stored if name not in slots]
    unfit = [
        _misfit(name, stored[name], slot)
        for name, slot in slots.items()
        if name in stored and not _fits(stored[name], slot)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape or kind": unfit}
    found = [f"{len(names)} {kind}: {_names(names)}" for kind, names in kinds.items() if names]
    if found:
        raise CheckpointError(
            f"{where} does not match the model that its config.json describes ({'; '.join(found)}); "
            "download both again, or give the checkpoint this config belongs to"
        )


def _check_dtype(entry: TensorEntry) -> None:
    if entry.dtype not in DTYPES or entry.scale is not None:
        check_readable(entry.dtype)


def _scale_fits(entry: TensorEntry) -> bool:
    """Whether what the numbers are multiplied by is one plain number, or one for each row."""
    scale = entry.scale
    if scale is None:
        return True
    is_plain = scale.dtype in DTYPES and DTYPES[scale.dtype].is_floating_point and scale.scale is None
    return is_plain and math.prod(scale.shape) in (1, *entry.shape[:1])


def _fits(entry: TensorEntry, slot: Tensor) -> bool:
    if not _scale_fits(entry):
        return False
    floats = entry.dtype in BLOCK_TYPES or entry.scale is not None or DTYPES[entry.dtype].is_floating_point
    return entry.shape == tuple(slot.shape) and floats == slot.is_floating_point()


def _misfit(name: str, entry: TensorEntry, slot: Tensor) -> str:
    kind = str(slot.dtype).removeprefix("torch.")
    scaled = "" if entry.scale is None else f" with a scale {entry.scale.dtype} {list(entry.scale.shape)}"
    return f"{name} (stored {entry.dtype} {list(entry.shape)}{scaled}, needed {kind} {list(slot.shape)})"


def _holdable(module: nn.Module, stored: Mapping[str, TensorEntry]) -> frozenset[str]:
    """The weights whose layers can compute with them as they are stored."""
    return frozenset(name for name, entry in stored.items() if is_quantized(entry) and _can_hold(module, name, entry))


def _can_hold(module: nn.Module, name: str, entry: TensorEntry) -> bool:
    """Rows of an embedding are read one by one: each must be whole blocks."""
    owner, attribute = _owner(module, name)
    if attribute != "weight" or not isinstance(owner, Linear | Embedding):
        return False
    return entry.dtype not in BLOCK_TYPES or entry.shape[-1] % BLOCK_TYPES[entry.dtype].numbers == 0


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


# --- bytes ---


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """How tensors are read: in which dtype, onto which device, what is kept of each, which stay as they are stored."""

    dtype: torch.dtype | None
    device: torch.device
    keep: Callable[[str], bool]
    take: Callable[[str, Tensor], Tensor]
    as_stored: frozenset[str]
    staging_U8: Tensor

    def read_all(self, stored: Mapping[str, TensorEntry]) -> Iterable[tuple[str, Tensor | QuantizedWeight]]:
        """Yield the tensors in the order in which they lie on disk, each file opened once."""
        ordered = sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset))
        for path, group in itertools.groupby(ordered, key=lambda item: item[1].file):
            with path.open("rb", buffering=0) as file:
                for name, entry in group:
                    if name in self.as_stored:
                        yield name, self._as_stored(file, entry)
                    else:
                        yield name, self.take(name, self.plain(file, name, entry))  # no name holds what is not kept

    def wanted_dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """What numbers of the dtype `stored` become."""
        if not stored.is_floating_point:
            return stored
        return torch.float32 if self.keep(name) else self.dtype or stored

    def plain(self, file: FileIO, name: str, entry: TensorEntry) -> Tensor:
        """The numbers of a tensor, as the module or its caller wants them."""
        expands = entry.dtype in BLOCK_TYPES or entry.scale is not None
        wanted = self.wanted_dtype(name, torch.float32 if expands else DTYPES[entry.dtype])
        out = torch.empty(entry.shape, dtype=wanted, device=self.device)
        if expands:
            return _expand(file, entry, out, self.staging_U8, scale=self._scale(entry))
        return _read(file, entry, out, self.staging_U8)

    def _as_stored(self, file: FileIO, entry: TensorEntry) -> QuantizedWeight:
        raw_U8 = torch.empty(entry.size_bytes, dtype=torch.uint8, device=self.device)
        _read(file, replace(entry, dtype="U8", shape=(entry.size_bytes,)), raw_U8, self.staging_U8)
        return QuantizedWeight(raw_U8=raw_U8, dtype_name=entry.dtype, shape=entry.shape, scale=self._scale(entry))

    def _scale(self, entry: TensorEntry) -> Tensor | None:
        """What the numbers of a tensor are multiplied by, (1,) or (rows,) float32."""
        if entry.scale is None:
            return None
        out = torch.empty(math.prod(entry.scale.shape), dtype=torch.float32, device=self.device)
        with entry.scale.file.open("rb", buffering=0) as file:
            return _read(file, entry.scale, out, self.staging_U8)


def _fill(module: nn.Module, reader: _Reader, stored: Mapping[str, TensorEntry]) -> int:
    """Read everything into the module; returns the bytes that it now holds."""
    held: dict[str, QuantizedWeight] = {}
    size_bytes = 0
    for name, weight in reader.read_all(stored):
        size_bytes += weight.nbytes
        if isinstance(weight, QuantizedWeight):
            held[name] = weight
        else:
            _assign(module, name, weight)
    for name, weight in held.items():  # their layers have their biases now
        hold(_layer(module, name), weight, reader.wanted_dtype(name, torch.float32))
    return size_bytes


def _all_of_it(_: str, tensor: Tensor) -> Tensor:
    return tensor


def _none(_: str) -> bool:
    return False


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
        part.copy_(dequantise(piece_U8.to(out.device), entry.dtype, shape=shape, dtype=out.dtype, scale=factor))
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


def _same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    if (a.dtype, a.shape, a.scale is None) != (b.dtype, b.shape, b.scale is None):
        return False
    if a.scale is not None and b.scale is not None and not _same_bytes(a.scale, b.scale):
        return False
    with a.file.open("rb") as file_a, b.file.open("rb") as file_b:
        file_a.seek(a.offset)
        file_b.seek(b.offset)
        sizes = (min(STAGING_BYTES, a.size_bytes - done) for done in range(0, a.size_bytes, STAGING_BYTES))
        return all(file_a.read(size) == file_b.read(size) for size in sizes)


# --- the module ---


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def _layer(module: nn.Module, name: str) -> Linear | Embedding:
    layer, _ = _owner(module, name)
    assert isinstance(layer, Linear | Embedding)
    return layer


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, attribute = _owner(module, name)
    is_parameter = isinstance(getattr(owner, attribute), nn.Parameter)
    setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _share(module: nn.Module, alias: str, name: str) -> None:
    owner, attribute = _owner(module, name)
    alias_owner, alias_attribute = _owner(module, alias)
    setattr(alias_owner, alias_attribute, getattr(owner, attribute))
    if isinstance(owner, Embedding) and isinstance(alias_owner, Embedding):
        alias_owner.kernel = owner.kernel


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers that no file holds (positions, tables) follow the weights to their device."""
    for name, buffer in list(module.named_buffers()):
        if buffer.device != device:
            _assign(module, name, buffer.to(device))
