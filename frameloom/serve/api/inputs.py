"""Pictures and videos that clients give: known by their first bytes, and looked at in a process with limits."""

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from frameloom.serve.api.asking import Shape
from frameloom.serve.api.errors import bad
from frameloom.serve.config import Limits

log = logging.getLogger(__name__)

IMAGES: Final = ("png", "jpeg", "webp")
VIDEOS: Final = ("mp4", "webm", "gif")
MEMORY_BYTES: Final = 3 * 2**30
"""Of address space: the libraries alone map most of one."""
CPU_S: Final = 30
_WALL_S: Final = 60.0
_STILL_BRANDS: Final = (b"avif", b"avis", b"heic", b"heix", b"heif", b"mif1", b"msf1", b"crx ")
_ATOMS: Final = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_DATA_URL: Final = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*);base64,", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """A picture or video that was looked at: its shape, and the bytes that are kept."""

    shape: Shape
    data: bytes


def sniff(data: bytes) -> str | None:
    """The kind of a file by its first bytes: png, jpeg, webp, mp4 (MOV too), webm (Matroska too), gif; None else."""
    head = data[:16]
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "webm"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return "mp4" if head[4:8] in _ATOMS and head[8:12] not in _STILL_BRANDS else None


def bytes_of_data_url(url: str, param: str) -> bytes:
    """What a data: URL holds. Its type is not looked at. Raises ApiError 400."""
    match = _DATA_URL.match(url[:200])
    if match is None:
        raise bad(param, f"{param} is a data: URL without ';base64,'; give data:image/png;base64,...")
    try:
        return base64.b64decode(url[match.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise bad(param, f"{param} is a data: URL whose base64 is damaged; encode it again") from None


class Examiner:
    """Looks at what was given."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    async def image(self, data: bytes, param: str, name: str) -> Given:
        """An image, to be kept as PNG in `name`.png. Raises ApiError 400."""
        kind = sniff(data)
        if kind not in IMAGES:
            raise bad(param, f"the {param} is {_noun(data, kind)}; give a PNG, JPEG or WebP image")
        facts, picture = await self._examined(data, kind, param)
        return Given(shape=Shape(name=f"{name}.png", **facts), data=picture)

    async def video(self, data: bytes, param: str, name: str) -> Given:
        """A video, to be kept as it is in `name` and its suffix. Raises ApiError 400."""
        kind = sniff(data)
        if kind not in VIDEOS:
            raise bad(param, f"the {param} is {_noun(data, kind)}; give an MP4, WebM, GIF or MOV video")
        facts, _ = await self._examined(data, kind, param)
        return Given(shape=Shape(name=f"{name}.{kind}", **facts), data=data)

    async def _examined(self, data: bytes, kind: str, param: str) -> tuple[Mapping[str, Any], bytes]:
        limits = {
            "what": param, "pixels": self._limits.image_pixels, "frames": self._limits.video_frames,
            "memory_bytes": MEMORY_BYTES, "cpu_s": CPU_S,
        }  # fmt: skip
        told = await _ask(data, kind, json.dumps(limits))
        if len(told) < 4:
            raise bad(param, f"the {param} cannot be read within the limits of this server; give another file")
        end = 4 + int.from_bytes(told[:4], "big")
        facts = json.loads(told[4:end])
        if "error" in facts:
            raise bad(param, facts["error"])
        return facts, told[end:]


async def _ask(data: bytes, kind: str, limits: str) -> bytes:
    """What the examining process says; nothing if it ended without a word, or had to be ended."""
    command = (sys.executable, "-m", "frameloom.pipeline.examine", kind, limits)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(_WALL_S):
            out, problems = await process.communicate(data)
    except TimeoutError:
        log.warning("a %s file was not read within %g s", kind, _WALL_S)
        return b""
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        lines = problems.decode(errors="replace").strip().splitlines()
        log.warning("the reader of a %s file ended with %d: %s", kind, process.returncode, lines[-1] if lines else "")
        return b""
    return out


def _noun(data: bytes, kind: str | None) -> str:
    if not data:
        return "empty"
    if kind is None:
        return "of no known kind"
    return f"a {kind.upper()} {'image' if kind in IMAGES else 'video'}"
