"""A client: creates, polls, fetches, cancels, deletes, remixes, and writes what it is told into the ledger."""

import http.client
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from served import Reply, ask

from chaos.asks import ASKS, Ask
from chaos.ledger import Entry, Ledger, headers_of

MOST_OPEN = 8  # jobs of a client's key that have not ended, before it creates more
REFUSALS = (429, 503)


class LostError(Exception):
    """No answer came."""


class Client(threading.Thread):
    """One user of a key."""

    def __init__(self, port: int, ledger: Ledger, key: str, *, seed: int) -> None:
        super().__init__(daemon=True)
        self.port, self.ledger, self.key = port, ledger, key
        self.rng = random.Random(seed)
        self._going, self._idle, self._over = threading.Event(), threading.Event(), False
        self._going.set()
        self.deeds: dict[Callable[[], None], int] = {
            self.create: 30, self.poll: 40, self.content: 15, self.cancel: 8, self.delete: 8, self.remix: 6,
            self.repeat: 6,
        }  # fmt: skip

    def run(self) -> None:
        """Until `end`."""
        while not self._over:
            if not self._going.is_set():
                self._idle.set()
                self._going.wait()
                continue
            (deed,) = self.rng.choices(list(self.deeds), list(self.deeds.values()))
            try:
                deed()
            except LostError:
                pass
            except Exception as error:  # an answer that nobody understands is one that should not have come
                self.ledger.wrong(f"{deed.__name__}: {type(error).__name__} {error}")
            time.sleep(self.rng.uniform(0.01, 0.2))

    def pause(self) -> None:
        """Returns when nothing is asked any more."""
        self._idle.clear()
        self._going.clear()
        if self.is_alive() and not self._idle.wait(300):
            self.ledger.wrong("a client waits for an answer for five minutes")

    def resume(self) -> None:
        """Go on."""
        self._going.set()

    def end(self) -> None:
        """For good."""
        self._over = True
        self._going.set()
        self.join(60)

    def send(self, method: str, path: str, body: Any = None, more: Mapping[str, str] | None = None) -> Reply:
        """One request. Raises LostError."""
        try:
            answer = ask(self.port, method, path, body, headers={**headers_of(self.key), **(more or {})}, timeout=60)
        except (OSError, http.client.HTTPException) as error:
            raise LostError(str(error)) from None
        if answer.status >= 500 and answer.status != 503:
            self.ledger.wrong(f"{method} {path} was answered {answer.status}: {answer.body[:300]!r}")
        if answer.status == 503 and method != "POST":
            raise LostError("the server ends")
        return answer

    def _one(self, status: str | None = None) -> Entry:
        """A job of this key. Raises LostError where there is none."""
        found = [entry for entry in self.ledger.alive(self.key) if status is None or entry.status == status]
        if not found:
            raise LostError
        return self.rng.choice(found)

    def create(self) -> None:
        """A new job, in one of its forms."""
        if self.ledger.open_jobs(self.key) < MOST_OPEN:
            chosen = self.rng.choice(ASKS)
            body, headers = chosen.body(as_form=self.rng.random() < 0.5)
            deadline = not chosen.edits and isinstance(body, dict) and self.rng.random() < 0.1
            if deadline:
                body = {**body, "deadline": round(self.rng.uniform(0.5, 5), 3)}
            self._create(chosen, chosen.path, body, headers, deadline=deadline)

    def remix(self) -> None:
        """A completed job with another prompt."""
        entry = self._one("completed")
        group = next(known.group for known in ASKS if known.name == entry.ask)
        chosen = self.rng.choice([known for known in ASKS if known.group == group])
        self._create(chosen, f"/v1/videos/{entry.id}/remix", {"prompt": chosen.prompt}, {}, source=entry)

    def _create(
        self, chosen: Ask, path: str, body: Any, headers: Mapping[str, str], *, deadline: bool = False,
        source: Entry | None = None,
    ) -> None:  # fmt: skip
        repeat = uuid.uuid4().hex if self.key == "careful" else ""
        sent = time.monotonic()
        answer = self._until_answered(path, body, {**headers, **({"Idempotency-Key": repeat} if repeat else {})})
        if answer.status == 200:
            told = answer.json()
            entry = Entry(id=told["id"], key=self.key, ask=chosen.name, sent=sent, deadline=deadline, repeat=repeat)
            self.ledger.created(told, entry)
        elif answer.status not in REFUSALS and not (answer.status == 404 and source and source.delete_sent):
            self.ledger.wrong(f"POST {path} was answered {answer.status}: {answer.body[:300]!r}")

    def _until_answered(self, path: str, body: Any, headers: Mapping[str, str]) -> Reply:
        """With an Idempotency-Key, a lost answer is asked for again. Raises LostError."""
        end = time.monotonic() + 240
        while True:
            try:
                answer = self.send("POST", path, body, headers)
                if answer.status != 503 or "Idempotency-Key" not in headers:
                    return answer
            except LostError:
                if "Idempotency-Key" not in headers:
                    self.ledger.lost()
                    raise
            if time.monotonic() > end:
                self.ledger.wrong(f"POST {path} is not answered for four minutes")
                raise LostError
            time.sleep(0.1)

    def repeat(self) -> None:
        """A create that was acknowledged, once more; such a job is not deleted."""
        entry = self._one()
        entry.pinned = True
        if entry.delete_sent:
            return
        chosen = next(known for known in ASKS if known.name == entry.ask)
        if not entry.repeat or entry.deadline or chosen.edits:
            return
        for as_form in (False, True):
            body, headers = chosen.body(as_form=as_form)
            answer = self.send("POST", chosen.path, body, {**headers, "Idempotency-Key": entry.repeat})
            if answer.status == 200 and answer.json()["id"] != entry.id:
                self.ledger.wrong(f"an Idempotency-Key gave {entry.id} and {answer.json()['id']}")
            elif answer.status not in (200, 409, *REFUSALS):
                self.ledger.wrong(f"a repeated create was answered {answer.status}")

    def poll(self) -> None:
        """How a job stands."""
        entry, sent = self._one(), time.monotonic()
        self.ledger.seen(entry, self.send("GET", f"/v1/videos/{entry.id}"), sent)

    def content(self) -> None:
        """The video of a job; a whole one of a completed job, or none."""
        entry, begun = self._one(), time.monotonic()
        answer = self.send("GET", f"/v1/videos/{entry.id}/content")
        sent = time.monotonic()
        if answer.status == 200:
            after = self.send("GET", f"/v1/videos/{entry.id}")
            if after.status == 200 and after.json()["status"] != "completed":
                self.ledger.wrong(f"{entry.id} has content and is {after.json()['status']}")
            self.ledger.seen(entry, after, sent)
            self.ledger.check_content(entry, answer)
        elif answer.status not in (400, 404, 410):
            self.ledger.wrong(f"content of {entry.id} was answered {answer.status}")
        elif entry.status == "completed" and entry.ended and not entry.delete_sent and begun > entry.ended:
            self.ledger.wrong(f"content of {entry.id}, completed, was answered {answer.status}: {answer.body[:200]!r}")

    def cancel(self) -> None:
        """End a job."""
        entry = self._one()
        entry.cancel_sent = time.monotonic()
        answer = self.send("POST", f"/v1/videos/{entry.id}/cancel")
        if answer.status == 200:
            told = answer.json()
            if told["status"] in ("queued", "in_progress"):
                entry.cancel_told = time.time()
        elif answer.status != 503 and not (answer.status == 404 and entry.delete_sent):
            self.ledger.wrong(f"cancel of {entry.id} was answered {answer.status}: {answer.body[:200]!r}")

    def delete(self) -> None:
        """Remove a job for good."""
        entry = self._one()
        if entry.pinned:
            return
        entry.delete_sent = True
        while True:
            try:
                answer = self.send("DELETE", f"/v1/videos/{entry.id}")
                break
            except LostError:
                time.sleep(0.1)
        if answer.status not in (200, 404):
            self.ledger.wrong(f"delete of {entry.id} was answered {answer.status}: {answer.body[:200]!r}")
            return
        after = self.send("GET", f"/v1/videos/{entry.id}")
        if after.status != 404:
            self.ledger.wrong(f"{entry.id} was deleted and is answered {after.status}")
