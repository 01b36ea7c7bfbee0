"""Keys, whose jobs are whose, and what web pages of others cannot do where there are no keys."""

import asyncio

import httpx2 as httpx
import pytest
from memory_service import MemoryService, served

from frameloom.serve.api.app import make_app
from frameloom.serve.api.auth import EVERYBODY, Doorkeeper
from frameloom.serve.api.errors import ApiError
from frameloom.serve.config import Key, ServeConfig

KEYS = (Key(name="ann", secret="ann-secret-1234567", priority=5), Key(name="ben", secret="bén-secret-7654321"))


def bearer(secret):
    return {"authorization": f"Bearer {secret}".encode()}


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked")
    config = ServeConfig(data=folder, keys=KEYS)
    with served(MemoryService(folder), config) as (url, app), httpx.Client(base_url=url) as client:
        yield client, app


@pytest.fixture(scope="module")
def unlocked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlocked")
    with served(MemoryService(folder), ServeConfig(data=folder)) as (url, _), httpx.Client(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "Basic ann-secret-1234567", "ann-secret-1234567", "bearer \xff"],
)
def test_without_a_known_key_nothing_is_told(locked, header):
    client, _ = locked
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    paths = ("/v1/videos", f"/v1/videos/video_{'0' * 32}", "/v1/models", "/v1/loras", "/v1/estimate", "/metrics")
    for path in paths:
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client.post("/v1/videos", headers=headers, json={"prompt": "x"}).status_code == 401
    assert client.get("/health/live").status_code == 200
    assert client.get("/").status_code == 200


def test_jobs_are_there_for_their_key_alone(locked):
    client, _ = locked
    ann, ben = bearer(KEYS[0].secret), bearer(KEYS[1].secret)
    job = client.post("/v1/videos", headers=ann, json={"prompt": "x", "priority": 9}).json()
    assert job["priority"] == 5
    at = f"/v1/videos/{job['id']}"
    assert client.get(at, headers=ann).json()["id"] == job["id"]
    for method, path in (
        ("GET", at), ("DELETE", at), ("POST", f"{at}/cancel"), ("GET", f"{at}/content"), ("GET", f"{at}/events"),
        ("GET", f"{at}/preview"),
    ):  # fmt: skip
        answer = client.request(method, path, headers=ben)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
    assert client.post(f"{at}/remix", headers=ben, json={"prompt": "y"}).status_code == 404
    edit = client.post("/v1/videos/edits", headers=ben, json={"prompt": "y", "video": {"id": job["id"]}})
    assert edit.status_code == 404
    assert client.get("/v1/videos", headers=ben).json()["data"] == []
    assert client.get(f"/v1/videos?after={job['id']}", headers=ben).status_code == 404
    assert [one["id"] for one in client.get("/v1/videos", headers=ann).json()["data"]] == [job["id"]]


def test_keys_are_replaced_while_the_server_runs(locked):
    client, app = locked
    doorkeeper = app.state.site.doorkeeper
    doorkeeper.keys = (Key(name="cat", secret="cat-secret-1234567"),)
    assert client.get("/v1/models", headers=bearer(KEYS[0].secret)).status_code == 401
    assert client.get("/v1/models", headers=bearer("cat-secret-1234567")).status_code == 200
    doorkeeper.keys = KEYS
    assert client.get("/v1/models", headers=bearer(KEYS[0].secret)).status_code == 200


def test_all_keys_are_compared_whichever_it_is(monkeypatch):
    compared = []

    def compare(one, other):
        compared.append(one)
        return one == other

    monkeypatch.setattr("frameloom.serve.api.auth.hmac.compare_digest", compare)
    door = Doorkeeper(KEYS)
    assert door.caller(f"Bearer {KEYS[0].secret}").name == "ann"
    with pytest.raises(ApiError):
        door.caller("Bearer x")
    assert compared == [key.digest for key in KEYS] * 2
    assert Doorkeeper(()).caller(None) is EVERYBODY


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "10.0.0.1", "localhost.evil.example", "[::ffff:1]", "]["]
)
def test_without_keys_foreign_names_are_refused(unlocked, host):
    answer = unlocked.get("/v1/videos", headers={"host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_host")
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1:1", "[::1]:1"])
def test_names_of_this_machine_are_taken(unlocked, host):
    assert unlocked.get("/v1/videos", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("config", "host", "status"),
    [
        ({"host": "MyHost"}, "myhost:9", 200), ({"host": "MyHost"}, "localhost:9", 200),
        ({"host": "MyHost"}, "evil.example", 403), ({"host": "MyHost", "is_public": True}, "any.example", 200),
        ({"is_public": True}, "evil.example", 403), ({"host": "MyHost", "keys": KEYS}, "any.example", 401),
    ],
)  # fmt: skip
def test_a_server_that_listens_by_a_name_answers_to_that_name_and_is_guarded_no_less(tmp_path, config, host, status):
    """Without keys a name that is not public is one of this machine, whatever it is: the start sees to that."""
    app = make_app(MemoryService(tmp_path), ServeConfig(data=tmp_path, **config))

    async def asked():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/v1/videos", headers={"host": host})

    assert asyncio.run(asked()).status_code == status


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://localhost:1"},
        {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "http://["},
    ],
)  # fmt: skip
def test_without_keys_web_pages_of_others_change_nothing(unlocked, headers):
    before = len(unlocked.get("/v1/videos").json()["data"])
    answer = unlocked.post("/v1/videos", json={"prompt": "x"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert unlocked.delete(f"/v1/videos/video_{'0' * 32}", headers=headers).status_code == 403
    assert len(unlocked.get("/v1/videos").json()["data"]) == before


def test_our_own_page_may(unlocked):
    origin = str(unlocked.base_url).rstrip("/")
    headers = {"origin": origin, "sec-fetch-site": "same-origin"}
    assert unlocked.post("/v1/videos", json={"prompt": "x"}, headers=headers).status_code == 200
    answer = unlocked.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = unlocked.get("/", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for name in ("../config.py", "..%2Fconfig.py", "%2e%2e/config.py", "nothing.js", "", "/etc/passwd"):
        assert unlocked.get(f"/web/{name}").status_code == 404
