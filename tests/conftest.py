"""Fixtures of the whole suite: small checkpoints, written once."""

from pathlib import Path

import diffusers.utils.logging
import pytest
import transformers.utils.logging
from checkpoints import Kind, save_checkpoint

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a small random checkpoint of a kind; do not write into it."""
    made: dict[str, Path] = {}

    def make(kind: Kind = "one expert") -> Path:
        if kind not in made:
            made[kind] = save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", kind)
        return made[kind]

    return make
