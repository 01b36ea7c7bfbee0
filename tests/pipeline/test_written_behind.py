"""Frames are written while others are made; an error on either side ends both, and leaves no file."""

import threading
from pathlib import Path

import numpy as np
import pytest

from frameloom.errors import OutputError
from frameloom.pipeline.media import open_writer, written_behind
from frameloom.pipeline.reader import read_frames

FRAMES = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)


def test_the_same_file_as_without(tmp_path: Path) -> None:
    for name, behind in (("a", False), ("b", True)):
        with open_writer(tmp_path / f"{name}.mp4", width=16, height=16, fps=8) as writer:
            if behind:
                with written_behind(writer) as write:
                    for frame in FRAMES:
                        write(frame[None])
            else:
                writer.write(FRAMES)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert len(read_frames(tmp_path / "b.mp4")[0]) == 6


def make(path: Path, frames: np.ndarray, times: int, error: BaseException | None = None) -> None:
    with open_writer(path, width=16, height=16, fps=8) as writer, written_behind(writer) as write:
        for _ in range(times):
            write(frames)
        if error is not None:
            raise error


def test_an_error_of_the_writer_reaches_the_maker_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="give one size"):
        make(tmp_path / "a.mp4", FRAMES[:, :8], 100)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_maker_stops_the_writer_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a.mp4", FRAMES, 1, KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "frame writer"]
