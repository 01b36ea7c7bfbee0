"""What every request passes: no web page of another origin gets in, and no error gets out unshaped."""

import asyncio
import ipaddress
import logging
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frameloom.serve.api.errors import ApiError
from frameloom.serve.config import ServeConfig

log = logging.getLogger(__name__)

_SAFE: Final = ("GET", "HEAD", "OPTIONS")
_NAMES: Final = ("localhost", "localhost.")


class Gate:
    """Stands between the observer, which is outermost, and the application."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.is_open = not config.keys
        self.host = config.host.lower()
        self.is_local = not config.is_public or _says_loopback(self.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no websockets here: the server refuses what is not accepted
        answer = _Answer(send)
        try:
            if (refusal := self._refusal(scope["method"], Headers(scope=scope))) is not None:
                await refusal.answer()(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        except asyncio.CancelledError:  # as the server ends: what takes longer than answers are given
            if answer.status:
                raise
            error = ApiError(503, "draining", "the server ends; send this again when it is back", retry_s=5)
            await error.answer()(scope, receive, answer)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if answer.status:
                raise  # half an answer is out: only the end of the connection can tell
            error = ApiError(500, "internal_error", "something is wrong with the server itself; its log says what")
            await error.answer()(scope, receive, answer)

    def _refusal(self, method: str, headers: Headers) -> ApiError | None:
        """Without keys anybody on this machine may ask, and so might a web page that somebody here has open."""
        if not self.is_open:
            return None
        host = headers.get("host", "")
        if self.is_local and not self._is_of_here(host):
            return ApiError(403, "foreign_host", "without keys this server answers to localhost alone")
        if method in _SAFE:
            return None
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none") or (origin is not None and _authority(origin) != host.lower()):
            return ApiError(403, "foreign_origin", "without keys other web pages may not ask this server for anything")
        return None

    def _is_of_here(self, authority: str) -> bool:
        """Whether a Host header names this machine, or what the server was told to listen at."""
        try:
            name = urlsplit(f"//{authority}").hostname or ""
        except ValueError:
            return False
        return name == self.host or _says_loopback(name)


class _Answer:
    """Sends an answer, and adds what all have."""

    def __init__(self, send: Send) -> None:
        self.send, self.status = send, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=list(message["headers"]))
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
            message = {**message, "headers": headers.raw}
        await self.send(message)


def _says_loopback(host: str) -> bool:
    """Whether a name or address, without a port, means this machine alone by its very words.

    Nobody is asked what a name stands for, as `door.is_loopback` does: whoever rules a name could point it here.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in _NAMES


def _authority(origin: str) -> str:
    """Host and port of an origin; a port that goes without saying is left out, as Host headers do."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
