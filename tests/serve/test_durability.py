"""What is acknowledged is on the disk, a full disk is said and survived, and a damaged store is not served."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from chaos.asks import EDIT, PROMPTS, source
from served import Served, form, served

SMALL = {"prompt": PROMPTS[0], "size": "64x64", "num_frames": 9, "steps": 2, "seed": 3}
SYNCED = re.compile(r"(?:fsync|fdatasync)\(\d+<([^>]*)>")
LONG = {"prompt": PROMPTS[0], "size": "128x128", "num_frames": 81, "steps": 200, "seed": 3}


def mounted(folder, size):
    """Whether a file system of so many bytes could be mounted at a folder; only root may."""
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        return False
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode
        == 0
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("durable")
    with served(folder / "data", environment={"OMP_NUM_THREADS": "1"}) as one:
        one.wait_for("/health/ready", 120)
        yield one


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_row_and_inputs_are_on_the_disk_before_the_answer_is_sent(server, tmp_path):
    trace = tmp_path / "trace"
    calls = "fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg,write,writev"
    words = ["strace", "-f", "-y", "-s", "64", "-e", f"trace={calls}", "-o", trace, "-p", str(server.pid)]
    watcher = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        if "attached" not in (told := watcher.stderr.readline()):
            pytest.skip(f"strace may not watch processes here: {told}")
        body, headers = form({"prompt": PROMPTS[0], **EDIT}, {"video": ("source.mp4", source())})
        answer = server.ask("POST", "/v1/videos/edits", body, headers=headers)
    finally:
        watcher.send_signal(signal.SIGINT)
        watcher.wait(30)
        watcher.stderr.close()
    assert answer.status == 200, answer
    job = answer.json()["id"]
    lines = trace.read_text(errors="replace").splitlines()
    (sent,) = (i for i, line in enumerate(lines) if "HTTP/1.1 200" in line)
    synced = [(i, found[1]) for i, line in enumerate(lines[:sent]) if (found := SYNCED.search(line))]
    videos, paths = server.data / "videos", [path for _, path in synced]
    begun = f"{videos}/{job}.partial"  # it gets its name when all is in it
    named = next(i for i, line in enumerate(lines) if "rename" in line and f'{job}"' in line)
    within = [path for i, path in synced if i < named]
    assert any(path.startswith(f"{begun}/inputs/") for path in within), synced
    assert {begun, f"{begun}/inputs"} <= set(within), synced
    folder = next(i for i, path in synced if path == str(videos) and i > named)  # the start of the job syncs it again
    stored = max(i for i, path in synced if path.startswith(f"{server.data}/jobs.sqlite"))
    assert folder < stored, (named, paths)


def fill(folder, leave=0):
    """Take all room that is left but so many bytes."""
    with (folder / "filler").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(16 * 1024))
        except OSError:
            pass
        size = file.tell()
        file.truncate(max(0, size - leave))


def wait_for(server, job, is_so):
    end = time.monotonic() + 120
    while not is_so(told := server.ask("GET", f"/v1/videos/{job}").json()):
        assert time.monotonic() < end, told
        time.sleep(0.02)


@pytest.mark.slow
def test_full_disk_is_said_and_the_server_goes_on_when_there_is_room(tmp_path):
    disk = tmp_path / "disk"
    if not mounted(disk, "16m"):
        pytest.skip("no file system can be mounted here")
    try:
        environment = {"OMP_NUM_THREADS": "1"}
        with served(disk / "data", "--reserve", "1MB", environment=environment, log=tmp_path / "log") as one:
            one.wait_for("/health/ready", 120)
            fine = one.ask("POST", "/v1/videos", SMALL).json()["id"]
            assert one.ended(fine)["status"] == "completed"
            fill(disk)
            refused = one.ask("POST", "/v1/videos", SMALL)
            assert refused.status in (503, 507), refused
            assert refused.json()["error"]["code"] == "insufficient_storage", refused
            assert one.ask("GET", f"/v1/videos/{fine}").json()["status"] == "completed"
            (disk / "filler").unlink()
            again = one.ask("POST", "/v1/videos", SMALL)
            assert again.status == 200, again
            assert one.ended(again.json()["id"])["status"] == "completed"
            running = one.ask("POST", "/v1/videos", SMALL | {"steps": 150}).json()["id"]
            wait_for(one, running, lambda job: job["status"] != "queued")
            fill(disk)
            wait_for(one, running, lambda job: job["progress"] >= 99 or job["error"])
            time.sleep(1.0)  # whatever it comes to on a full disk, it is told when that can be kept
            (disk / "filler").unlink()
            ended = one.ended(running)
            assert ended["status"] == "completed" or ended["error"]["code"] == "insufficient_storage", ended
            assert one.ended(one.ask("POST", "/v1/videos", SMALL).json()["id"])["status"] == "completed"
            assert one.stop() == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("damage", ["flipped", "cut", "text"])
def test_damaged_store_is_refused_in_one_sentence(tmp_path, damage):
    one = Served(data=tmp_path / "data")
    one.start()
    for _ in range(20):
        assert one.ask("POST", "/v1/videos", LONG).status == 200
    assert one.stop() == 0
    path = one.data / "jobs.sqlite"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[content.index(b"red circle")] ^= 1  # a letter of a prompt
    path.write_bytes({"flipped": content, "cut": content[: len(content) * 2 // 3], "text": b"hello " * 1000}[damage])
    before = one.log.stat().st_size
    one.start(wait=False)
    try:
        code = one.process.wait(60)
    except subprocess.TimeoutExpired:
        one.kill()
        pytest.fail("a damaged store is served")
    told = one.log.read_bytes()[before:].decode()
    assert code, told
    assert "jobs.sqlite" in told, told
    assert "Traceback" not in told, told
