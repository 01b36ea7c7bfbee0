"""Bytes on a socket, where a request is expected."""

import contextlib
import http.client
import json
import random
import socket
from collections.abc import Callable
from typing import Any

from served import Reply

RAW = (
    "half a body", "more than announced", "no form", "wild form", "wild JSON", "deep JSON", "wild path", "wild header",
    "huge header", "wild type", "no length", "chunks cut off", "bad chunks", "bytes", "wild query",
    "wild key", "pipelined",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**400, -0.0, 1e308, "", "NaN", "1e400", "-Infinity", "\x00", "ü" * 500, [], [[]],
    {}, {"": 1}, "../../etc/passwd", "%2e%2e", "9" * 5000, "64x64", "0x0", "99999999999x1",
    "data:image/png;base64,AAAA", "file:///etc/passwd", "http://127.0.0.1:1/x", "＋１", "1_000",
    " 5 ", {"image_url": 5}, {"id": "../x"},
    [{"name": []}],
)  # fmt: skip
_FIELDS = (
    "prompt", "size", "seconds", "model", "width", "height", "num_frames", "steps", "seed", "guidance_scale", "fps",
    "negative_prompt", "input_reference", "video", "loras", "loras[][name]", "loras[][scale]", "quality", "priority",
    "deadline", "strength", "input_reference[image_url]", "sigmas[]", "references", "windows",
    "a[b][c][]", "[]", "]", "__proto__",
)  # fmt: skip
FORM = "multipart/form-data; boundary=abc"
WILD_TYPE = "a/b; c=" + "d" * 999
_PATHS = ("/v1/videos", "/v1/videos/edits", "/v1/videos/extensions", "/v1/videos/x/remix", "/v1/videos/x/cancel")


class Raw:
    """Sends what is no proper request, and hands back what is answered, if anything is."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.rng = port, random.Random(seed)
        self._makers: dict[str, Callable[[], bytes]] = {
            "half a body": lambda: self._post(b'{"prompt": "x"', length=5000, kind="application/json"),
            "more than announced": lambda: self._post(b'{"prompt": "x"}' * 50, length=15, kind="application/json"),
            "no form": lambda: self._post(self._noise(300), kind=FORM),
            "wild form": self._wild_form,
            "wild JSON": lambda: self._post(json.dumps(self._wild_fields()).encode(), kind="application/json"),
            "deep JSON": lambda: self._post(b"[" * self.rng.randint(1, 100_000), kind="application/json"),
            "wild path": lambda: b"GET /" + self._noise(40, plain=True) + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            "wild header": lambda: b"GET /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + self._noise(60) + b"\r\n\r\n",
            "huge header": lambda: self._get("/v1/videos", f"X: {'y' * self.rng.randint(1_000, 200_000)}"),
            "wild type": lambda: self._post(b"x=1", kind=self.rng.choice(("", "text/plain", FORM, WILD_TYPE))),
            "no length": lambda: b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: a/b\r\n\r\n{}",
            "chunks cut off": lambda: self._chunked(b"ff\r\nabc"),
            "bad chunks": lambda: self._chunked(b"zz\r\n" + self._noise(50)),
            "bytes": lambda: self._noise(self.rng.randint(1, 3000)),
            "wild query": lambda: self._get(f"/v1/videos?after={self._word()}&limit={self._word()}&order=asc"),
            "wild key": lambda: self._get("/v1/videos", f"Authorization: {self._word()}", f"Range: {self._word()}"),
            "pipelined": lambda: self._get("/health/live") * self.rng.randint(2, 60),
        }  # fmt: skip

    def send(self, what: str) -> Reply | None:
        """One of RAW."""
        return self._exchange(self._makers[what]())

    def upload(self, num_bytes: int, watch: Callable[[], int]) -> dict[str, Any]:
        """A chunked form that goes on: the bytes taken, the status of the answer, and the most that `watch` said."""
        head = b'--abc\r\nContent-Disposition: form-data; name="input_reference"; filename="x"\r\n\r\n'
        told: dict[str, Any] = {"taken_bytes": 0, "status": None, "peak": watch()}
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as one:
            one.sendall(self._chunked(b"%x\r\n%b\r\n" % (len(head), head), kind=FORM))
            chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
            with contextlib.suppress(OSError):
                while told["taken_bytes"] < num_bytes:
                    one.sendall(chunk)
                    told["taken_bytes"] += 0x100000
                    told["peak"] = max(told["peak"], watch())
            answer = _read(one)
            told["status"] = answer.status if answer else None
        return told

    def _exchange(self, data: bytes) -> Reply | None:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=20) as one:
                with contextlib.suppress(OSError):  # the server may have heard enough
                    one.sendall(data)
                    one.shutdown(socket.SHUT_WR)
                return _read(one)
        except OSError:
            return None

    def _post(self, body: bytes, *, kind: str, length: int | None = None) -> bytes:
        path = self.rng.choice(_PATHS)
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
        return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body

    def _get(self, path: str, *headers: str) -> bytes:
        lines = "".join(f"{line}\r\n" for line in headers)
        return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n".encode("utf-8", "surrogatepass")

    def _chunked(self, body: bytes, kind: str = "application/json") -> bytes:
        head = f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
        return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + body

    def _wild_fields(self) -> dict[str, Any]:
        names = self.rng.sample(_FIELDS, self.rng.randint(0, 6))
        return {"prompt": "a red circle rising"} | {name: self.rng.choice(_VALUES) for name in names}

    def _wild_form(self) -> bytes:
        parts = []
        for name, value in self._wild_fields().items():
            file = self.rng.choice(("", "", '; filename="a"', '; filename="../../x"', "; filename"))
            head = f'--abc\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
            parts.append(head.encode() + str(value).encode() + b"\r\n")
        return self._post(
            b"".join([*parts, self.rng.choice((b"--abc--\r\n", b"", b"--ab"))]),
            kind=FORM,
        )

    def _word(self) -> str:
        kinds: tuple[Callable[[], str], ...] = (
            lambda: str(self.rng.choice(_VALUES)),
            lambda: self._noise(20, plain=True).decode(),
            lambda: "x" * self.rng.randint(0, 2000),
        )
        return self.rng.choice(kinds)().replace("\r", "").replace("\n", "").replace(" ", "")

    def _noise(self, length: int, *, plain: bool = False) -> bytes:
        return bytes(self.rng.choices(range(33, 127) if plain else range(256), k=length))


def _read(one: socket.socket) -> Reply | None:
    answer = http.client.HTTPResponse(one)
    try:
        answer.begin()
        told = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(status=answer.status, headers=told, body=answer.read())
    except (OSError, http.client.HTTPException):
        return None
