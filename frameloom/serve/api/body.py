"""Reads the body of a request as it streams in: no more bytes than are allowed, no slower than is bearable."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from frameloom.serve.api.errors import ApiError

Hold: TypeAlias = Callable[[int], None]
_GRACE_S: Final = 30.0
_LEAST_BYTES_PER_S: Final = 10_000
_LISTEN_S: Final = 10.0
_SILENT_S: Final = 1.0
_AT_ONCE: Final = 4
"""So many of the largest bodies are held at the same time; what is read of one may take several times as much."""
_OF_ONE: Final = 2
"""As much as so many of the largest bodies may come from the URLs of one request."""
_TURNS: Final = 2
_TURN_S: Final = 60.0


@dataclass(kw_only=True, slots=True)
class BodyReader:
    """Counts what all requests together hold in memory. `limit`: bytes of one body; `grace_s`: see `_chunks`."""

    limit: int
    grace_s: float = _GRACE_S
    held: int = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, accounted for until the block ends. Raises ApiError 408, 413 or 503."""
        received = 0
        chunks: list[bytes] = []
        declared = request.headers.get("content-length", "")
        self._check(int(declared) if declared.isdecimal() else 0)
        with self.holding() as hold:
            async for chunk in self._chunks(request.stream()):
                received += len(chunk)
                self._check(received)
                hold(len(chunk))
                chunks.append(chunk)
            yield _joined(chunks)

    @contextlib.contextmanager
    def holding(self) -> Iterator[Hold]:
        """Gives what is to be told of bytes that are held until the block ends; it raises ApiError 413 or 503."""
        taken = 0

        def hold(num_bytes: int) -> None:
            nonlocal taken
            if taken + num_bytes > self.limit * _OF_ONE:
                most = f"{self.limit * _OF_ONE / 2**20:g} MiB"
                raise ApiError(
                    413, "request_too_large", f"its URLs bring more than {most}; give fewer or smaller files"
                )
            if self.held + num_bytes > self.limit * _AT_ONCE:
                raise ApiError(503, "busy", "too many large requests at once; come again soon", retry_s=2)
            self.held += num_bytes
            taken += num_bytes

        try:
            yield hold
        finally:
            self.held -= taken

    async def _chunks(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """At least 10 kB a second, after some seconds of grace: a client that dawdles does not hold a place."""
        clock = asyncio.get_running_loop().time
        began, received = clock(), 0
        while True:
            left = began + self.grace_s + received / _LEAST_BYTES_PER_S - clock()
            try:
                async with asyncio.timeout(max(left, 0.001)):
                    chunk = await anext(stream, None)
            except TimeoutError:
                raise _closing(408, "request_timeout", "the request came too slowly; send it again, faster") from None
            if chunk is None:
                return
            received += len(chunk)
            yield chunk

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self.limit:
            raise _TooLargeError(self.limit)


class Turns:
    """So few requests at a time have what they gave as pictures and videos, read and made from it, in memory."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_TURNS)

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A turn until the block ends. Raises ApiError 503 where none comes in a minute."""
        try:
            async with asyncio.timeout(_TURN_S):
                await self._free.acquire()
        except TimeoutError:
            message = "too many requests with pictures or videos at once; come again soon"
            raise ApiError(503, "busy", message, retry_s=10) from None
        try:
            yield
        finally:
            self._free.release()


def _joined(chunks: list[bytes]) -> bytes:
    """One body; its pieces are let go of."""
    body = b"".join(chunks)
    chunks.clear()
    return body


def _closing(status: int, code: str, message: str) -> ApiError:
    return ApiError(status, code, message, headers={"connection": "close"})


class _TooLargeError(ApiError):
    """A body has more bytes than `limit`, or says so of itself."""

    def __init__(self, limit: int) -> None:
        most = f"{limit / 2**20:g} MiB"
        message = f"the request is larger than {most}; send smaller or shorter files"
        super().__init__(413, "request_too_large", message, headers={"connection": "close"})
        self._most_bytes = 16 * limit

    def answer(self) -> Response:
        """The same as HTTP has it, whole at once; then what still comes is listened to for a while."""
        return _Listening(super().answer(), self._most_bytes)


class _Listening(Response):
    """An answer after which the connection is held open while a client goes on sending.

    One that is still sending when it is closed may lose the answer that it has received. Listened to are `most_bytes`
    at the most, until nothing comes any more.
    """

    def __init__(self, answer: Response, most_bytes: int) -> None:
        super().__init__(answer.body, answer.status_code, dict(answer.headers))
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LISTEN_S):
                await self._listen(receive)
        await send({"type": "http.response.body", "body": b""})

    async def _listen(self, receive: Receive) -> None:
        received, is_more = 0, True
        while is_more and received <= self._most_bytes:
            async with asyncio.timeout(_SILENT_S):
                message = await receive()
            received += len(message.get("body", b""))
            is_more = message.get("more_body", False)
