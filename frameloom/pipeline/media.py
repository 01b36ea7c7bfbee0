"""Frames and files: the finished video, a writer that leaves a whole file or none, and contact sheets.

Frames are uint8 RGB arrays of shape (T, H, W, 3).
"""

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from frameloom.errors import InternalError, OutputError
from frameloom.pipeline.reader import read_frames
from frameloom.pipeline.sinks import Frames, GifFile, PngFolder, Sink, Spec, YuvFile, sync
from frameloom.pipeline.target import OutputTarget, check_output, check_quality, exact_fps

__all__ = [
    "DEFAULT_QUALITY",
    "FrameWriter",
    "Frames",
    "OutputTarget",
    "Video",
    "check_output",
    "contact_sheet",
    "open_writer",
    "read_frames",
    "written_behind",
]

DEFAULT_QUALITY: Final = 70  # CRF 16 (VP9: 20); FFmpeg's guide calls 17 to 18 nearly lossless to the eye

_FOLDER_PATTERN: Final = "%04d.png"
_MAX_SIDE: Final = 16384  # pixels; the limit of H.264 level 6.2, which the other formats share here


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Video:
    """A finished video: `frames` uint8 RGB (T, H, W, 3), T >= 1, shown at `fps` frames per second.

    `metadata` travels with the object (prompt, seed, ...) and is not written into files.
    Raises OutputError when frames or fps are not that.
    """

    frames: Frames
    fps: float
    metadata: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_frames(self.frames)
        if self.frames.ndim != 4 or self.num_frames < 1:
            raise OutputError(f"frames of shape {self.frames.shape} are no video; give (T, H, W, 3) with T >= 1")
        exact_fps(self.fps)

    @property
    def num_frames(self) -> int:
        """Number of frames, T."""
        return int(self.frames.shape[0])

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.frames.shape[2])

    @property
    def duration_s(self) -> float:
        """Length in seconds, the last frame included."""
        return self.num_frames / self.fps

    def save(self, path: str | os.PathLike[str], *, quality: int = DEFAULT_QUALITY) -> Path:
        """Write the video to `path` (see `open_writer`) and return the absolute path."""
        with open_writer(path, width=self.width, height=self.height, fps=self.fps, quality=quality) as writer:
            writer.write(self.frames)
        return writer.target.path


def _check_frames(frames: object) -> None:
    if not isinstance(frames, np.ndarray):
        raise OutputError(f"frames of type {type(frames).__name__} cannot be written; give a numpy uint8 array")
    if frames.dtype != np.uint8:
        raise OutputError(f"frames of dtype {frames.dtype} cannot be written; give uint8 values from 0 to 255")
    if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
        raise OutputError(f"frames of shape {frames.shape} cannot be written; give RGB as (T, H, W, 3)")


def open_writer(
    path: str | os.PathLike[str], *, width: int, height: int, fps: float, quality: int = DEFAULT_QUALITY
) -> "FrameWriter":
    """Open a writer of `width` x `height` RGB frames; nothing is on disk before the first frame.

    .mp4 is H.264, .webm is VP9 (both yuv420p in BT.709; an odd size gets its last column or row once more).
    .gif has one palette for the whole video, loops for ever, and is held in memory until closed; its delays
    are whole 1/100 s. PNG frames are lossless. `quality` runs from 0 (smallest) to 100 (best): CRF 51 to 1
    for H.264, 63 to 1 for VP9; GIF and PNG have no such dial. Raises OutputError (see `check_output`).
    """
    target = check_output(path)
    check_quality(quality)
    if not (1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE):
        raise OutputError(f"a video of {width}x{height} pixels cannot be written; give 1 to {_MAX_SIDE} each way")
    exact = exact_fps(fps, target.kind)
    return FrameWriter(target, Spec(width=width, height=height, fps=exact, quality=int(quality)))


class FrameWriter:
    """Writes frames to a partial output beside the target and puts it in place, whole, on `close`.

    As a context manager it closes on success and leaves nothing behind on any exception, Ctrl-C included. A
    killed process leaves `.NAME.partial-...` (safe to delete), never a file under the final name. Frames for
    a folder that exists are moved there one by one, last frame first: frame 0 is there only when all are.
    """

    def __init__(self, target: OutputTarget, spec: Spec) -> None:
        self.target = target
        self.num_frames = 0
        self._spec = spec
        self._partial = target.partial(os.getpid())
        self._sink: Sink | None = None
        self._done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def write(self, frames: Frames) -> None:
        """Add frames: uint8 (T, H, W, 3) with any T, or one frame (H, W, 3). Raises OutputError."""
        if self._done:
            raise InternalError(f"a frame came for {self.target.path} after it was closed; please report this")
        _check_frames(frames)
        if frames.shape[-3:-1] != (self._spec.height, self._spec.width):
            size = f"{frames.shape[-2]}x{frames.shape[-3]}"
            raise OutputError(f"a frame is {size}, the video {self._spec.width}x{self._spec.height}; give one size")
        with self._disk_errors():
            for frame in frames if frames.ndim == 4 else frames[None]:
                self._sink = self._sink or self._open()
                self._sink.add(frame)
                self.num_frames += 1

    def close(self) -> None:
        """Finish, flush to disk and put the output in place; a second call does nothing."""
        if self._done:
            return
        try:
            if self._sink is None:
                raise OutputError(f"{self.target.path} would be empty; write at least one frame before closing")
            with self._disk_errors():
                self._sink.finish()
                self._commit(self._sink)
        except BaseException:
            self.discard()
            raise
        self._done = True

    def discard(self) -> None:
        """Stop, and remove what was written so far; after `close` it does nothing."""
        if self._done:
            return
        self._done = True
        if self._sink is not None:
            # What brought us here is the error to tell, not that the end of a doomed file failed too.
            with contextlib.suppress(OSError, av.FFmpegError):
                self._sink.abort()
        if self._partial.is_dir():
            shutil.rmtree(self._partial, ignore_errors=True)
        else:
            self._partial.unlink(missing_ok=True)

    def _open(self) -> Sink:
        match self.target.kind:
            case "gif":
                return GifFile(self._partial, "gif", self._spec)
            case "mp4" | "webm":
                return YuvFile(self._partial, self.target.kind, self._spec)
            case "folder":
                return PngFolder(self._partial, _FOLDER_PATTERN)
            case "pattern":
                return PngFolder(self._partial, self.target.path.name)

    def _commit(self, sink: Sink) -> None:
        folder = self.target.folder
        if not isinstance(sink, PngFolder):
            sync(self._partial)
            os.replace(self._partial, self.target.path)
        elif folder.exists():
            check_output(self.target)  # files may have come while the frames were made
            _move_frames(self._partial, folder, sink.names)
        else:
            os.rename(self._partial, folder)
        sync(self.target.home)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            raise OutputError(
                f"writing {self.target.path} failed after {self.num_frames} frames ({error.strerror}) and "
                "nothing was kept; free some space or choose another path"
            ) from error


_AHEAD: Final = 2  # parts of a video that wait for the writer


@contextlib.contextmanager
def written_behind(writer: FrameWriter) -> Iterator[Callable[[Frames], None]]:
    """Write in a thread of its own, so that the next frames can be made meanwhile.

    Yields a function that takes frames as `FrameWriter.write` does and waits while too many are waiting. An error of
    the writer is raised at the next call, or at the end.
    """
    waiting: queue.Queue[Frames | None] = queue.Queue(_AHEAD)
    failed: list[BaseException] = []

    def work() -> None:
        while (frames := waiting.get()) is not None:
            if not failed:
                try:
                    writer.write(frames)
                except BaseException as error:  # handed to the thread that makes the frames
                    failed.append(error)

    def write(frames: Frames) -> None:
        if failed:
            raise failed[0]
        waiting.put(frames)

    thread = threading.Thread(target=work, name="frame writer")
    thread.start()
    try:
        yield write
    except BaseException as error:
        failed.append(error)  # what still waits is not written
        raise
    finally:
        waiting.put(None)
        thread.join()
    if failed:
        raise failed[0]


def _move_frames(source: Path, folder: Path, names: Sequence[str]) -> None:
    moved: list[Path] = []
    try:
        for name in reversed(names):
            moved.append(folder / name)
            os.rename(source / name, folder / name)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    source.rmdir()


# Contact sheets; lengths are pixels.
_PAPER: Final = (250, 250, 248)
_INK: Final = (38, 38, 42)
_THUMB: Final = 192  # longest side of a thumbnail
_MARGIN: Final = 36
_GAP: Final = 8  # between the frames of one video
_FONT_SIZE: Final = 18
_LINE: Final = 25
_MAX_LINES: Final = 3


def contact_sheet(
    videos: Sequence[Video], captions: Sequence[str], *, columns: int = 1, frames_per_video: int = 4
) -> Image.Image:
    """Draw one strip of evenly spaced frames per video, its caption above, `columns` strips side by side.

    First and last frame are shown; a video with fewer frames shows each once. Small frames grow by whole
    factors with hard pixels, large ones shrink with Lanczos. The font has Latin letters only.
    Raises OutputError.
    """
    if not videos or len(videos) != len(captions):
        raise OutputError(f"{len(videos)} videos with {len(captions)} captions make no sheet; give one caption each")
    if columns < 1 or frames_per_video < 1:
        raise OutputError(f"{columns} columns of {frames_per_video} frames make no sheet; give at least 1 of each")
    font = ImageFont.load_default(size=_FONT_SIZE)
    strips = [_strip(video.frames, frames_per_video) for video in videos]
    width = max(strip.width for strip in strips)
    cells = [
        _cell(strip, _wrap(caption, width, font), width, font) for strip, caption in zip(strips, captions, strict=True)
    ]
    return _grid(cells, columns)


def _strip(frames: Frames, count: int) -> Image.Image:
    last = len(frames) - 1
    picks = np.unique(np.linspace(0, last, min(count, last + 1)).round().astype(int))
    thumbs = [_thumbnail(frames[index]) for index in picks]
    width, height = thumbs[0].size
    strip = Image.new("RGB", (len(thumbs) * (width + _GAP) - _GAP, height), _PAPER)
    for column, thumb in enumerate(thumbs):
        strip.paste(thumb, (column * (width + _GAP), 0))
    return strip


def _thumbnail(frame: Frames) -> Image.Image:
    image = Image.fromarray(frame)
    scale = _THUMB / max(image.size)
    if scale >= 2:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(caption: str, width: int, font: Any) -> list[str]:
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:_MAX_LINES]
    if len(lines) > _MAX_LINES:
        shown[-1] += " ..."
    return [_cut(line, width, font) for line in shown]


def _cut(line: str, width: int, font: Any) -> str:
    if font.getlength(line) <= width:
        return line
    kept = line.removesuffix(" ...")
    while kept and font.getlength(kept + " ...") > width:
        kept = kept[:-1]
    return kept.rstrip() + " ..."


def _cell(strip: Image.Image, lines: Sequence[str], width: int, font: Any) -> Image.Image:
    top = _LINE * len(lines) + _GAP
    cell = Image.new("RGB", (width, top + strip.height), _PAPER)
    draw = ImageDraw.Draw(cell)
    for row, line in enumerate(lines):
        draw.text((0, row * _LINE), line, fill=_INK, font=font)
    cell.paste(strip, (0, top))
    return cell


def _grid(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    columns = min(columns, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = columns * (cells[0].width + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN * (len(rows) + 1)), _PAPER)
    y = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            # Captions of one line and of three: the strips of a row stand on one line.
            sheet.paste(cell, (_MARGIN + column * (cell.width + _MARGIN), y + height - cell.height))
        y += height + _MARGIN
    return sheet
