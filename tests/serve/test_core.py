"""The service, with a real store on the disk and real processes as workers that do what prompts tell them."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from toy_workers import CARD, ToyWorker, ToyWorkers

from frameloom.serve.config import Keeping, Key, Limits, Patience, ServeConfig
from frameloom.serve.jobs.board import Live
from frameloom.serve.jobs.core import Core
from frameloom.serve.jobs.folder import DataFolderError
from frameloom.serve.jobs.job import Ask, Job, Repeat
from frameloom.serve.service import RefusedError
from frameloom.types import Lora
from frameloom.wire import News

LONG_S = 60.0


class Witnessed:
    """What the service told of its jobs."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    def accepted(self, job):
        self.told.append(("accepted", job.id))

    def refused(self, code):
        self.told.append(("refused", code))

    def started(self, job, *, is_first):
        self.told.append(("started", job.id))

    def advanced(self, job, stage, step):
        pass

    def lost(self, job, reason):
        self.told.append(("lost", job.id, reason))

    def ended(self, job):
        self.told.append(("ended", job.id))


class Server:
    """A core on a folder, with toy workers."""

    def __init__(self, data: Path, *, count: int = 1, delay_s: float = 0.0, clock=time.time, **config) -> None:
        config = {"keeping": Keeping(reserve_bytes=0), "patience": Patience(grace_s=0.0), "workers": count} | config
        self.data = data
        self.witness, self.workers = Witnessed(), ToyWorkers(count, delay_s=delay_s)
        self.core = Core(ServeConfig(data=data, **config), self.workers, witness=self.witness, clock=clock)

    async def __aenter__(self) -> "Server":
        await self.core.start()
        return self

    async def __aexit__(self, *_) -> None:
        await self.core.stop()

    async def ask(self, prompt="go", *, key="local", inputs=None, repeat=None, request=None, **changes):
        asked = Ask(key=key, kind="create", model="toy", request={"prompt": prompt} | (request or {}), **changes)
        standing = await self.core.accept(self.core.new_id(), asked, inputs or {}, repeat)
        return standing.job.id

    async def ended(self, job_id: str):
        async with asyncio.timeout(LONG_S):
            async for standing in self.core.watch(job_id):
                last = standing
        assert last.job.status in ("completed", "failed")
        return last

    async def until(self, job_id: str, holds):
        async with asyncio.timeout(LONG_S):
            async for standing in self.core.watch(job_id):
                if holds(standing):
                    return standing
        raise AssertionError("it ended before")

    async def running(self, job_id: str):
        return await self.until(job_id, lambda standing: standing.stage == "denoise")

    def attempts(self) -> list[tuple[str, int]]:
        try:
            lines = (self.data / "attempts.log").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(line.split()[0], int(line.split()[1])) for line in lines]


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def test_a_job_is_made_and_its_files_are_there_and_nothing_else(data):
    async def story():
        async with Server(data) as server:
            image = {"inputs": {"image.png": b"picture"}, "request": {"image": "inputs/image.png"}}
            job_id = await server.ask("steps=3 pause=0.05", **image)
            seen = [standing async for standing in server.core.watch(job_id)]
            job = seen[-1].job
            assert (job.status, seen[-1].progress, job.attempts) == ("completed", 100, 1)
            progress = [standing.progress for standing in seen]
            assert progress == sorted(progress)
            assert all(standing.progress < 100 for standing in seen[:-1])
            assert {standing.job.status for standing in seen} >= {"in_progress", "completed"}
            assert max(standing.preview for standing in seen) > 0
            folder = server.core.folder(job_id)
            assert (folder / job.result.video).stat().st_size == job.result.num_bytes
            await until(lambda: not (folder / "journal").exists())
            assert {path.name for path in folder.iterdir()} == {
                "inputs", job.result.video, job.result.thumbnail, job.result.sheet,
            }  # fmt: skip
            assert server.workers.all[0].orders[0].request["image"] == str(folder / "inputs" / "image.png")
            assert (folder / "inputs" / "image.png").read_bytes() == b"picture"
            assert job.expires_at == pytest.approx(job.completed_at + 7 * 86_400)
            assert server.core.card == CARD
            assert server.core.is_ready
            assert server.core.trouble == ""
            assert server.witness.told == [("accepted", job_id), ("started", job_id), ("ended", job_id)]

    asyncio.run(story())


def test_loras_are_made_with_as_strongly_as_they_are_registered_and_asked_for(data):
    async def story():
        async with Server(data, loras={"ink": "high:/inks/a.safetensors:0.5", "pen": "/pen:4"}) as server:
            made = await server.ended(await server.ask(loras=(("ink", -2.0), ("pen", 5.0))))
            assert made.job.status == "completed"
            assert server.workers.all[0].orders[0].loras == (
                Lora(path="/inks/a.safetensors", strength=-1.0, expert="high"), Lora(path="/pen", strength=20.0),
            )  # fmt: skip
            # As of a server that was started anew, with other LoRAs than those that jobs were taken for.
            for name, says in (("oil", "registered are: ink, pen"), ("pen", "give a scale of up to 5")):
                refused = (await server.ended(await server.ask(loras=((name, 6.0),)))).job
                assert (refused.status, refused.error.code) == ("failed", "invalid_request")
                assert says in refused.error.message

    asyncio.run(story())


async def until(holds) -> None:
    async with asyncio.timeout(LONG_S):
        while not holds():
            await asyncio.sleep(0.01)


def test_a_worker_that_dies_costs_an_attempt_and_the_third_is_the_last(data):
    async def story():
        async with Server(data) as server:
            once, poison, after = [await server.ask(prompt) for prompt in ("die=1", "die", "go")]
            assert (await server.ended(once)).job.attempts == 2
            failed = (await server.ended(poison)).job
            assert (failed.status, failed.attempts, failed.error.code) == ("failed", 3, "attempts_exhausted")
            assert "3 attempts came to nothing: the worker ended with status -9" in failed.error.message
            assert (await server.ended(after)).job.status == "completed"
            lost = [told for told in server.witness.told if told[0] == "lost"]
            assert lost == [("lost", once, "died")] + 3 * [("lost", poison, "died")]
            kept = (await server.ended(once)).job.result
            await until(lambda: len(list(server.core.folder(once).iterdir())) == 3)
            assert kept.video == "video-2.mp4"

    asyncio.run(story())


def test_what_a_worker_says_of_a_failure_decides(data):
    async def story():
        async with Server(data) as server:
            refused, again, full, lie = [await server.ask(prompt) for prompt in ("refuse", "again", "full", "lie")]
            found = {name: (await server.ended(name)).job for name in (refused, again, full, lie)}
            assert [(job.attempts, job.error.code) for job in found.values()] == [
                (1, "invalid_request"), (3, "attempts_exhausted"),
                (1, "insufficient_storage"), (3, "attempts_exhausted"),
            ]  # fmt: skip
            assert found[refused].error.message == "told to refuse"
            assert "its video has 0 bytes in place of" in found[lie].error.message

    asyncio.run(story())


def test_a_cancelled_job_that_waits_never_starts_and_one_that_runs_stops(data):
    async def story():
        async with Server(data) as server:
            runs, waits, last = [await server.ask(prompt) for prompt in ("steps=9999 pause=0.02", "go", "go")]
            await server.running(runs)
            assert (await server.core.standing(last)).position == 1
            cancelled = await server.core.cancel(waits)
            assert (cancelled.job.status, cancelled.job.error.code) == ("failed", "cancelled")
            assert (await server.core.standing(last)).position == 0
            assert (await server.core.cancel(runs)).job.cancelled
            assert (await server.core.cancel(runs)) is not None  # twice is fine
            stopped = (await server.ended(runs)).job
            assert (stopped.status, stopped.error.code, stopped.attempts) == ("failed", "cancelled", 1)
            assert (await server.ended(last)).job.status == "completed"
            assert (await server.core.cancel(last)).job.status == "completed"  # too late
            assert (await server.core.cancel(server.core.new_id())) is None
            assert [job for job, _ in server.attempts()] == [runs, last]
            assert server.workers.all[0].killed == []

    asyncio.run(story())


def test_a_worker_that_does_not_stop_is_killed(data, monkeypatch):
    monkeypatch.setattr("frameloom.serve.jobs.dispatch._CANCEL_S", 0.3)

    async def story():
        async with Server(data) as server:
            deaf, hangs = [await server.ask(prompt) for prompt in ("steps=9999 pause=0.02 deaf", "hang")]
            await server.running(deaf)
            await server.core.cancel(deaf)
            assert (await server.ended(deaf)).job.error.code == "cancelled"
            await server.running(hangs)
            assert await server.core.delete(hangs)
            assert await server.core.standing(hangs) is None
            assert not server.core.folder(hangs).exists()
            assert len(server.workers.all[0].killed) == 2
            assert "did not stop within" in server.workers.all[0].killed[0]
            assert (await server.ended(await server.ask())).job.status == "completed"

    asyncio.run(story())


def test_a_worker_is_given_the_time_of_a_step_to_stop(data, monkeypatch):
    monkeypatch.setattr("frameloom.serve.jobs.dispatch._CANCEL_S", 0.1)

    async def story():
        async with Server(data) as server:
            job_id = await server.ask("steps=2 pause=0.4 late", work_s=2 * LONG_S, resolved={"steps": 2})
            await until(server.attempts)
            await server.core.cancel(job_id)
            assert (await server.ended(job_id)).job.error.code == "cancelled"
            assert server.workers.all[0].killed == []

    asyncio.run(story())


def test_the_time_of_a_step_is_the_longest_that_is_known():
    def live(**changes):
        ask = Ask(key="local", kind="create", model="toy", request={}, **changes)
        one = Live(job=Job(id="video_1", ask=ask, status="queued", created_at=0.0))
        one.begin(one.job, ToyWorker(0), 100.0)
        return one

    unknown, foreseen = live(), live(work_s=120.0, resolved={"steps": 4})
    assert [unknown.still_s(now) for now in (100.0, 107.0)] == [0.0, 7.0]
    assert [foreseen.still_s(now) for now in (100.0, 150.0, 90_000.0)] == [30.0, 50.0, 60.0]  # a hang earns no time
    unknown.hear(News(job="video_1", fence=0, stage="denoise", step=1, total=2), 109.0)
    assert unknown.still_s(110.0) == 9.0
    foreseen.company = 3
    assert foreseen.still_s(100.0) == 90.0


def test_deleting_removes_a_job_in_any_state(data):
    async def story():
        async with Server(data) as server:
            done = await server.ask(inputs={"image.png": b"p"})
            await server.ended(done)
            runs = await server.ask("steps=9999 pause=0.02")
            waits = await server.ask()
            await server.running(runs)
            watched = asyncio.create_task(server.ended(waits))
            for job_id in (done, waits, runs):
                assert await server.core.delete(job_id)
                assert await server.core.standing(job_id) is None
                assert not server.core.folder(job_id).exists()
                assert not await server.core.delete(job_id)
            assert (await watched).job.error.code == "cancelled"
            assert await server.core.page("local", after=None, limit=9, newest_first=True) == ([], False)
            for name in ("..", "video_1", "video_" + "g" * 32, "x/../../y", "\0"):
                assert not await server.core.delete(name)
                assert await server.core.standing(name) is None
                assert await server.core.cancel(name) is None
                with pytest.raises(ValueError, match="no id of a job"):
                    server.core.folder(name)

    asyncio.run(story())


def test_deadlines_are_of_a_clock_that_nobody_sets(data):
    wall = [1_000_000.0]

    async def story():
        async with Server(data, clock=lambda: wall[0]) as server:
            runs = await server.ask("steps=40 pause=0.02", deadline_s=3600.0)
            await server.running(runs)
            wall[0] += 86_400.0
            await asyncio.sleep(0.2)
            wall[0] -= 2 * 86_400.0
            assert (await server.ended(runs)).job.status == "completed"
            late = await server.ask("steps=9999 pause=0.02", deadline_s=0.5)
            waits = await server.ask(deadline_s=0.1)
            for job_id in (late, waits):
                failed = (await server.ended(job_id)).job
                assert (failed.status, failed.error.code) == ("failed", "deadline_exceeded")
            assert waits not in [job for job, _ in server.attempts()]

    asyncio.run(story())


def test_every_job_may_have_a_deadline_from_the_config(data):
    async def story():
        async with Server(data, patience=Patience(deadline_s=0.2, grace_s=0.0)) as server:
            assert (await server.ended(await server.ask("steps=9999 pause=0.02"))).job.error.code == "deadline_exceeded"
            own = await server.ask("steps=20 pause=0.02", deadline_s=60.0)
            assert (await server.ended(own)).job.status == "completed"

    asyncio.run(story())


def test_a_server_that_ends_gracefully_costs_no_attempt(data):
    async def first():
        async with Server(data, patience=Patience(grace_s=LONG_S)) as server:
            done = await server.ask("steps=30 pause=0.02")
            await server.running(done)
        return done, (await reopened(done))

    async def reopened(job_id):
        async with Server(data) as server:
            return (await server.core.standing(job_id)).job

    async def second():
        async with Server(data) as server:  # no grace
            late = await server.ask("steps=100 pause=0.02")
            await server.running(late)
            waits = await server.ask("go")
        assert server.core.trouble == "the server is ending"
        with pytest.raises(RefusedError, match="the server is ending") as refused:
            await server.ask()
        assert refused.value.code == "draining"
        async with Server(data) as server:
            assert (await server.core.standing(late)).job.attempts <= 1
            assert (await server.ended(late)).job.attempts == 1
            assert (await server.ended(late)).job.fence == 2
            assert (await server.ended(waits)).job.status == "completed"

    job_id, job = asyncio.run(first())
    assert (job.id, job.status, job.attempts) == (job_id, "completed", 1)
    asyncio.run(second())


def test_a_grace_is_over_when_nothing_runs_any_more(data):
    async def story():
        async with Server(data, patience=Patience(grace_s=LONG_S * 10)) as server:
            dies = await server.ask("steps=9999 pause=0.02")
            await server.running(dies)
            stopping = asyncio.create_task(server.core.stop())
            await until(lambda: server.core.trouble == "the server is ending")
            os.kill(server.workers.all[0].process.pid, signal.SIGKILL)
            async with asyncio.timeout(LONG_S / 2):
                await stopping
        async with Server(data) as again:  # it waits for its next attempt
            assert (await again.core.standing(dies)).job.attempts >= 1
            await again.core.delete(dies)

    asyncio.run(story())


def test_a_grace_can_be_cut_short(data):
    async def story():
        server = Server(data, patience=Patience(grace_s=LONG_S * 10))
        await server.core.start()
        runs = await server.ask("steps=9999 pause=0.02")
        await server.running(runs)
        stopping = asyncio.create_task(server.core.stop())
        await until(lambda: server.core.trouble == "the server is ending")
        server.core.hasten()
        async with asyncio.timeout(LONG_S):
            await stopping
        async with Server(data) as again:
            assert (await again.core.standing(runs)).job.attempts <= 1
            await again.core.delete(runs)

    asyncio.run(story())


def killed_server(data: Path, prompts: list[str], *, started: int) -> list[str]:
    """Ids that were accepted by a server of its own, which was killed once so many attempts had begun."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        asyncio.run(_serve_until_killed(data, prompts, started, writer))
        os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as told:
        lines = told.read().split()
    os.waitpid(pid, 0)
    assert lines[-1] == "now"
    return lines[:-1]


async def _serve_until_killed(data, prompts, started, writer) -> None:
    async with Server(data) as server:
        ids = [await server.ask(prompt) for prompt in prompts]
        await until(lambda: len(server.attempts()) >= started)
        os.write(writer, " ".join([*ids, "now"]).encode())
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_server_loses_nothing_and_its_end_costs_an_attempt(data):
    first, second = killed_server(data, ["steps=9999 pause=0.02", "go"], started=1)
    stray = data / "videos" / ("video_" + "0" * 32)
    stray.mkdir()
    (data / "videos" / f"video_{'1' * 32}.partial").mkdir()
    (data / "videos" / "notes").mkdir()  # none of ours

    async def story():
        async with Server(data) as server:
            assert (await server.core.standing(first)).job.status in ("queued", "in_progress")
            await server.running(first)
            assert (await server.core.standing(first)).job.attempts == 2
            await server.core.cancel(first)
            assert (await server.ended(second)).job.status == "completed"
            assert ("lost", first, "interrupted") in server.witness.told
            assert not stray.exists()
            names = {path.name for path in (data / "videos").iterdir()}
            assert names == {first, second, "notes"}

    asyncio.run(story())


def test_what_ends_the_server_three_times_is_not_begun_again(data):
    (poison,) = killed_server(data, ["steps=9999 pause=0.02"], started=1)
    for started in (2, 3):
        killed_server(data, [], started=started)

    async def story():
        async with Server(data) as server:
            failed = (await server.core.standing(poison)).job
            assert (failed.error.code, failed.attempts) == ("attempts_exhausted", 3)
            assert "the server ended while it was made" in failed.error.message

    asyncio.run(story())


def test_a_second_server_on_a_folder_and_a_damaged_store_are_refused_in_words(data):
    async def story():
        async with Server(data) as server:
            await server.ended(await server.ask())
            with pytest.raises(DataFolderError, match="another server uses the data folder"):
                await Server(data).core.start()
        store = data / "jobs.sqlite"
        whole = store.read_bytes()
        for damaged in (b"", whole[:5000], b"letter" * 1000):
            store.write_bytes(damaged)
            with pytest.raises(DataFolderError, match="damaged"):
                await Server(data).core.start()
        store.write_bytes(whole)
        async with Server(data) as server:
            assert len((await server.core.page("local", after=None, limit=9, newest_first=True))[0]) == 1

    asyncio.run(story())


def test_the_same_request_again_is_the_same_job(data):
    async def story():
        repeat = Repeat(name="n", digest="d")
        async with Server(data) as server:
            ids = await asyncio.gather(*(server.ask(inputs={"image.png": b"x"}, repeat=repeat) for _ in range(8)))
            assert len(set(ids)) == 1
            with pytest.raises(RefusedError) as refused:
                await server.ask(repeat=Repeat(name="n", digest="other"))
            assert refused.value.code == "idempotency_mismatch"
            await server.ended(ids[0])
        async with Server(data) as server:
            assert await server.ask(repeat=repeat) == ids[0]
            assert len(server.attempts()) == 1
            assert [path.name for path in (data / "videos").iterdir()] == [ids[0]]
            key = (await server.core.standing(ids[0])).job.ask.key
            assert (await server.core.repeated(key, repeat)).job.id == ids[0]
            assert await server.core.repeated("another", repeat) is None
            with pytest.raises(RefusedError, match="another request"):
                await server.core.repeated(key, Repeat(name="n", digest="other"))
            await server.core.delete(ids[0])
            assert await server.core.repeated(key, repeat) is None

    asyncio.run(story())


def test_what_is_too_much_is_refused_and_leaves_nothing(data):
    async def story():
        limits = Limits(queued=3, queued_by_key=2, queued_s=100.0)
        keys = (Key(name="narrow", secret="s" * 16, queued=1),)
        async with Server(data, limits=limits, keys=keys) as server:
            runs = await server.ask("steps=9999 pause=0.02")
            await server.running(runs)
            asked = await asyncio.gather(
                *(server.ask(key="a", inputs={"image.png": b"x"}) for _ in range(6)), return_exceptions=True
            )
            assert [type(one) for one in asked].count(str) == 2
            assert {one.code for one in asked if not isinstance(one, str)} == {"key_queue_full"}
            assert all(1 <= one.retry_s <= 120 for one in asked if not isinstance(one, str))
            assert (await server.ask(key="narrow")) in server.core._line.order()
            with pytest.raises(RefusedError) as refused:
                await server.ask(key="b")
            assert refused.value.code == "queue_full"
            for name in ("narrow", "b"):
                with pytest.raises(RefusedError):
                    server.core.check_room(name, 0.0)
            assert len(list((data / "videos").iterdir())) == 3  # what runs, and the two with inputs
            await server.core.delete(asked[0] if isinstance(asked[0], str) else asked[1])
            with pytest.raises(RefusedError, match="s of work wait"):
                await server.ask(key="b", work_s=1000.0)
            assert ("refused", "queue_full") in server.witness.told

    asyncio.run(story())


def test_a_full_disk_takes_no_jobs(data):
    async def story():
        async with Server(data, keeping=Keeping(reserve_bytes=10**18)) as server:
            with pytest.raises(RefusedError, match="disk of the server is full") as refused:
                await server.ask(inputs={"image.png": b"x"})
            assert (refused.value.code, refused.value.retry_s) == ("insufficient_storage", 60)
            assert list((data / "videos").iterdir()) == []

    asyncio.run(story())


def test_what_was_learned_is_known_after_a_restart(data):
    async def story():
        wide = {"width": 128, "height": 32, "num_frames": 9, "steps": 4, "guidance_scale": 5.0}
        async with Server(data, delay_s=0.3) as server:
            assert server.core.card is None
            assert server.core.work_s(wide) == 0.0
            assert server.core.trouble == "the model is being opened"
            await until(lambda: server.core.card is not None)
            assert server.core.work_s({}) == pytest.approx(2.0)  # as the worker foresees it
            assert server.core.work_s(wide) == pytest.approx(4.0)
            job_id = await server.ask("steps=5 pause=0.05", request={"width": 64, "height": 32, "num_frames": 9})
            await server.ended(job_id)
            learned = server.core.work_s(wide)
            assert learned != pytest.approx(4.0)
            assert learned > 0.5
            assert (await server.core.foresee({})).seconds == 12.5
        async with Server(data, delay_s=LONG_S) as server:
            assert server.core.card == CARD
            assert server.core.work_s(wide) == learned
            assert not server.core.is_ready
        async with Server(data, delay_s=LONG_S, model="another") as server:
            assert server.core.card is None

    asyncio.run(story())


def test_several_workers_share_the_work_and_keys_take_turns(data):
    async def story():
        async with Server(data, count=2) as server:
            blocks = [await server.ask("steps=9999 pause=0.02") for _ in range(2)]
            for block in blocks:
                await server.running(block)
            assert {live.worker.number for live in server.core._board.taken()} == {0, 1}
            mine = [await server.ask(key="a") for _ in range(3)]
            others = [await server.ask(key="b") for _ in range(2)]
            first = await server.ask(key="a", priority=5)
            for block in blocks:
                await server.core.cancel(block)
            for job_id in (*mine, *others, first):
                assert (await server.ended(job_id)).job.status == "completed"
            order = [job for job, _ in server.attempts()][2:]
            assert order[0] == first
            assert set(order[1:3]) & set(others)
            assert server.core.numbers()["queued"] == 0

    asyncio.run(story())


def test_who_asks_and_goes_away_leaves_a_whole_job(data):
    async def story():
        async with Server(data) as server:
            for delay_s in (0.0, 0.001, 0.003, 0.01):
                asking = asyncio.create_task(server.ask(inputs={"image.png": b"x" * 100_000}))
                await asyncio.sleep(delay_s)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: not server.core._tasks)
            page, _ = await server.core.page("local", after=None, limit=9, newest_first=True)
            for standing in page:
                assert (await server.ended(standing.job.id)).job.status == "completed"
            assert {path.name for path in (data / "videos").iterdir()} == {standing.job.id for standing in page}

    asyncio.run(story())


def test_a_worker_that_dies_while_it_waits_costs_nothing(data):
    async def story():
        async with Server(data) as server:
            await until(lambda: server.core.is_ready)
            os.kill(server.workers.all[0].process.pid, signal.SIGKILL)
            await until(lambda: not server.core.is_ready)
            job_id = await server.ask()
            assert (await server.ended(job_id)).job.attempts == 1

    asyncio.run(story())


def test_many_who_watch_one_job_all_see_its_end(data):
    async def story():
        async with Server(data) as server:
            job_id = await server.ask("steps=200 pause=0.002")
            told = [[] for _ in range(50)]

            async def watch(statuses):
                async for standing in server.core.watch(job_id):
                    statuses.append(standing.job.status)

            watchers = [asyncio.create_task(watch(statuses)) for statuses in told]
            await until(lambda: all(told))
            assert "completed" not in {status for statuses in told for status in statuses}
            await asyncio.gather(*watchers)
            assert {statuses[-1] for statuses in told} == {"completed"}
            assert [standing async for standing in server.core.watch(server.core.new_id())] == []

    asyncio.run(story())


def test_an_error_of_ours_costs_an_attempt_and_no_worker(data, monkeypatch):
    async def story():
        async with Server(data) as server:
            settle, failing = server.core._dispatcher._settle, [True]

            async def broken(live, outcome):
                if failing:
                    failing.clear()
                    raise KeyError("a bug")
                await settle(live, outcome)

            monkeypatch.setattr(server.core._dispatcher, "_settle", broken)
            assert (await server.ended(await server.ask())).job.attempts == 2

    asyncio.run(story())


def test_an_end_that_cannot_be_kept_is_said_to_all_who_ask_for_it(data):
    async def story():
        async with Server(data, delay_s=LONG_S) as server, asyncio.timeout(LONG_S / 2):
            waits = await server.ask()
            keeper, core = server.core._desk.keeper, server.core
            await keeper.do(lambda store: store._sql.execute("PRAGMA query_only = ON"))
            told = await asyncio.gather(core.cancel(waits), core.delete(waits), return_exceptions=True)
            assert [type(one) for one in told] == [RefusedError, RefusedError]
            assert (await core.standing(waits)).job.status == "queued"
            await keeper.do(lambda store: store._sql.execute("PRAGMA query_only = OFF"))
            _, is_gone = await asyncio.gather(core.cancel(waits), core.delete(waits))
            assert is_gone

    asyncio.run(story())


def test_what_the_disk_does_not_take_is_kept_later(data):
    async def story():
        async with Server(data) as server:
            runs = await server.ask("steps=150 pause=0.02")
            await server.running(runs)
            await server.core._desk.keeper.do(lambda store: store._sql.execute("PRAGMA query_only = ON"))
            with pytest.raises(RefusedError) as refused:
                await server.ask(inputs={"image.png": b"x"})
            assert refused.value.code == "insufficient_storage"
            assert [path.name for path in (data / "videos").iterdir()] == [runs]
            with pytest.raises(RefusedError) as not_ended:
                await server.core.cancel(runs)
            for told in (refused, not_ended):  # where the files are is for the log
                assert told.value.message == "the disk of the server is full, or cannot be written"
            await until((server.core.folder(runs) / "video-1.mp4").exists)
            await asyncio.sleep(0.5)
            assert (await server.core.standing(runs)).job.status == "in_progress"
            await server.core._desk.keeper.do(lambda store: store._sql.execute("PRAGMA query_only = OFF"))
            assert (await server.ended(runs)).job.status == "completed"

    asyncio.run(story())
