"""The API of a real server with a real worker, from the first request to the last: what is asked is what is made."""

import base64
import hashlib
import io
import os
import re
import subprocess
import sys
import time

import av
import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from frameloom.serve.api.schemas import Estimate, LoraList, ModelList, Video, VideoDeleted, VideoPage

SMALL = {"prompt": "a red circle", "size": "64x64", "num_frames": 5, "steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def client(checkpoint_of, tmp_path_factory):
    """Of a server whose model takes an image, or none: a random one of the kind of Wan 2.2 5B."""
    command = [
        sys.executable,
        "-m",
        "frameloom",
        "serve",
        "--model",
        checkpoint_of("per-token timesteps"),
        "--port",
        "0",
    ]
    options = ["--data-dir", tmp_path_factory.mktemp("data"), "--name", "small", "--log", "json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("w") as problems:
        server = subprocess.Popen(
            list(map(str, command + options)), stdout=subprocess.PIPE, stderr=problems, text=True, env=environment
        )
    try:
        line = server.stdout.readline()
        url = re.search(r"http://[\d.:]+", line)
        assert url, line + log.read_text()
        with httpx.Client(base_url=url[0], timeout=60) as client:
            until(lambda: client.get("/health/ready").status_code == 200)
            yield client
    finally:
        server.terminate()
        server.wait(60)
        server.stdout.close()
    assert "Traceback" not in log.read_text()


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def made(client, answer):
    """The finished video of an answer that has accepted it."""
    assert answer.status_code == 200, answer.text
    job = Video.model_validate(answer.json())
    assert job.status == "queued" or job.progress < 100
    seen = []
    until(lambda: seen.append(found := of(client, job.id)) or found.status in ("completed", "failed"))
    assert seen[-1].status == "completed", seen[-1].error
    assert seen[-1].progress == 100
    assert [video.progress for video in seen] == sorted(video.progress for video in seen)
    return seen[-1]


def of(client, video_id):
    return Video.model_validate(client.get(f"/v1/videos/{video_id}").json())


def content(client, video, variant="video"):
    answer = client.get(f"/v1/videos/{video.id}/content", params={"variant": variant})
    assert answer.status_code == 200
    return answer.content


def frames(data):
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def picture(kind="PNG", size=(64, 64)):
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def first(client):
    return made(client, client.post("/v1/videos", json=SMALL))


def test_a_video_is_made_and_all_its_files_are_there(client, first):
    data = content(client, first)
    assert (first.sha256, first.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert [frame.shape for frame in frames(data)] == [(64, 64, 3)] * 5
    assert (first.size, first.num_frames, first.steps, first.seed, first.attempts) == ("64x64", 5, 2, 7, 1)
    for variant in ("thumbnail", "spritesheet"):
        assert Image.open(io.BytesIO(content(client, first, variant))).format == "JPEG"


def test_the_same_by_a_form_has_the_same_bytes(client, first):
    form = {name: (None, str(value)) for name, value in SMALL.items()}
    again = made(client, client.post("/v1/videos", files=form | {"user": (None, "me")}))
    assert again.sha256 == first.sha256
    other = made(client, client.post("/v1/videos", json={**SMALL, "seed": None}))
    assert other.sha256 != first.sha256
    assert other.seed != 7


def test_seconds_become_frames_that_the_model_makes(client):
    video = made(
        client, client.post("/v1/videos", json={"prompt": "x", "size": "32x32", "seconds": "1", "fps": 8, "steps": 1})
    )
    assert (video.num_frames, video.seconds, video.fps) == (9, "1", 8)
    assert len(frames(content(client, video))) == 9


def test_an_image_is_the_first_frame_however_it_is_given(client):
    asked = {**SMALL, "prompt": "y"}
    url = "data:image/jpeg;base64," + base64.b64encode(picture("JPEG")).decode()
    form = {name: (None, str(value)) for name, value in asked.items()}
    ways = [
        client.post("/v1/videos", json={**asked, "input_reference": url}),
        client.post("/v1/videos", json={**asked, "input_reference": {"image_url": url}}),
        client.post("/v1/videos", files=form | {"input_reference[image_url]": (None, url)}),
        client.post(
            "/v1/videos", files=form | {"input_reference": ("upload", picture("JPEG"), "application/octet-stream")}
        ),
    ]
    videos = [made(client, answer) for answer in ways]
    assert len({video.sha256 for video in videos}) == 1
    assert videos[0].inputs == ["input_reference"]
    remixed = made(client, client.post(f"/v1/videos/{videos[0].id}/remix", json={"prompt": "z"}))
    assert (remixed.remixed_from_video_id, remixed.seed, remixed.prompt) == (videos[0].id, 7, "z")
    assert remixed.inputs == ["input_reference"]
    same = made(client, client.post(f"/v1/videos/{videos[0].id}/remix", json={"prompt": "y"}))
    assert same.sha256 == videos[0].sha256


def test_an_image_decides_the_shape_where_the_size_is_open(client):
    wide = {"input_reference": ("a.png", picture(size=(128, 32)))}
    numbers = {"prompt": "x", "num_frames": "5", "steps": "1", "width": "64"}
    video = made(client, client.post("/v1/videos", files={name: (None, text) for name, text in numbers.items()} | wide))
    assert "auto" not in (video.size, video.seconds)
    height, width, _ = frames(content(client, video))[0].shape
    assert video.size == f"{width}x{height}"


def test_edits_by_id_and_by_file_are_the_same(client, first):
    asked = {"prompt": "blue", "steps": "2", "strength": "0.5", "seed": "1"}
    form = {name: (None, value) for name, value in asked.items()}
    by_id = made(client, client.post("/v1/videos/edits", json={**asked, "video": {"id": first.id}}))
    by_field = made(client, client.post("/v1/videos/edits", files=form | {"video[id]": (None, first.id)}))
    by_file = made(client, client.post("/v1/videos/edits", files=form | {"video": ("v.mp4", content(client, first))}))
    assert by_id.sha256 == by_file.sha256 == by_field.sha256 != first.sha256
    assert (by_id.kind, by_id.source_video_id, by_id.size, by_id.num_frames) == ("edit", first.id, "64x64", 5)
    assert by_file.source_video_id is None


def test_an_extension_begins_with_the_video_and_tells_its_whole_length(client, first):
    asked = {"prompt": "on", "seconds": "0.5", "steps": 1, "video": {"id": first.id}}
    answer = client.post("/v1/videos/extensions", json=asked)
    video = made(client, answer)
    assert answer.json()["num_frames"] == video.num_frames
    assert video.seconds == f"{round((video.num_frames - 1) / first.fps, 3):g}"
    shown, before = frames(content(client, video)), frames(content(client, first))
    assert len(shown) == video.num_frames > len(before)
    apart = [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(before, shown, strict=False)]
    assert max(apart) < 12  # encoded once more


def test_an_order_that_was_cancelled_never_makes_a_video(client):
    long = client.post("/v1/videos", json={**SMALL, "steps": 200, "num_frames": 49}).json()["id"]
    queued = client.post("/v1/videos", json=SMALL).json()
    assert queued["queue_position"] is not None
    until(lambda: of(client, long).step >= 1)
    for video_id in (queued["id"], long, long):
        assert client.post(f"/v1/videos/{video_id}/cancel").status_code == 200
    until(lambda: of(client, long).status == "failed")
    for video_id in (queued["id"], long):
        video = of(client, video_id)
        assert (video.status, video.error.code) == ("failed", "cancelled")
        assert client.get(f"/v1/videos/{video_id}/content").json()["error"]["code"] == "video_failed"


def test_events_tell_how_far_a_video_is_until_it_is_done(client):
    job = client.post("/v1/videos", json={**SMALL, "steps": 60}).json()
    with client.stream("GET", f"/v1/videos/{job['id']}/events") as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    told = [Video.model_validate_json(line.removeprefix("data: ")) for line in lines]
    assert told[-1].status == "completed"
    assert [video.progress for video in told] == sorted(video.progress for video in told)
    assert any(video.stage is not None and video.total for video in told)  # what comes too fast is left out


def test_lists_page_to_their_end_in_both_orders(client, first):
    newest = VideoPage.model_validate(client.get("/v1/videos", params={"limit": 100}).json())
    ids = [video.id for video in newest.data]
    assert first.id in ids
    for order, whole in (("desc", ids), ("asc", ids[::-1])):
        found, after = [], None
        while True:
            query = {"limit": 3, "order": order} | ({"after": after} if after else {})
            page = VideoPage.model_validate(client.get("/v1/videos", params=query).json())
            found += [video.id for video in page.data]
            if not page.has_more:
                break
            after = page.last_id
        assert found == whole


def test_what_was_sent_twice_under_one_key_is_made_once(client):
    headers = {"idempotency-key": "one"}
    ids = {client.post("/v1/videos", json=SMALL | {"seed": None}, headers=headers).json()["id"] for _ in range(3)}
    assert len(ids) == 1
    other = client.post("/v1/videos", json=SMALL, headers=headers)
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")


def test_deleted_videos_are_gone(client):
    video = made(client, client.post("/v1/videos", json=SMALL))
    answer = client.request("DELETE", f"/v1/videos/{video.id}", headers={"content-type": "application/json"})
    assert VideoDeleted.model_validate(answer.json()).id == video.id
    for path in ("", "/content", "/events"):
        assert client.get(f"/v1/videos/{video.id}{path}").json()["error"]["code"] == "video_not_found"
    assert client.delete(f"/v1/videos/{video.id}").status_code == 404


def test_a_deadline_that_passes_ends_a_video(client):
    job = client.post("/v1/videos", json={**SMALL, "steps": 200, "num_frames": 49, "deadline": 0.5}).json()
    until(lambda: of(client, job["id"]).status == "failed")
    assert of(client, job["id"]).error.code == "deadline_exceeded"


def test_what_the_server_tells_of_itself(client):
    model = ModelList.model_validate(client.get("/v1/models").json()).data[0]
    assert (model.id, model.temporal, model.extends, model.needs_image) == ("small", 4, True, False)
    assert {"input_reference", "video"} <= set(model.takes)
    LoraList.model_validate(client.get("/v1/loras").json())
    query = {"size": "64x64", "seconds": "1", "steps": "3"}
    estimate = Estimate.model_validate(client.get("/v1/estimate", params=query).json())
    assert estimate.refusal == ""
    assert estimate.resolved["steps"] == 3
    assert client.get("/metrics").status_code == 200


def test_requests_against_the_model_are_refused_with_what_is_possible(client, first):
    odd = {"prompt": "x", "video": {"id": first.id}}
    for path, body, param in (
        ("", {"prompt": "x", "width": 33}, "width"),
        ("", {"prompt": "x", "mask": "data:video/mp4;base64,AAAA"}, "mask"),
        ("/edits", {**odd, "video": {"id": f"video_{'0' * 32}"}}, None),
        ("/edits", {**odd, "video": "data:video/mp4;base64,AAAA"}, "video"),
        ("/extensions", {**odd, "size": "64x64"}, "size"),
        ("/edits", {**odd, "steps": 3, "strength": 0.01}, "strength"),
    ):
        answer = client.post(f"/v1/videos{path}", json=body)
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == param
