"""A real server, `python -m frameloom serve`, as its users see it: a process, a port, and HTTP. Used by server_*.py."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "FRAMELOOM_SERVED_BY"
"""A variable in the environment of a server and of all that it starts, by which they are found."""
WORKER = b"frameloom.engine.worker"
LIVE_S = 60.0
"""How long a start may take, on a machine that does much else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer: its status, its headers in lower case, its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ask(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: float = 30,
) -> Reply:
    """One request on a connection of its own; a mapping goes as JSON. Raises OSError, http.client.HTTPException."""
    sent = dict(headers or {})
    if isinstance(body, Mapping):
        body, sent["Content-Type"] = json.dumps(body), "application/json"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        told = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(status=answer.status, headers=told, body=answer.read())
    finally:
        connection.close()


def form(fields: Mapping[str, object], files: Mapping[str, tuple[str, bytes]]) -> tuple[bytes, dict[str, str]]:
    """A multipart body and its header; `files`: name, content."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()
    ]
    for name, (file, content) in files.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{file}"\r\n'
        parts.append(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + content + b"\r\n")
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), {
        "Content-Type": f"multipart/form-data; boundary={boundary}"
    }


def marked(mark: str) -> list[int]:
    """The processes that a server of this mark has started, itself included; those that have ended are left out."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def rss_bytes(pid: int) -> int:
    """What a process holds in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(kw_only=True, slots=True)
class Served:
    """A server on a data folder; it may be struck and started again, on the same port.

    `log`: of all its starts, one after the other; beside the data by default.
    """

    data: Path
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path = Path()
    port: int = field(default_factory=free_port)
    mark: str = ""
    process: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        if self.log == Path():
            self.log = self.data.parent / f"{self.data.name}.log"

    @property
    def pid(self) -> int:
        """Of the HTTP process."""
        assert self.process is not None
        return self.process.pid

    def start(self, *, wait: bool = True) -> float:
        """Start it; the seconds until it answers."""
        self.mark, begun = uuid.uuid4().hex, time.monotonic()
        words = [sys.executable, "-m", "frameloom", "serve", "--port", str(self.port), "--data-dir", str(self.data)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, *self.options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment, MARK: self.mark},
                start_new_session=True,
            )
        if wait:
            self.wait_for("/health/live")
        return time.monotonic() - begun

    def wait_for(self, path: str, seconds: float = LIVE_S) -> None:
        """Until `path` is answered with 200. Raises TimeoutError, with the end of the log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process is not None and self.process.poll() is None:
            if self.answers(path):
                return
            time.sleep(0.02)
        raise TimeoutError(f"no answer of {path}: {self.log.read_text(errors='replace')[-2000:]}")

    def answers(self, path: str = "/health/live") -> bool:
        """Whether `path` is answered with 200 now."""
        try:
            return ask(self.port, "GET", path, timeout=5).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def workers(self) -> list[int]:
        """Processes that make videos."""
        found = []
        for pid in marked(self.mark):
            with contextlib.suppress(OSError):
                if WORKER in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def signal(self, number: int) -> None:
        """Send the HTTP process a signal, if it is there."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the HTTP process with SIGKILL, it alone."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self, seconds: float = 60.0) -> int:
        """End it with SIGTERM, and with SIGKILL where that takes too long; its exit code."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def orphans(self, mark: str, seconds: float = 10.0) -> list[int]:
        """What is still there of the start of a mark after so many seconds, its HTTP process aside."""
        end = time.monotonic() + seconds
        while (left := [pid for pid in marked(mark) if pid != self.process_id]) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    @property
    def process_id(self) -> int | None:
        """As `pid`; None before the first start."""
        return self.process.pid if self.process is not None else None

    def ask(self, method: str, path: str, body: Any = None, **more: Any) -> Reply:
        """As `ask`."""
        return ask(self.port, method, path, body, **more)

    def ended(self, job: str, *, seconds: float = 120.0, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A job when it has ended. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            told = self.ask("GET", f"/v1/videos/{job}", headers=headers).json()
            if told.get("status") in ("completed", "failed"):
                return dict(told)
            time.sleep(0.05)
        raise TimeoutError(f"{job} is {told}")


@contextlib.contextmanager
def served(data: Path, *options: str, **more: Any) -> Iterator[Served]:
    """A server that answers; it and all that it started are gone afterwards."""
    server = Served(data=data, options=options, **more)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.stop(20.0)
            for pid in marked(server.mark):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
