"""Small jobs that are made as one batch: real workers, what becomes of each, and who is left alone."""

import asyncio
import json
import logging
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from attempts import REQUEST, order_in, until, workshop

import frameloom
from frameloom.engine.worker.batch import Batch as WorkersBatch
from frameloom.pipeline.reader import each_frame
from frameloom.serve.config import Keeping, Patience, ServeConfig
from frameloom.serve.jobs.board import Board, Live
from frameloom.serve.jobs.company import Companions
from frameloom.serve.jobs.core import Core
from frameloom.serve.jobs.job import Ask, Job
from frameloom.serve.jobs.known import Known
from frameloom.serve.jobs.line import WaitingLine
from frameloom.serve.jobs.pace import Pace
from frameloom.serve.jobs.speed import alike_of
from frameloom.serve.metrics import Metrics
from frameloom.serve.service import Nobody
from frameloom.serve.workers.pool import Pool
from frameloom.serve.workers.worker import Died
from frameloom.types import EngineConfig
from frameloom.wire import Cancelled, Card, Done, Failed, Together

LONG_S = 240.0
CPU = EngineConfig(device="cpu", compilation="off")
SMALL = {"prompt": "a red ball", "width": 64, "height": 32, "num_frames": 9, "steps": 4, "seed": 5}
LONG = {**REQUEST, "steps": 300}
CARD = Card(
    model="m", defaults={"width": 64, "height": 64, "num_frames": 17, "steps": 25, "fps": 8, "guidance_scale": 3.0},
    width_multiple=16, height_multiple=16, temporal=4, takes=("image",), needs_image=False, previews=True,
    device="cpu", dtype="float32", torch="none", small_tokens=80,
)  # fmt: skip


# --- a worker and its batch ---


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with workshop(tmp_path_factory.mktemp("data"), engine=CPU) as made:
        made.ready()
        yield made


class Batch:
    """Attempts that were begun as one, and what was told of them."""

    def __init__(self, shop, orders):
        self.shop, self.orders, self.news, self.heard = shop, orders, [], {}
        self.outcomes = shop.do(self._begin())

    async def _begin(self):
        await self.shop.first.ready()
        outcomes = self.shop.first.begin_together(self.orders, self.news.append)
        for order, outcome in zip(self.orders, outcomes, strict=True):  # so much was heard when it ended
            outcome.add_done_callback(lambda _, job=order.job: self.heard.update({job: len(self.news)}))
        return outcomes

    def steps(self, order, until=None):
        return [news.step for news in self.news[:until] if news.job == order.job and news.stage == "denoise"]

    def cancel(self, order):
        self.shop.loop.call_soon_threadsafe(self.shop.first.cancel, order.job, order.fence)

    def ends(self, index):
        return self.shop.do(_result(self.outcomes[index]))


async def _result(future):
    return await future


def orders_in(folder, *requests):
    return [order_in(folder / str(index), request=request) for index, request in enumerate(requests)]


def test_each_video_of_a_batch_is_that_of_the_run_alone(shop, tmp_path):
    requests = [REQUEST, {**REQUEST, "prompt": "a blue star", "seed": 7, "negative_prompt": "red"}]
    batch = Batch(shop, orders_in(tmp_path, *requests))
    told = [batch.ends(index) for index in (0, 1)]
    assert [type(one) for one in told] == [Done, Done]
    with frameloom.load(device="cpu", compilation="off") as engine:
        for one, order, request in zip(told, batch.orders, requests, strict=True):
            own = {"prompt": request["prompt"], "seed": request["seed"], "together": 2}
            assert own.items() <= one.made.items()
            engine.generate_to(tmp_path / "alone.mp4", **request)
            alone, mine = (np.stack(list(each_frame(path))) for path in (tmp_path / "alone.mp4", order.output))
            # Before the codec they are within one level of 255 (tests/engine/test_batches.py); it may make more of it.
            assert np.abs(alone.astype(int) - mine.astype(int)).mean() < 0.5
    assert batch.steps(batch.orders[1])[-1] == REQUEST["steps"]
    assert not list(tmp_path.glob("*/journal"))
    assert isinstance(shop.run(order_in(tmp_path / "after")), Done)


def test_one_of_a_batch_is_cancelled_and_the_other_goes_on(shop, tmp_path):
    batch = Batch(shop, orders_in(tmp_path, {**LONG, "steps": 200}, {**LONG, "steps": 200}))
    first, second = batch.orders
    until(lambda: batch.steps(first))
    batch.cancel(first)
    assert isinstance(batch.ends(0), Cancelled)
    assert max(batch.steps(second, until=batch.heard[first.job])) < 200
    assert isinstance(batch.ends(1), Done)
    assert not list((tmp_path / "0").iterdir())


def test_an_attempt_is_over_before_it_is_told(tmp_path):
    """Else a cancel of what comes next, by the same name, would find nothing to stop."""
    said = []
    line = SimpleNamespace(tell=lambda _: said.append("told"), done_with=lambda _: said.append("over"))
    (order,) = orders_in(tmp_path, LONG)
    batch = WorkersBatch(None, line, Together(runs=(order,)))
    batch._end(batch._attempts[0], Cancelled(job=order.job, fence=order.fence))
    assert said == ["over", "told"]


def test_a_batch_that_nobody_wants_stops_at_that_step(shop, tmp_path):
    longest = {**LONG, "steps": 1000}  # on a busy machine a cancel may come seconds after the first step
    batch = Batch(shop, orders_in(tmp_path, longest, longest))
    until(lambda: batch.steps(batch.orders[0]))
    for order in batch.orders:
        batch.cancel(order)
    assert [type(batch.ends(index)) for index in (0, 1)] == [Cancelled, Cancelled]
    assert isinstance(shop.run(order_in(tmp_path / "after")), Done)
    assert batch.steps(batch.orders[0])[-1] < 1000


@pytest.mark.parametrize("other", [{"steps": 3}, {"prompt": " "}, {"num_frames": 8}, {"width": 65}], ids=str)
def test_what_is_no_batch_fails_as_one_and_each_is_to_be_made_alone(shop, tmp_path, other):
    batch = Batch(shop, orders_in(tmp_path, REQUEST, {**REQUEST, **other}))
    for index in (0, 1):
        told = batch.ends(index)
        assert isinstance(told, Failed)
        assert (told.together, told.again) == (True, True)
    assert isinstance(shop.run(order_in(tmp_path / "after")), Done)


def test_a_file_that_cannot_be_written_is_the_fault_of_one(shop, tmp_path):
    orders = orders_in(tmp_path, REQUEST, REQUEST)
    os.rmdir(tmp_path / "0")
    batch = Batch(shop, orders)
    failed, done = batch.ends(0), batch.ends(1)
    assert isinstance(failed, Failed)
    assert failed.together
    assert isinstance(done, Done)


def test_a_worker_that_dies_takes_all_of_its_batch_along(shop, tmp_path):
    batch = Batch(shop, orders_in(tmp_path, LONG, LONG))
    until(lambda: batch.steps(batch.orders[0]))
    os.kill(shop.first.pid, signal.SIGKILL)
    assert [type(batch.ends(index)) for index in (0, 1)] == [Died, Died]
    assert isinstance(shop.run(order_in(tmp_path / "after")), Done)


# --- the server ---


class Told(Nobody):
    """Who was begun together, and who was begun."""

    def __init__(self):
        self.batches, self.begun, self.first, self.lost_for = [], [], [], []

    def together(self, jobs):
        self.batches.append([job.id for job in jobs])

    def started(self, job, *, is_first):
        self.begun.append((job.id, job.attempts))
        self.first += [job.id] * is_first

    def lost(self, job, reason):
        self.lost_for.append((job.id, reason))


class Server:
    """A core with a pool of one, which knows what alone takes: batches are tried at once."""

    def __init__(self, data, **config):
        self.told = Told()
        self.config = ServeConfig(
            data=data, engine=CPU, keeping=Keeping(reserve_bytes=0), patience=Patience(grace_s=0.0), **config
        )
        self.pool = Pool(self.config)
        self.core = Core(self.config, self.pool, witness=self.told)

    async def ask(self, *, key="local", priority=0, deadline_s=None, work_s=0.0, **changes) -> str:
        request = {name: value for name, value in (SMALL | changes).items() if value is not None}
        ask = Ask(
            key=key, kind="create", model="m", request=request, priority=priority, deadline_s=deadline_s, work_s=work_s
        )
        return (await self.core.accept(self.core.new_id(), ask, {}, None)).job.id

    async def until(self, job_id, holds):
        async with asyncio.timeout(LONG_S):
            async for standing in self.core.watch(job_id):
                if holds(standing):
                    return
        raise AssertionError("it ended before")

    async def ended(self, job_id) -> Job:
        async with asyncio.timeout(LONG_S):
            async for standing in self.core.watch(job_id):
                last = standing
        return last.job

    async def ask_together(self, *asked):
        """Ask for several while the worker is kept from them; alone is known to be slow for small jobs."""
        for steps in (4, 200):
            shape = f"64x32, 9 frames, {steps} steps, with guidance"
            for _ in range(3):
                self.core._known.pace.learn(shape, 1, 1e6)
        other = await self.ask(width=32, steps=1000)
        await self.until(other, lambda standing: standing.stage == "denoise")
        names = [await self.ask(**one) for one in asked]
        await self.core.cancel(other)
        return names


def test_like_jobs_are_made_together_and_others_alone(tmp_path):
    async def story():
        server = Server(tmp_path / "data", batch=4)
        async with server.core:
            names = await server.ask_together(
                {"seed": 1}, {"seed": 2, "steps": 3}, {"seed": 3, "prompt": "a blue star", "negative_prompt": "red"},
                {"seed": 4, "priority": 1}, {"seed": 5, "key": "someone"}, {"seed": 6, "deadline_s": 500.0},
            )  # fmt: skip
            first, _, second, urgent, third, _ = names
            jobs = [await server.ended(name) for name in names]
            assert [(job.status, job.attempts) for job in jobs] == 6 * [("completed", 1)]
            assert [sorted(batch) for batch in server.told.batches] == [sorted([first, second, third])]
            begun = [name for name, _ in server.told.begun]
            assert begun.index(urgent) < begun.index(first)
            for job, seed in zip(jobs, (1, 2, 3, 4, 5, 6), strict=True):
                video = server.core.folder(job.id) / job.result.video
                assert video.stat().st_size == job.result.num_bytes
                assert job.result.made["seed"] == seed
                assert job.result.made.get("together") == (3 if seed in (1, 3, 5) else None)

    asyncio.run(story())


def test_one_of_a_batch_is_cancelled_another_deleted_and_the_last_completes(tmp_path):
    async def story():
        server = Server(tmp_path / "data", batch=4)
        async with server.core:
            names = await server.ask_together(*({"seed": seed, "steps": 200} for seed in (1, 2, 3)))
            for name in names:
                await server.until(name, lambda standing: standing.stage == "denoise" and standing.step > 0)
            assert len(server.told.batches) == 1
            await server.core.cancel(names[0])
            assert await server.core.delete(names[1])
            cancelled = await server.ended(names[0])
            assert (cancelled.status, cancelled.error.code) == ("failed", "cancelled")
            assert await server.core.standing(names[1]) is None
            assert not server.core.folder(names[1]).exists()
            last = await server.ended(names[2])
            assert (last.status, last.attempts) == ("completed", 1)
            assert server.told.lost_for == []

    asyncio.run(story())


def test_a_batch_whose_worker_dies_is_made_one_at_a_time(tmp_path):
    async def story():
        server = Server(tmp_path / "data", batch=4)
        async with server.core:
            names = await server.ask_together(*({"seed": seed, "steps": 200} for seed in (1, 2)))
            await server.until(names[1], lambda standing: standing.stage == "denoise" and standing.step > 0)
            os.kill(server.pool.all[0].pid, signal.SIGKILL)
            jobs = [await server.ended(name) for name in names]
            assert [(job.status, job.attempts) for job in jobs] == 2 * [("completed", 2)]
            assert server.told.batches == [names]
            assert sorted(server.told.lost_for) == sorted((name, "died") for name in names)
            assert all("together" not in job.result.made for job in jobs)

    asyncio.run(story())


def test_a_batch_that_fails_costs_nobody_an_attempt(tmp_path):
    async def story():
        server = Server(tmp_path / "data", batch=4)
        async with server.core:
            *good, bad = await server.ask_together({"seed": 1}, {"seed": 2}, {"seed": 3, "prompt": " "})
            jobs = [await server.ended(name) for name in good]
            assert [(job.status, job.attempts) for job in jobs] == 2 * [("completed", 1)]
            refused = await server.ended(bad)
            assert (refused.status, refused.attempts, refused.error.code) == ("failed", 1, "invalid_request")
            assert [len(batch) for batch in server.told.batches] == [3]
            assert {reason for _, reason in server.told.lost_for} == {"together"}
            assert sorted(server.told.first) == sorted({name for name, _ in server.told.begun})  # once each

    asyncio.run(story())


def test_by_default_everything_is_made_alone(tmp_path):
    async def story():
        server = Server(tmp_path / "data")
        async with server.core:
            names = await server.ask_together({"seed": 1}, {"seed": 2})
            assert [(await server.ended(name)).status for name in names] == ["completed", "completed"]
            assert server.told.batches == []

    asyncio.run(story())


# --- who goes with whom, and whether it is worth it ---


def job_of(**changes):
    ask = {"key": "k", "kind": "create", "model": "m", "request": SMALL | changes.pop("request", {})} | changes
    return Job(id="video_" + 32 * "0", ask=Ask(**ask), status="queued", created_at=0.0)


def test_only_prompts_and_seeds_may_differ():
    alike = alike_of(job_of(), CARD)
    assert alike is not None
    assert alike[0] == "64x32, 9 frames, 4 steps, with guidance"
    same = [{"prompt": "x"}, {"negative_prompt": "y"}, {"seed": 9}, {"fps": 8}, {"flow_shift": None}]
    for request in same:
        assert alike_of(job_of(request=request), CARD) == alike
    others = [
        {"request": {"width": 32}}, {"request": {"height": 64}}, {"request": {"num_frames": 5}},
        {"request": {"steps": 5}}, {"request": {"fps": 9}}, {"request": {"guidance_scale": 1.0}},
        {"request": {"guidance_scale_2": 2.0}}, {"request": {"flow_shift": 5.0}},
        {"loras": (("a", 1.0),)}, {"loras": (("a", 0.5),)}, {"quality": 5},
    ]  # fmt: skip
    found = [alike_of(job_of(**other), CARD) for other in others]
    assert None not in found
    assert len({alike, *found}) == len(others) + 1


@pytest.mark.parametrize(
    "request_",
    [
        {"image": "inputs/a.png"}, {"video": "inputs/a.mp4"}, {"references": ["inputs/a.png"]},
        {"extends": "inputs/a.mp4"}, {"windows": True}, {"window_frames": 5},
        {"width": 160, "height": 160}, {"num_frames": 21},
    ],
)  # fmt: skip
def test_large_ones_and_those_with_pictures_or_windows_go_alone(request_):
    assert alike_of(job_of(request=request_), CARD) is None


def test_nothing_goes_together_where_the_model_is_unknown_or_says_so():
    assert alike_of(job_of(), None) is None
    assert alike_of(job_of(), msgspec.structs.replace(CARD, small_tokens=0)) is None


class Waiting:
    """Jobs that wait for a worker of a known model, whose batches are fast."""

    def __init__(self, tmp_path, *asks, **config):
        config = ServeConfig(data=tmp_path, batch=4, **config)
        self.line, self.known = WaitingLine(), Known(config)
        self.known.card = CARD
        self.board = Board(self.line, None, workers=config.workers)
        self.companions = Companions(config, self.known, self.line, self.board, lambda: 100.0)
        for number, ask in enumerate(asks):
            job = replace(job_of(**ask.get("ask", {})), id=f"j{number}", **ask.get("job", {}))
            self.board.add(Live(job=job))
            self.line.add(job)
        for _ in range(3):
            self.known.learn_together(job_of(), 1, 1.0)

    def company(self, free=1):
        """Who goes with the first in line."""
        lead = self.board.live(self.line.first())
        self.line.begin(lead.job.id)
        lead.phase = "taken"
        return [live.job.id for live in self.companions.of(lead, free=free)]


def test_the_first_in_line_decides_and_what_waits_is_shared_with_free_workers(tmp_path):
    assert Waiting(tmp_path, *6 * [{}]).company() == ["j1", "j2", "j3"]
    assert Waiting(tmp_path, *6 * [{}]).company(free=2) == ["j1", "j2"]
    assert Waiting(tmp_path, *3 * [{}]).company(free=2) == ["j1"]
    assert Waiting(tmp_path, *3 * [{}]).company(free=3) == []
    assert Waiting(tmp_path, *6 * [{}], gpus_per_worker=2).company() == []
    unlike = {"ask": {"request": {"flow_shift": 2.0}}}
    assert Waiting(tmp_path, unlike, {}, {}, unlike).company() == ["j3"]
    assert Waiting(tmp_path, {}, {"ask": {"priority": -1}}, {"ask": {"key": "other"}}).company() == ["j2"]
    assert Waiting(tmp_path, {}, {"job": {"fence": 1}}, {}).company() == ["j2"]
    assert Waiting(tmp_path, {"job": {"fence": 1}}, {}, {}).company() == []


def test_company_is_not_kept_by_those_whose_deadline_is_near(tmp_path):
    near = {"ask": {"deadline_s": 139.0, "work_s": 10.0}}  # 39 s are left, and a batch of four may take 40
    far = {"ask": {"deadline_s": 141.0, "work_s": 10.0}}
    assert Waiting(tmp_path, {}, near, far, {}).company() == ["j2", "j3"]
    assert Waiting(tmp_path, near, far, {}).company() == []
    assert Waiting(tmp_path, {}, {"ask": {"deadline_s": 9e9}}, {}).company() == ["j2"]  # nobody knows what it takes
    assert Waiting(tmp_path, {}, {}, patience=Patience(deadline_s=50.0)).company() == []


def test_company_is_kept_as_long_as_it_is_fast(tmp_path):
    waiting = Waiting(tmp_path, *6 * [{}])
    for number in (4, 3):
        for _ in range(3):
            waiting.known.learn_together(job_of(), number, 2.0 * number)
    assert waiting.company() == ["j1"]
    unknown = Waiting(tmp_path, *6 * [{}])
    unknown.known.pace = Pace()
    assert unknown.company() == []


def test_both_ways_take_turns_until_the_faster_one_is_known(caplog):
    caplog.set_level(logging.INFO, logger="frameloom")
    slow, fast = Pace(), Pace()
    ways = []
    for _ in range(12):
        for pace, each_s in ((slow, 2.5), (fast, 1.0)):
            number = pace.number("tiny", 4)
            pace.learn("tiny", number, 2.0 if number == 1 else each_s * number)
            ways.append(number)
    assert ways[0::2][:6] == [1, 4, 1, 4, 1, 4]
    assert ways[1::2][6:] == 6 * [4]
    # Of the slow ones smaller batches are tried, too, before all go alone.
    assert ways[0::2][6:] == [3, 3, 3, 2, 2, 2]
    assert slow.number("tiny", 4) == 1
    said = [record.message for record in caplog.records]
    assert said == [
        f"tiny: no {number} are made together any more: they took 2.50 s each, and alone 2.00 s" for number in (4, 3, 2)
    ]
    again = Pace(fast.text)
    assert (again.number("tiny", 4), again.number("tiny", 1), again.text) == (4, 1, fast.text)
    assert Pace(slow.text).number("tiny", 4) == 1
    assert Pace("what is this").number("tiny", 4) == 1
    json.loads(slow.text)


def test_batches_that_come_to_nothing_are_given_up():
    pace = Pace()
    pace.learn("tiny", 1, 2.0)
    for _ in range(3):
        pace.learn("tiny", 2, None)
        pace.learn("tiny", 1, 2.0)
    assert pace.number("tiny", 2) == 1


def test_batches_are_counted():
    metrics = Metrics()
    metrics.together([job_of(), job_of(), job_of()])
    page = metrics.page({}).decode()
    assert "frameloom_batches_total 1.0" in page
    assert "frameloom_jobs_together_total 3.0" in page
