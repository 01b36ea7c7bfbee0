"""What Prometheus reads at /metrics: how much waits and runs, how long things took, what failed, what the disk holds.

Every name begins with frameloom_, but for those of the process. Nothing in it names a client, a prompt or a job.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from frameloom.serve.jobs.job import Job
from frameloom.types import Stage

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_ANSWER_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 30, 120)
_WORK_S: Final = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1_800, 3_600, 7_200, 21_600)
_STEP_S: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)

# What `Service.numbers` tells, by its name there: the name of the gauge, and what it says.
_GAUGES: Final = {
    "queued": ("frameloom_queued_jobs", "Jobs that wait."),
    "queued_s": ("frameloom_queued_seconds", "Seconds of work foreseen for the jobs that wait."),
    "running": ("frameloom_running_jobs", "Jobs that are made now."),
    "workers": ("frameloom_workers", "Workers that the server was asked to have."),
    "workers_ready": ("frameloom_workers_ready", "Workers that have an engine."),
    "data_bytes": ("frameloom_data_bytes", "Bytes in the data folder."),
    "free_bytes": ("frameloom_free_bytes", "Bytes free on the disk of the data folder."),
    "watchers": ("frameloom_watchers", "Clients that watch a job's events."),
}


class Metrics:
    """Counts what happens in one server; a `service.Witness` of its jobs."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._stepped: dict[str, tuple[int, float]] = {}
        registry = self._registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._accepted = Counter("frameloom_jobs_accepted", "Jobs accepted, by kind.", ["kind"], registry=registry)
        self._refused = Counter("frameloom_jobs_refused", "Jobs not accepted, by code.", ["code"], registry=registry)
        self._completed = Counter("frameloom_jobs_completed", "Jobs completed.", registry=registry)
        self._failed = Counter("frameloom_jobs_failed", "Jobs failed, by code.", ["code"], registry=registry)
        self._attempts = Counter("frameloom_attempts", "Attempts begun.", registry=registry)
        self._lost = Counter("frameloom_attempts_lost", "Attempts in vain, by reason.", ["reason"], registry=registry)
        self._batches = Counter("frameloom_batches", "Batches of small jobs begun.", registry=registry)
        self._together = Counter("frameloom_jobs_together", "Attempts begun in a batch.", registry=registry)
        self._wait_s = _seconds("frameloom_job_wait_seconds", "From acceptance to the start.", _WORK_S, registry)
        self._run_s = _seconds("frameloom_job_run_seconds", "From the last start to completion.", _WORK_S, registry)
        self._step_s = _seconds("frameloom_step_seconds", "One denoising step.", _STEP_S, registry)
        self._requests = Counter(
            "frameloom_http_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self._answer_s = Histogram(
            "frameloom_http_request_seconds", "To the end of an answer; without event streams.", ["method", "route"],
            buckets=_ANSWER_S, registry=registry,
        )  # fmt: skip

    def answered(self, method: str, route: str, status: int, seconds: float, *, is_stream: bool = False) -> None:
        """A request was answered. `route`: its template; `is_stream`: it lasted as long as its job."""
        self._requests.labels(method, route, str(status)).inc()
        if not is_stream:
            self._answer_s.labels(method, route).observe(seconds)

    def accepted(self, job: Job) -> None:
        """A new job was kept."""
        self._accepted.labels(job.ask.kind).inc()

    def refused(self, code: str) -> None:
        """A job was not accepted."""
        self._refused.labels(code).inc()

    def started(self, job: Job, *, is_first: bool) -> None:
        """An attempt has begun; the wait is that before the first."""
        self._attempts.inc()
        if is_first and job.started_at is not None:
            self._wait_s.observe(max(0.0, job.started_at - job.created_at))

    def together(self, jobs: Sequence[Job]) -> None:
        """Attempts of these have begun as one batch."""
        self._batches.inc()
        self._together.inc(len(jobs))

    def advanced(self, job: Job, stage: Stage, step: int) -> None:
        """A running job is so far; the time of a step is that between two of them."""
        if stage != "denoise":
            self._stepped.pop(job.id, None)
            return
        now = time.monotonic()
        before, since = self._stepped.get(job.id, (step, now))
        if step > before:
            self._step_s.observe((now - since) / (step - before))
        self._stepped[job.id] = step, now

    def lost(self, job: Job, reason: str) -> None:
        """An attempt came to nothing."""
        self._stepped.pop(job.id, None)
        self._lost.labels(reason).inc()

    def ended(self, job: Job) -> None:
        """A job is completed or failed."""
        self._stepped.pop(job.id, None)
        if job.error is not None:
            self._failed.labels(job.error.code).inc()
            return
        self._completed.inc()
        if job.started_at is not None and job.completed_at is not None:
            self._run_s.observe(max(0.0, job.completed_at - job.started_at))

    def page(self, numbers: Mapping[str, float]) -> bytes:
        """All of it as text of the type CONTENT_TYPE. `numbers`: what `Service.numbers` says now."""
        gauges = CollectorRegistry()
        gauges.register(_Gauges(numbers))
        return generate_latest(gauges) + generate_latest(self._registry)


class _Gauges(Collector):
    """What stands now, read when it is asked for."""

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Every number that is known."""
        for name, (metric, says) in _GAUGES.items():
            if name in self._numbers:
                yield GaugeMetricFamily(metric, says, value=self._numbers[name])


def _seconds(name: str, says: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(name, f"Seconds. {says}", buckets=buckets, registry=registry)
