"""Every error in one shape, with its status, its code, the parameter to blame and when to come again."""

import asyncio
import json
import re
import socket
import time

import httpx2 as httpx
import pytest
from memory_service import CARD, MemoryService, served

from frameloom.serve.api.body import BodyReader
from frameloom.serve.api.schemas import ErrorAnswer
from frameloom.serve.config import Limits, ServeConfig
from frameloom.serve.jobs.job import StoreError
from frameloom.serve.service import RefusedError

LIMITS = Limits(body_bytes=200_000, prompt_chars=50, steps=20, pixels_frames=640 * 480 * 81)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    service = MemoryService(folder)
    config = ServeConfig(data=folder, limits=LIMITS, loras={"ink": "/x", "pen": "/y:4"})
    with served(service, config) as (url, app), httpx.Client(base_url=url, timeout=30) as client:
        yield client, service, app


@pytest.fixture
def site(whole):
    client, service, app = whole
    service.refusal, service.card, service.is_ready, service.trouble = None, CARD, True, ""
    return client, service, app


def told(answer, status):
    """The error of an answer, which has the shape of all."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])
    error = ErrorAnswer.model_validate(answer.json()).error
    assert error.message
    assert "\n" not in error.message
    return error


def connected(client):
    return socket.create_connection((client.base_url.host, client.base_url.port))


def head(length):
    lines = (
        "POST /v1/videos HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return "\r\n".join((*lines, "", "")).encode()


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": " "}, "prompt", "empty"),
        ({"prompt": "x" * 51}, "prompt", "shorten"),
        ({"prompt": "x", "width": 100}, "width", "use 96 or 112"),
        ({"prompt": "x", "size": "100x64"}, "size", "use 96 or 112"),
        ({"prompt": "x", "size": "big"}, "size", "832x480"),
        ({"prompt": "x", "size": "96x64", "width": 96}, "size", "twice"),
        ({"prompt": "x", "seconds": "4", "num_frames": 9}, "seconds", "twice"),
        ({"prompt": "x", "num_frames": 10}, "num_frames", "use 9 or 13"),
        ({"prompt": "x", "steps": 21}, "steps", "more than the 20"),
        ({"prompt": "x", "steps": 1001}, "steps", "more than the 20"),
        ({"prompt": "x", "steps": 0}, "steps", "from 1 to 20"),
        ({"prompt": "x", "strength": 0.5}, "strength", "cannot be given here"),
        ({"prompt": "x", "control_strength": 0.5}, "control_strength", "leave control_strength out"),
        ({"prompt": "x", "guidance_scale_2": 2}, "guidance_scale_2", "has one"),
        ({"prompt": "x", "mask": "data:,"}, "mask", "takes no mask"),
        ({"id": "video_1"}, "id", "there are prompt, "),
        ({"prompt": "x", "size": "4096x4096"}, "size", "ask for less"),
        ({"prompt": "x", "seconds": "3600"}, "seconds", "frames 57601"),
        ({"prompt": "x", "loras": [{"name": "oil"}]}, "loras", "registered are: ink"),
        ({"prompt": "x", "loras": [{"name": "ink", "scale": 21}]}, "loras", "from -20 to 20"),
        ({"prompt": "x", "loras": [{"name": "pen", "scale": -6}]}, "loras", "more than 20; give a scale of up to 5"),
        ({"prompt": "x", "last_image": "data:,"}, "last_image", "takes no last_image"),
        ({"prompt": "x", "input_reference": "/etc/passwd"}, "input_reference", "no file and no URL"),
        ({"prompt": "x", "input_reference": {"image_url": "http://127.0.0.1/a"}}, "input_reference", "fetches no URLs"),
        ({"prompt": "x", "input_reference": {"file_id": "file-1"}}, "input_reference", "keeps no files"),
        ({"prompt": "x", "windows": False, "window_frames": 33}, "windows", "switched off"),
        ({"prompt": "x", "output_path": "/tmp/x"}, "output_path", "no parameter"),
        ({"prompt": "x", "control_strength": [1, "a"]}, "control_strength", "no number"),
    ],
)
def test_requests_that_cannot_be_made(site, body, param, says):
    client, service, _ = site
    before = len(service.jobs)
    error = told(client.post("/v1/videos", json=body), 400)
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert says in error.message
    assert len(service.jobs) == before


def test_another_model_is_not_found(site):
    client, _, _ = site
    error = told(client.post("/v1/videos", json={"prompt": "x", "model": "sora-2"}), 404)
    assert (error.code, error.param) == ("model_not_found", "model")
    assert told(client.get("/v1/models/sora-2"), 404).code == "model_not_found"


def test_a_model_whose_name_has_a_slash_is_found(tmp_path):
    config = ServeConfig(data=tmp_path, name="Wan-AI/Wan2.1")
    with served(MemoryService(tmp_path), config) as (url, _), httpx.Client(base_url=url) as client:
        for path in ("/v1/models/Wan-AI/Wan2.1", "/v1/models/Wan-AI%2FWan2.1"):
            assert client.get(path).json()["id"] == "Wan-AI/Wan2.1"
        assert told(client.get("/v1/models/Wan-AI"), 404).code == "model_not_found"


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/video", "/v1/videos/", "/etc/passwd", "/v1/videos/a/b/c", "//", "/docs", "/%00"]
)
def test_unknown_paths_and_methods(site, path):
    client, _, _ = site
    assert told(client.request("PATCH", path), 405 if path in ("/", "//") else 404).code in (
        "not_found",
        "method_not_allowed",
    )


def test_methods_that_a_path_does_not_take(site):
    client, _, _ = site
    for method, path in (("PUT", "/v1/videos"), ("POST", "/v1/models"), ("GET", f"/v1/videos/video_{'0' * 32}/cancel")):
        answer = client.request(method, path)
        assert told(answer, 405).code == "method_not_allowed"
        assert answer.headers["allow"]


def test_characters_are_told_to_be_nothing_of_ours(site):
    client, _, _ = site
    assert told(client.post("/v1/videos/characters", files={"name": (None, "x")}), 404).code == "not_supported"
    assert told(client.get("/v1/videos/characters/char_1"), 404).code == "not_supported"


def test_queries_that_make_no_sense(site):
    client, _, _ = site
    for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("limit=101", "limit"), ("order=up", "order")):
        assert told(client.get(f"/v1/videos?{query}"), 400).param == param
    assert told(client.get("/v1/videos?after=video_1"), 404).code == "video_not_found"
    assert told(client.get("/v1/estimate?width=100"), 400).param == "width"
    assert told(client.get("/v1/estimate?widht=96"), 400).param == "widht"
    assert told(client.post("/v1/videos", json={"prompt": "x"}, headers={"idempotency-key": "x" * 256}), 400)


@pytest.mark.parametrize(
    ("code", "retry_s", "status", "kind"),
    [
        ("queue_full", 7, 429, "rate_limit_error"), ("key_queue_full", 4000, 429, "rate_limit_error"),
        ("starting", None, 503, "server_error"), ("draining", 3, 503, "server_error"),
        ("insufficient_storage", None, 507, "server_error"), ("idempotency_mismatch", None, 409, "conflict_error"),
    ],
)  # fmt: skip
def test_refusals_say_when_to_come_again(site, code, retry_s, status, kind):
    client, service, _ = site
    service.refusal = RefusedError(code, "not now", retry_s=retry_s)
    answer = client.post("/v1/videos", json={"prompt": "x"})
    error = told(answer, status)
    assert (error.code, error.type) == (code, kind)
    if status in (429, 503):
        seconds = int(answer.headers["retry-after"])
        assert 1 <= seconds <= 120
        assert answer.headers["retry-after-ms"] == str(seconds * 1000)
        assert "x-should-retry" not in answer.headers
    else:
        assert answer.headers["x-should-retry"] == "false"


def test_a_full_queue_is_told_before_the_body_is_read(site):
    client, service, _ = site
    service.refusal = RefusedError("queue_full", "not now", retry_s=1)
    with connected(client) as connection:
        connection.sendall(head(LIMITS.body_bytes))
        assert connection.recv(100).startswith(b"HTTP/1.1 429")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/videos",
        "/v1/videos/ID",
        "/v1/loras",
        "/metrics",
        "/health/live",
        "/health/ready",
        "/v1/estimate",
        "/openapi.json",
        "/",
    ],
)
def test_head_is_get_without_its_body(site, path):
    client, _, _ = site
    path = path.replace("ID", client.post("/v1/videos", json={"prompt": "x"}).json()["id"])
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == str(len(get.content))
    assert client.head("/v1/videos/video_1").status_code == 404
    assert client.head("/nothing").status_code == 404


def test_the_same_key_when_the_source_is_gone(site):
    client, _, _ = site
    source = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    path, headers = f"/v1/videos/{source}/remix", {"idempotency-key": "remix"}
    first = client.post(path, json={"prompt": "y"}, headers=headers).json()["id"]
    assert told(client.post(path, json={"prompt": "z"}, headers=headers), 409).code == "idempotency_mismatch"
    client.delete(f"/v1/videos/{source}")
    assert client.post(path, json={"prompt": "y"}, headers=headers).json()["id"] == first
    assert told(client.post(path, json={"prompt": "z"}, headers=headers), 409).code == "idempotency_mismatch"
    assert told(client.post(path, json={"prompt": "y"}, headers={"idempotency-key": "new"}), 404)
    other = f"/v1/videos/video_{'0' * 32}/remix"
    assert told(client.post(other, json={"prompt": "y"}, headers=headers), 409)
    client.delete(f"/v1/videos/{first}")
    assert told(client.post(path, json={"prompt": "y"}, headers=headers), 404).code == "video_not_found"


def test_a_remix_needs_a_prompt_too(site):
    client, service, _ = site
    source = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    before = len(service.jobs)
    for prompt in ("", " \n"):
        error = told(client.post(f"/v1/videos/{source}/remix", json={"prompt": prompt}), 400)
        assert (error.param, "empty" in error.message) == ("prompt", True)
    service.card = None
    assert told(client.post("/v1/videos", json={"prompt": " "}), 400).param == "prompt"
    assert told(client.post("/v1/videos", json={"prompt": "x", "windows": False, "window_frames": 9}), 400)
    assert len(service.jobs) == before


def test_the_same_key_with_another_request(site):
    client, _, _ = site
    headers = {"idempotency-key": "once"}
    first = client.post("/v1/videos", json={"prompt": "x", "steps": 4}, headers=headers).json()
    form = client.post("/v1/videos", files={"prompt": (None, "x"), "num_inference_steps": (None, "4")}, headers=headers)
    assert form.json()["id"] == first["id"]
    answer = client.post("/v1/videos", json={"prompt": "y", "steps": 4}, headers=headers)
    assert told(answer, 409).code == "idempotency_mismatch"
    assert answer.headers["x-should-retry"] == "false"


def test_what_goes_wrong_inside_has_the_shape_and_says_nothing_of_it(site, monkeypatch):
    client, service, _ = site
    monkeypatch.setattr(service, "page", lambda *_, **__: 1 / 0)
    error = told(client.get("/v1/videos"), 500)
    assert "division" not in error.message

    async def broken(*_, **__):
        raise StoreError("the disk with /srv/data/jobs.sqlite is full")

    monkeypatch.setattr(service, "page", broken)
    answer = client.get("/v1/videos")
    error = told(answer, 503)
    assert error.code == "store_unavailable"
    assert "/srv" not in error.message
    assert answer.headers["retry-after"] == "5"


def test_readiness_and_the_model_before_it_is_known(site, monkeypatch):
    client, service, _ = site
    service.is_ready, service.trouble = False, "the worker is starting"
    assert told(client.get("/health/ready"), 503).message == "the worker is starting"
    assert client.get("/health/live").json() == {"status": "ok"}
    service.card = None
    assert client.get("/v1/models").json()["data"][0]["defaults"] is None
    assert client.post("/v1/videos", json={"prompt": "x"}).json()["size"] == "auto"
    monkeypatch.setattr("frameloom.serve.api.videos._CARD_S", 0.01)
    assert told(client.post("/v1/videos", json={"prompt": "x", "seconds": "4"}), 503).code == "starting"
    assert told(client.get("/v1/estimate?seconds=4"), 503).code == "starting"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
def test_other_bodies(site, kind):
    client, _, _ = site
    answer = client.post("/v1/videos", content=b"prompt=x", headers={"content-type": kind})
    assert told(answer, 415).code == "unsupported_media_type"


def test_bodies_that_are_too_large(site):
    client, _, app = site
    large = json.dumps({"prompt": "x", "input_reference": "data:image/png;base64," + "A" * 400_000}).encode()
    headers = {"content-type": "application/json"}
    assert told(client.post("/v1/videos", content=large, headers=headers), 413).code == "request_too_large"
    pieces = (b" " * 10_000 for _ in range(30))
    assert told(client.post("/v1/videos", content=pieces, headers=headers), 413).code == "request_too_large"
    assert app.state.site.bodies.held == 0
    error = told(client.post("/v1/videos", content=b" " * 150_000, headers=headers), 400)
    assert "no JSON" in error.message


def test_a_body_that_says_it_is_too_large_is_not_waited_for(site, monkeypatch):
    client, _, app = site
    for name in ("_LISTEN_S", "_SILENT_S"):
        monkeypatch.setattr(f"frameloom.serve.api.body.{name}", 600.0)
    answer = b""
    with connected(client) as connection:
        connection.settimeout(60)
        connection.sendall(head(99999999999999))
        while not answer.endswith(b"}"):
            piece = connection.recv(1000)
            assert piece
            answer += piece
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in answer.lower()
        connection.sendall(b"x" * 100_000)  # it is still listened to, so that the answer is not lost
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000) == b""
    assert app.state.site.bodies.held == 0


def test_bodies_that_come_too_slowly(site, monkeypatch):
    client, _, app = site
    monkeypatch.setattr(app.state.site.bodies, "grace_s", 0.2)
    answer = b""
    with connected(client) as connection:
        connection.sendall(head(5000) + b"{")
        while piece := connection.recv(1000):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer
    assert app.state.site.bodies.held == 0


def test_half_a_body_makes_no_job_and_holds_nothing(site):
    client, service, app = site
    before = len(service.jobs)
    for _ in range(5):
        with connected(client) as connection:
            connection.sendall(head(5000) + b'{"prompt": "x"}')
    end = time.monotonic() + 20
    while app.state.site.bodies.held and time.monotonic() < end:
        time.sleep(0.01)
    assert app.state.site.bodies.held == 0
    assert len(service.jobs) == before
    assert client.get("/health/live").status_code == 200


def test_many_large_bodies_share_what_may_be_held():
    class Sent:
        def __init__(self, pieces):
            self.headers, self.pieces = {}, pieces

        async def stream(self):
            for piece in self.pieces:
                yield piece

    async def read():
        reader = BodyReader(limit=1000)
        reader.held = 3_500
        async with reader.read(Sent([b"x" * 400])) as body:
            assert (len(body), reader.held) == (400, 3_900)
            with pytest.raises(Exception, match="too many large requests") as caught:
                async with reader.read(Sent([b"x" * 400])):
                    pass
            assert caught.value.status == 503
        assert reader.held == 3_500

    asyncio.run(read())


def test_all_errors_are_declared(site):
    client, _, _ = site
    described = client.get("/openapi.json").json()
    text = json.dumps(described)
    assert "HTTPValidationError" not in text
    post = described["paths"]["/v1/videos"]["post"]
    assert set(post["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    declared = set(post["responses"])
    assert {"200", "400", "401", "404", "408", "409", "413", "415", "429", "500", "503", "507"} <= declared
    for status, answer in post["responses"].items():
        name = answer["content"]["application/json"]["schema"]["$ref"].rsplit("/")[-1]
        assert name == ("Video" if status == "200" else "ErrorAnswer")
    assert set(described["paths"]["/health/live"]["get"]["responses"]) == {"200", "403", "500", "503"}
    assert {"206", "416"} <= set(described["paths"]["/v1/videos/{video_id}/preview"]["get"]["responses"])
    assert not any("head" in methods for methods in described["paths"].values())
    paths = {
        "/v1/videos/{video_id}/content",
        "/v1/videos/{video_id}/events",
        "/v1/estimate",
        "/health/ready",
        "/metrics",
    }
    assert paths <= set(described["paths"])


def test_the_description_says_what_this_server_takes(site):
    client, _, _ = site
    paths = client.get("/openapi.json").json()["paths"]
    bodies = paths["/v1/videos"]["post"]["requestBody"]["content"]
    for form in ("application/json", "multipart/form-data"):
        taken = bodies[form]["schema"]["properties"]
        assert [taken[name]["maximum"] for name in ("steps", "num_inference_steps")] == [20, 20]
        assert [taken[name]["maxLength"] for name in ("prompt", "negative_prompt")] == [50, 50]
        assert (taken["priority"]["minimum"], taken["priority"]["maximum"]) == (-1000, 1000)
        scale = taken["loras"]["items"]["properties"]["scale"]
        assert (scale["minimum"], scale["maximum"]) == (-20, 20)
    asked = {one["name"]: one["schema"] for one in paths["/v1/estimate"]["get"]["parameters"]}
    assert (asked["steps"]["maximum"], asked["deadline"]["maximum"]) == (20, 2_592_000)
    remixed = paths["/v1/videos/{video_id}/remix"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert remixed["properties"]["prompt"]["maxLength"] == 50


@pytest.mark.parametrize("name", ["prompt", "steps", "priority", "deadline", "quality"])
def test_what_the_description_allows_is_taken_and_what_is_past_it_is_not(site, name):
    client, _, _ = site
    described = client.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    schema = described["application/json"]["schema"]["properties"][name]
    if name == "prompt":
        ends, past = ["x" * schema["maxLength"]], ["x" * (schema["maxLength"] + 1)]
    else:
        ends, past = [schema["minimum"], schema["maximum"]], [schema["minimum"] - 1, schema["maximum"] + 1]
    for value in ends:
        assert client.post("/v1/videos", json={"prompt": "x", name: value}).status_code == 200
    for value in past:
        assert told(client.post("/v1/videos", json={"prompt": "x", name: value}), 400).param == name
