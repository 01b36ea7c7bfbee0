"""How a video stands, told as it changes."""

import contextlib
import json
import socket
import time

import httpx2 as httpx
import pytest
from memory_service import MemoryService, served

from frameloom.serve.api import events
from frameloom.serve.config import ServeConfig


@pytest.fixture
def site(tmp_path):
    service = MemoryService(tmp_path)
    with served(service, ServeConfig(data=tmp_path)) as (url, app), httpx.Client(base_url=url, timeout=30) as client:
        yield client, service, app


def parts(answer):
    held = ""
    for text in answer.iter_text():
        held += text
        while "\n\n" in held:
            part, held = held.split("\n\n", 1)
            yield dict(line.split(": ", 1) for line in part.split("\n") if not line.startswith(":")) or {
                "comment": part
            }


def told(answer):
    return (part for part in parts(answer) if "data" in part)


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_every_change_is_told_until_the_end(site):
    client, service, _ = site
    job_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    with client.stream("GET", f"/v1/videos/{job_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        news = told(answer)
        first = next(news)
        assert (first["event"], json.loads(first["data"])["status"]) == ("video", "queued")
        service.set(job_id, status="in_progress", stage="denoise", step=3, total=8, progress=30, preview=1, fence=1)
        second = json.loads(next(news)["data"])
        assert (second["stage"], second["step"], second["total"], second["preview_version"]) == ("denoise", 3, 8, 1)
        service.complete(job_id, b"video")
        last = next(news)
        assert (last["id"], json.loads(last["data"])["status"]) == ("end", "completed")
        assert list(news) == []
    with client.stream("GET", f"/v1/videos/{job_id}/events") as answer:
        assert [part["id"] for part in told(answer)] == ["end"]
    assert client.get(f"/v1/videos/{job_id}/events", headers={"last-event-id": "end"}).status_code == 204


def test_signs_of_life_come_while_nothing_changes_and_who_leaves_is_forgotten(site, monkeypatch):
    client, service, app = site
    monkeypatch.setattr(events, "BEAT_S", 0.05)
    job_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    with client.stream("GET", f"/v1/videos/{job_id}/events") as answer:
        seen = parts(answer)
        until(lambda: "comment" in next(seen))
        assert app.state.site.streams == 1
        service.set(job_id, status="in_progress", step=1, fence=1)
        until(lambda: "in_progress" in next(seen).get("data", ""))  # and nothing was lost by waiting
    until(lambda: app.state.site.streams == 0)


def test_streams_end_when_the_job_is_gone_or_the_server_closes(site):
    client, _, app = site
    job_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    with client.stream("GET", f"/v1/videos/{job_id}/events") as answer:
        news = told(answer)
        next(news)
        client.delete(f"/v1/videos/{job_id}")
        assert list(news) == []
    assert client.get(f"/v1/videos/{job_id}/events").status_code == 404
    job_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    with client.stream("GET", f"/v1/videos/{job_id}/events") as answer:
        news = told(answer)
        next(news)
        app.state.loop.call_soon_threadsafe(app.state.site.closing.set)
        assert list(news) == []


def test_there_are_only_so_many_streams(site, monkeypatch):
    client, _, _ = site
    monkeypatch.setattr(events, "MAX_STREAMS", 0)
    job_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    answer = client.get(f"/v1/videos/{job_id}/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_streams")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_burst_finds_no_gap_between_the_check_and_the_count(site, monkeypatch):
    client, _, app = site
    monkeypatch.setattr(events, "MAX_STREAMS", 5)
    path = f"/v1/videos/{client.post('/v1/videos', json={'prompt': 'x'}).json()['id']}/events"
    address = (client.base_url.host, client.base_url.port)
    asked = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address)) for _ in range(40)]
        for connection in connections:
            connection.sendall(asked)
        statuses = [connection.recv(12)[-3:] for connection in connections]
        assert (statuses.count(b"200"), statuses.count(b"503")) == (5, 35)
        assert app.state.site.streams == 5
    until(lambda: app.state.site.streams == 0)
    with client.stream("GET", path) as answer:
        assert answer.status_code == 200


def test_head_of_events_ends_at_once(site):
    client, _, app = site
    job_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    answer = client.head(f"/v1/videos/{job_id}/events")
    assert (answer.status_code, answer.headers["content-type"][:17]) == (200, "text/event-stream")
    assert "content-length" not in answer.headers
    assert app.state.site.streams == 0
