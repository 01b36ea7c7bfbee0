"""What is kept in the data folder, and what goes when."""

import asyncio
import os
import random
from pathlib import Path

import pytest
from test_core import LONG_S, Server, until
from test_store import ERROR, RESULT, Clock, job

from frameloom.serve.config import Keeping
from frameloom.serve.jobs.folder import DataFolder, DataFolderError
from frameloom.serve.jobs.keeper import Keeper
from frameloom.serve.jobs.retention import FRESH_S, Retention
from frameloom.serve.jobs.sqlite import SqliteStore
from frameloom.serve.service import RefusedError

DAY_S = 86_400.0


def name(number: int) -> str:
    return f"video_{number:032x}"


class Kept:
    """A store and a folder with jobs, and what sweeps them."""

    def __init__(self, data: Path, clock: Clock, **keeping) -> None:
        self.clock, self.folder = clock, DataFolder(data)
        self.keeper = Keeper(lambda: SqliteStore(self.folder.store, clock=clock))
        keeping = Keeping(reserve_bytes=0, **keeping)
        self.retention = Retention(self.keeper, self.folder, keeping, clock=clock, remove=self.remove)

    async def __aenter__(self):
        await self.keeper.open()
        return self

    async def __aexit__(self, *_):
        await self.keeper.close()
        self.folder.close()

    async def remove(self, job_id: str) -> bool:
        found = await self.keeper.do(lambda store: store.remove(job_id))
        if found:
            self.folder.remove(job_id)
        return found

    async def have(self, number: int, state: str, *, ended: float = 0.0, expires: float = 0.0, size: int = 0) -> None:
        def keep(store):
            store.add(job(name(number)), None)
            if state in ("in_progress", "completed"):
                store.start(name(number), 0.0)
            if state == "completed":
                store.finish(name(number), 1, RESULT, now=ended, expires_at=expires)
            if state == "failed":
                store.fail(name(number), None, ERROR, now=ended, expires_at=expires)

        await self.keeper.do(keep)
        self.folder.prepare(name(number))
        self.folder.files(name(number), 1).video.write_bytes(b"x" * size)

    async def left(self) -> list[int]:
        rows = await self.keeper.do(lambda store: store.waiting() + store.running() + store.ended())
        assert {row.id for row in rows} == set(self.folder.jobs())
        return sorted(int(row.id.removeprefix("video_"), 16) for row in rows)


def test_only_what_has_ended_and_expired_goes(tmp_path):
    async def story():
        clock = Clock(10 * DAY_S)
        async with Kept(tmp_path, clock) as kept:
            await kept.have(1, "completed", ended=DAY_S, expires=9 * DAY_S)
            await kept.have(2, "completed", ended=DAY_S, expires=11 * DAY_S)
            await kept.have(3, "failed", ended=DAY_S, expires=10 * DAY_S)
            await kept.have(4, "queued")
            await kept.have(5, "in_progress")
            assert await kept.retention.sweep() == [name(1), name(3)]
            assert await kept.left() == [2, 4, 5]
            clock.now += 365 * DAY_S
            assert await kept.retention.sweep() == [name(2)]
            assert await kept.left() == [4, 5]  # whatever the time
            clock.now = 0.0
            assert await kept.retention.sweep() == []

    asyncio.run(story())


def test_a_quota_takes_those_that_ended_first_and_nothing_that_runs_or_is_fresh(tmp_path):
    async def story():
        clock = Clock(10 * DAY_S)
        async with Kept(tmp_path, clock, quota_bytes=2_000_000) as kept:
            for number, ended in ((1, 3.0), (2, 1.0), (3, 2.0)):
                await kept.have(number, "completed", ended=ended * DAY_S, expires=99 * DAY_S, size=500_000)
            await kept.have(4, "in_progress", size=500_000)
            await kept.have(5, "queued", size=100_000)
            await kept.have(6, "completed", ended=clock.now - 1, expires=99 * DAY_S, size=500_000)
            assert await kept.retention.sweep() == [name(2), name(3)]
            assert kept.retention.used_bytes <= 2_000_000
            assert await kept.retention.sweep() == []
            await kept.have(7, "in_progress", size=900_000)
            assert await kept.retention.sweep() == [name(1)]
            assert await kept.retention.sweep() == []
            assert await kept.left() == [4, 5, 6, 7]
            clock.now += FRESH_S
            assert await kept.retention.sweep() == [name(6)]

    asyncio.run(story())


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_clock_does_no_job_that_has_not_ended_goes(tmp_path, seed):
    async def story():
        clock, random_ = Clock(10 * DAY_S), random.Random(seed)
        async with Kept(tmp_path, clock, quota_bytes=1) as kept:
            for number in range(12):
                await kept.have(number, random_.choice(["queued", "in_progress"]), size=5000)
            for number in range(12, 18):
                await kept.have(number, "completed", ended=clock.now, expires=clock.now + DAY_S)
            for _ in range(10):
                clock.now += random_.uniform(-DAY_S, DAY_S)
                await kept.retention.sweep()
                assert set(range(12)) <= set(await kept.left())

    asyncio.run(story())


def test_the_server_sweeps_and_refuses_what_no_quota_allows(tmp_path, monkeypatch):
    monkeypatch.setattr("frameloom.serve.jobs.core._SWEEP_S", 0.05)
    clock = Clock(1e9)

    async def story():
        keeping = Keeping(ttl_s=100.0, reserve_bytes=0, quota_bytes=2_000_000)
        async with Server(tmp_path, keeping=keeping, clock=clock) as server:
            job_id = await server.ask()
            await server.ended(job_id)
            runs = await server.ask("steps=9999 pause=0.02")
            await server.running(runs)
            clock.now += 101.0
            async with asyncio.timeout(LONG_S):
                while await server.core.standing(job_id) is not None:
                    await asyncio.sleep(0.01)
            assert not server.core.folder(job_id).exists()
            (server.core.folder(runs) / "preview.png").write_bytes(b"x" * 2_000_000)
            await until(lambda: server.core.numbers()["data_bytes"] > 2_000_000)
            with pytest.raises(RefusedError, match="quota of the server is used up"):
                await server.ask()
            assert (await server.core.standing(runs)).job.status == "in_progress"

    asyncio.run(story())


def test_the_folder_of_a_job_without_inputs_is_on_the_disk_too(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def synced_now(number):
        synced.append((os.readlink(f"/proc/self/fd/{number}"), os.listdir(number)))
        fsync(number)

    folder = DataFolder(tmp_path)
    monkeypatch.setattr(os, "fsync", synced_now)
    for _ in range(2):  # a kill may have come between the folder and its sync
        folder.prepare(name(1))
    assert synced == [(str(folder.videos), [name(1)])] * 2
    folder.close()


def test_inputs_are_whole_or_not_there(tmp_path):
    folder = DataFolder(tmp_path / "deep" / "data")
    folder.keep_inputs(name(1), {"image.png": b"a", "reference-1.png": b"b"})
    assert {path.name: path.read_bytes() for path in (folder.of(name(1)) / "inputs").iterdir()} == {
        "image.png": b"a", "reference-1.png": b"b",
    }  # fmt: skip
    folder.keep_inputs(name(2), {})
    for bad in ("../x", "a/b.png", ".hidden", "", "image", "x.png\0", "X.png", "a" * 300 + ".png"):
        with pytest.raises((ValueError, OSError)):
            folder.keep_inputs(name(3), {"image.png": b"a", bad: b"b"})
    with pytest.raises(OSError, match="not empty"):
        folder.keep_inputs(name(1), {"image.png": b"other"})
    assert (folder.of(name(1)) / "inputs" / "image.png").read_bytes() == b"a"
    assert os.listdir(folder.videos) == [name(1)]
    assert (folder.path.stat().st_mode & 0o777) == 0o700
    folder.close()


@pytest.mark.parametrize("bad", ["..", "", "video_1", "video_" + "A" * 32, name(1) + "/x", name(1) + "\n", "\0"])
def test_no_other_name_becomes_a_path(tmp_path, bad):
    folder = DataFolder(tmp_path)
    for call in (folder.of, folder.remove, folder.prepare, lambda job_id: folder.files(job_id, 1)):
        with pytest.raises(ValueError, match="no id of a job"):
            call(bad)
    folder.close()


def test_what_a_crash_has_left_goes_and_what_is_not_ours_stays(tmp_path):
    folder = DataFolder(tmp_path)
    for entry in (name(1), name(2), f"{name(3)}.partial", f"{name(1)}.gone", "notes"):
        (folder.videos / entry / "inputs").mkdir(parents=True)
    (folder.videos / f"{name(4)}").symlink_to(tmp_path / "videos" / "notes")
    assert sorted(folder.sweep({name(1)})) == sorted([name(2), f"{name(3)}.partial", f"{name(1)}.gone", name(4)])
    assert sorted(os.listdir(folder.videos)) == sorted([name(1), "notes"])
    assert (folder.videos / "notes" / "inputs").is_dir()
    for entry in ("video-1.mp4", "video-2.mp4", "thumbnail-1.jpg", "video-2.mp4.partial", "preview.png", "journal"):
        (folder.of(name(1)) / entry).write_bytes(b"x")
    folder.tidy(name(1), 2)
    assert sorted(os.listdir(folder.of(name(1)))) == ["inputs", "video-2.mp4"]
    folder.tidy(name(1), None)
    assert os.listdir(folder.of(name(1))) == ["inputs"]
    folder.remove(name(1))
    folder.remove(name(1))
    folder.close()


def test_a_folder_that_cannot_be_used_is_said_in_words(tmp_path):
    held = DataFolder(tmp_path)
    with pytest.raises(DataFolderError, match=r"another server uses the data folder .* --data-dir"):
        DataFolder(tmp_path)
    held.close()
    DataFolder(tmp_path).close()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataFolderError, match="cannot be used"):
        DataFolder(tmp_path / "file" / "data")
