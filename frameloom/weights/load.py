"""Fills a module that was built on the meta device from safetensors files, strictly and one tensor at a time.

Host memory: the weights plus one staging buffer. Files are read with plain `readinto`, not mapped: a mapped
page stays in the resident set until it is unmapped, and if a mapped file shrinks the process is killed
(SIGBUS), where a short read is an error with a sentence.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor, nn

from frameloom.errors import CheckpointError, InternalError
from frameloom.weights.checkpoint import Component
from frameloom.weights.header import TensorEntry, read_tensors

# Bytes read per step where a tensor is converted or goes to an accelerator; larger gains nothing measurable.
STAGING_BYTES = 16 * 2**20
_LISTED = 10  # names per kind in an error message

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


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
) -> LoadReport:
    """Replace every parameter and persistent buffer of `module` by the stored tensor of the same name.

    Floating tensors become `dtype` (None: as stored), those whose name satisfies `keep` float32; integers
    stay as they are. `rename` maps a stored name to the module's, None drops it. `tied` maps an alias to the
    name it shares memory with: one of the two may be absent; if both are stored they must be equal.
    `take` gets each tensor as it is read, under its name in the module, and returns what is kept of it, in memory of
    its own: never more than the parts and one whole tensor exist. Parameters come back without gradient.
    Raises CheckpointError before anything is loaded, naming what is missing, unexpected or does not fit.
    """
    try:
        where, entries = _stored(source)
        renamed, dropped = _rename(entries, rename, where=where)
        slots = module.state_dict(keep_vars=True)
        _check_buildable(module, slots)
        aliases = dict(tied or {})
        stored = _untie(renamed, aliases, where=where)
        _check_fit(stored, {name: slots[name] for name in slots if name not in aliases}, where=where)
        size_bytes = 0
        read = _read_all(stored, dtype=dtype, device=torch.device(device), keep=keep, take=take or _all_of_it)
        for name, tensor in read:
            _assign(module, name, tensor)
            size_bytes += tensor.nbytes
    except OSError as error:
        raise CheckpointError(f"the weights cannot be read ({error}); check the files and their disk") from None
    for alias, name in aliases.items():
        _share(module, alias, name)
    _move_buffers(module, torch.device(device))
    return LoadReport(num_tensors=len(stored), size_bytes=size_bytes, dropped=dropped)


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


def _fits(entry: TensorEntry, slot: Tensor) -> bool:
    return entry.shape == tuple(slot.shape) and _DTYPES[entry.dtype].is_floating_point == slot.is_floating_point()


def _misfit(name: str, entry: TensorEntry, slot: Tensor) -> str:
    kind = str(slot.dtype).removeprefix("torch.")
    return f"{name} (stored {entry.dtype} {list(entry.shape)}, needed {kind} {list(slot.shape)})"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


# --- bytes ---


def _read_all(
    stored: Mapping[str, TensorEntry],
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    keep: Callable[[str], bool] | None,
    take: Callable[[str, Tensor], Tensor],
) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors in the order in which they lie on disk, each file opened once."""
    staging_U8 = torch.empty(STAGING_BYTES, dtype=torch.uint8)
    ordered = sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset))
    for path, group in itertools.groupby(ordered, key=lambda item: item[1].file):
        with path.open("rb", buffering=0) as file:
            for name, entry in group:
                wanted = _wanted_dtype(_DTYPES[entry.dtype], dtype, keep=keep is not None and keep(name))
                empty = functools.partial(torch.empty, entry.shape, dtype=wanted, device=device)
                yield name, take(name, _read(file, entry, empty(), staging_U8))  # no name holds what is not kept


def _all_of_it(_: str, tensor: Tensor) -> Tensor:
    return tensor


def _wanted_dtype(stored: torch.dtype, dtype: torch.dtype | None, *, keep: bool) -> torch.dtype:
    if not stored.is_floating_point:
        return stored
    return torch.float32 if keep else dtype or stored


def _read(file: FileIO, entry: TensorEntry, out: Tensor, staging_U8: Tensor) -> Tensor:
    """Fill `out` from the file: directly where nothing has to change, else piece by piece through staging."""
    file.seek(entry.offset)
    flat = out.view(-1)
    stored = _DTYPES[entry.dtype]
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
    if (a.dtype, a.shape) != (b.dtype, b.shape):
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


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, attribute = _owner(module, name)
    is_parameter = isinstance(getattr(owner, attribute), nn.Parameter)
    setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _share(module: nn.Module, alias: str, name: str) -> None:
    owner, attribute = _owner(module, name)
    alias_owner, alias_attribute = _owner(module, alias)
    setattr(alias_owner, alias_attribute, getattr(owner, attribute))


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers that no file holds (positions, tables) follow the weights to their device."""
    for name, buffer in list(module.named_buffers()):
        if buffer.device != device:
            _assign(module, name, buffer.to(device))
