"""/metrics: a scripted scenario, read as Prometheus reads it, has the numbers of the scenario."""

import asyncio
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from frameloom.serve.jobs.job import Ask, Job, JobError
from frameloom.serve.logs import TALK
from frameloom.serve.metrics import Metrics
from frameloom.serve.observe import Observed

ASK = Ask(key="alice", kind="create", model="m", request={"prompt": "a secret plan"})


def samples(metrics, numbers=None):
    """Every sample of a page by its name and labels."""
    text = metrics.page(numbers or {}).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def job_of(number, **fields):
    return Job(id=f"video_{number}", ask=ASK, status="queued", created_at=100.0, **fields)


def test_jobs_are_counted_as_they_went():
    metrics = Metrics()
    good, bad, poison = job_of(1), job_of(2), replace(job_of(3), ask=replace(ASK, kind="remix"))
    for job in (good, bad, poison):
        metrics.accepted(job)
    metrics.refused("queue_full")
    metrics.refused("queue_full")

    good = replace(good, attempts=1, started_at=103.0)
    metrics.started(good, is_first=True)
    metrics.lost(good, "together")  # counts for none of its attempts
    metrics.started(good, is_first=False)
    metrics.ended(replace(good, status="completed", completed_at=133.0))
    metrics.started(replace(bad, attempts=1, started_at=100.5), is_first=True)
    metrics.ended(replace(bad, status="failed", error=JobError(code="cancelled", message="it was cancelled")))
    for attempt in (1, 2, 3):
        metrics.started(replace(poison, attempts=attempt, started_at=110.0), is_first=attempt == 1)
        metrics.lost(poison, "died")
    metrics.ended(replace(poison, status="failed", error=JobError(code="attempts_exhausted", message="three times")))

    found = samples(metrics)
    assert found["frameloom_jobs_accepted_total", ("kind", "create")] == 2
    assert found["frameloom_jobs_accepted_total", ("kind", "remix")] == 1
    assert found["frameloom_jobs_refused_total", ("code", "queue_full")] == 2
    assert found["frameloom_jobs_completed_total",] == 1
    assert found["frameloom_jobs_failed_total", ("code", "cancelled")] == 1
    assert found["frameloom_jobs_failed_total", ("code", "attempts_exhausted")] == 1
    assert found["frameloom_attempts_total",] == 6
    assert found["frameloom_attempts_lost_total", ("reason", "died")] == 3
    assert found["frameloom_job_wait_seconds_count",] == 3  # a second attempt has not waited anew
    assert found["frameloom_job_wait_seconds_sum",] == 3.0 + 0.5 + 10.0
    assert (found["frameloom_job_run_seconds_count",], found["frameloom_job_run_seconds_sum",]) == (1, 30.0)


def test_a_step_is_the_time_between_two_of_them(monkeypatch):
    metrics, job = Metrics(), job_of(1)
    clock = iter([10.0, 12.0, 18.0])
    monkeypatch.setattr("frameloom.serve.metrics.time.monotonic", lambda: next(clock))
    metrics.advanced(job, "text", 1)
    metrics.advanced(job, "denoise", 0)
    metrics.advanced(job, "denoise", 1)  # 2 s
    metrics.advanced(job, "denoise", 4)  # three in 6 s, of which two were left out: 2 s
    metrics.advanced(job, "decode", 1)
    found = samples(metrics)
    assert (found["frameloom_step_seconds_count",], found["frameloom_step_seconds_sum",]) == (2, 4.0)


def test_what_stands_now_and_the_process():
    numbers = {"queued": 3, "queued_s": 12.5, "running": 1, "workers": 2, "workers_ready": 1, "data_bytes": 7e9,
               "free_bytes": 9e9, "watchers": 4, "of_no_interest": 1}  # fmt: skip
    found = samples(Metrics(), numbers)
    assert found["frameloom_queued_jobs",] == 3
    assert found["frameloom_queued_seconds",] == 12.5
    assert found["frameloom_running_jobs",] == 1
    assert (found["frameloom_workers",], found["frameloom_workers_ready",]) == (2, 1)
    assert (found["frameloom_data_bytes",], found["frameloom_free_bytes",]) == (7e9, 9e9)
    assert found["frameloom_watchers",] == 4
    assert found["process_resident_memory_bytes",] > 1e6
    assert not any("interest" in key[0] for key in found)


def test_every_name_is_in_the_documentation():
    documented = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    numbers = dict.fromkeys(("queued", "queued_s", "running", "workers", "workers_ready", "watchers"), 1.0)
    page = Metrics().page(numbers | {"data_bytes": 1.0, "free_bytes": 1.0}).decode()
    names = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE frameloom_")}
    ours = {name for name in names if not name.endswith("_created")}
    assert len(ours) > 15
    assert sorted(name for name in ours if name not in documented) == []
    said = set(re.findall(r"`(frameloom_[a-z_]+)", documented))
    assert sorted(said - ours - {"frameloom_api_key"}) == []


def test_two_servers_in_a_process_count_for_themselves():
    one, other = Metrics(), Metrics()
    one.accepted(job_of(1))
    assert samples(one)["frameloom_jobs_accepted_total", ("kind", "create")] == 1
    assert ("frameloom_jobs_accepted_total", ("kind", "create")) not in samples(other)


def test_nothing_names_clients_prompts_or_jobs():
    metrics = Metrics()
    metrics.accepted(job_of(1))
    text = metrics.page({}).decode()
    for word in ("alice", "secret plan", "video_1"):
        assert word not in text


class Route:
    path = "/v1/videos/{video_id}"


async def application(scope, receive, send):
    if scope["path"] == "/boom":
        raise ValueError("it broke")
    if scope["path"].startswith("/v1/"):
        scope["route"] = Route()
    kind = b"text/event-stream" if scope["path"].endswith("events") else b"application/json"
    status = 404 if scope["path"] == "/nowhere" else 200
    TALK.get().key = "alice"
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": b"{}"})


def ask(app, method, path):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "http", "method": method, "path": path, "headers": []}, None, send))
    return dict(sent[0]["headers"])


def test_answers_are_counted_by_the_template_of_their_path(caplog):
    metrics = Metrics()
    app = Observed(application, metrics)
    with caplog.at_level(logging.INFO, "frameloom"):
        first, second = ask(app, "GET", "/v1/videos/video_1"), ask(app, "GET", "/v1/videos/video_2")
        ask(app, "GET", "/nowhere")
        ask(app, "BREW", "/nowhere")
        ask(app, "POST", "/v1/videos/video_1/events")
        with pytest.raises(ValueError, match="it broke"):
            ask(app, "GET", "/boom")
    assert first[b"x-request-id"] != second[b"x-request-id"]
    found = samples(metrics)

    def count(method, route, status):
        return found["frameloom_http_requests_total", ("method", method), ("route", route), ("status", status)]

    assert count("GET", Route.path, "200") == 2
    assert count("GET", "unknown", "404") == 1
    assert count("other", "unknown", "404") == 1
    assert count("GET", "unknown", "499") == 1
    assert count("POST", Route.path, "200") == 1
    assert found["frameloom_http_request_seconds_count", ("method", "GET"), ("route", Route.path)] == 2
    assert ("frameloom_http_request_seconds_count", ("method", "POST"), ("route", Route.path)) not in found
    said = [(record.method, record.path, record.status) for record in caplog.records]
    assert said == [  # what reads and succeeds is told at debug
        ("GET", "/nowhere", 404), ("other", "/nowhere", 404), ("POST", "/v1/videos/video_1/events", 200),
        ("GET", "/boom", 499),
    ]  # fmt: skip
