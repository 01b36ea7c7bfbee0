"""Fixtures of the whole suite: small checkpoints, written once."""

import os

# Two torch threads fight over two cores with parallel test processes; the numbers do not depend on it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
from checkpoints import Kind, save_checkpoint


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a small random checkpoint of a kind; do not write into it."""
    made: dict[str, Path] = {}

    def make(kind: Kind = "one expert") -> Path:
        if kind not in made:
            made[kind] = save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", kind)
        return made[kind]

    return make
