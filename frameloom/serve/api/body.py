"""Reads the body of a request as it streams in: no more bytes than are allowed, no slower than is bearable."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

from frameloom.serve.api.errors import ApiError

_GRACE_S: Final = 30.0
_LEAST_BYTES_PER_S: Final = 10_000
_AT_ONCE: Final = 8
"""So many of the largest bodies are held at the same time."""


@dataclass(kw_only=True, slots=True)
class BodyReader:
    """Counts what all requests together hold in memory. `limit`: bytes of one body; `grace_s`: see `_check_pace`."""

    limit: int
    grace_s: float = _GRACE_S
    held: int = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, accounted for until the block ends. Raises ApiError 408, 413 or 503."""
        taken = 0
        chunks: list[bytes] = []
        try:
            stream = request.stream()
            async for chunk in self._chunks(stream):
                if taken + len(chunk) > self.limit:
                    chunks.clear()
                    await self._refuse(stream)
                if self.held + len(chunk) > self.limit * _AT_ONCE:
                    raise ApiError(503, "busy", "too many large requests at once; come again soon", retry_s=2)
                self.held += len(chunk)
                taken += len(chunk)
                chunks.append(chunk)
            yield _joined(chunks)
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

    async def _refuse(self, stream: AsyncIterator[bytes]) -> None:
        """Clients that are still sending hear an answer only if they are listened to; so for some time they are."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.grace_s / 3):
                received = 0
                async for chunk in stream:
                    received += len(chunk)
                    if received > 16 * self.limit:
                        break
        most = f"{self.limit / 2**20:g} MiB"
        raise _closing(413, "request_too_large", f"the request is larger than {most}; send smaller or shorter files")


def _joined(chunks: list[bytes]) -> bytes:
    """One body; its pieces are let go of."""
    body = b"".join(chunks)
    chunks.clear()
    return body


def _closing(status: int, code: str, message: str) -> ApiError:
    return ApiError(status, code, message, headers={"connection": "close"})
