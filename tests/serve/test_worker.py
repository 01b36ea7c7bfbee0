"""A worker makes the bytes that a process alone makes, whatever happens on the way, and says what became of a job."""

import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attempts import REQUEST, order_in, until, workshop
from PIL import Image

import frameloom
from frameloom.engine import jobs
from frameloom.pipeline.media import Video, read_frames
from frameloom.serve.workers.worker import Died
from frameloom.types import EngineConfig
from frameloom.wire import Cancelled, Done, Failed

CPU = EngineConfig(device="cpu")
LONG = {**REQUEST, "steps": 120}  # so long that a step is kept on the way
ALONE = """
import hashlib, json, sys
from pathlib import Path
import frameloom
requests, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
with frameloom.load(device="cpu") as engine:
    for index, request in enumerate(requests):
        engine.generate_to(folder / f"{index}.mp4", **request)
        print(hashlib.sha256((folder / f"{index}.mp4").read_bytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The digests of the videos of REQUEST and of LONG, each made in a process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    words = [sys.executable, "-c", ALONE, json.dumps([REQUEST, LONG]), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return dict(zip(("short", "long"), done.stdout.split(), strict=True))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with workshop(tmp_path_factory.mktemp("data"), engine=CPU) as made:
        made.ready()
        yield made


def digest_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def look_at(path):
    """The kind of a picture, its size, and its pixels."""
    with Image.open(path) as image:
        return image.format, image.size, np.asarray(image, dtype=float)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def check_done(told, order, digest):
    assert isinstance(told, Done), told
    assert (told.job, told.fence) == (order.job, order.fence)
    assert told.sha256 == digest == digest_of(order.output)
    assert told.num_bytes == os.path.getsize(order.output)


def test_a_video_has_the_bytes_of_a_process_alone(shop, alone, tmp_path):
    order, news = order_in(tmp_path / "job"), []
    told = shop.run(order, news.append)
    check_done(told, order, alone["short"])
    assert (told.width, told.height, told.num_frames, told.fps) == (64, 64, 9, 8)
    assert told.made["steps"] == 4
    assert told.made["model"] == "frameloom-shapes"
    assert str(tmp_path) not in json.dumps(told.made)
    stages = [one.stage for one in news]
    assert stages == sorted(stages, key=["text", "denoise", "decode", "encode"].index)
    assert [one.step for one in news if one.stage == "denoise"][-1] == 4
    assert news[-1].previewed >= 1
    assert look_at(order.preview)[0] == "PNG"


def test_the_small_pictures_show_the_video(shop, tmp_path):
    order = order_in(tmp_path / "job", request={**REQUEST, "width": 96})
    shop.run(order)
    frames, _ = read_frames(order.output)
    assert look_at(order.sheet)[:2] == ("JPEG", (3 * 96, 3 * 64))
    kind, size, shown = look_at(order.thumbnail)
    assert (kind, size) == ("JPEG", (96, 64))
    middle, last = (np.abs(shown - frames[index]).mean() for index in (4, 8))
    assert middle < last, "the frame in the middle is another one than the last"
    assert names_in(tmp_path / "job") == {"video-1.mp4", "thumbnail-1.jpg", "sheet-1.jpg", "preview.png", "journal"}


def test_a_large_video_has_a_small_thumbnail(shop, tmp_path):
    order = order_in(tmp_path / "job", request={**REQUEST, "width": 640, "height": 64, "num_frames": 1, "steps": 1})
    assert isinstance(shop.run(order), Done)
    assert look_at(order.thumbnail)[1] == (512, 51)


@pytest.mark.parametrize(("stage", "step"), [("text", 0), ("denoise", 3), ("decode", 1), ("encode", 1)])
def test_a_cancelled_attempt_stops_and_leaves_nothing(shop, alone, tmp_path, stage, step):
    order, seen = order_in(tmp_path / "job", request=LONG), []

    def on_news(news):
        if news.stage == stage and news.step >= step:
            shop.first.cancel(order.job, order.fence)
        seen.append(news)

    told = shop.run(order, on_news)
    if stage in ("encode", "text") and isinstance(told, Done):
        pytest.skip("it was done before it could be stopped")
    assert told == Cancelled(job=order.job, fence=order.fence)
    assert not {path for path in names_in(tmp_path / "job") if path.startswith(("video", "thumb", "sheet", "."))}
    if stage == "denoise":
        assert seen[-1].stage == "denoise"
        assert seen[-1].step < LONG["steps"]
    again = order_in(tmp_path / "next")
    check_done(shop.run(again), again, alone["short"])


def test_a_cancel_of_another_attempt_does_nothing(shop, alone, tmp_path):
    order = order_in(tmp_path / "job", fence=2)
    told = shop.run(order, lambda _: shop.first.cancel(order.job, 1))
    check_done(told, order, alone["short"])


def strike(shop, order, *, at=0):
    """Run an order, and kill its worker at a step, or before that once a step is kept; whether one is."""
    kept = []

    def on_news(news):
        found = any(Path(order.journal).glob("step-*.safetensors"))
        if news.stage == "denoise" and (found or news.step >= at) and not kept:
            os.kill(shop.first.pid, signal.SIGKILL)
            kept.append(found)

    told = shop.run(order, on_news)
    assert told == Died(reason="was killed (SIGKILL), as the system does when memory runs out")
    return kept[0]


def test_an_attempt_after_a_kill_goes_on_and_has_the_same_bytes(shop, alone, tmp_path, caplog):
    kept = strike(shop, order_in(tmp_path / "job", request=LONG), at=100)
    (tmp_path / "job" / ".video-1.mp4.partial-00000001abcd").write_bytes(b"half")  # what it might have left
    order, steps = order_in(tmp_path / "job", fence=2, request=LONG), []
    with caplog.at_level("INFO", "frameloom"):
        told = shop.run(order, lambda news: news.stage == "denoise" and steps.append(news.step))
    check_done(told, order, alone["long"])
    assert steps[1] > 1 or not kept, "it went on, and did not begin again"
    assert "going on from what an earlier attempt of this job has left" in caplog.text
    assert not [name for name in names_in(tmp_path / "job") if name.startswith(".")]


def test_a_video_that_was_finished_but_not_told_of_is_not_made_again(shop, alone, tmp_path):
    first = order_in(tmp_path / "job")
    shop.run(first)
    second, stages = order_in(tmp_path / "job", fence=2), set()
    told = shop.run(second, lambda news: stages.add(news.stage))
    check_done(told, second, alone["short"])
    assert stages == {"encode"}
    os.unlink(first.output)
    os.unlink(second.output)
    third, stages = order_in(tmp_path / "job", fence=3), set()
    check_done(shop.run(third, lambda news: stages.add(news.stage)), third, alone["short"])
    assert "denoise" in stages


def left_by_one_that_was_cancelled(shop, folder):
    """What an attempt has left that had just begun."""
    order = order_in(folder)
    told = shop.run(order, lambda _: shop.first.cancel(order.job, order.fence))
    assert isinstance(told, Cancelled)
    return folder / "journal"


def test_a_journal_that_does_not_fit_costs_time_and_not_the_job(shop, alone, tmp_path, caplog):
    journal = left_by_one_that_was_cancelled(shop, tmp_path / "first")
    for name in ("damaged", "empty", "facts"):
        shutil.copytree(journal, tmp_path / name / "journal")
    (tmp_path / "damaged" / "journal" / "job.json").write_text("{}")
    (tmp_path / "empty" / "journal" / "job.json").unlink()
    described = tmp_path / "facts" / "journal" / "job.json"
    told = json.loads(described.read_text())
    told["origin"]["facts"]["torch"] = "0.1"
    del told["format"], told["sha256"]
    described.write_text(json.dumps({"format": jobs.FORMAT, "sha256": jobs.digest_of(told), **told}))
    why = {"damaged": "cannot be read", "empty": "it had hardly begun", "facts": "torch was 0.1"}
    for name, said in why.items():
        order = order_in(tmp_path / name, fence=2)
        with caplog.at_level("WARNING", "frameloom"):
            check_done(shop.run(order), order, alone["short"])
        assert "is put aside, and the video is made from its start" in caplog.text
        assert said in caplog.text
        caplog.clear()
    told = shop.run(order_in(tmp_path / "first", fence=2, quality=20))
    assert isinstance(told, Done)
    assert told.sha256 != alone["short"]
    assert "it was asked for with other options" in caplog.text


def test_a_journal_that_a_stopped_process_holds_is_put_aside(shop, alone, tmp_path):
    journal = left_by_one_that_was_cancelled(shop, tmp_path / "job")
    with (journal / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        order = order_in(tmp_path / "job", fence=2)
        check_done(shop.run(order), order, alone["short"])
    assert names_in(tmp_path / "job") >= {"video-2.mp4", "journal"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_frames": 10}, "10 frames are not possible"),
        ({"width": 722}, "width 722 is not a multiple of"),
        ({"image": "{folder}/inputs/image.png"}, "cannot take an image"),
        ({"video": "{folder}/inputs/video.mp4"}, "the video cannot be read"),
        ({"colour": "red"}, "option 'colour' is unknown"),
    ],
)
def test_a_request_that_cannot_be_computed_is_refused_in_one_sentence(shop, tmp_path, given, said):
    (tmp_path / "job" / "inputs").mkdir(parents=True)
    (tmp_path / "job" / "inputs" / "video.mp4").write_bytes(b"no video")
    given = {
        name: value.format(folder=tmp_path / "job") if isinstance(value, str) else value
        for name, value in given.items()
    }
    told = shop.run(order_in(tmp_path / "job", request={**REQUEST, **given}))
    assert isinstance(told, Failed)
    assert (told.code, told.again) == ("invalid_request", False)
    assert said in told.message
    assert str(tmp_path) not in told.message


def test_a_video_that_is_gone_on_with_needs_a_model_that_takes_an_image(shop, tmp_path):
    front = order_in(tmp_path / "front")
    shop.run(front)
    told = shop.run(order_in(tmp_path / "job", extends=front.output))
    assert isinstance(told, Failed)
    assert told.code == "invalid_request"
    assert "use a model that takes an image" in told.message


def limited(shop, kind, value):
    """Set a limit of the worker's process; returns the one before."""
    return resource.prlimit(shop.first.pid, kind, (value, resource.RLIM_INFINITY))[0]


def test_memory_that_runs_out_fails_the_job_and_not_the_worker(shop, alone, tmp_path):
    pid = shop.first.pid
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    before = limited(shop, resource.RLIMIT_AS, pages * resource.getpagesize() + 100_000_000)
    large = {**REQUEST, "width": 1024, "height": 1024, "num_frames": 49, "steps": 1}
    told = shop.run(order_in(tmp_path / "job", request=large))
    limited(shop, resource.RLIMIT_AS, before)
    assert isinstance(told, Failed)
    assert told.code == "out_of_memory"
    assert "smaller or a shorter video" in told.message
    again = order_in(tmp_path / "next")
    check_done(shop.run(again), again, alone["short"])
    assert shop.first.pid == pid


def test_a_disk_that_is_full_fails_the_job_and_not_the_worker(shop, alone, tmp_path):
    pid = shop.first.pid
    before = limited(shop, resource.RLIMIT_FSIZE, 2000)
    told = shop.run(order_in(tmp_path / "job"))
    limited(shop, resource.RLIMIT_FSIZE, before)
    assert isinstance(told, Failed)
    assert told.code == "insufficient_storage"
    assert not [name for name in names_in(tmp_path / "job") if name.startswith((".", "video"))]
    again = order_in(tmp_path / "job", fence=2)
    check_done(shop.run(again), again, alone["short"])
    assert shop.first.pid == pid


def test_questions_are_answered_meanwhile_and_change_no_bit(shop, alone, tmp_path):
    order, answers, asked = order_in(tmp_path / "job", request=LONG), [], iter(range(1, 1000))

    async def ask(frames):
        answers.append(await shop.first.foresee({"num_frames": 9 + 4 * frames, "steps": 3}))

    waiting = []

    def on_news(news):
        if news.stage == "denoise" and len(waiting) < 8:
            waiting.append(shop.loop.create_task(ask(next(asked))))

    check_done(shop.run(order, on_news), order, alone["long"])
    until(lambda: len(answers) == len(waiting))
    assert len(answers) == 8
    assert all(answer is not None and answer.seconds > 0 and answer.memory_bytes > 0 for answer in answers)
    assert answers[0].resolved == {"width": 64, "height": 64, "num_frames": 13, "steps": 3, "fps": 8.0}


def test_what_cannot_be_computed_is_foreseen_so(shop):
    answer = shop.foresee({"num_frames": 10})
    assert answer.refusal.startswith("10 frames are not possible")


def test_a_worker_says_what_its_model_can_do(shop):
    card = shop.first.card
    assert card.defaults["num_frames"] == 17
    assert (card.width_multiple, card.height_multiple, card.temporal) == (16, 16, 4)
    assert (card.takes, card.needs_image, card.previews, card.ranks) == (("video",), False, True, 1)
    assert card.experts == 1
    until(lambda: shop.first.usual_seconds)
    assert shop.first.usual_seconds > 0


def test_a_worker_gives_way_to_the_server(shop):
    assert os.getpriority(os.PRIO_PROCESS, shop.first.pid) > os.getpriority(os.PRIO_PROCESS, 0)


def test_a_video_is_redone_from_one_that_is_given(shop, tmp_path):
    front = order_in(tmp_path / "front")
    shop.run(front)
    order = order_in(tmp_path / "job", request={**REQUEST, "video": front.output, "strength": 0.5})
    told = shop.run(order)
    assert isinstance(told, Done)
    assert told.made["video"] == "video-1.mp4"
    with frameloom.load(device="cpu") as engine:
        engine.generate_to(tmp_path / "alone.mp4", **{**REQUEST, "video": front.output, "strength": 0.5})
    assert told.sha256 == digest_of(tmp_path / "alone.mp4")


@pytest.fixture(scope="module")
def tiny(checkpoint_of):
    """A model that may start from an image."""
    return str(checkpoint_of("per-token timesteps"))


@pytest.fixture(scope="module")
def image_shop(tmp_path_factory, tiny):
    engine = EngineConfig(device="cpu", dtype="float32")
    with workshop(tmp_path_factory.mktemp("data"), model=tiny, name="tiny", engine=engine) as made:
        made.ready()
        yield made


SMALL = {"prompt": "a ball", "width": 64, "height": 32, "num_frames": 5, "steps": 2, "seed": 1, "fps": 12}


def test_a_video_is_gone_on_with_from_its_last_frame(image_shop, tiny, tmp_path):
    assert image_shop.first.card.takes == ("image", "video")
    assert not image_shop.first.card.previews
    front = order_in(tmp_path / "front", request=SMALL)
    assert isinstance(image_shop.run(front), Done)
    request = {"prompt": "it bounces", "num_frames": 9, "steps": 2, "seed": 2}
    order = order_in(tmp_path / "job", request=request, extends=front.output)
    told = image_shop.run(order)
    assert isinstance(told, Done), told
    assert (told.width, told.height, told.num_frames, told.fps) == (64, 32, 5 + 8, 12)
    before, _ = read_frames(front.output)
    with frameloom.load(tiny, device="cpu", dtype="float32") as engine:
        new = engine.generate(**request, image=before[-1], width=64, height=32)
    both = np.concatenate([before, new.frames[1:]])
    assert told.sha256 == digest_of(Video(frames=both, fps=12).save(tmp_path / "both.mp4"))


def test_a_video_that_is_gone_on_with_after_a_kill_has_the_same_bytes(image_shop, tmp_path):
    front = order_in(tmp_path / "front", request=SMALL)
    image_shop.run(front)
    request = {"prompt": "it bounces", "num_frames": 9, "steps": 1000, "seed": 2}
    whole = image_shop.run(order_in(tmp_path / "whole", request=request, extends=front.output))
    assert isinstance(whole, Done)
    first = order_in(tmp_path / "job", request=request, extends=front.output)
    strike(image_shop, first)
    second = order_in(tmp_path / "job", fence=2, request=request, extends=front.output)
    told = image_shop.run(second)
    check_done(told, second, whole.sha256)
