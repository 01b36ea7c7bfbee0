"""What becomes of a request before it is kept: numbers worked out, pictures named, and everything in its place."""

import asyncio
import base64
import io
import json
from types import SimpleNamespace

import av
import httpx2 as httpx
import msgspec
import numpy as np
import pytest
from memory_service import CARD, MemoryService, served
from PIL import Image

from frameloom.serve.api.app import make_app
from frameloom.serve.api.asking import Shape
from frameloom.serve.api.body import Turns
from frameloom.serve.api.errors import ApiError
from frameloom.serve.api.inputs import Examiner, Given
from frameloom.serve.config import Key, ServeConfig
from frameloom.wire import Foreseen

ALL = msgspec.structs.replace(CARD, takes=("image", "last_image", "video", "control_video", "mask", "references"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asking")
    service = MemoryService(folder, ALL)
    config = ServeConfig(data=folder, loras={"ink": "/inks/ink.safetensors"}, keys=(Key(name="ann", secret="s" * 20),))
    headers = {"authorization": "Bearer " + "s" * 20}
    with served(service, config) as (url, _), httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        yield client, service


def picture(width=96, height=64):
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def clip(frames=13, width=96, height=64, rate=8):
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            shade = np.full((height, width, 3), 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def ask(site, path="", **options):
    client, service = site
    answer = client.post(f"/v1/videos{path}", **options)
    assert answer.status_code == 200, answer.text
    return service.jobs[answer.json()["id"]].job, answer.json()


def files(service, job):
    return sorted(file.name for file in (service.folder(job.id) / "inputs").iterdir())


def test_numbers_are_kept_as_they_were_asked_and_as_they_will_be(site):
    job, shown = ask(site, json={"prompt": "x", "seconds": "3", "size": "64x32", "guidance_scale": 1, "windows": False})
    assert {**job.ask.request, "seed": 0} == {
        "prompt": "x", "num_frames": 49, "width": 64, "height": 32, "guidance_scale": 1.0, "windows": False, "seed": 0,
    }  # fmt: skip
    expected = {"width": 64, "height": 32, "num_frames": 49, "steps": 8, "fps": 16.0, "guidance_scale": 1.0}
    assert job.ask.resolved == expected
    assert (shown["seconds"], shown["size"], shown["steps"]) == ("3", "64x32", 8)
    json.dumps([job.ask.request, job.ask.resolved])  # as the store keeps them


def test_large_requests_are_planned_before_they_are_kept(site):
    client, service = site
    large = {"prompt": "x", "size": "96x96"}
    assert ask(site, json=large)[0].ask.work_s == 2.5  # as the planner says, and of a usual one as was learned
    assert ask(site, json={"prompt": "x"})[0].ask.work_s == 1.0
    service.planned = Foreseen(number=1, refusal="it takes 9 GB and there are 4; ask for 64x64")
    try:
        answer = client.post("/v1/videos", json=large)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "size"
        assert answer.json()["error"]["message"] == service.planned.refusal
        assert ask(site, json={"prompt": "x"})[0].ask.work_s == 1.0
        service.planned = Foreseen(number=1)  # too many were asked at once: nothing is known
        assert ask(site, json=large)[0].ask.work_s == 1.0
    finally:
        service.planned = None


def test_an_estimate_says_what_was_learned_where_the_planner_knows_nothing(site, monkeypatch):
    client, service = site
    numbers = {"steps": 8, "width": 96, "height": 64, "num_frames": 33, "fps": 16.0, "guidance_scale": 3.0}

    def told():
        answer = client.get("/v1/estimate").json()
        assert answer["resolved"] == numbers
        return answer["seconds"], answer["memory_bytes"], answer["refusal"]

    assert told() == (2.5, 10**9, "")
    try:
        service.planned = Foreseen(number=1)
        assert told() == (1.0, None, "")
        monkeypatch.setattr(service, "work_s", lambda request: 0.0)
        assert told() == (None, None, "")
        service.planned = Foreseen(number=1, refusal="it takes 9 GB", seconds=3.0, memory_bytes=1)
        assert told() == (None, None, "it takes 9 GB")
    finally:
        service.planned = None


def test_what_is_not_of_the_picture_is_kept_beside_it(site):
    asked = {"prompt": "x", "quality": 30, "priority": 7, "deadline": "60", "loras": '[{"name": "ink", "scale": 0.5}]'}
    job, shown = ask(site, files={name: (None, str(value)) for name, value in asked.items()})
    assert (job.ask.quality, job.ask.priority, job.ask.deadline_s, job.ask.loras) == (30, 0, 60.0, (("ink", 0.5),))
    assert shown["loras"] == [{"name": "ink", "scale": 0.5}]
    assert job.ask.key == "ann"


def test_every_kind_of_picture_gets_a_name_of_ours(site):
    _, service = site
    image, video = ("../../etc/passwd", picture()), ("x\0y", clip())
    given = [
        ("prompt", (None, "x")), ("input_reference", image), ("last_image", image), ("control_video", video),
        ("mask", video), ("references", image), ("references", image),
        ("control_strength[]", (None, "0.5")), ("control_strength[]", (None, "1")),
    ]  # fmt: skip
    job, shown = ask(site, files=given)
    assert job.ask.request["references"] == ["inputs/reference-0.png", "inputs/reference-1.png"]
    assert job.ask.request["image"] == "inputs/image.png"
    assert job.ask.request["control_strength"] == [0.5, 1.0]
    assert files(service, job) == [
        "control_video.mp4", "image.png", "last_image.png", "mask.mp4", "reference-0.png", "reference-1.png",
    ]  # fmt: skip
    assert shown["inputs"] == ["control_video", "input_reference", "last_image", "mask", "references"]
    assert (shown["num_frames"], shown["size"]) == (13, "96x64")
    remixed, _ = ask(site, f"/{job.id}/remix", json={"prompt": "y"})
    assert remixed.ask.request == {**job.ask.request, "prompt": "y"}
    assert files(service, remixed) == files(service, job)
    assert remixed.ask.resolved == job.ask.resolved


def test_an_image_decides_the_shape_as_in_the_engine(site):
    job, shown = ask(site, files={"prompt": (None, "x"), "input_reference": ("a", picture(50, 100))})
    assert "width" not in job.ask.request
    assert (shown["width"] % 16, shown["height"] % 16) == (0, 0)
    assert shown["height"] > 1.5 * shown["width"]


def test_edits_follow_their_video(site):
    video = {"prompt": (None, "x"), "video": ("v", clip())}
    job, shown = ask(site, "/edits", files=video)
    assert (job.ask.kind, job.ask.request["video"], job.ask.request["width"]) == ("edit", "inputs/video.mp4", 96)
    assert (shown["num_frames"], shown["fps"], shown["seconds"]) == (13, 8.0, "1.5")
    large, shown = ask(site, "/edits", files={**video, "video": ("v", clip(5, 320, 192))})
    assert "width" not in large.ask.request
    assert shown["width"] * shown["height"] <= 96 * 64
    _, shown = ask(site, "/edits", files={**video, "size": (None, "32x32"), "num_frames": (None, "5")})
    assert (shown["size"], shown["num_frames"]) == ("32x32", 5)


def test_extensions_go_on_with_the_size_and_rate_of_their_video(site):
    video = {"prompt": (None, "x"), "video": ("v", clip()), "seconds": (None, "2")}
    job, shown = ask(site, "/extensions", files=video)
    asked = {name: job.ask.request[name] for name in ("width", "height", "fps", "num_frames", "extends")}
    assert asked == {"width": 96, "height": 64, "fps": 8.0, "num_frames": 17, "extends": "inputs/extends.mp4"}
    assert (shown["num_frames"], shown["seconds"], shown["kind"]) == (13 + 16, "3.5", "extension")
    client, _ = site
    long = {"prompt": (None, "x"), "video": ("v", clip()), "seconds": (None, "1")}
    assert ask(site, "/edits", files=long)[1]["num_frames"] == 9
    odd = client.post("/v1/videos/extensions", files={**video, "video": ("v", clip(5, 90, 64))})
    assert (odd.status_code, odd.json()["error"]["param"]) == (400, "video")


def test_of_an_extension_the_frames_that_are_made_are_weighed_whenever_it_is_made(site, monkeypatch):
    weighed = []
    monkeypatch.setattr(site[1], "work_s", lambda request: float(weighed.append(request["num_frames"]) or 1))
    for seconds, made in (({"seconds": (None, "2")}, 17), ({}, 33)):
        job, _ = ask(site, "/extensions", files={"prompt": (None, "x"), "video": ("v", clip()), **seconds})
        remixed, shown = ask(site, f"/{job.id}/remix", json={"prompt": "y"})
        assert remixed.ask.resolved == job.ask.resolved
        assert shown["num_frames"] == 13 + made - 1
        assert weighed[-2:] == [made, made]


def test_pictures_that_change_make_another_request_of_the_same_key(site):
    client, _ = site
    headers = {"idempotency-key": "pictures"}
    request = {"prompt": (None, "x"), "input_reference": ("a", picture())}
    first = client.post("/v1/videos", files=request, headers=headers).json()
    assert client.post("/v1/videos", files=request, headers=headers).json()["id"] == first["id"]
    changed = {**request, "input_reference": ("a", picture(64, 96))}
    assert client.post("/v1/videos", files=changed, headers=headers).status_code == 409
    url = "DATA:image/png;base64," + base64.b64encode(picture()).decode()
    for same in (url, {"image_url": url}):
        again = client.post("/v1/videos", json={"prompt": "x", "input_reference": same}, headers=headers)
        assert again.json()["id"] == first["id"]
    odd = {"prompt": "x", "input_reference": "data:image/png;base64,!"}
    assert client.post("/v1/videos", json=odd, headers=headers).json()["error"]["param"] == "input_reference"


def test_the_same_key_of_an_edit_whose_source_is_gone(site):
    _, service = site
    source, _ = ask(site, json={"prompt": "x"})
    service.complete(source.id, clip())
    for path in ("/edits", "/extensions"):
        asked = {"json": {"prompt": "y", "video": {"id": source.id}}, "headers": {"idempotency-key": path}}
        first, _ = ask(site, path, **asked)
        kept = service.jobs.pop(source.id)
        assert ask(site, path, **asked)[0].id == first.id
        service.jobs[source.id] = kept


def test_numbers_of_parts_that_the_model_has_are_taken(site):
    client, service = site
    assert ask(site, json={"prompt": "x", "control_strength": 0.5})[0].ask.request["control_strength"] == 0.5
    for experts, status in ((1, 400), (2, 200), (None, 200)):
        service.card = msgspec.structs.replace(ALL, experts=experts)
        answer = client.post("/v1/videos", json={"prompt": "x", "guidance_scale_2": 2})
        assert answer.status_code == status
        estimate = client.get("/v1/estimate?guidance_scale_2=2")
        assert estimate.status_code == status
    service.card = ALL


def test_who_waits_too_long_for_a_turn_is_asked_to_come_again(monkeypatch):
    monkeypatch.setattr("frameloom.serve.api.body._TURN_S", 0.01)

    async def story():
        turns = Turns()
        async with turns.one(), turns.one():
            with pytest.raises(ApiError) as caught:
                await turns.one().__aenter__()
            assert (caught.value.status, caught.value.code, caught.value.retry_s) == (503, "busy", 10)
        async with turns.one(), turns.one():
            pass

    asyncio.run(story())


def test_of_many_requests_few_have_their_videos_in_memory_at_a_time(tmp_path, monkeypatch):
    """Bodies of some bytes name videos of any size: what is read for them is held until it is kept."""
    held, most = [], []

    async def read(site, job_id, name):
        held.append(name)
        most.append(len(held))
        return b"video"

    async def examined(self, data, param, name):
        return Given(shape=Shape(name=f"{name}.mp4", width=96, height=64, num_frames=5, fps=8.0), data=data)

    class Slow(MemoryService):
        async def accept(self, job_id, ask, inputs, repeat):
            await asyncio.sleep(0.002)
            del held[: len(inputs)]
            return await super().accept(job_id, ask, inputs, repeat)

    async def story():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            source = (await client.post("/v1/videos", json={"prompt": "x"})).json()["id"]
            service.complete(source, b"video")
            body = {"prompt": "y", "video": {"id": source}}
            made = [client.post(f"/v1/videos/{kind}", json=body) for kind in ("edits", "extensions") * 4]
            ids = [answer.json()["id"] for answer in await asyncio.gather(*made)]
            again = [client.post(f"/v1/videos/{video_id}/remix", json={"prompt": "z"}) for video_id in ids]
            assert {answer.status_code for answer in await asyncio.gather(*again)} == {200}

    monkeypatch.setattr("frameloom.serve.api.collect._read", read)
    monkeypatch.setattr(Examiner, "video", examined)
    service = Slow(tmp_path)
    app = make_app(service, ServeConfig(data=tmp_path))
    asyncio.run(story())
    assert (len(most), max(most), held) == (16, 2, [])


def test_what_came_from_urls_is_accounted_for_until_it_is_kept(tmp_path, monkeypatch):
    async def fetch(url, param, hold):
        hold(1_000_000)
        return b"picture"

    async def examined(self, data, param, name):
        return Given(shape=Shape(name=f"{name}.png", width=96, height=64), data=data)

    class Watched(MemoryService):
        async def accept(self, job_id, ask, inputs, repeat):
            held.append(app.state.site.bodies.held // 1_000_000)
            return await super().accept(job_id, ask, inputs, repeat)

    async def story():
        body = {"prompt": "x", "input_reference": "http://a.example/1", "references": ["http://a.example/2"]}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            assert (await client.post("/v1/videos", json=body)).status_code == 200

    held = []
    monkeypatch.setattr(Examiner, "image", examined)
    app = make_app(Watched(tmp_path), ServeConfig(data=tmp_path))
    app.state.site.fetcher = SimpleNamespace(fetch=fetch)
    asyncio.run(story())
    assert (held, app.state.site.bodies.held) == ([2], 0)


def test_an_unfinished_video_cannot_be_made_from(site):
    client, service = site
    job, _ = ask(site, json={"prompt": "x"})
    body = {"prompt": "y", "video": {"id": job.id}}
    error = client.post("/v1/videos/edits", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("video_not_ready", "video")
    service.fail(job.id, "cancelled")
    assert client.post("/v1/videos/edits", json=body).json()["error"]["code"] == "video_failed"
    other, _ = ask(site, json={"prompt": "x"})
    service.complete(other.id, clip())
    edit, shown = ask(site, "/edits", json={"prompt": "y", "video": {"id": other.id}, "strength": 0.5})
    assert (shown["source_video_id"], edit.ask.request["strength"]) == (other.id, 0.5)
    (service.folder(other.id) / "video-1.mp4").unlink()
    gone = client.post("/v1/videos/edits", json={"prompt": "y", "video": {"id": other.id}})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "video_expired")
