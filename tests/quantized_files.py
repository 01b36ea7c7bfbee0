"""Weights as quantized files have them: blocks of every GGUF type with sensible scales, float8 and int8 with theirs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from frameloom.ops.dequant import BLOCK_TYPES
from frameloom.weights.checkpoint import Component
from frameloom.weights.header import TensorEntry

# Where the float16 scales of a block lie, for types that gguf cannot write from Python.
SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
}  # fmt: skip
BY_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    scale: "Stored | None" = None
    rotated: int = 0


def plain(tensor: Tensor) -> Stored:
    """As safetensors holds it."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    data = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    return Stored(dtype=names[tensor.dtype], shape=tuple(tensor.shape), data=data.numpy().tobytes())


def in_blocks(weight: Tensor, kind: str, *, seed: int = 0) -> Stored:
    """`weight` as gguf quantizes it, or random blocks of its shape where gguf cannot."""
    if kind in BY_GGUF:
        raw = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind])
    else:
        block, rng = BLOCK_TYPES[kind], np.random.default_rng(seed)
        raw = rng.integers(0, 256, (weight.numel() // block.numbers, block.size_bytes), dtype=np.uint8)
        for start in SCALES[kind]:
            raw[:, start : start + 2] = rng.uniform(1e-4, 1e-3, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return Stored(dtype=kind, shape=tuple(weight.shape), data=raw.tobytes())


def rotation(group: int) -> Tensor:
    """ConvRot's matrix of so many rows, as the paper defines it: Kronecker's power of a regular Hadamard matrix."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double() / 2
    return four if group == 4 else torch.kron(rotation(group // 4), four)


def _turned(weight: Tensor, group: int) -> Tensor:
    return (weight.double().view(len(weight), -1, group) @ rotation(group).T).view(weight.shape)


def scaled(weight: Tensor, kind: str, *, by_row: bool = False, rotated: int = 0) -> Stored:
    """`weight` as float8 or int8, and the scale that brings its largest number back.

    Rotated weights have powers of 2 for scales: whatever is added up of their numbers is exact in float32.
    """
    if rotated:
        weight = _turned(weight, rotated).float()
    largest = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().amax()
    if kind == "I8":
        scale = largest.float() / 127
        scale = torch.exp2(scale.log2().ceil()) if rotated else scale
        numbers = (weight / scale).round().to(torch.int8)
    else:
        scale = largest.float() / torch.finfo(FLOAT8[kind]).max
        numbers = (weight / scale).to(FLOAT8[kind])
    data = numbers.view(torch.uint8).numpy().tobytes()
    return Stored(dtype=kind, shape=tuple(weight.shape), data=data, scale=plain(scale), rotated=rotated)


def cast(weight: Tensor, kind: str) -> Stored:
    """`weight` as float8 without a scale."""
    return Stored(
        dtype=kind, shape=tuple(weight.shape), data=weight.to(FLOAT8[kind]).view(torch.uint8).numpy().tobytes()
    )


def numbers(stored: Stored) -> Tensor:
    """What a stored tensor stands for, in float32: gguf's reference for blocks, the product with the scale."""
    raw = np.frombuffer(stored.data, dtype=np.uint8)
    if stored.dtype in ("I8", *FLOAT8):
        values = torch.from_numpy(raw.copy()).view(FLOAT8.get(stored.dtype, torch.int8)).view(stored.shape).float()
        values = values if stored.scale is None else values * numbers(stored.scale)
        return _turned(values, stored.rotated).float() if stored.rotated else values
    rows = raw.reshape(*stored.shape[:-1], -1) if stored.shape else raw
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[stored.dtype])
    return torch.from_numpy(values.copy()).view(stored.shape)


def write_gguf(path: Path, tensors: Mapping[str, Stored], *, architecture: str, fold: bool = False) -> Path:
    """A GGUF file of these tensors; `fold`: what has more than four dimensions in four, and its shape beside it."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, stored in tensors.items():
        shape = stored.shape
        if fold and len(shape) > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
            shape = (shape[0] * shape[1], *shape[2:])
        rows = np.frombuffer(stored.data, dtype=np.uint8).reshape(*shape[:-1], -1)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[stored.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_tensor(stored: Stored) -> Tensor:
    """For safetensors: the tensor as it is stored, without its scale."""
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, **FLOAT8}
    raw = torch.from_numpy(np.frombuffer(stored.data, dtype=np.uint8).copy())
    return raw.view(dtypes[stored.dtype]).view(stored.shape)


def write(path: Path, tensors: Mapping[str, Stored]) -> Component:
    """One file of these tensors, scales among them, and what an opened checkpoint says of it."""
    entries: dict[str, TensorEntry] = {}
    with path.open("wb") as file:

        def put(name: str, stored: Stored) -> TensorEntry:
            scale = None if stored.scale is None else put(f"{name}_scale", stored.scale)
            offset = file.tell()
            file.write(stored.data)
            return TensorEntry(
                name=name, dtype=stored.dtype, shape=stored.shape, file=path, offset=offset,
                size_bytes=len(stored.data), scale=scale, rotated=stored.rotated,
            )  # fmt: skip

        for name, stored in tensors.items():
            entries[name] = put(name, stored)
    return Component(
        name="net", folder=path.parent, described_by=path, class_name="Net", config={}, files=(path,), tensors=entries
    )
