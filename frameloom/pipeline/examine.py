"""Looks at a foreign picture or video in a process of its own, with little memory and time: python -m this KIND LIMITS.

KIND is the format that the first bytes tell: png, jpeg, webp, or mp4, webm, gif. LIMITS is JSON: `pixels` of a picture
or frame, `frames`, `memory_bytes`, `cpu_s`, and `what` it is called in errors. The file comes on standard input. On
standard output go the length of a JSON object, four bytes and big-endian, the object, and of a picture the same as PNG,
upright RGB. The object holds width, height, num_frames and fps, or `error`: one sentence. Torch-free.
"""

import io
import json
import resource
import signal
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Final

import av
from PIL import Image, UnidentifiedImageError

from frameloom.errors import InputError
from frameloom.parent import when_parent_dies
from frameloom.pipeline.images import MAX_ASPECT, image_of
from frameloom.pipeline.reader import is_cut_off

_CONTAINERS: Final[Mapping[str, str]] = {"mp4": "mp4", "webm": "matroska", "gif": "gif"}
_MAX_FPS: Final = 240


def examine_image(data: bytes, kind: str, *, what: str, max_pixels: int) -> tuple[dict[str, Any], bytes]:
    """What an image is, and the same as PNG. Its size is judged before anything is decoded. Raises InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities, which matter where they are errors
            image = Image.open(io.BytesIO(data), formats=[kind.upper()])
    except Image.DecompressionBombError:
        raise _too_large(what, max_pixels) from None
    except Exception as error:  # a decoder of foreign bytes may fail in any way
        why = "its header is damaged" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise InputError(f"the {what} is no whole {kind.upper()} file ({why}); give another one") from None
    if image.width * image.height > max_pixels:
        raise _too_large(what, max_pixels)
    pictures = image_of(image, what)
    out = io.BytesIO()
    Image.fromarray(pictures.frames[0]).save(out, "PNG", compress_level=1)
    return {"width": pictures.width, "height": pictures.height, "num_frames": 1, "fps": None}, out.getvalue()


def examine_video(data: bytes, kind: str, *, what: str, max_pixels: int, max_frames: int) -> dict[str, Any]:
    """What a video is, decoded from its first to its last frame, of which one is held. Raises InputError."""
    try:
        container: Any
        with av.open(io.BytesIO(data), format=_CONTAINERS[kind]) as container:
            if not container.streams.video:
                raise InputError(f"the {what} holds no video stream; give another file")
            return _watched(container, data, what=what, max_pixels=max_pixels, max_frames=max_frames)
    except (OSError, ValueError, av.FFmpegError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the {what} cannot be read as {kind} ({_reason(error)}); give another file") from None


def _watched(container: Any, data: bytes, *, what: str, max_pixels: int, max_frames: int) -> dict[str, Any]:
    stream = container.streams.video[0]
    stream.thread_type = "NONE"  # a codec's threads would each take their share of the memory
    _check_size(stream.width or 0, stream.height or 0, what, max_pixels)
    count = packets = 0
    width = height = 0
    end_s = 0.0
    for packet in container.demux(stream):
        packets += packet.size > 0 and not packet.is_corrupt
        for frame in packet.decode():
            count += 1
            if count > max_frames:
                raise InputError(f"the {what} has more than {max_frames} frames; cut it")
            _check_size(frame.width, frame.height, what, max_pixels)
            size = (frame.height, frame.width) if frame.rotation // 90 % 2 else (frame.width, frame.height)
            if count > 1 and size != (width, height):
                raise InputError(f"the {what} changes its size from {width}x{height}; convert it to one size")
            width, height = size
            end_s = max(end_s, float(((frame.pts or 0) + frame.duration) * stream.time_base))
    rate = count / end_s if container.format.name == "gif" and end_s else stream.average_rate
    if not count or not rate or not 0.1 <= rate <= _MAX_FPS:
        raise InputError(f"the {what} holds no frames with a rate; convert it to mp4 with a fixed rate")
    if is_cut_off(container, lambda: data, packets=packets, latest_s=end_s + 0.75 / float(rate)):
        raise InputError(f"the {what} is cut off after {count} frames; copy or write it again")
    return {"width": width, "height": height, "num_frames": count, "fps": float(rate)}


def _check_size(width: int, height: int, what: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _too_large(what, max_pixels)
    if max(width, height) > MAX_ASPECT * max(1, min(width, height)):
        raise InputError(f"the {what} is {width}x{height}, longer than {MAX_ASPECT} times its width; cut it")


def _too_large(what: str, max_pixels: int) -> InputError:
    return InputError(f"the {what} has more than {max_pixels:,} pixels; make it smaller")


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return str(text)[:200] or type(error).__name__


def _limit(limits: Mapping[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(kind: str, told: str) -> None:
    """Examine what comes on standard input."""
    when_parent_dies(signal.SIGKILL)
    limits = json.loads(told)
    _limit(limits)
    data, picture = sys.stdin.buffer.read(), b""
    what, max_pixels = limits["what"], limits["pixels"]
    try:
        if kind in _CONTAINERS:
            facts = examine_video(data, kind, what=what, max_pixels=max_pixels, max_frames=limits["frames"])
        else:
            facts, picture = examine_image(data, kind, what=what, max_pixels=max_pixels)
    except InputError as error:
        facts = {"error": str(error)}
    except MemoryError:
        facts = {"error": f"the {what} needs too much memory to be read; make it smaller"}
    head = json.dumps(facts).encode()
    sys.stdout.buffer.write(len(head).to_bytes(4, "big") + head + picture)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
