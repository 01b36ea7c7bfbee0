"""Opens any weight file by its first bytes, whatever its name: safetensors, GGUF or PyTorch, and lists its tensors."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from frameloom.errors import CheckpointError
from frameloom.weights.gguf import read_gguf
from frameloom.weights.header import MAX_HEADER_BYTES, TensorEntry, read_safetensors
from frameloom.weights.torch_file import read_torch

Kind = Literal["safetensors", "gguf", "torch"]
_READERS: Mapping[Kind, Any] = {"safetensors": read_safetensors, "gguf": read_gguf, "torch": read_torch}

# What else lies where weights should be, by its first bytes, and what to do.
_STRANGERS: Mapping[bytes, str] = {
    b"version https://git-lfs": "is only a Git LFS pointer; fetch the real file with 'git lfs pull'",
    b"<": "is a web page, not the file it speaks of; download the file itself",
    b"{": "is JSON text; give the weight file it belongs to",
    b"\x80": "is a bare pickle, as before PyTorch 1.6, which can run code; convert it to safetensors if you trust it",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """One file of weights: where each tensor lies, and what the file says beside them.

    `metadata` are texts in safetensors; numbers, texts and tuples of them in GGUF; the plain values beside the tensors
    in a PyTorch file.
    """

    path: Path
    kind: Kind
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, Any]


def read_file(path: str | os.PathLike[str]) -> WeightFile:
    """List the tensors of one weight file; no tensor is read. Raises CheckpointError with one sentence."""
    file = Path(path)
    try:
        kind = _kind(file)
        entries, metadata = _READERS[kind](file)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} cannot be read ({error}); check the path and its permissions") from None
    return WeightFile(path=file, kind=kind, entries=entries, metadata=metadata)


def _kind(path: Path) -> Kind:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give a weight file in it")
    if not path.is_file():
        found = "is no regular file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {found}; give a weight file (safetensors, GGUF or PyTorch)")
    with path.open("rb") as file:
        head = file.read(32)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    if head[:4] in (b"GGUF", b"FUGG"):
        return "gguf"
    if head.startswith(b"PK\3\4"):
        return "torch"
    raise CheckpointError(f"{path} {_instead(head)}")


def _instead(head: bytes) -> str:
    if not head:
        return "is empty; download it again"
    said = (text for start, text in _STRANGERS.items() if head.lstrip().startswith(start))
    return next(said, "is neither safetensors, GGUF nor PyTorch; download it again, or give another file")
