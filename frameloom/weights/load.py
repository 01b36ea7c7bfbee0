"""Fills a module that was built on the meta device from weight files, strictly and one tensor at a time.

Host memory: the weights, plain or as they are stored, plus one staging buffer; on a CPU, weights that stay as they are
stored lie in their mapped files.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from frameloom.errors import CheckpointError, InternalError, RequestError
from frameloom.ops.dequant import BLOCK_TYPES
from frameloom.ops.quantized import (
    Embedding,
    HeldTable,
    HeldWeight,
    Linear,
    QuantizedWeight,
    hold,
    hold_table,
    hold_weight,
)
from frameloom.weights.checkpoint import Component
from frameloom.weights.header import TensorEntry, read_tensors
from frameloom.weights.tensors import (
    DTYPES,
    Reader,
    check_dtype,
    is_quantized,
    rows_are_whole,
    same_bytes,
    scale_fits,
)

Quantized = Literal["keep", "expand"]
Leave = Callable[[str, TensorEntry], HeldWeight | HeldTable | None]
"""What a layer holds in place of a tensor that is left in its file; None: the tensor is read."""
_LISTED = 10  # names per kind in an error message


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
    leave: Leave | None = None,
) -> LoadReport:
    """Replace every parameter and persistent buffer of `module` by the stored tensor of the same name.

    Floating tensors become `dtype` (None: as stored), those whose name satisfies `keep` float32; integers
    stay as they are. `rename` maps a stored name to the module's, None drops it. `tied` maps an alias to the
    name it shares memory with: one of the two may be absent; if both are stored they must be equal.
    `take` gets each tensor as it is read, under its name in the module, and returns what is kept of it, in memory of
    its own: never more than the parts and one whole tensor exist. Parameters come back without gradient.
    `quantized`: GGUF's blocks, float8 and what has a scale become plain numbers ("expand"), or stay as they are stored
    where a layer can compute with that ("keep": `Linear` and `Embedding` of ops/quantized.py).
    `leave` is asked for every tensor under its name in the module, in the order in which they lie on disk.
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
        left = {} if leave is None else _left(leave, stored)
        read = {name: entry for name, entry in stored.items() if name not in left}
        as_stored = _holdable(module, read) if quantized == "keep" else frozenset()
        if as_stored and take is not None:
            raise RequestError(
                f"the weights of {where} stay quantized and can neither be divided over ranks nor have a LoRA merged "
                "into them; expand them (quantized=expand), or leave out tp, fsdp and merging"
            )
        reader = Reader(dtype=dtype, device=torch.device(device), keep=keep, take=take, as_stored=as_stored, maps=True)
        size_bytes = _fill(module, reader, read)
    except OSError as error:
        raise CheckpointError(f"the weights cannot be read ({error}); check the files and their disk") from None
    for name, held in left.items():
        _hold_left(module, name, held, reader.wanted_dtype(name, torch.float32))
    for alias, name in aliases.items():
        _share(module, alias, name)
    _move_buffers(module, torch.device(device))
    return LoadReport(num_tensors=len(read), size_bytes=size_bytes, dropped=dropped)


def held_bytes(component: Component, dtype: torch.dtype, quantized: Quantized) -> int:
    """Bytes that the weights of a component take once they are loaded, about: small ones may stay in float32."""
    return sum(
        entry.size_bytes if quantized == "keep" and is_quantized(entry) else math.prod(entry.shape) * dtype.itemsize
        for entry in component.tensors.values()
    )


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
        if name in found and not same_bytes(entry, found[name]):
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
        check_dtype(entry)
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
    if not scale_fits(entry):
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
    return rows_are_whole(entry)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _left(leave: Leave, stored: Mapping[str, TensorEntry]) -> dict[str, HeldWeight | HeldTable]:
    ordered = sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset))
    return {name: held for name, entry in ordered if (held := leave(name, entry)) is not None}


# --- bytes ---


def _fill(module: nn.Module, reader: Reader, stored: Mapping[str, TensorEntry]) -> int:
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


def _hold_left(module: nn.Module, name: str, held: HeldWeight | HeldTable, dtype: torch.dtype) -> None:
    layer = _layer(module, name)
    if isinstance(layer, Linear):
        hold_weight(layer, cast("HeldWeight", held), dtype)
    else:
        hold_table(layer, cast("HeldTable", held), dtype)


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
