"""What clients were told by a server, and what it must therefore hold to, whatever strikes it."""

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
from served import Reply, Served

from chaos.asks import num_frames

KEYS = {"careful": "careful-0123456789abcdef", "hasty": "hasty-0123456789abcdef"}
"""Whose jobs they are. `careful` sends an Idempotency-Key with all that it creates and asks until it is answered."""
SETTLES_S = 420.0
CANCEL_S = 8.0  # after which an acknowledged cancel may not be followed by a completed video
ROOT = re.compile(r"jobs\.sqlite(-wal|-shm|-journal)?|lock|videos")
FILES = re.compile(r"video-\d+\.mp4|(thumbnail|sheet)-\d+\.jpg|preview\.png|inputs|inputs/[^/]+")


def headers_of(key: str) -> dict[str, str]:
    """Of a request of a key."""
    return {"Authorization": f"Bearer {KEYS[key]}"}


@dataclass(kw_only=True, slots=True)
class Entry:
    """A job that was acknowledged, and what became known of it. Times: of time.monotonic, when asked."""

    id: str
    key: str
    ask: str
    sent: float
    deadline: bool = False
    repeat: str = ""
    cancel_sent: float | None = None
    cancel_told: float | None = None  # acknowledged, as a job that had not ended
    delete_sent: bool = False
    pinned: bool = False  # clients do not delete it
    status: str = "queued"
    ended: float | None = None  # when an end was known
    etag: str = ""


@dataclass(kw_only=True, slots=True)
class Ledger:
    """All entries. `wanted`: sha256 by the name of a request. `broken`: promises, in words."""

    wanted: Mapping[str, str]
    entries: dict[str, Entry] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    unsure: int = 0  # hasty creates whose answer was lost
    tally: Counter[str] = field(default_factory=Counter)
    _strikes: list[float] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)

    def wrong(self, what: str) -> None:
        """A promise was broken."""
        with self._lock:
            self.broken.append(what)

    def struck(self, kind: str) -> None:
        """Something is struck from now on."""
        with self._lock:
            self._strikes.append(time.monotonic())

    def lost(self) -> None:
        """A hasty create was not answered: there may be a job that nobody knows of."""
        with self._lock:
            self.unsure += 1

    def created(self, told: Mapping[str, Any], entry: Entry) -> None:
        """A create was acknowledged, perhaps not for the first time."""
        with self._lock:
            known = self.entries.get(entry.id)
            if known is None:
                self.entries[entry.id] = entry
                self.tally["jobs"] += 1
            elif known.repeat != entry.repeat or not entry.repeat:
                self.broken.append(f"{entry.id} was given to two requests")
            if told["object"] != "video" or told["prompt"] == "":
                self.broken.append(f"{entry.id} was acknowledged as {told}")

    def open_jobs(self, key: str) -> int:
        """How many of a key have not ended, as far as is known."""
        with self._lock:
            return sum(entry.ended is None for entry in self.alive(key))

    def alive(self, key: str) -> list[Entry]:
        """Those that nobody has asked to delete."""
        with self._lock:
            return [entry for entry in self.entries.values() if entry.key == key and not entry.delete_sent]

    def seen(self, entry: Entry, answer: Reply, sent: float) -> None:
        """The answer of a retrieve that was sent then."""
        with self._lock:
            if answer.status == 404:
                if not entry.delete_sent:
                    self.broken.append(f"{entry.id} was acknowledged and is lost: {answer.body[:200]!r}")
                return
            if answer.status != 200:
                self.broken.append(f"retrieve of {entry.id} was answered {answer.status}: {answer.body[:200]!r}")
                return
            self.told(entry, answer.json(), sent)

    def told(self, entry: Entry, video: Mapping[str, Any], sent: float) -> None:
        """How a job stands, by a request that was sent then."""
        with self._lock:
            status = video["status"]
            if entry.ended is not None and sent > entry.ended and status != entry.status:
                self.broken.append(f"{entry.id} was {entry.status} and is {status}")
            if (status == "completed") != (video["progress"] == 100):
                self.broken.append(f"{entry.id} is {status} at {video['progress']} per cent")
            if entry.ended is not None or status not in ("completed", "failed"):
                return
            entry.status, entry.ended = status, time.monotonic()
            reason = video["error"]["code"] if status == "failed" else ""
            self.tally[reason or "completed"] += 1
            self._check_end(entry, status, reason, video)

    def _check_end(self, entry: Entry, status: str, reason: str, video: Mapping[str, Any]) -> None:
        strikes = sum(moment > entry.sent for moment in self._strikes)
        late = entry.cancel_told is not None and video.get("completed_at") is not None
        if status == "completed":
            if late and video["completed_at"] > entry.cancel_told + CANCEL_S:
                self.broken.append(f"{entry.id} was cancelled, and completed {CANCEL_S:.0f} s later or more")
        elif not {
            "cancelled": entry.cancel_sent is not None or entry.delete_sent,
            "attempts_exhausted": strikes >= 3,
            "deadline_exceeded": entry.deadline,
        }.get(reason, False):
            self.broken.append(f"{entry.id} ({entry.ask}) failed after {strikes} strikes: {video['error']}")

    def check_content(self, entry: Entry, answer: Reply) -> None:
        """The video of a completed job."""
        with self._lock:
            if answer.status != 200:
                self.broken.append(f"content of {entry.id}, completed, was answered {answer.status}")
                return
            etag = answer.headers.get("etag", "")
            if not etag or (entry.etag and entry.etag != etag):
                self.broken.append(f"the ETag of {entry.id} was {entry.etag} and is {etag}")
            entry.etag = etag
        if hashlib.sha256(answer.body).hexdigest() != self.wanted[entry.ask]:
            self.wrong(f"{entry.id} ({entry.ask}) has other bytes than the undisturbed video")
        try:
            num_frames(answer.body)
        except av.FFmpegError as error:
            self.wrong(f"{entry.id} ({entry.ask}) cannot be decoded: {error}")
        with self._lock:
            self.tally["videos checked"] += 1

    def settle(self, server: Served) -> None:
        """Wait until all jobs have ended, and compare the lists of jobs, and the videos, with what was acknowledged."""
        end = time.monotonic() + SETTLES_S
        for key in KEYS:
            while True:
                sent = time.monotonic()
                listed = self._listed(server, key)
                waiting = [video["id"] for video in listed if video["status"] not in ("completed", "failed")]
                if not waiting or self.broken:
                    break
                if time.monotonic() > end:
                    self.wrong(f"{len(waiting)} jobs do not end, as {waiting[0]}")
                    return
                time.sleep(0.2)
            self._compare(server, key, {video["id"]: video for video in listed}, sent)

    def _listed(self, server: Served, key: str) -> list[dict[str, Any]]:
        """All jobs of a key, by pages."""
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            answer = server.ask("GET", f"/v1/videos?limit=100&order=asc{after}", headers=headers_of(key))
            if answer.status != 200:
                self.wrong(f"the list was answered {answer.status}: {answer.body[:200]!r}")
                return found
            page = answer.json()
            found += page["data"]
            if not page["has_more"]:
                return found
            after = f"&after={page['last_id']}"

    def _compare(self, server: Served, key: str, listed: dict[str, dict[str, Any]], sent: float) -> None:
        headers = headers_of(key)
        for entry in self.alive(key):
            if entry.id not in listed:
                self.wrong(f"{entry.id} was acknowledged and is not listed")
                continue
            self.told(entry, listed[entry.id], sent)
            if entry.status == "completed":
                self.check_content(entry, server.ask("GET", f"/v1/videos/{entry.id}/content", headers=headers))
        extra = [name for name in listed if name not in self.entries]
        if key == "careful" and extra:
            self.wrong(
                f"{len(extra)} jobs that nobody was told of, as {extra[0]}, though all asked again until they were"
            )
        if len(extra) > self.unsure:
            self.wrong(f"{len(extra)} jobs that nobody was told of, and {self.unsure} answers were lost")
        self.unsure = 0 if key == "hasty" else self.unsure
        gone = extra + [name for name in listed if name in self.entries]
        for name in gone:  # else the lists grow for ever
            entry = self.entries.get(name)
            if entry is not None and self.tally["rests"] % 2 == 0:
                continue  # half of the rests keep what is there
            if entry is not None:
                entry.delete_sent = True
            answer = server.ask("DELETE", f"/v1/videos/{name}", headers=headers)
            if answer.status != 200:
                self.wrong(f"delete of {name} was answered {answer.status}")
        self.tally["rests"] += key == "hasty"

    def check_files(self, data: Path) -> None:
        """What lies in the data folder of a server that is at rest: what its jobs need, and nothing else."""
        names = [path.name for path in data.iterdir()]
        if strange := [name for name in names if not ROOT.fullmatch(name)]:
            self.wrong(f"left in the data folder: {strange}")
        known = {entry.id: entry for key in KEYS for entry in self.alive(key)}
        for folder in (data / "videos").iterdir():
            entry = known.get(folder.name)
            if entry is None:
                self.wrong(f"left without a job: {folder.name} with {[p.name for p in folder.iterdir()]}")
                continue
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
            if strange := [name for name in files if not FILES.fullmatch(name)]:
                self.wrong(f"left by {entry.id}, {entry.status}: {strange}")
            videos = sum(name.startswith("video-") for name in files)
            if videos != (entry.status == "completed"):
                self.wrong(f"{entry.id} is {entry.status} and has {files}")

    def summary(self) -> str:
        """One line for people."""
        return ", ".join(f"{count} {name}" for name, count in self.tally.items()) + f", broken {len(self.broken)}"

    def counts(self) -> dict[str, Any]:
        """For the record."""
        return dict(self.tally)
