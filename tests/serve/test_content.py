"""Files of a finished video: whole, in ranges, and not at all where they are known."""

import hashlib

import httpx2 as httpx
import pytest
from memory_service import MemoryService, served

from frameloom.serve.config import ServeConfig

DATA = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("content")
    service = MemoryService(folder)
    with served(service, ServeConfig(data=folder)) as (url, _), httpx.Client(base_url=url) as client:
        yield client, service


@pytest.fixture
def video(site):
    client, service = site
    job_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    service.complete(job_id, DATA)
    return job_id


def test_the_whole_file(site, video):
    client, _ = site
    answer = client.get(f"/v1/videos/{video}/content", headers={"accept": "application/binary"})
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["content-length"] == str(len(DATA))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'
    for variant, kind in (("thumbnail", "thumbnail"), ("spritesheet", "sheet")):
        answer = client.get(f"/v1/videos/{video}/content?variant={variant}")
        assert (answer.content, answer.headers["content-type"]) == (kind.encode(), "image/jpeg")


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1), ("bytes=5-9", 5, 10), ("bytes=1000000-", 1_000_000, len(DATA)),
        ("bytes=-7", len(DATA) - 7, len(DATA)),
        (f"bytes=10-{10**17}", 10, len(DATA)), (f"bytes=-{10**17}", 0, len(DATA)), ("bytes = 3 - 4", 3, 5),
    ],
)  # fmt: skip
def test_ranges(site, video, asked, start, end):
    client, _ = site
    answer = client.get(f"/v1/videos/{video}/content", headers={"range": asked})
    assert answer.content == DATA[start:end]
    assert answer.headers["content-length"] == str(end - start)
    if (start, end) == (0, len(DATA)):
        assert answer.status_code == 200
    else:
        assert (answer.status_code, answer.headers["content-range"]) == (206, f"bytes {start}-{end - 1}/{len(DATA)}")


@pytest.mark.parametrize(
    "asked", ["bytes=a-b", "lines=1-2", "bytes=-", "", "bytes=1-2,5-9", "bytes=٣-", "bytes=" + "9" * 400 + "-"]
)
def test_ranges_that_are_none_are_passed_over(site, video, asked):
    client, _ = site
    answer = client.get(f"/v1/videos/{video}/content", headers={"range": asked.encode()})
    assert (answer.status_code, answer.content) == (200, DATA)


@pytest.mark.parametrize("asked", [f"bytes={len(DATA)}-", "bytes=9-5", "bytes=-0"])
def test_ranges_outside_of_the_file(site, video, asked):
    client, _ = site
    answer = client.get(f"/v1/videos/{video}/content", headers={"range": asked})
    assert (answer.status_code, answer.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


def test_files_that_are_known_are_not_sent_again(site, video):
    client, _ = site
    at = f"/v1/videos/{video}/content"
    tag = client.get(at).headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = client.get(at, headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert client.get(at, headers={"if-none-match": '"other"'}).status_code == 200
    assert client.get(at, headers={"range": "bytes=0-1", "if-range": tag}).status_code == 206
    assert client.get(at, headers={"range": "bytes=0-1", "if-range": '"other"'}).status_code == 200
    head = client.head(at)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(DATA)), b"")


def test_what_cannot_be_sent_says_why(site, video):
    client, service = site

    def code(path):
        answer = client.get(f"/v1/videos/{path}")
        return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]

    assert code(f"{video}/content?variant=gif") == (400, "invalid_request", "variant")
    assert code(f"{video}/preview") == (404, "preview_not_ready", None)
    waiting = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    assert code(f"{waiting}/content") == (404, "video_not_ready", None)
    service.fail(waiting, "internal_error")
    assert code(f"{waiting}/content") == (400, "video_failed", None)
    (service.folder(video) / "video-1.mp4").unlink()
    assert code(f"{video}/content") == (404, "video_expired", None)
    for odd in ("..%2F..%2Fetc%2Fpasswd", "%00", "video_" + "g" * 32, "x" * 5000, "video_" + "0" * 31 + "%0a"):
        assert code(f"{odd}/content")[0] == 404


def test_a_video_that_is_deleted_while_it_is_sent_is_sent_to_its_end(site, video):
    client, service = site
    with client.stream("GET", f"/v1/videos/{video}/content") as answer:
        (service.folder(video) / "video-1.mp4").unlink()
        assert answer.read() == DATA


def test_the_preview_changes_its_tag_as_it_is_drawn_anew(site):
    client, service = site
    job_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    service.folder(job_id).mkdir()
    tags = []
    for version in (1, 2):
        (service.folder(job_id) / "preview.apng").write_bytes(b"%d" % version)
        service.set(job_id, preview=version, status="in_progress", fence=1)
        answer = client.get(f"/v1/videos/{job_id}/preview")
        assert (answer.content, answer.headers["content-type"]) == (b"%d" % version, "image/apng")
        tags.append(answer.headers["etag"])
    assert len(set(tags)) == 2
    assert client.get(f"/v1/videos/{job_id}/preview", headers={"if-none-match": tags[1]}).status_code == 304
