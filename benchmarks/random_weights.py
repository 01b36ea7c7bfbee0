"""Writes a single weight file of a transformer, with the names of the original code and random numbers in bfloat16."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import WanDiT
from frameloom.weights.header import stored_bytes
from frameloom.weights.keymap import DIT_ORIGINAL

_PIECE = 32 * 2**20  # bytes of random numbers at a time


def write_transformer(path: Path, spec: TransformerSpec, *, repeats: bool = False) -> int:
    """Finite numbers, the same again for every piece where it `repeats`, which is faster; returns the file's bytes."""
    with on_meta():
        shapes = {name: tuple(value.shape) for name, value in WanDiT(spec).state_dict().items()}
    header: dict[str, Any] = {}
    end = 0
    for native, shape in shapes.items():
        start, end = end, end + stored_bytes("BF16", shape)
        header[str(DIT_ORIGINAL.from_native(native))] = {
            "dtype": "BF16", "shape": shape, "data_offsets": [start, end],
        }  # fmt: skip
    if shutil.disk_usage(path.parent).free < 2 * end:
        sys.exit(f"{path.parent} has too little space for {end / 1e9:.1f} GB; set TMPDIR to another folder")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors' own writer aligns the numbers
    numbers = _random()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, _PIECE):
            numbers = numbers if repeats else _random()
            file.write(numbers[: end - start].numpy().data)
    return path.stat().st_size


def _random() -> torch.Tensor:
    return torch.randn(_PIECE // 2).mul_(0.02).bfloat16().view(torch.uint8)
