"""What a user of the official `openai` package does, and what the server answers; run by server_clients.py.

`python scenario.py TEXT_URL IMAGE_URL PICTURE` in an environment that has nothing but `openai`: two servers, one whose
model starts from text and videos, one that starts from an image. Prints JSON: every step, and "ok" or what was wrong.
"""

import base64
import json
import logging
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai

KEY = "sk-alice-0123456789abcdef"
TIGHT = "sk-tight-0123456789abcdef"  # of a key that may have one job waiting
SMALL = {"num_frames": 9, "steps": 2, "seed": 3}
SIZE = "64x64"
LONG = {"num_frames": 81, "steps": 200, "seed": 3}
PROMPT = "a red circle rising"


class Tries(logging.Handler):
    """Counts how often the client asks again, by what it logs."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """A record of the client."""
        self.count += record.getMessage().startswith("Retrying request")


TRIES = Tries()
logging.getLogger("openai").addHandler(TRIES)
logging.getLogger("openai").setLevel(logging.INFO)


def expect(what: bool, told: Any) -> None:
    """Fail with what was told instead."""
    if not what:
        raise AssertionError(told)


def refused(call: Callable[[], Any], kind: type[Exception], status: int, code: str | None, **more: Any) -> Any:
    """The error of a call: its class, its status, its code, how often the client tried, and other attributes."""
    tries, before = more.pop("tries", 1), TRIES.count
    try:
        answer = call()
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        told = {"class": type(error).__name__, "status": error.status_code, "code": error.code, "param": error.param,
                "type": error.type, "request_id": error.request_id, "tries": 1 + TRIES.count - before,
                "message": body.get("message")}  # fmt: skip
        expect(isinstance(error, kind) and error.status_code == status, told)
        expect(code is None or error.code == code, told)
        expect(told["tries"] == tries, told)
        expect(bool(told["request_id"] and told["message"] and told["type"]), told)
        expect(all(told[name] == value for name, value in more.items()), told)
        return error
    raise AssertionError(f"no error, but {answer!r}")


class Scenario:
    """All steps, in the order in which they are run; a step is a method whose name starts with `_step_`."""

    def __init__(self, text_url: str, image_url: str, picture: bytes) -> None:
        self.text = openai.OpenAI(base_url=text_url, api_key=KEY, max_retries=2)
        self.image = openai.OpenAI(base_url=image_url, api_key=KEY, max_retries=2)
        self.picture, self.made = picture, ""

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """By name."""
        for name in dir(type(self)):
            if name.startswith("_step_"):
                yield name.removeprefix("_step_").replace("_", " "), getattr(self, name)

    def small(self, client: openai.OpenAI | None = None, **more: Any) -> Any:
        """Create a small video, and wait."""
        options = {"prompt": PROMPT, "size": SIZE, "extra_body": SMALL, "poll_interval_ms": 100} | more
        video = (client or self.text).videos.create_and_poll(**options)
        expect(video.status == "completed", video)
        return video

    def _step_01_create_by_text(self) -> None:
        video = self.text.videos.create(prompt=PROMPT, size=SIZE, extra_body=SMALL)
        expect(video.object == "video" and video.status in ("queued", "in_progress"), video)
        expect(video.prompt == PROMPT and video.size == SIZE and video.progress < 100, video)
        done = self.text.videos.poll(video.id, poll_interval_ms=100)
        expect(done.status == "completed" and done.progress == 100 and done.error is None, done)
        expect(done.completed_at >= done.created_at and done.expires_at > done.completed_at, done)
        self.made = video.id

    def _step_02_create_and_poll(self) -> None:
        again = self.small()
        one, other = (self.text.videos.download_content(i).read() for i in (self.made, again.id))
        expect(one == other, "the same request has other bytes")

    def _step_03_seconds_and_size_alone(self) -> None:
        video = self.text.videos.create(prompt=PROMPT, seconds="4", size=SIZE, extra_body={"steps": 1})
        expect(video.seconds.startswith("4") and video.size == SIZE, video)
        self.text.videos.delete(video.id)

    def _step_04_retrieve(self) -> None:
        video = self.text.videos.retrieve(self.made)
        expect(video.id == self.made and video.status == "completed" and video.seconds, video)

    def _step_05_list_pages(self) -> None:
        made = [self.text.videos.create(prompt=PROMPT, size=SIZE, extra_body=SMALL).id for _ in range(5)]
        for order in ("asc", "desc"):
            listed = [video.id for video in self.text.videos.list(limit=2, order=order)]
            expect(len(listed) == len(set(listed)), "a video is listed twice")
            expect([i for i in listed if i in made] == (made if order == "asc" else made[::-1]), listed)
        page = self.text.videos.list(limit=2)
        expect(len(page.data) == 2 and page.has_more and page.last_id == page.data[-1].id, page)
        for video in made:
            self.text.videos.delete(video)

    def _step_06_download_variants(self) -> None:
        starts = {"video": (b"ftyp", 4), "thumbnail": (b"\xff\xd8", 0), "spritesheet": (b"\xff\xd8", 0)}
        for variant, (magic, place) in starts.items():
            got = self.text.videos.download_content(self.made, variant=variant)
            content = got.read()
            expect(content[place:].startswith(magic), (variant, content[:16]))
            told = got.response.headers
            expect(int(told["content-length"]) == len(content) and told["etag"], dict(told))
        with self.text.videos.with_streaming_response.download_content(self.made) as streamed:
            expect(sum(map(len, streamed.iter_bytes())) > 1000, "nothing streamed")

    def _step_07_json(self) -> None:
        video = self.text.videos.create(
            prompt=PROMPT, size=SIZE, extra_body=SMALL, extra_headers={"Content-Type": "application/json"}
        )
        expect(video.num_frames == SMALL["num_frames"] and video.seed == SMALL["seed"], video)

    def _step_08_bracket_fields(self) -> None:
        extra = {**SMALL, "loras": [{"name": "bold", "scale": 0.5}]}
        for body in (extra, {**SMALL, "loras": json.dumps(extra["loras"])}):
            try:
                self.text.videos.create(prompt=PROMPT, size=SIZE, extra_body=body)
            except openai.BadRequestError as wrong:  # the server has registered none: the name has arrived
                expect("bold" in wrong.message, wrong.message)
                continue
            raise AssertionError("a LoRA that nobody has registered was taken")

    def _step_09_remix(self) -> None:
        video = self.text.videos.remix(self.made, prompt="a blue square falling")
        expect(video.remixed_from_video_id == self.made and video.prompt == "a blue square falling", video)
        expect(self.text.videos.poll(video.id, poll_interval_ms=100).status == "completed", video)

    def _step_10_edit(self) -> None:
        if not hasattr(self.text.videos, "edit"):
            raise NotImplementedError("this client has no edit")
        source = self.text.videos.download_content(self.made).read()
        video = self.text.videos.edit(prompt="a blue circle rising", video=source, extra_body={"steps": 2, "seed": 1})
        expect(self.text.videos.poll(video.id, poll_interval_ms=100).status == "completed", video)
        body = {"prompt": "a blue circle rising", "video": {"id": self.made}, "steps": 2, "seed": 1}
        video = self.text.post("/videos/edits", body=body, cast_to=openai.types.Video)  # edit() takes files alone
        expect(self.text.videos.poll(video.id, poll_interval_ms=100).status == "completed", video)

    def _step_11_image_file(self) -> None:
        for given in (self.picture, ("start.png", self.picture, "image/png"), ("lies.jpg", self.picture, "image/jpeg")):
            self.small(self.image, input_reference=given)

    def _step_12_image_url_in_brackets(self) -> None:
        url = "data:image/png;base64," + base64.b64encode(self.picture).decode()
        body = {**SMALL, "input_reference": {"image_url": url}}
        self.small(self.image, extra_body=body)
        self.small(self.image, extra_body=body, extra_headers={"Content-Type": "application/json"})

    def _step_13_extend(self) -> None:
        if not hasattr(self.image.videos, "extend"):
            raise NotImplementedError("this client has no extend")
        first = self.small(self.image, input_reference=self.picture)
        source = self.image.videos.download_content(first.id).read()
        video = self.image.videos.extend(prompt=PROMPT, video=source, seconds="1", extra_body={"steps": 1})
        done = self.image.videos.poll(video.id, poll_interval_ms=100)
        expect(done.status == "completed" and float(done.seconds) > float(first.seconds), done)

    def _step_14_delete(self) -> None:
        video = self.small()
        gone = self.text.videos.delete(video.id)
        expect(gone.id == video.id and gone.deleted is True and gone.object == "video.deleted", gone)
        refused(lambda: self.text.videos.retrieve(video.id), openai.NotFoundError, 404, "video_not_found")
        refused(lambda: self.text.videos.delete(video.id), openai.NotFoundError, 404, "video_not_found")

    def _step_20_keys(self) -> None:
        stranger = self.text.with_options(api_key="sk-nobody-0123456789abcdef")
        error = refused(stranger.videos.list, openai.AuthenticationError, 401, None)
        expect(error.response.headers["www-authenticate"].startswith("Bearer"), dict(error.response.headers))
        other = self.text.with_options(api_key=TIGHT)
        refused(lambda: other.videos.retrieve(self.made), openai.NotFoundError, 404, "video_not_found")

    def _step_21_unknown(self) -> None:
        videos = self.text.videos
        for name in ("video_nothing", "../../etc/passwd", "a b", "%00"):
            refused(lambda name=name: videos.retrieve(name), openai.NotFoundError, 404, None)
        refused(lambda: videos.download_content("video_nothing"), openai.NotFoundError, 404, "video_not_found")
        refused(lambda: videos.remix("video_nothing", prompt="x"), openai.NotFoundError, 404, "video_not_found")
        refused(lambda: videos.create(prompt=PROMPT, model="sora-9"), openai.NotFoundError, 404, "model_not_found")
        refused(lambda: self.text.models.retrieve("sora-9"), openai.NotFoundError, 404, "model_not_found")
        refused(lambda: list(videos.list(after="video_nothing")), openai.NotFoundError, 404, None)

    def _step_22_bad_values(self) -> None:
        videos = self.text.videos
        for param, value in (
            ("size", "65x64"), ("size", "big"), ("seconds", "-1"), ("seconds", "nan"), ("steps", "many"),
            ("steps", 10**30), ("num_frames", 10), ("guidance_scale", "1e400"), ("seed", 1.5),
            ("input_reference", b"no picture"),
        ):  # fmt: skip
            given: dict[str, Any] = {"prompt": PROMPT, "size": SIZE}
            if param in ("size", "seconds", "input_reference"):
                given[param] = value
            else:
                given["extra_body"] = {param: value}
            refused(lambda given=given: videos.create(**given), openai.BadRequestError, 400, None, param=param)
        bad = {"extra_body": {"stepz": 3}}
        error = refused(lambda: videos.create(prompt=PROMPT, **bad), openai.BadRequestError, 400, None, param="stepz")
        expect("steps" in error.message, error.message)
        content = lambda: videos.download_content(self.made, variant="poster")  # noqa: E731
        refused(content, openai.BadRequestError, 400, None, param="variant")

    def _step_23_content_too_early(self) -> None:
        video = self.text.videos.create(prompt=PROMPT, size="128x128", extra_body=LONG)
        content = lambda: self.text.videos.download_content(video.id)  # noqa: E731
        refused(content, openai.NotFoundError, 404, "video_not_ready")
        ended = self.text.post(f"/videos/{video.id}/cancel", cast_to=openai.types.Video)
        expect(ended.id == video.id, ended)
        ended = self.text.videos.poll(video.id, poll_interval_ms=100)
        expect(ended.status == "failed" and ended.error.code == "cancelled", ended)
        refused(content, openai.APIStatusError, 400, "video_failed")
        self.text.videos.delete(video.id)

    def _step_24_repeats(self) -> None:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        create = self.text.videos.create
        one, other = (create(prompt=PROMPT, size=SIZE, extra_body=SMALL, extra_headers=headers).id for _ in range(2))
        expect(one == other, "the same Idempotency-Key gave two videos")
        again = lambda: create(prompt="another", size=SIZE, extra_body=SMALL, extra_headers=headers)  # noqa: E731
        refused(again, openai.ConflictError, 409, "idempotency_mismatch")

    def _step_25_full_queue(self) -> None:
        tight = self.text.with_options(api_key=TIGHT)
        long = self.text.videos.create(prompt=PROMPT, size="128x128", extra_body=LONG)
        while self.text.videos.retrieve(long.id).status == "queued":
            time.sleep(0.1)
        waits = tight.videos.create(prompt=PROMPT, size=SIZE, extra_body=SMALL)
        once = tight.with_options(max_retries=0)
        more = lambda client: client.videos.create(prompt=PROMPT, size=SIZE, extra_body=SMALL)  # noqa: E731
        error = refused(lambda: more(once), openai.RateLimitError, 429, "key_queue_full")
        pause = error.response.headers["retry-after"]
        expect(1 <= int(pause) <= 120, pause)
        before = len(list(tight.videos.list()))
        self.text.videos.delete(long.id)
        got, begun = None, time.monotonic()
        while got is None and time.monotonic() < begun + 300:  # as it is told to: it gets through
            try:
                got = more(tight)
            except openai.RateLimitError as full:
                time.sleep(float(full.response.headers["retry-after"]))
        expect(got is not None and before == 1, (got, before))
        for video in (waits, got):
            tight.videos.delete(video.id)

    def _step_26_too_large(self) -> None:
        large = b"\x89PNG\r\n\x1a\n" + bytes(65 * 2**20)
        create = lambda: self.text.videos.create(prompt=PROMPT, input_reference=large)  # noqa: E731
        refused(create, openai.APIStatusError, 413, None)

    def _step_27_wrong_type_and_method(self) -> None:
        headers = {"Content-Type": "text/plain"}
        create = lambda: self.text.videos.create(prompt=PROMPT, extra_headers=headers)  # noqa: E731
        refused(create, openai.APIStatusError, 415, None)
        refused(lambda: self.text.patch("/videos", cast_to=object), openai.APIStatusError, 405, None)
        refused(lambda: self.text.get("/nothing", cast_to=object), openai.NotFoundError, 404, None)

    def _step_28_models(self) -> None:
        (model,) = self.text.models.list().data
        expect(self.text.models.retrieve(model.id).id == model.id, model)
        video = self.text.videos.create(prompt=PROMPT, model=model.id, size=SIZE, extra_body=SMALL)
        expect(video.model == model.id, video)

    def _step_29_characters(self) -> None:
        if not hasattr(self.text.videos, "create_character"):
            raise NotImplementedError("this client has no characters")
        create = lambda: self.text.videos.create_character(name="x", video=b"x")  # noqa: E731
        refused(create, openai.NotFoundError, 404, "not_supported")


def main() -> None:
    """Run every step, whatever became of those before."""
    warnings.simplefilter("ignore", DeprecationWarning)
    text_url, image_url, picture, *wanted = sys.argv[1:]
    told = {"client": f"openai {openai.__version__}, Python"}
    scenario = Scenario(text_url, image_url, Path(picture).read_bytes())
    for name, step in scenario.steps():
        if wanted and name[:2] not in wanted:
            continue
        try:
            step()
            told[name[3:]] = "ok"
        except NotImplementedError as lacks:
            told[name[3:]] = str(lacks)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1].lineno
            told[name[3:]] = f"WRONG {type(error).__name__} {error!s:.600} (line {where})"
    print(json.dumps(told, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
