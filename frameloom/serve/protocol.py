"""HTTP on one connection: uvicorn's, with an end to the patience for requests that never come whole."""

import asyncio
import json
import secrets
from typing import Any, Final

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

HEAD_S: Final = 10.0
"""What a client is given to send the head of a request."""
HEAD_BYTES: Final = 64 * 1024
"""A longer head ends the connection."""
CONNECTIONS: Final = 2_000
"""More are told to come again."""
KEEP_ALIVE_S: Final = 75
TAKE_S: Final = 240.0
"""What a client is given to take what is kept of an answer that still goes on."""


class PatientProtocol(H11Protocol):
    """Closes a connection whose next request has begun and does not come, or whose answered one does not end.

    It has gone some time later even where its client does not take what is still to be sent. Says its own errors in the
    one shape.
    """

    def __init__(self, config: Config, **rest: Any) -> None:
        super().__init__(config, **rest)
        self._waiting: asyncio.TimerHandle | None = None
        self._patience = 0.0
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: its first request is awaited."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self.app = _overrun
        self._wait(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._wait_no_more()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """An answer goes on faster than its client takes it."""
        super().pause_writing()
        self._taking = self.loop.call_later(TAKE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken nearly all of what was kept."""
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()

    def handle_events(self) -> None:
        """Whatever of requests has come."""
        super().handle_events()
        is_answered = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._wait(HEAD_S)
        elif is_answered and self.timeout_keep_alive_task is None:  # bytes of a body that nobody reads have ended it
            self._wait(self.timeout_keep_alive)
        else:
            self._wait_no_more()

    def on_response_complete(self) -> None:
        """An answer is written, as far as the client takes it."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._wait(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """No other request has come."""
        super().timeout_keep_alive_handler()
        self._wait(self.timeout_keep_alive)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or a head that is too long, and close."""
        body = _error_body(f"{msg} A head is at most {HEAD_BYTES} bytes.", "invalid_request_error", "invalid_http")
        headers = _headers(body)
        head = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=STATUS_PHRASES[400])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait(self, seconds: float) -> None:
        """For what the client owes; the patience begins anew where that changes, not with whatever else it sends."""
        if self._waiting is None or seconds != self._patience:
            self._wait_no_more()
            self._patience = seconds
            self._waiting = self.loop.call_later(seconds, self._lose_patience)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _lose_patience(self) -> None:
        self._waiting = None
        if self.transport.is_closing():
            self.transport.abort()
        else:
            self.transport.close()
            self._wait(self.timeout_keep_alive)


async def _overrun(scope: Any, receive: Any, send: Any) -> None:
    """Answer that there are too many connections."""
    body = _error_body(f"{CONNECTIONS} connections are open; come again in a moment", "server_error", "overloaded")
    headers = [*_headers(body), (b"retry-after", b"5"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", f"req_{secrets.token_hex(12)}".encode()),
    ]


def _error_body(message: str, kind: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
