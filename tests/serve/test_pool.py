"""The pool keeps its workers running whatever they do, ends them with the server, and never believes what is late."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from attempts import children, is_alive, order_in, until, workshop

from frameloom import wire
from frameloom.serve.config import Patience
from frameloom.serve.workers.pool import Pauses
from frameloom.serve.workers.worker import Died
from frameloom.types import EngineConfig
from frameloom.wire import Cancelled, Done, Failed, News

CPU = EngineConfig(device="cpu")
PROLOGUE = """
import os, signal, socket, sys, time
from frameloom import wire
line = socket.socket(fileno=wire.Setup.of(sys.argv[1]).socket)
frames = wire.Frames(from_worker=False)
waiting = []
CARD = wire.Card(model="m", defaults={}, width_multiple=16, height_multiple=16, temporal=4, takes=(), needs_image=False,
                 previews=False, device="d", dtype="t", torch="0")
def tell(message):
    line.sendall(wire.frame(message))
def hear():
    while not waiting:
        data = line.recv(65536)
        if not data:
            sys.exit(0)
        waiting.extend(frames.feed(data))
    return waiting.pop(0)
def done(order, fence=None):
    return wire.Done(job=order.job, fence=order.fence if fence is None else fence, num_bytes=1, sha256="", width=16,
                     height=16, num_frames=1, fps=8, made={})
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A pool whose workers run a script in place of an engine: what they say is what the script says."""

    def make(script, *, pauses=None, **config):
        path = tmp_path / "worker.py"
        path.write_text(PROLOGUE + textwrap.dedent(script))

        def command(setup):
            return [sys.executable, str(path), wire.msgspec.json.encode(setup).decode()]

        monkeypatch.setattr(wire.Setup, "command", command)
        return workshop(tmp_path, pauses=pauses, **config)

    return make


def test_what_is_said_of_another_attempt_does_not_count(scripted, tmp_path):
    script = """
    tell(wire.Ready(card=CARD))
    while True:
        order = hear()
        tell(wire.News(job=order.job, fence=order.fence - 1, stage="denoise", step=9, total=9))
        tell(done(order, order.fence - 1))
        tell(wire.News(job=order.job, fence=order.fence, stage="denoise", step=1, total=9))
        tell(wire.Cancelled(job=order.job, fence=order.fence) if order.job == "b" else done(order))
        tell(done(order))
    """
    with scripted(script) as shop:
        for name, kind in (("a", Done), ("b", Cancelled), ("c", Done)):
            news: list[News] = []
            told = shop.run(order_in(tmp_path / name, fence=7), news.append)
            assert (type(told), told.fence) == (kind, 7)
            assert [(one.job, one.fence, one.step) for one in news] == [(name, 7, 1)]


@pytest.mark.parametrize("what", ["garbage", "length", "orders"])
def test_what_is_no_message_ends_the_worker_and_not_the_server(scripted, tmp_path, what):
    said = {
        "garbage": "b'\\0\\0\\0\\5hello'",
        "length": "b'\\xff' * 9",
        "orders": "wire.frame(wire.Stop())",
    }[what]
    script = f"""
    tell(wire.Ready(card=CARD))
    order = hear()
    if order.fence == 1:
        line.sendall({said})
        time.sleep(600)
    tell(done(order))
    hear()
    """
    with scripted(script) as shop:
        told = shop.run(order_in(tmp_path / "a"))
        assert isinstance(told, Died)
        assert told.reason.startswith("said what is no message")
        assert isinstance(shop.run(order_in(tmp_path / "a", fence=2)), Done)


def test_a_worker_that_dies_at_its_start_is_started_again_after_growing_pauses(scripted, tmp_path):
    script = f"""
    with open({str(tmp_path / "starts")!r}, "a") as file:
        print(time.monotonic(), file=file)
    if sum(1 for _ in open({str(tmp_path / "starts")!r})) > 4:
        tell(wire.Ready(card=CARD))
        hear()
    sys.stderr.write("the card fell out\\n")
    sys.exit(3)
    """
    with scripted(script, pauses=Pauses(first_s=0.2, most_s=0.5)) as shop:
        until(lambda: shop.first.trouble)
        sentence = "worker 0 does not start: it ended with exit code 3 (the card fell out); the log may say more"
        assert shop.first.trouble == sentence
        shop.ready()
        assert shop.first.trouble == ""
    times = [float(line) for line in (tmp_path / "starts").read_text().split()]
    between = [after - before for before, after in itertools.pairwise(times)]
    assert len(between) == 4
    assert all(least <= took for least, took in zip((0.2, 0.4, 0.5, 0.5), between, strict=True)), (
        "each pause is twice the last, up to the most"
    )


def test_a_worker_that_was_ready_is_started_again_at_once(scripted):
    with scripted("tell(wire.Ready(card=CARD))\nhear()\n", pauses=Pauses(first_s=600)) as shop:
        for _ in range(3):
            shop.ready()
            pid = shop.first.pid
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: shop.first.pid != pid)
        shop.ready()


def test_what_keeps_an_engine_from_being_built_is_said_and_tried_seldom(tmp_path):
    config = {"model": str(tmp_path / "nowhere"), "engine": CPU}
    with workshop(tmp_path, pauses=Pauses(unable_s=600), **config) as shop:
        until(lambda: shop.first.trouble)
        assert "nowhere" in shop.first.trouble
        assert not shop.first.is_ready


def test_a_worker_that_is_stopped_is_killed_and_its_attempt_died(tmp_path):
    with workshop(tmp_path, engine=CPU, patience=Patience(beat_s=3)) as shop:
        shop.ready()
        pid = shop.first.pid

        def on_news(news):
            if news.stage == "denoise" and news.step >= 2:
                os.kill(pid, signal.SIGSTOP)

        order = order_in(tmp_path / "a", request={"prompt": "a", "num_frames": 9, "steps": 500})
        assert shop.run(order, on_news) == Died(reason="gave no sign of life for 3 s")
        assert not is_alive(pid)
        assert isinstance(shop.run(order_in(tmp_path / "b")), Done)


def test_a_worker_that_lives_and_makes_no_progress_is_killed(scripted, tmp_path):
    script = """
    tell(wire.Ready(card=CARD))
    order = hear()
    for work in range(100000):
        tell(wire.Beat(work=work if order.fence == 2 and work < 17 else 17))
        time.sleep(0.2)
        if order.fence == 2 and work == 17:
            tell(done(order))
            hear()
    """
    with scripted(script, patience=Patience(progress_s=3.0)) as shop:
        told = shop.run(order_in(tmp_path / "a"))
        assert told == Died(reason="made no progress for 3 s")
        assert isinstance(shop.run(order_in(tmp_path / "a", fence=2)), Done), "steady work may take longer than that"


def test_a_worker_that_never_gets_ready_is_killed(scripted):
    with scripted("time.sleep(600)", patience=Patience(start_s=0.5), pauses=Pauses(first_s=600)) as shop:
        until(lambda: shop.first.trouble)
        assert "did not start within 0.5 s" in shop.first.trouble


def test_an_attempt_is_ended_by_force_with_the_reason_of_who_does_it(scripted, tmp_path):
    script = """
    tell(wire.Ready(card=CARD))
    order = hear()
    tell(wire.News(job=order.job, fence=order.fence, stage="denoise", step=1, total=9))
    time.sleep(600)
    """
    with scripted(script) as shop:
        told = shop.run(order_in(tmp_path / "a"), lambda _: shop.first.kill("did not stop when it was asked to"))
        assert told == Died(reason="did not stop when it was asked to")


def test_a_worker_that_is_just_being_started_can_be_ended(scripted):
    for _ in range(3):
        with scripted("time.sleep(600)"):
            pass


def test_how_a_worker_ended_is_said(scripted, tmp_path):
    script = """
    tell(wire.Ready(card=CARD))
    order = hear()
    if order.fence == 1:
        sys.exit(0)
    if order.fence == 2:
        sys.stderr.write("no more\\n")
        sys.exit(9)
    os.kill(os.getpid(), signal.SIGSEGV)
    """
    with scripted(script) as shop:
        said = [shop.run(order_in(tmp_path / "a", fence=fence)).reason for fence in (1, 2, 3)]
    assert said == ["ended with exit code 0", "ended with exit code 9 (no more)", "was killed by SIGSEGV"]


def test_nobody_is_asked_what_a_request_takes_before_there_is_a_worker(scripted):
    with scripted("time.sleep(600)") as shop:
        assert shop.foresee({"steps": 3}) is None


def test_a_worker_that_dies_owes_no_answer(scripted):
    with scripted("tell(wire.Ready(card=CARD))\nhear()\nsys.exit(1)\n") as shop:
        shop.ready()
        assert shop.foresee({"steps": 3}) is None


SERVER = """
import asyncio, sys
from pathlib import Path
from frameloom.serve.config import ServeConfig
from frameloom.serve.workers.pool import Pool
from frameloom.types import EngineConfig

async def main():
    engine = EngineConfig(device="cpu")
    pool = Pool(ServeConfig(data=Path(sys.argv[1]), gpus_per_worker=int(sys.argv[2]), engine=engine))
    await pool.start()
    if sys.argv[3] == "ready":
        await pool.all[0].ready()
    print(pool.all[0].pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize(("ranks", "when"), [(1, "ready"), (1, "starting"), (2, "ready")])
def test_a_server_that_is_killed_leaves_no_orphans(tmp_path, ranks, when):
    words = [sys.executable, "-c", SERVER, str(tmp_path), str(ranks), when]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            if when == "ready":
                server.stdout.readline()
            started = until(
                lambda: len(found := children(server.pid)) >= (ranks if ranks == 1 else 1 + ranks) and found
            )
        finally:
            os.kill(server.pid, signal.SIGKILL)
        until(lambda: not any(map(is_alive, started)))


def test_a_pool_that_stops_has_ended_its_workers(tmp_path):
    with workshop(tmp_path, engine=CPU, gpus_per_worker=2) as shop:
        shop.ready()
        started = [shop.first.pid, *children(shop.first.pid)]
        assert len(started) == 3
    until(lambda: not any(map(is_alive, started)), 10)


def test_the_log_of_a_worker_is_the_servers_own(scripted, tmp_path, caplog):
    script = r"""
    import json
    sys.stderr.write(json.dumps({"level": "info", "message": "chosen", "job": "j"}) + "\n")
    sys.stderr.write("x" * 200000 + "\nwords\xff of a library\n")
    sys.stderr.flush()
    tell(wire.Ready(card=CARD))
    hear()
    """
    with caplog.at_level("INFO", "frameloom"), scripted(script) as shop:
        shop.ready()
        until(lambda: "of a library" in caplog.text)
    (record,) = [one for one in caplog.records if one.getMessage() == "chosen"]
    assert (record.levelname, record.job, record.worker) == ("INFO", "j", 0)


def test_failures_are_passed_on_as_they_are(scripted, tmp_path):
    script = """
    tell(wire.Ready(card=CARD))
    while True:
        order = hear()
        tell(wire.Failed(job=order.job, fence=order.fence, code="out_of_memory", message="m", again=True))
    """
    with scripted(script) as shop:
        told = shop.run(order_in(tmp_path / "a"))
    assert told == Failed(job="a", fence=1, code="out_of_memory", message="m", again=True)
