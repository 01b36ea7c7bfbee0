"""What surrounds the routes: every request gets an id, its line in the log, and its place in the metrics."""

import logging
import secrets
import time
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frameloom.serve.logs import TALK, Talk
from frameloom.serve.metrics import Metrics
from frameloom.settings import LOGGER_NAME

_LOG: Final = logging.getLogger(LOGGER_NAME)
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_GONE: Final = 499
"""What the log says where the client went away before the answer; nobody receives it."""


class Observed:
    """An application whose requests are told of. What reads and succeeds is told at debug, all else at info."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        talk = Talk(request=f"req_{secrets.token_hex(12)}")
        token = TALK.set(talk)
        since = time.perf_counter()
        status, is_stream = _GONE, False

        async def telling(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers["x-request-id"] = talk.request
                is_stream = headers.get("content-type", "").startswith("text/event-stream")
            await send(message)

        try:
            await self._app(scope, receive, telling)
        finally:
            self._tell(scope, status, time.perf_counter() - since, is_stream=is_stream)
            TALK.reset(token)

    def _tell(self, scope: Scope, status: int, seconds: float, *, is_stream: bool) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path", "") or "unknown"
        self._metrics.answered(method, route, status, seconds, is_stream=is_stream)
        quiet = method in ("GET", "HEAD", "OPTIONS") and status < 400
        facts = {"method": method, "path": scope["path"], "status": status, "ms": round(1000 * seconds, 1)}
        _LOG.log(logging.DEBUG if quiet else logging.INFO, "answered", extra=facts)
