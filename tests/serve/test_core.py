"""The service, with a real store on the disk and real processes as workers that do what prompts tell them."""

import asyncio
import time
from pathlib import Path

import pytest
from toy_workers import CARD, ToyWorkers

from frameloom.serve.config import Keeping, Patience, ServeConfig
from frameloom.serve.core import Core
from frameloom.serve.jobs import Ask

LONG_S = 60.0


class Witnessed:
    """What the service told of its jobs."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    def accepted(self, job):
        self.told.append(("accepted", job.id))

    def refused(self, code):
        self.told.append(("refused", code))

    def started(self, job):
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
            job_id = await server.ask(
                "steps=3 pause=0.05", inputs={"image.png": b"picture"}, request={"image": "inputs/image.png"}
            )
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


async def until(holds) -> None:
    async with asyncio.timeout(LONG_S):
        while not holds():
            await asyncio.sleep(0.01)
