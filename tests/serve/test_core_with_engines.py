"""The service with workers that have engines: what becomes of a job is the same whatever happens on its way."""

import asyncio
import hashlib
import os
import signal
from pathlib import Path

import pytest

from frameloom.serve.config import Keeping, Patience, ServeConfig
from frameloom.serve.jobs.core import Core
from frameloom.serve.jobs.job import Ask, Job
from frameloom.serve.workers.pool import Pool
from frameloom.types import EngineConfig

LONG_S = 240.0
SMALL = {"prompt": "a red ball", "width": 96, "height": 64, "num_frames": 9, "seed": 5}


class Server:
    """A core and its pool of one."""

    def __init__(self, data: Path) -> None:
        config = ServeConfig(
            data=data,
            engine=EngineConfig(device="cpu", compilation="off"),
            keeping=Keeping(reserve_bytes=0),
            patience=Patience(grace_s=0.0),
        )
        self.pool = Pool(config)
        self.core = Core(config, self.pool)

    async def ask(self, **changes) -> str:
        ask = Ask(key="local", kind="create", model="m", request=SMALL | changes)
        return (await self.core.accept(self.core.new_id(), ask, {}, None)).job.id

    async def until(self, job_id: str, holds) -> None:
        async with asyncio.timeout(LONG_S):
            async for standing in self.core.watch(job_id):
                if holds(standing):
                    return
        raise AssertionError("it ended before")

    async def ended(self, job_id: str) -> Job:
        async with asyncio.timeout(LONG_S):
            async for standing in self.core.watch(job_id):
                last = standing
        return last.job

    def sha256(self, job: Job) -> str:
        data = (self.core.folder(job.id) / job.result.video).read_bytes()
        assert len(data) == job.result.num_bytes
        digest = hashlib.sha256(data).hexdigest()
        assert digest == job.result.sha256
        return digest


@pytest.mark.slow
def test_a_killed_worker_a_cancel_and_a_stop_change_no_byte(tmp_path):
    async def story():
        server = Server(tmp_path / "data")
        async with server.core:
            plain = await server.ended(await server.ask(steps=8))
            assert plain.error is None
            wanted = server.sha256(plain)

            struck = await server.ask(steps=8)
            await server.until(struck, lambda standing: standing.stage == "denoise" and standing.step >= 2)
            os.kill(server.pool.all[0].pid, signal.SIGKILL)
            cancelled = await server.ask(steps=200)
            again = await server.ended(struck)
            assert (again.status, again.attempts) == ("completed", 2)
            assert server.sha256(again) == wanted

            await server.until(cancelled, lambda standing: standing.stage == "denoise" and standing.step >= 1)
            pid = server.pool.all[0].pid
            await server.core.cancel(cancelled)
            assert (await server.ended(cancelled)).error.code == "cancelled"
            assert server.pool.all[0].pid == pid  # it stopped by itself

            stopped = await server.ask(steps=8)
            await server.until(stopped, lambda standing: standing.stage == "denoise" and standing.step >= 2)
        later = Server(tmp_path / "data")
        async with later.core:
            finished = await later.ended(stopped)
            assert (finished.status, finished.fence) == ("completed", 2)
            assert later.sha256(finished) == wanted
            names = {path.name for path in later.core.folder(stopped).iterdir()}
            result = finished.result
            assert {result.video, result.thumbnail, result.sheet} <= names

    asyncio.run(story())
