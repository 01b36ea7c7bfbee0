"""A short name for what a checkpoint holds, so that two machines can tell whether they have the same one."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from frameloom.weights.checkpoint import Checkpoint, Component

_SAMPLE_BYTES = 1 << 16


def fingerprint(checkpoint: Checkpoint) -> str:
    """Sixteen hexadecimal digits of its settings and of its parts."""
    return fingerprint_of_parts(
        checkpoint.components,
        checkpoint.pipeline,
        checkpoint.boundary_ratio,
        checkpoint.expand_timesteps,
        dict(checkpoint.scheduler),
    )


def fingerprint_of_parts(parts: Mapping[str, Component], *facts: object) -> str:
    """The same of parts: of their configs, of every tensor's name, dtype and shape, and of samples of their files.

    A sample from the beginning, the middle and the end of every file: reading all of it would take minutes.
    """
    told = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, part in sorted(parts.items()):
        tensors = [(key, entry.dtype, entry.shape) for key, entry in sorted(part.tensors.items())]
        told.update(json.dumps([name, part.config, tensors], sort_keys=True, default=str).encode())
        for file in sorted(part.files):
            _sample(file, told)
    return told.hexdigest()[:16]


def fingerprint_of_files(files: Iterable[Path]) -> str:
    """The same of any files, in their order."""
    told = hashlib.sha256()
    for file in files:
        _sample(file, told)
    return told.hexdigest()[:16]


def _sample(path: Path, told: "hashlib._Hash") -> None:
    size = path.stat().st_size
    told.update(str(size).encode())
    with path.open("rb") as file:
        for start in sorted({0, max(0, (size - _SAMPLE_BYTES) // 2), max(0, size - _SAMPLE_BYTES)}):
            file.seek(start)
            told.update(file.read(_SAMPLE_BYTES))
