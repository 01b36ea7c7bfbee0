"""Reading: a video, a picture or a folder of numbered frames becomes one uint8 RGB array (T, H, W, 3)."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
from PIL import Image, ImageOps

from frameloom.errors import InputError
from frameloom.pipeline.sinks import SWS_EXACT, Frames

MAX_PIXELS: Final = 80_000_000  # of a picture, or a frame; as RGB 240 MB, below what Pillow itself warns of
_STILLS: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


def read_frames(path: str | os.PathLike[str], limit: int | None = None) -> tuple[Frames, float | None]:
    """Read a video, a picture or a folder of numbered PNG files: uint8 RGB (T, H, W, 3), frames per second.

    `limit`: only so many frames are read, the first ones; whether the others are whole is not looked at. The rate is
    None where the file holds no time (pictures, folders). A camera's rotation is applied, and transparency dropped.
    Raises InputError when there is nothing to read, or it is damaged.
    """
    source = Path(os.path.expanduser(path))
    if not source.exists():
        raise InputError(f"{source} does not exist; give a video, a picture or a folder of numbered PNG files")
    if not source.is_dir() and not source.is_file():  # a pipe could be waited for without end
        raise InputError(f"{source} is no file; give a video, a picture or a folder of numbered PNG files")
    try:
        if source.is_dir():
            return _read_folder(source, limit), None
        if source.suffix.lower() in _STILLS:
            return _read_still(source)[None], None
        return _read_video(source, limit)
    except (OSError, av.FFmpegError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{source} cannot be read as a video or a picture ({reason}); give another file") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFacts:
    """What a video file says of itself: its size in pixels as it is shown, its frames (0 if unknown) and its rate."""

    width: int
    height: int
    num_frames: int
    fps: float


def facts_of(path: str | os.PathLike[str]) -> VideoFacts:
    """What a video file says of itself, by its first frame. Raises InputError."""
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None or not stream.average_rate:
            raise InputError(f"{path} holds no frames with a rate; convert it to mp4 with a fixed rate")
        lies = first.rotation // 90 % 2
        width, height = (first.height, first.width) if lies else (first.width, first.height)
        return VideoFacts(width=width, height=height, num_frames=stream.frames, fps=float(stream.average_rate))


def each_frame(path: str | os.PathLike[str]) -> Iterator[Frames]:
    """The frames of a video file one by one, uint8 RGB (H, W, 3), as `read_frames` has them; one is held at a time.

    Raises InputError.
    """
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            yield _picture(frame)


def last_frame(path: str | os.PathLike[str]) -> Frames:
    """The last frame of a video file, uint8 RGB (H, W, 3). Raises InputError."""
    last = None
    for last in each_frame(path):  # noqa: B007 (the last one counts)
        pass
    if last is None:
        raise InputError(f"{path} holds no frames; give another video")
    return last


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """A video file and its stream; whatever goes wrong with it is told in one sentence."""
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no video stream; give a video")
            stream = container.streams.video[0]
            if (stream.width or 0) * (stream.height or 0) > MAX_PIXELS:
                raise too_large(path)
            yield container, stream
    except (OSError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read as a video ({reason}); give another file") from error


def _picture(frame: Any) -> Frames:
    """Upright RGB."""
    picture: Frames = frame.to_ndarray(format="rgb24", interpolation=SWS_EXACT, threads=1)
    return np.rot90(picture, frame.rotation // 90)


def too_large(name: str | os.PathLike[str]) -> InputError:
    """What is said of a picture or a video with more than MAX_PIXELS."""
    return InputError(f"{name} has more than {MAX_PIXELS:,} pixels; make it smaller")


def _read_still(path: Path) -> Frames:
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:  # before anything is decoded
            raise too_large(path)
        if getattr(image, "n_frames", 1) > 1:
            raise InputError(f"{path} is an animation; convert it to mp4 or gif, or give one picture")
        if image.mode.startswith(("I", "F")):
            raise InputError(f"{path} has more than 8 bits per channel; convert it to 8-bit RGB")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _read_folder(folder: Path, limit: int | None) -> Frames:
    numbered = [path for path in folder.iterdir() if re.fullmatch(r"\d+\.png", path.name)]
    if not numbered:
        raise InputError(f"{folder} holds no numbered frames such as 0000.png; give a video or another folder")
    frames = [_read_still(path) for path in sorted(numbered, key=lambda path: int(path.stem))[:limit]]
    if len({frame.shape for frame in frames}) > 1:
        raise InputError(f"{folder} holds pictures of different sizes; give one size")
    return np.stack(frames)


def _read_video(path: Path, limit: int | None) -> tuple[Frames, float]:
    container: Any
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise InputError(f"{path} holds no video stream; give a video or a picture")
        stream = container.streams.video[0]
        if (stream.width or 0) * (stream.height or 0) > MAX_PIXELS:
            raise too_large(path)
        frames: list[Frames] = []
        ticks, end, packets = 0, 0, 0
        for packet in container.demux(stream):
            packets += packet.size > 0 and not packet.is_corrupt
            for frame in packet.decode():
                frames.append(_picture(frame))
                ticks += frame.duration
                end = (frame.pts or 0) + frame.duration
            if limit is not None and len(frames) >= limit:
                break
        rate = stream.average_rate
        if container.format.name == "gif":  # delays are whole 1/100 s: 16 per second is 6, 7, 6, 6, ...
            rate = len(frames) / (ticks * stream.time_base) if ticks else None
        if not frames or not rate:
            raise InputError(f"{path} holds no frames with a rate; convert it to mp4 with a fixed rate")
        if limit is not None and len(frames) >= limit:
            return np.stack(frames[:limit]), float(rate)
        latest_s = float(end * stream.time_base + 0.75 / rate)
        if is_cut_off(container, path.read_bytes, packets=packets, latest_s=latest_s):
            raise InputError(f"{path} is cut off after {len(frames)} frames; copy or write it again")
        return np.stack(frames), float(rate)


def is_cut_off(container: Any, data: Callable[[], bytes], *, packets: int, latest_s: float) -> bool:
    """Whether a video file promises more than it holds, as its kind tells it.

    `data` gives its bytes, where they are needed. `packets`: those of its first video stream that were whole.
    `latest_s`: when its last frame ends, in seconds, with some to spare.
    """
    kind = container.format.name
    if kind == "gif":
        return not data().rstrip(b"\0").endswith(b";")  # the trailer byte that ends every GIF
    if "mp4" in kind:
        return packets < len(container.streams.video[0].index_entries)
    if "matroska" not in kind or len(container.streams) > 1:
        return False  # with sound the promise may be about the sound
    return bool((container.duration or 0) / av.time_base > latest_s)
