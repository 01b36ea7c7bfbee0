"""Encoders: frames into one H.264, VP9 or GIF file, or into a folder of PNG files.

The same frames give the same bytes in every run: one thread, bit-exact conversion, no dates, no versions.
"""

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Protocol

import av
import numpy as np
import numpy.typing as npt
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image

Frames = npt.NDArray[np.uint8]

_CODECS: Final[Mapping[str, str]] = {"mp4": "libx264", "webm": "libvpx-vp9", "gif": "gif"}
# Without FULL_CHR_H_INT, YUV to RGB comes out 2 levels too dark (40 instead of 52 dB over plain 4:2:0).
SWS_EXACT: Final = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)
_BT709: Final = int(Colorspace.ITU709)  # 1 both as swscale's matrix and as the tag in the file
_LIMITED: Final = int(ColorRange.MPEG)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """Size in pixels, exact frames per second, and quality from 0 to 100."""

    width: int
    height: int
    fps: Fraction
    quality: int


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX opens a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, *pieces: bytes | memoryview, waits: bool = True) -> None:
    """Write a file that appears under its name whole or not at all; `waits` until it is on the disk. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            if waits:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if waits:
            sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class Sink(Protocol):
    """Takes frames (H, W, 3) one by one; `finish` completes the output, `abort` lets go of it."""

    def add(self, frame: Frames) -> None:
        """Take one frame."""

    def finish(self) -> None:
        """Write what is still held and close."""

    def abort(self) -> None:
        """Close without completing."""


class _VideoFile:
    """One video stream in one container."""

    def __init__(self, path: Path, kind: str, spec: Spec, *, pix_fmt: str, options: Mapping[str, str]) -> None:
        muxing = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if kind == "mp4" else {})
        self._container: Any = av.open(str(path), "w", format=kind, container_options=muxing)
        self._stream: Any = self._container.add_stream(
            _CODECS[kind], rate=spec.fps, options={"flags": "+bitexact", **options}
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = spec.width, spec.height, pix_fmt
        self._stream.codec_context.thread_count = 1  # H.264 bytes depend on the number of threads
        self._filter: Any = None
        self._time_base = 1 / spec.fps
        self._count = 0

    def _start(self) -> None:
        """Create the file: a place that cannot be written shows at the first frame, not at the end."""
        self._container.start_encoding()

    def _picture(self, frame: Frames) -> Any:
        picture: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self._count, self._time_base
        self._count += 1
        return picture

    def _encode(self, picture: Any) -> None:
        for packet in self._stream.encode(picture):
            self._container.mux(self._filter.filter(packet) if self._filter else packet)

    def abort(self) -> None:
        """Close the half-written file."""
        self._container.close()


class YuvFile(_VideoFile):
    """H.264 in mp4, or VP9 in webm: 8-bit 4:2:0, BT.709, limited range."""

    def __init__(self, path: Path, kind: str, spec: Spec) -> None:
        if kind == "mp4":
            # mbtree reads memory it never wrote (x264 core 165, SIMD code), so equal frames could give other bytes.
            # Without it, files of equal PSNR were 0 to 15 % larger (two synthetic scenes, CRF 16 and 18).
            options = {"crf": str(51 - spec.quality // 2), "preset": "medium", "mbtree": "0"}
        else:
            options = {
                "crf": str(63 - spec.quality * 31 // 50),
                "b": "0",
                "deadline": "good",
                "cpu-used": "3",
            }
        self._pad = ((0, spec.height % 2), (0, spec.width % 2), (0, 0))
        even = replace(spec, width=spec.width + spec.width % 2, height=spec.height + spec.height % 2)
        if even != spec:
            _log.info(
                "the %s is %dx%d: 4:2:0 video needs even sizes, and %dx%d repeats its last column or row",
                *(kind, even.width, even.height, spec.width, spec.height),
            )
        super().__init__(path, kind, even, pix_fmt="yuv420p", options=options)
        context = self._stream.codec_context
        context.colorspace, context.color_range = _BT709, _LIMITED
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._start()
        if kind == "mp4":
            # Unit type 6 is supplemental information: x264 writes its version and build there.
            self._filter = BitStreamFilterContext("filter_units=remove_types=6", self._stream, self._stream)

    def add(self, frame: Frames) -> None:
        """Encode one frame."""
        picture = self._picture(np.pad(frame, self._pad, mode="edge")).reformat(
            format="yuv420p",
            dst_colorspace=_BT709,
            dst_color_range=_LIMITED,
            interpolation=SWS_EXACT,
            threads=1,
        )
        picture.color_primaries, picture.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._encode(picture)

    def finish(self) -> None:
        """Flush the encoder and write the index."""
        self._encode(None)
        if self._filter:
            self._container.mux(self._filter.filter(None))
        self._container.close()


class GifFile(_VideoFile):
    """GIF with one palette for the whole video, so that still areas do not flicker."""

    def __init__(self, path: Path, kind: str, spec: Spec) -> None:
        super().__init__(path, kind, spec, pix_fmt="pal8", options={})
        self._start()
        self._graph: Any = av.filter.Graph()
        self._graph.threads = 1
        # Above 256x256 pixels every third one in each direction tells the colours, in a third of the time.
        step = 3 if spec.width * spec.height > 65536 else 1
        source = self._graph.add_buffer(
            width=spec.width, height=spec.height, format=av.VideoFormat("rgb24"), time_base=self._time_base
        )
        split, sample, palette, use, sink = (
            self._graph.add(*node)
            for node in (
                ("split", "2"),
                ("scale", f"ceil(iw/{step}):ceil(ih/{step}):flags=neighbor+bitexact"),
                ("palettegen", "stats_mode=full"),
                ("paletteuse", "dither=sierra2_4a:diff_mode=rectangle"),
                ("buffersink",),
            )
        )
        self._graph.link_nodes(source, split, sample, palette)
        split.link_to(use, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        self._graph.configure()

    def add(self, frame: Frames) -> None:
        """Count the colours of one frame and hold it."""
        self._graph.push(self._picture(frame))

    def finish(self) -> None:
        """Choose the palette and write all frames."""
        self._graph.push(None)
        with contextlib.suppress(av.EOFError):
            while True:
                self._encode(self._graph.pull())
        self._encode(None)
        self._container.close()


class PngFolder:
    """Numbered PNG files in one folder."""

    def __init__(self, path: Path, pattern: str) -> None:
        path.mkdir()
        self._path = path
        self._pattern = pattern
        self.names: list[str] = []

    def add(self, frame: Frames) -> None:
        """Write one file."""
        name = self._pattern % len(self.names)
        Image.fromarray(frame).save(self._path / name, format="PNG", compress_level=6)
        self.names.append(name)

    def finish(self) -> None:
        """Wait until all files are on the disk."""
        for name in self.names:
            sync(self._path / name)
        sync(self._path)

    def abort(self) -> None:
        """Nothing is open between frames."""
