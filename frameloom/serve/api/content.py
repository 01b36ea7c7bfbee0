"""Routes of files: the video, its pictures, and the preview of one that is being made; with ranges and ETags."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from frameloom.serve.api.described import errors
from frameloom.serve.api.errors import ApiError
from frameloom.serve.api.site import Caller, OfSite
from frameloom.serve.jobs.folder import PREVIEW
from frameloom.serve.jobs.job import Job, Result

router = APIRouter(prefix="/v1/videos", tags=["videos"])

_CHUNK: Final = 262_144
_RANGE: Final = re.compile(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.A)
Variant = Literal["video", "thumbnail", "spritesheet"]
_VARIANTS: Final[Mapping[Variant, str]] = {"video": "video/mp4", "thumbnail": "image/jpeg", "spritesheet": "image/jpeg"}


def _files(*types: str) -> dict[str, Any]:
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {"description": "The bytes.", "content": dict.fromkeys(types, schema)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """What is sent. `tag`: the same bytes have the same."""

    path: Path
    media_type: str
    tag: str


@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses={
        **errors(404, 416),
        200: _files("video/mp4", "image/jpeg"),
        206: _files("video/mp4", "image/jpeg"),
        304: {"description": "Not modified."},
    },
)
async def content(
    video_id: str, request: Request, site: OfSite, caller: Caller, variant: Variant = "video"
) -> Response:
    """The video, or with `variant` its `thumbnail` or `spritesheet`."""
    job = (await site.standing(video_id, caller)).job
    result = _result(job)
    names = {"video": result.video, "thumbnail": result.thumbnail, "spritesheet": result.sheet}
    tag = result.sha256 if variant == "video" else f"{result.sha256}-{variant}"
    path = site.service.folder(job.id) / names[variant]
    return await _sent(request, _File(path=path, media_type=_VARIANTS[variant], tag=f'"{tag}"'))


@router.get(
    "/{video_id}/preview",
    response_class=Response,
    responses={
        **errors(404, 416),
        200: _files("image/apng"),
        206: _files("image/apng"),
        304: {"description": "Not modified."},
    },
)
async def preview(video_id: str, request: Request, site: OfSite, caller: Caller) -> Response:
    """What a video is becoming while it is being made: a picture that moves, which browsers and PNG readers show."""
    standing = await site.standing(video_id, caller)
    path = site.service.folder(video_id) / PREVIEW
    if not standing.preview:
        raise ApiError(404, "preview_not_ready", f"there is no preview of {video_id} now")
    tag = f'"{standing.job.fence}-{standing.preview}"'
    return await _sent(request, _File(path=path, media_type="image/apng", tag=tag))


def _result(job: Job) -> Result:
    """Of a completed job. Raises ApiError."""
    if job.error is not None:
        raise ApiError(400, "video_failed", f"{job.id} failed: {job.error.message}")
    if job.result is None:
        raise ApiError(404, "video_not_ready", f"{job.id} is not finished; GET /v1/videos/{job.id} says how it stands")
    return job.result


async def _sent(request: Request, file: _File) -> Response:
    headers = {"etag": file.tag, "accept-ranges": "bytes", "cache-control": "private, no-cache"}
    if _is_known(request.headers.get("if-none-match", ""), file.tag):
        return Response(status_code=304, headers=headers)
    try:
        opened = await asyncio.to_thread(
            file.path.open, "rb"
        )  # before the answer begins: deleted files go on being sent
    except FileNotFoundError:
        raise ApiError(404, "video_expired", "this file is gone") from None
    size = os.fstat(opened.fileno()).st_size
    try:
        start, end = _range(request, file.tag, size)
    except ApiError:
        opened.close()
        raise
    is_part = (start, end) != (0, size)
    headers |= {"content-length": str(end - start)}
    if is_part:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    status = 206 if is_part else 200
    if request.method == "HEAD":
        opened.close()
        return Response(None, status, headers, media_type=file.media_type)
    return StreamingResponse(_chunks(opened, start, end), status, headers, media_type=file.media_type)


def _is_known(asked: str, tag: str) -> bool:
    return asked.strip() == "*" or tag in (one.strip().removeprefix("W/") for one in asked.split(","))


def _range(request: Request, tag: str, size: int) -> tuple[int, int]:
    """From where to where is sent: the whole file unless one range is asked for. Raises ApiError 416."""
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    if asked is None or asked.groups() == ("", "") or request.headers.get("if-range", tag) != tag:
        return 0, size
    first, last = asked.groups()
    if first:
        start, end = int(first), min(size, int(last) + 1) if last else size
    else:
        start, end = max(0, size - int(last)), size
    if start >= end:
        what = f"bytes {first}-{last} are outside of a file of {size} bytes"
        raise ApiError(416, "range_not_satisfiable", what, headers={"content-range": f"bytes */{size}"})
    return start, end


async def _chunks(opened: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    try:
        await asyncio.to_thread(opened.seek, start)
        while start < end:
            chunk = await asyncio.to_thread(opened.read, min(_CHUNK, end - start))
            if not chunk:
                return  # shorter than it was: the length that was promised tells the client
            start += len(chunk)
            yield chunk
    finally:
        opened.close()
