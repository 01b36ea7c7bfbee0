"""Tensors that are in memory already, by the names of any layout, as if they had been read from a file."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from frameloom.errors import CheckpointError
from frameloom.weights.checkpoint import JsonObject
from frameloom.weights.header import TensorEntry
from frameloom.weights.identify import identify

_DTYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
)


def vae_of_tensors(
    tensors: Mapping[str, Tensor], *, config: JsonObject | None = None
) -> tuple[JsonObject, Mapping[str, Tensor]]:
    """The config and the native names of a VAE in a mapping, which may hold other networks beside it.

    The tensors themselves are returned. `config`: in the words of Diffusers' config.json; None where the shapes tell
    all. Raises CheckpointError.
    """
    where = "the mapping"
    if not tensors:
        raise CheckpointError(f"{where} is empty; give the tensors of a VAE by their names")
    entries = {name: _entry(name, tensor) for name, tensor in tensors.items()}
    parts = identify(entries, config=config, where=where)
    for part in parts:
        if part.kind == "vae":
            return part.config, {native: tensors[entry.name] for native, entry in part.tensors.items()}
    raise CheckpointError(f"{where} holds no VAE ({', '.join(part.model for part in parts)} instead)")


def _entry(name: str, tensor: Tensor) -> TensorEntry:
    """Its name, dtype and shape; it lies in no file."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(f"the mapping has {type(tensor).__name__} under {name!r}; give tensors by their names")
    if tensor.dtype not in _DTYPES or type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        raise CheckpointError(
            f"'{name}' is {tensor.dtype} on {tensor.device}; give plain tensors of float32, float16 or bfloat16"
        )
    size = math.prod(tensor.shape) * tensor.element_size()
    return TensorEntry(
        name=name, dtype=_DTYPES[tensor.dtype], shape=tuple(tensor.shape), file=Path(), offset=0, size_bytes=size
    )
