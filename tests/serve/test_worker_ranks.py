"""A worker of several ranks: they begin, stop and end together, and a rank that dies costs one attempt."""

import os
import signal

import pytest
from attempts import REQUEST, children, is_alive, order_in, until, workshop

from frameloom.serve.workers.worker import Died
from frameloom.types import EngineConfig
from frameloom.wire import Cancelled, Done, Failed

LONG = {**REQUEST, "steps": 120}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with workshop(tmp_path_factory.mktemp("data"), gpus_per_worker=2, engine=EngineConfig(device="cpu")) as made:
        made.ready()
        yield made


@pytest.fixture(scope="module")
def whole(shop, tmp_path_factory):
    """The digest of the video of LONG that nothing disturbed."""
    told = shop.run(order_in(tmp_path_factory.mktemp("whole") / "job", request=LONG))
    assert isinstance(told, Done), told
    return told.sha256


def ranks_of(shop):
    shop.ready()
    return sorted(children(shop.first.pid))


@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_all_ranks_stop_at_the_same_step_and_go_on_with_the_next_job(shop, tmp_path, stage):
    before = ranks_of(shop)
    assert len(before) == 2
    assert shop.first.card.ranks == 2
    order = order_in(tmp_path / "job", request={**LONG, "num_frames": 33})

    def on_news(news):
        if news.stage == stage:
            shop.first.cancel(order.job, order.fence)

    assert shop.run(order, on_news) == Cancelled(job=order.job, fence=order.fence)
    assert {path.name for path in (tmp_path / "job").iterdir()} <= {"journal", "preview.png"}
    assert isinstance(shop.run(order_in(tmp_path / "next")), Done)
    assert ranks_of(shop) == before, "nobody had to be started again"


def test_a_request_that_cannot_be_computed_costs_no_rank(shop, tmp_path):
    before = ranks_of(shop)
    told = shop.run(order_in(tmp_path / "job", request={**REQUEST, "num_frames": 10}))
    assert isinstance(told, Failed)
    assert told.code == "invalid_request"
    assert isinstance(shop.run(order_in(tmp_path / "next")), Done)
    assert ranks_of(shop) == before


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_an_attempt_after_the_end_of_a_rank_goes_on_and_has_the_same_bytes(shop, whole, tmp_path, rank, number):
    before = ranks_of(shop)
    first, struck = order_in(tmp_path / "job", request=LONG), []

    def on_news(news):
        if news.stage == "denoise" and not struck and any((tmp_path / "job" / "journal").glob("step-*.safetensors")):
            struck.append(before[rank])
            os.kill(before[rank], number)

    told = shop.run(first, on_news)
    assert isinstance(told, Died)
    how = "was stopped" if number == signal.SIGSTOP else "was killed by SIGKILL"
    assert f"rank {rank} {how}" in told.reason
    until(lambda: not any(map(is_alive, before)))
    second, steps = order_in(tmp_path / "job", fence=2, request=LONG), []
    told = shop.run(second, lambda news: news.stage == "denoise" and steps.append(news.step))
    assert isinstance(told, Done), told
    assert told.sha256 == whole
    assert steps[1] > 1
    assert not set(ranks_of(shop)) & set(before)


def test_an_output_that_cannot_be_written_fails_the_attempt_and_the_ranks_are_started_anew(shop, tmp_path):
    folder = tmp_path / "job"
    order = order_in(folder)
    before = ranks_of(shop)
    (folder / "journal").write_text("in the way")
    (folder / "video-1.mp4").mkdir()
    told = shop.run(order)
    assert isinstance(told, Failed)
    assert (told.code, told.again, told.ends) == ("internal_error", True, True)
    assert str(tmp_path) not in told.message
    (folder / "video-1.mp4").rmdir()
    assert isinstance(shop.run(order_in(folder, fence=2)), Done)
    assert ranks_of(shop) != before
