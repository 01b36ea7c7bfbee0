"""A small model hub on loopback for tests: lists repositories, serves their files, and does wrong what a test asks for.

As the real one does, it keeps large files on another host: `resolve` redirects there, and says their size and hash.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".pth", ".bin", ".model")
_PIECE = 1 << 20


@dataclass(kw_only=True)
class Repository:
    """Files per revision; a revision's commit is the hash of what it holds."""

    revisions: dict[str, Mapping[str, bytes]]
    refusal: tuple[int, dict[str, str]] | None = None  # a status and headers, for whatever is asked
    answer: bytes | None = None  # instead of its listing
    token: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)  # of files whose size is told wrong
    hang_s: float = 0.0  # before its listing is answered

    def commit(self, revision: str) -> str:
        told = "".join(f"{path} {hash_of(data)}\n" for path, data in sorted(self.revisions[revision].items()))
        return hashlib.sha1(told.encode()).hexdigest()

    def revision(self, asked: str) -> str | None:
        """The revision that a name or a commit means."""
        return next((name for name in self.revisions if asked in (name, self.commit(name))), None)


@dataclass(kw_only=True)
class Hub:
    """What the server has and what it has seen. `cut_at`: the next `cuts` files so long are cut off there."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    cut_at: int | None = None
    cuts: int = 1
    stall_s: float = 0.0  # a cut file ends so long after its last byte
    pause_s: float = 0.0  # after every piece of a file
    damaged: set[str] = field(default_factory=set)  # hashes of files that arrive changed
    surplus: bytes = b""  # comes after every file
    refused: dict[str, int] = field(default_factory=dict)  # statuses of files that are listed, by their hashes
    address: str = ""
    leaked: bool = False  # a token was told to the host that large files come from
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    served: dict[str, int] = field(default_factory=dict)  # bytes of bodies per path

    def add(self, name: str, files: Mapping[str, bytes], **facts: object) -> Repository:
        """A repository with one revision."""
        self.repositories[name] = Repository(revisions={"main": files}, **facts)
        return self.repositories[name]

    def fetched(self) -> set[str]:
        """The paths inside their repositories of the files whose bodies were asked for."""
        return {path.split("/", 5)[5] for method, path, _ in self.asked if "/resolve/" in path and method == "GET"}

    def large_ranges(self) -> list[str | None]:
        """The ranges asked for of large files, None for a whole one."""
        return [asked for method, path, asked in self.asked if path.startswith("/large/") and method == "GET"]

    def large_bytes(self) -> int:
        """Bytes of large files that were sent."""
        return sum(count for path, count in self.served.items() if path.startswith("/large/"))


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub without repositories, on a free port of the loopback."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        asked = urlsplit(self.path).path
        path = unquote(asked)
        if path != "/api/agent-harnesses":  # which the library asks for itself, at times
            self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/large/"):
            return self._send_large(path)
        match = re.fullmatch(r"(/api/models)?/([^/]+/[^/]+)/(revision|resolve|tree)/([^/]+)(?:/(.+))?", asked)
        repository = self.hub.repositories.get(match[2]) if match else None
        if match is None or repository is None:
            return self._refuse(404, {"X-Error-Code": "RepoNotFound"} if match else {})
        if refusal := repository.refusal or self._unauthorized(repository):
            return self._refuse(*refusal)
        revision = repository.revision(unquote(match[4]))
        if revision is None:
            return self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        if match[3] == "tree":
            return self._list_tree(repository.revisions[revision])
        return self._list(match[2], revision) if match[1] else self._resolve(repository, revision, unquote(match[5]))

    do_HEAD = do_GET

    def _unauthorized(self, repository: Repository) -> tuple[int, dict[str, str]] | None:
        given = self.headers.get("Authorization")
        if repository.token is None or given == f"Bearer {repository.token}":
            return None
        if given is None:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
        return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}

    def _list(self, name: str, revision: str) -> None:
        repository = self.hub.repositories[name]
        time.sleep(repository.hang_s)
        if repository.answer is not None:
            return self._send(200, repository.answer)
        siblings = []
        for path, data in repository.revisions[revision].items():
            facts = {"rfilename": path, "size": repository.sizes.get(path, len(data)), "blobId": git_hash_of(data)}
            if path.endswith(LARGE):
                facts["lfs"] = {"sha256": hash_of(data), "size": facts["size"], "pointerSize": 135}
            siblings.append(facts)
        told = {"id": name, "sha": repository.commit(revision), "siblings": siblings}
        return self._send(200, json.dumps(told).encode())

    def _list_tree(self, files: Mapping[str, bytes]) -> None:
        """The other listing, which the hub library asks for when it fetches by itself."""
        told = []
        for path, data in files.items():
            facts = {"type": "file", "path": path, "size": len(data), "oid": git_hash_of(data)}
            if path.endswith(LARGE):
                facts["lfs"] = {"oid": hash_of(data), "size": len(data), "pointerSize": 135}
            told.append(facts)
        self._send(200, json.dumps(told).encode())

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        data = repository.revisions[revision].get(path)
        headers = {"X-Repo-Commit": repository.commit(revision)}
        if data is None:
            return self._refuse(404, {"X-Error-Code": "EntryNotFound", **headers})
        if not path.endswith(LARGE):
            changed = git_hash_of(data) in self.hub.damaged
            return self._send(200, data[::-1] if changed else data, {"ETag": f'"{git_hash_of(data)}"', **headers})
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{hash_of(data)}"'}
        elsewhere = self.hub.address.replace("127.0.0.1", "localhost")  # the library follows only what stays on a host
        return self._send(302, b"", {"Location": f"{elsewhere}/large/{hash_of(data)}", **linked, **headers})

    def _send_large(self, path: str) -> None:
        self.hub.leaked |= "Authorization" in self.headers
        data = next(
            data
            for repository in self.hub.repositories.values()
            for files in repository.revisions.values()
            for data in files.values()
            if hash_of(data) == path.removeprefix("/large/")
        )
        if hash_of(data) in self.hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        if status := self.hub.refused.get(hash_of(data)):
            return self._refuse(status, {})
        data += self.hub.surplus
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data)
        begin, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1) + 1
        return self._send(206, data[begin:end], {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})

    def _refuse(self, status: int, headers: Mapping[str, str]) -> None:
        self._send(status, b'{"error": "refused"}', headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "GET":
            return
        cut_at = self.hub.cut_at
        is_cut = cut_at is not None and len(body) > cut_at and self.hub.cuts > 0
        if is_cut:
            self.hub.cuts, body = self.hub.cuts - 1, body[:cut_at]
        path = urlsplit(self.path).path
        for begin in range(0, len(body), _PIECE):
            piece = body[begin : begin + _PIECE]
            self.wfile.write(piece)
            self.hub.served[path] = self.hub.served.get(path, 0) + len(piece)
            time.sleep(self.hub.pause_s)
        if is_cut:
            time.sleep(self.hub.stall_s)

    def log_message(self, *_: object) -> None:
        """Tests tell what they saw themselves."""


def git_hash_of(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
