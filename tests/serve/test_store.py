"""The store of jobs: what it has taken is there, whatever happens to its process, its disk and its file."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from frameloom.serve.jobs.job import Ask, Job, JobError, Repeat, RepeatError, Result, StoreError
from frameloom.serve.jobs.sqlite import SqliteStore

RESULT = Result(
    video="video-1.mp4", thumbnail="thumbnail-1.jpg", sheet="sheet-1.jpg", num_bytes=1234, sha256="ab" * 32, width=256,
    height=160, num_frames=9, fps=16.0, made={"seed": 7, "seconds": 1.5},
)  # fmt: skip
ERROR = JobError(code="internal_error", message="a screw is loose", param="steps")


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def ask(key="alice", **changes):
    return Ask(**{"key": key, "kind": "create", "model": "m", "request": {"prompt": "a cat"}} | changes)


def job(name: str, key="alice", at=1000.0, **changes) -> Job:
    return Job(id=name, ask=ask(key, **changes), status="queued", created_at=at)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


@pytest.fixture
def store(path: Path, clock: Clock):
    opened = SqliteStore(path, clock=clock)
    yield opened
    opened.close()


def test_a_job_comes_back_as_it_was_after_a_restart(store, path):
    rich = ask(
        kind="remix", request={"prompt": "☃ 'quoted'", "steps": 4, "references": ["inputs/a.png"], "fps": 16.5},
        loras=(("style", 0.5), ("other", -1.0)), quality=80, priority=3, deadline_s=60.5, source="video_0",
        work_s=12.25,
    )  # fmt: skip
    kept = Job(id="video_1", ask=rich, status="queued", created_at=1234.5678)
    assert store.add(kept, None) == kept
    started = store.start("video_1", 1300.0)
    assert (started.status, started.attempts, started.fence, started.started_at) == ("in_progress", 1, 1, 1300.0)
    assert store.finish("video_1", 1, RESULT, now=1400.0, expires_at=2000.0)
    done = store.get("video_1")
    assert (done.ask, done.result, done.status, done.completed_at, done.expires_at) == (
        rich, RESULT, "completed", 1400.0, 2000.0,
    )  # fmt: skip
    store.close()
    again = SqliteStore(path)
    assert again.get("video_1") == done
    again.close()
    with pytest.raises(StoreError):
        store.get("video_1")


def test_what_another_start_says_does_not_count(store):
    store.add(job("a"), None)
    assert not store.finish("a", 0, RESULT, now=1.0, expires_at=2.0)  # it does not run
    assert store.start("a", 1.0).fence == 1
    assert store.start("a", 1.0) is None
    assert store.requeue("a", 1, counts=True)
    second = store.start("a", 2.0)
    assert (second.fence, second.attempts) == (2, 2)
    for stale in (0, 1, 3):
        assert not store.finish("a", stale, RESULT, now=1.0, expires_at=2.0)
        assert not store.fail("a", stale, ERROR, now=1.0, expires_at=2.0)
        assert not store.requeue("a", stale, counts=True)
    assert not store.fail("a", None, ERROR, now=1.0, expires_at=2.0)  # that is for queued ones
    assert store.get("a") == second
    assert store.requeue("a", 2, counts=False)
    assert (store.get("a").attempts, store.get("a").fence) == (1, 2)
    third = store.start("a", 3.0)
    assert (third.fence, third.attempts) == (3, 2)
    assert store.finish("a", 3, RESULT, now=4.0, expires_at=9.0)
    assert not store.fail("a", 3, ERROR, now=5.0, expires_at=9.0)
    assert not store.requeue("a", 3, counts=True)
    assert store.get("a").status == "completed"


def test_failing_cancelling_and_removing(store):
    for name in "abc":
        store.add(job(name), None)
    assert store.fail("a", None, ERROR, now=5.0, expires_at=6.0)
    assert (store.get("a").status, store.get("a").error) == ("failed", ERROR)
    assert not store.mark_cancelled("b")
    store.start("b", 1.0)
    assert store.mark_cancelled("b")
    assert store.get("b").cancelled
    assert not store.remove("b")  # it runs
    assert store.fail("b", 1, ERROR, now=7.0, expires_at=8.0)
    assert store.remove("b")
    assert not store.remove("b")
    assert store.get("b") is None
    assert [found.id for found in store.waiting()] == ["c"]


def test_lists_and_counts(store):
    for number, key in enumerate(["alice", "bob", "alice", "alice", "bob"]):
        store.add(job(f"j{number}", key, at=1000.0 - number, work_s=10.0), None)  # a clock that goes back
    assert [found.id for found in store.waiting()] == ["j0", "j1", "j2", "j3", "j4"]
    store.start("j1", 1.0)
    counted = store.queue()
    assert (counted.queued, counted.running, counted.queued_s, counted.by_key) == (4, 1, 40.0, {"alice": 3, "bob": 1})
    assert [found.id for found in store.running()] == ["j1"]
    page, more = store.page("alice", after=None, limit=2, newest_first=True)
    assert ([found.id for found in page], more) == (["j3", "j2"], True)
    page, more = store.page("alice", after="j2", limit=2, newest_first=True)
    assert ([found.id for found in page], more) == (["j0"], False)
    page, more = store.page("alice", after="j0", limit=2, newest_first=False)
    assert ([found.id for found in page], more) == (["j2", "j3"], False)
    assert store.page("alice", after="j1", limit=2, newest_first=True) is None  # bob's
    assert store.page("alice", after="none", limit=2, newest_first=True) is None
    assert store.page("carol", after=None, limit=2, newest_first=True) == ([], False)
    store.finish("j1", 1, RESULT, now=50.0, expires_at=60.0)
    store.fail("j0", None, ERROR, now=40.0, expires_at=70.0)
    assert [found.id for found in store.ended()] == ["j0", "j1"]
    assert [found.id for found in store.ended_before(60.0)] == ["j1"]
    assert store.ended_before(59.0) == []


def test_the_same_request_twice_is_one_job_for_a_day_and_after_a_restart(store, path, clock):
    first = Repeat(name="n1", digest="d1")
    assert store.add(job("a"), first).id == "a"
    assert store.add(job("b"), first).id == "a"
    assert store.get("b") is None
    assert store.add(job("c", "bob"), first).id == "c"  # another's key
    with pytest.raises(RepeatError, match="another request"):
        store.add(job("d"), Repeat(name="n1", digest="d2"))
    with pytest.raises(RepeatError, match="another request"):
        store.repeated("alice", Repeat(name="n1", digest="d2"))
    assert store.repeated("alice", Repeat(name="n2", digest="d1")) is None
    store.close()
    again = SqliteStore(path, clock=clock)
    assert again.repeated("alice", first).id == "a"
    clock.now += 86_399.0
    assert again.repeated("alice", first).id == "a"
    clock.now += 2.0
    assert again.repeated("alice", first) is None
    assert again.add(job("e"), Repeat(name="n1", digest="d3")).id == "e"
    assert again.remove("e")
    assert again.repeated("alice", Repeat(name="n1", digest="d3")) is None  # with its job
    again.close()


def test_many_threads_with_one_idempotency_key_make_one_job(store):
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: store.add(job(f"j{n}"), Repeat(name="x", digest="y")).id, range(40)))
    assert len(set(found)) == 1
    assert len(store.waiting()) == 1


def test_notes(store, path):
    assert store.noted("speed") is None
    store.note("speed", "1")
    store.note("speed", "2")
    store.close()
    again = SqliteStore(path)
    assert again.noted("speed") == "2"
    again.close()


def test_every_commit_is_synced_and_the_file_is_held(store, path):
    assert store._pragma("synchronous") == 2
    assert store._sql.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    store.note("a", "b")
    with pytest.raises(StoreError, match="another process"):
        SqliteStore(path)
    assert not path.with_name("jobs.sqlite-shm").exists()  # no second connection can join


def test_a_newer_store_a_foreign_file_and_no_database_are_refused_unchanged(path):
    SqliteStore(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 2")
    raw.close()
    with pytest.raises(StoreError, match="newer Frameloom \\(tables 2, this one knows 1\\)"):
        SqliteStore(path)
    path.unlink()
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE recipes (cake TEXT)")
    raw.close()
    with pytest.raises(StoreError, match="no store of Frameloom"):
        SqliteStore(path)
    path.write_bytes(b"this is a letter to grandmother" * 100)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="damaged"):
        SqliteStore(path)
    assert path.read_bytes() == before
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="cannot be read or written"):
        SqliteStore(path)


def test_a_start_that_was_killed_before_the_tables_were_made_is_no_damage(path):
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.close()
    store = SqliteStore(path)
    store.add(job("a"), None)
    store.close()


def filled(path: Path) -> list[Job]:
    store = SqliteStore(path)
    for number in range(60):
        store.add(
            job(f"j{number}", request={"prompt": f"prompt {number} " * 20}), Repeat(name=f"n{number}", digest="d")
        )
    for number in range(20):
        store.start(f"j{number}", 1.0)
        store.finish(f"j{number}", 1, RESULT, now=2.0, expires_at=3.0)
    jobs = [store.get(f"j{number}") for number in range(60)]
    store.close()
    return jobs


def test_flipped_bytes_are_refused_or_changed_nothing(path, tmp_path):
    jobs = filled(path)
    whole = path.read_bytes()
    random_ = random.Random(8)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        try:
            store = SqliteStore(path)
        except StoreError:
            refused += 1
            continue
        assert [store.get(f"j{number}") for number in range(60)] == jobs
        assert [found.id for found in store.ended()] == [found.id for found in jobs[:20]]
        store.close()
        for log in tmp_path.glob("jobs.sqlite-*"):
            log.unlink()
    assert refused > 20


def test_words_of_sqlite_that_are_no_text_are_damage_too(path):
    SqliteStore(path).close()
    data = bytearray(path.read_bytes())
    data[data.index(b"tablenotes") + len("table")] ^= 0x80  # a name, which SQLite quotes when it complains
    path.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        SqliteStore(path)


def test_only_its_owner_reads_the_store(tmp_path):
    folder = tmp_path / "open to all"
    folder.mkdir(mode=0o755)
    path = folder / "jobs.sqlite"
    store = SqliteStore(path)
    store.note("a", "b")
    assert {file.name: file.stat().st_mode & 0o077 for file in folder.iterdir()} == dict.fromkeys(
        ("jobs.sqlite", "jobs.sqlite-wal"), 0
    )
    store.close()


def test_a_truncated_store_is_refused(path):
    filled(path)
    whole = path.read_bytes()
    for size in (50, 100, 4096, 4097, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError):
            SqliteStore(path)


def test_an_empty_store_beside_videos_is_no_new_one(path):
    for size in (0, 1):
        path.write_bytes(b"x" * size)
        with pytest.raises(StoreError, match="it is empty, and there are videos beside it"):
            SqliteStore(path, expects_jobs=True)
        assert path.stat().st_size == size


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import RESULT, job
from frameloom.serve.jobs.job import Repeat
from frameloom.serve.jobs.sqlite import SqliteStore
store = SqliteStore(Path(sys.argv[1]))
base = int(sys.argv[2])
for number in range(base, base + 100_000):
    name = f"j{{number}}"
    store.add(job(name), Repeat(name=name, digest="d"))
    print("added", name, flush=True)
    fence = store.start(name, 1.0).fence
    print("started", name, flush=True)
    store.finish(name, fence, RESULT, now=2.0, expires_at=9e9)
    print("completed", name, flush=True)
"""


def test_what_a_killed_process_had_acknowledged_is_there(path):
    acknowledged: dict[str, str] = {}
    rank = {"queued": 0, "in_progress": 1, "completed": 2}
    reached = {"added": 0, "started": 1, "completed": 2}
    for moment in range(12):
        code = WRITER.format(tests=str(Path(__file__).parent))
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(moment * 100_000)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(3 * moment % 7 + 1)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        writer.wait()
        writer.stdout.close()
        acknowledged |= {line.split()[1]: line.split()[0] for line in lines if line.endswith("\n")}
        store = SqliteStore(path)
        for name, state in acknowledged.items():
            assert rank[store.get(name).status] >= reached[state]
            assert store.repeated("alice", Repeat(name=name, digest="d")).id == name
        store.close()
    assert len(acknowledged) > 12


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("only who may mount can make a small disk")
    yield folder
    for _ in range(50):
        if not subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            break
        time.sleep(0.1)


def test_a_full_disk_refuses_and_forgets_nothing_and_works_again(small_disk):
    store = SqliteStore(small_disk / "jobs.sqlite")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 600_000)
    added = []
    refusal = ""
    while not refusal:
        try:
            added.append(store.add(job(f"j{len(added)}", request={"prompt": "p" * 4000}), None).id)
        except StoreError as error:
            refusal = str(error)
    assert "is full" in refusal
    assert added
    with suppress(StoreError):
        store.start(added[0], 1.0)
    ballast.unlink()
    assert {found.id for found in store.waiting() + store.running()} == set(added)
    store.add(job("later"), None)
    store.close()
    again = SqliteStore(small_disk / "jobs.sqlite")
    assert {found.id for found in again.waiting() + again.running()} == {*added, "later"}
    again.close()


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import job
from frameloom.serve.jobs.job import StoreError
from frameloom.serve.jobs.sqlite import SqliteStore
store = SqliteStore(Path(sys.argv[1]))
store.add(job("first"), None)
most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, most[1]))
try:
    for number in range(10_000):
        store.add(job(f"j{{number}}", request={{"prompt": "p" * 4000}}), None)
        print(f"j{{number}}")
except StoreError as error:
    print("refused", file=sys.stderr)
resource.setrlimit(resource.RLIMIT_FSIZE, most)
store.add(job("later"), None)
print("later")
"""


def test_a_write_that_fails_leaves_a_store_that_works(path):
    code = LIMITED.format(tests=str(Path(__file__).parent))
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "refused" in out.stderr
    store = SqliteStore(path)
    assert {found.id for found in store.waiting()} == {"first", *out.stdout.split()}
    store.close()


def test_a_store_needs_a_folder_that_is_there(tmp_path):
    with pytest.raises(StoreError, match="cannot be read or written"):
        SqliteStore(tmp_path / "none" / "jobs.sqlite")
    assert os.listdir(tmp_path) == []
