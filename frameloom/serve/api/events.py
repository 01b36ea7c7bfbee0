"""The route of events: how a video stands, told as it changes, until it has ended."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from frameloom.serve.api.answers import video_of
from frameloom.serve.api.described import errors
from frameloom.serve.api.errors import ApiError
from frameloom.serve.api.site import Caller, OfSite, Site
from frameloom.serve.service import Standing

router = APIRouter(prefix="/v1/videos", tags=["videos"])

BEAT_S: Final = 10.0
"""Between signs of life; they keep proxies from closing a silent connection."""
MAX_STREAMS: Final = 1_000
_END: Final = "end"
_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}
_DESCRIBED: Final[dict[str, Any]] = {
    "description": "Server-sent events named `video`; the data of each is a Video. The last one has the id `end`.",
    "content": {
        "text/event-stream": {
            "schema": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "event": {"const": "video"},
                    "data": {"type": "string", "contentMediaType": "application/json"},
                },
            }
        }
    },
}


@router.get(
    "/{video_id}/events",
    response_class=Response,
    responses={**errors(404), 200: _DESCRIBED, 204: {"description": "There is no more: the last event was received."}},
)
async def events(
    video_id: str, site: OfSite, caller: Caller, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """Tell how a video stands, now and with every step, until it has ended. Asking again goes on from now."""
    await site.standing(video_id, caller)
    if last_event_id == _END:
        return Response(status_code=204)
    return _Events(video_id, site)


class _Events(StreamingResponse):
    """Counted from the moment at which it is let in to its end, whatever that is: a burst finds no gap between."""

    def __init__(self, video_id: str, site: Site) -> None:
        super().__init__(_told(video_id, site), headers=_HEADERS, media_type="text/event-stream")
        self._site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["method"] == "HEAD":
            head = Response(None, 200, _HEADERS, media_type="text/event-stream")
            del head.headers["content-length"]  # nobody knows it
            await head(scope, receive, send)
            return
        if self._site.streams >= MAX_STREAMS:
            error = ApiError(503, "too_many_streams", f"{MAX_STREAMS} clients watch already; poll instead", retry_s=10)
            await error.answer()(scope, receive, send)
            return
        self._site.streams += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._site.streams -= 1


async def _told(video_id: str, site: Site) -> AsyncIterator[str]:
    news = site.service.watch(video_id)
    waiting: asyncio.Future[Standing | None] | None = None
    closing = asyncio.ensure_future(site.closing.wait())
    try:
        yield "retry: 1000\n\n"
        while not site.closing.is_set():
            waiting = waiting or asyncio.ensure_future(_next(news))
            await asyncio.wait((waiting, closing), timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                yield ": still here\n\n"
                continue
            standing, waiting = waiting.result(), None
            if standing is None:
                return
            yield _event(standing, site)
    finally:
        for task in (closing, waiting):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        if (close := getattr(news, "aclose", None)) is not None:
            await close()


async def _next(news: AsyncIterator[Standing]) -> Standing | None:
    return await anext(news, None)


def _event(standing: Standing, site: Site) -> str:
    job = standing.job
    ended = job.status in ("completed", "failed")
    name = _END if ended else f"{job.fence}-{standing.stage or job.status}-{standing.step}-{standing.preview}"
    data = json.dumps(video_of(standing, site.service.card))
    return f"id: {name}\nevent: video\ndata: {data}\n\n"
