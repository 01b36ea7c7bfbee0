"""What is known of the model before a worker has said it in this run: its card, and how fast it was."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from frameloom.serve.config import ServeConfig
from frameloom.serve.jobs.job import Job, JobStore
from frameloom.serve.jobs.pace import Pace
from frameloom.serve.jobs.speed import Speed, alike_of, units_of
from frameloom.serve.workers.worker import Worker
from frameloom.wire import Card


class Known:
    """The card and the speed of the model that a server was told to use; kept in its store, each model's apart.

    `pace`: how long small videos take alone and together.
    """

    def __init__(self, config: ServeConfig) -> None:
        asked = (config.model, config.variant, sorted(config.parts.items()), config.engine, config.gpus_per_worker)
        self._name = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
        self._speed = Speed()
        self._usual_s: float | None = None
        self.card: Card | None = None
        self.pace = Pace()

    def read(self, store: JobStore) -> None:
        """Take up what was kept. Raises StoreError."""
        self._speed = Speed(store.noted(f"speed {self._name}"))
        self.pace = Pace(store.noted(f"pace {self._name}"))
        kept = store.noted(f"card {self._name}")
        try:
            self.card = msgspec.json.decode(kept, type=Card) if kept else None
        except msgspec.DecodeError:
            self.card = None  # of another version: a worker says it anew

    def write(self, store: JobStore) -> None:
        """Keep what is known. Raises StoreError."""
        store.note(f"speed {self._name}", self._speed.text)
        store.note(f"pace {self._name}", self.pace.text)
        if self.card is not None:
            store.note(f"card {self._name}", msgspec.json.encode(self.card).decode())

    def meet(self, worker: Worker) -> bool:
        """Hear what a worker says of the model; whether it is news."""
        self._usual_s = worker.usual_seconds or self._usual_s
        is_news = worker.card is not None and worker.card != self.card
        self.card = worker.card or self.card
        return is_news

    def learn(self, job: Job, seconds: float) -> None:
        """A job was made from its start to its end in one go."""
        if "extends" not in job.ask.request:  # whose frames are not all made
            self._speed.learn(units_of({**job.ask.request, **job.ask.resolved}, self.card), seconds)
        if alike := alike_of(job, self.card):
            self.pace.learn(alike[0], 1, seconds)

    def learn_together(self, job: Job, number: int, seconds: float | None) -> None:
        """So many jobs like this one were made together, in so many seconds; None: it came to nothing."""
        if alike := alike_of(job, self.card):
            self.pace.learn(alike[0], number, seconds)

    def work_s(self, request: Mapping[str, Any]) -> float:
        """The seconds that a request takes; 0 where nothing is known."""
        return self._speed.seconds(units_of(request, self.card), self.card, self._usual_s)
