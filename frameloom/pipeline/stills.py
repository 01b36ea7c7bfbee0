"""Small pictures of a finished video: one from its middle, and a sheet of some. Torch-free.

They are JPEG files, written whole or not at all. One frame of the video is held at a time.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from frameloom.pipeline.reader import each_frame
from frameloom.pipeline.sinks import Frames, write_whole

_SIDE: Final = 512  # pixels of the thumbnail's longest side
_SHOWN: Final = 16  # frames on a sheet
_SHEET_SIDE: Final = 240  # pixels of the longest side of a frame there
_QUALITY: Final = 85


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was found of a video while its pictures were made: pixels and frames."""

    width: int
    height: int
    num_frames: int


def draw_stills(video: Path, num_frames: int, *, thumbnail: Path, sheet: Path, each: Callable[[], object]) -> Seen:
    """Write the thumbnail and the sheet of a video of so many frames; `each` is called for every frame.

    Raises InputError for a video that cannot be read, OSError for a disk that is full.
    """
    middle = num_frames // 2
    picks = set(np.unique(np.linspace(0, num_frames - 1, min(_SHOWN, num_frames)).round().astype(int)).tolist())
    cells: list[Image.Image] = []
    width = height = count = 0
    for index, frame in enumerate(each_frame(video)):
        each()
        height, width, count = frame.shape[0], frame.shape[1], index + 1
        if index == middle:
            _write_jpeg(thumbnail, _fitted(frame, _SIDE))
        if index in picks:
            cells.append(_fitted(frame, _SHEET_SIDE))
    _write_jpeg(sheet, _grid(cells))
    return Seen(width=width, height=height, num_frames=count)


def _fitted(frame: Frames, side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _grid(cells: list[Image.Image]) -> Image.Image:
    """Frames from left to right and from top to bottom, as many in a row as there are rows, or one more."""
    columns = math.ceil(math.sqrt(len(cells)))
    width, height = cells[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(cells) / columns) * height))
    for index, cell in enumerate(cells):
        sheet.paste(cell, (index % columns * width, index // columns * height))
    return sheet


def _write_jpeg(path: Path, image: Image.Image) -> None:
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=_QUALITY)
    write_whole(path, data.getbuffer())
