"""The server as a process: how it starts, what its log says, how it ends, and what is left then. Signals are real."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVED = pytest.importorskip("served", reason="benchmarks/served.py is not on the path")
served, marked = SERVED.served, SERVED.marked

SECRET, OTHER = "a-secret-of-alice-0123456789", "another-secret-of-bob-9876543"
SHORT = {"prompt": "a red circle moving left", "num_frames": 9, "steps": 2, "seed": 1, "size": "64x64"}
SECONDS = {**SHORT, "steps": 100}
MINUTES = {**SECONDS, "steps": 200, "num_frames": 33, "size": "128x128"}
OPTIONS = ("--log", "json")
FAST = {"OMP_NUM_THREADS": "1"}


def until(condition, what, seconds=90.0):
    """What the condition gives as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError(what)


def status_of(server, job, **more):
    return server.ask("GET", f"/v1/videos/{job}", **more).json()


def lines_of(server):
    """The log, without the line for people on standard output."""
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]


def denoising(server, body):
    """The id of a job that is made right now, some steps into it."""
    job = server.ask("POST", "/v1/videos", body).json()["id"]
    until(lambda: status_of(server, job)["step"] >= 3 and status_of(server, job)["stage"] == "denoise", "no steps")
    return job


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server with two keys, which has an engine; and its file of keys."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = folder / "keys.toml"
    keys.write_text(f'[alice]\nsecret = "{SECRET}"\n[bob]\nsecret = "{OTHER}"\nqueued = 2\n')
    keys.chmod(0o600)
    environment = {**FAST, "FRAMELOOM_LOG": "debug"}
    with served(folder / "data", *OPTIONS, "--keys", str(keys), environment=environment) as server:
        server.wait_for("/health/ready", 120)
        yield server, keys


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def test_no_secret_and_no_prompt_in_the_log_and_every_line_is_an_object(keyed):
    server, _ = keyed
    prompt = "a red circle that nobody else may know of"
    made = server.ask("POST", "/v1/videos", {**SHORT, "prompt": prompt}, headers=bearer(SECRET))
    job, request = made.json()["id"], made.headers["x-request-id"]
    assert server.ended(job, headers=bearer(SECRET))["status"] == "completed"
    server.ask("POST", "/v1/videos", {**SHORT, "prompt": prompt}, headers=bearer("a-key-that-nobody-has-0000"))
    server.ask("POST", f"/v1/videos?key={SECRET}", {**SHORT, "steps": prompt}, headers=bearer(SECRET))
    until(lambda: any(line.get("status") == 400 for line in lines_of(server)), "the last answer is not in the log")
    text = server.log.read_text()
    for word in (SECRET, OTHER, "nobody-has", "nobody else"):
        assert word not in text
    lines = lines_of(server)
    (answered,) = (line for line in lines if line.get("request") == request and line["message"] == "answered")
    assert (answered["key"], answered["method"], answered["path"]) == ("alice", "POST", "/v1/videos")
    assert answered["status"] == 200
    assert answered["ms"] > 0
    told = [line for line in lines if line.get("job") == job]
    assert {"alice"} == {line["key"] for line in told if "key" in line}
    assert any(line.get("fence") == 1 for line in told), told
    assert any(line.get("worker") == 0 for line in told), told
    assert any(line.get("status") == 401 for line in lines)
    people = [line for line in text.splitlines() if not line.startswith("{")]
    assert people == [f"frameloom serves frameloom-shapes at http://127.0.0.1:{server.port} (the page is there, "
                      f"the API below http://127.0.0.1:{server.port}/v1)"]  # fmt: skip


def test_metrics_need_a_key_and_count_what_happened(keyed):
    server, _ = keyed
    assert server.ask("GET", "/metrics").status == 401
    found = server.ask("GET", "/metrics", headers=bearer(OTHER))
    assert found.status == 200
    assert found.headers["content-type"].startswith("text/plain")
    text = found.body.decode()
    assert "frameloom_workers_ready 1.0" in text
    assert 'frameloom_jobs_accepted_total{kind="create"}' in text
    assert "alice" not in text


def test_the_http_process_has_no_torch(keyed):
    server, _ = keyed
    maps = Path(f"/proc/{server.pid}/maps").read_text()
    assert "libpython" in maps or "python" in maps
    assert "torch" not in maps


def test_hang_up_reads_the_keys_again_and_a_wrong_file_changes_nothing(keyed):
    server, keys = keyed
    new = "a-new-secret-of-carol-555555"
    assert server.ask("GET", "/v1/videos", headers=bearer(new)).status == 401
    before = keys.read_text()
    keys.write_text(before + f'[carol]\nsecret = "{new}"\n')
    server.signal(signal.SIGHUP)
    until(lambda: server.ask("GET", "/v1/videos", headers=bearer(new)).status == 200, "the new key is not taken")
    keys.write_text("[carol]\nsecret = 'short'\n")
    server.signal(signal.SIGHUP)
    until(lambda: any("the keys stay as they were" in line["message"] for line in lines_of(server)), "nothing said")
    assert server.ask("GET", "/v1/videos", headers=bearer(new)).status == 200
    keys.write_text(before)
    server.signal(signal.SIGHUP)
    until(lambda: server.ask("GET", "/v1/videos", headers=bearer(new)).status == 401, "the old key is still taken")
    assert server.ask("GET", "/v1/videos", headers=bearer(SECRET)).status == 200


def test_a_second_server_on_the_folder_is_refused_in_one_sentence(keyed):
    server, _ = keyed
    done = subprocess.run(
        [sys.executable, "-m", "frameloom", "serve", "--port", "0", "--data-dir", server.data],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    said = [line for line in done.stderr.splitlines() if line.startswith("frameloom: ")]
    assert len(said) == 1
    assert str(server.data) in said[0]
    assert "Traceback" not in done.stderr
    assert server.ask("GET", "/health/live").status == 200


def test_check_says_that_a_folder_is_in_use(keyed):
    server, _ = keyed
    done = subprocess.run(
        [sys.executable, "-m", "frameloom", "serve", "--check", "--port", "0", "--data-dir", server.data],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert f"process number {server.pid}" in " ".join(done.stdout.replace("│", " ").split())


def test_jobs_are_taken_before_there_is_an_engine_and_where_there_can_be_none(tmp_path):
    with served(tmp_path / "data", *OPTIONS, "--device", "quantum", environment=FAST) as server:
        made = server.ask("POST", "/v1/videos", SHORT)
        assert made.status == 200
        refused = until(lambda: (told := server.ask("GET", "/health/ready")).status == 503 and told.json(), "ready")
        until(lambda: "'quantum' is unknown" in server.ask("GET", "/health/ready").body.decode(), refused)
        assert server.ask("GET", "/health/live").status == 200
        until(lambda: any("'quantum' is unknown" in line["message"] for line in lines_of(server)), "no line says it")
        server.signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        server.options = OPTIONS
        server.start()
        assert server.ended(made.json()["id"])["status"] == "completed"


# --- the end ---


def test_sigterm_gives_a_running_job_its_grace(tmp_path):
    with served(tmp_path / "data", *OPTIONS, "--grace", "120s", environment=FAST) as server:
        server.wait_for("/health/ready", 120)
        job = denoising(server, SECONDS)
        waiting = server.ask("POST", "/v1/videos", SHORT).json()["id"]
        server.signal(signal.SIGTERM)
        until(lambda: server.ask("POST", "/v1/videos", SHORT).status == 503, "new jobs are still taken")
        refused = server.ask("POST", "/v1/videos", SHORT)
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) <= 120
        assert status_of(server, job)["status"] == "in_progress"  # those who wait for it are still answered
        assert server.process.wait(150) == 0
        server.start()
        assert status_of(server, job)["status"] == "completed"
        assert status_of(server, job)["attempts"] == 1
        assert server.ended(waiting)["status"] == "completed"


def test_what_the_grace_is_too_short_for_goes_on_after_the_next_start(tmp_path):
    with served(tmp_path / "data", *OPTIONS, "--grace", "0.5s", environment=FAST) as server:
        server.wait_for("/health/ready", 120)
        job = denoising(server, MINUTES)
        events = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        events.request("GET", f"/v1/videos/{job}/events")
        stream = events.getresponse()
        mark = server.mark
        begun = time.monotonic()
        assert server.stop(60) == 0
        assert time.monotonic() - begun < 30
        with contextlib.suppress(http.client.IncompleteRead):
            stream.read()  # it ends, and does not hang
        events.close()
        assert marked(mark) == []
        server.start()
        told = status_of(server, job)
        assert told["status"] in ("queued", "in_progress")
        assert server.ask("POST", f"/v1/videos/{job}/cancel").status == 200
        assert server.ended(job)["error"]["code"] == "cancelled"


def test_a_second_signal_ends_the_grace(tmp_path):
    with served(tmp_path / "data", *OPTIONS, "--grace", "1h", environment=FAST) as server:
        server.wait_for("/health/ready", 120)
        job = denoising(server, MINUTES)
        server.signal(signal.SIGINT)
        until(lambda: server.ask("POST", "/v1/videos", SHORT).status == 503, "new jobs are still taken")
        server.signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        server.start()
        assert status_of(server, job)["status"] in ("queued", "in_progress")


def test_kill_9_leaves_no_orphans_and_the_port_is_free_at_once(tmp_path):
    with served(tmp_path / "data", *OPTIONS, environment=FAST) as server:
        server.wait_for("/health/ready", 120)
        job = denoising(server, SECONDS)
        mark = server.mark
        kept = socket.create_connection(("127.0.0.1", server.port))  # a client that does not let go
        server.kill()
        gone = until(lambda: not marked(mark), "orphans", seconds=15)
        assert gone
        server.start()
        kept.close()
        made = server.ended(job)
        assert (made["status"], made["attempts"]) == ("completed", 2)


def test_keys_for_the_network_and_without_them_a_loud_warning(tmp_path):
    environment = {**FAST, "FRAMELOOM_API_KEY": SECRET}
    with served(tmp_path / "a", *OPTIONS, "--host", "0.0.0.0", environment=environment) as server:
        assert server.ask("GET", "/v1/videos").status == 401
        assert server.ask("GET", "/v1/videos", headers=bearer(SECRET)).status == 200
        assert SECRET not in server.log.read_text()
    with served(tmp_path / "b", *OPTIONS, "--host", "0.0.0.0", "--insecure-public", environment=FAST) as server:
        assert server.ask("GET", "/v1/videos").status == 200
        (said,) = until(lambda: [line for line in lines_of(server) if "ANYBODY" in line["message"]], "no warning")
        assert said["level"] == "warning"


def test_the_line_for_people_is_one_write_so_that_no_line_of_the_log_is_glued_to_it(tmp_path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a packet is what was one write
    words = [sys.executable, "-m", "frameloom", "serve", "--port", "0", "--data-dir", str(tmp_path / "data")]
    environment = {**os.environ, **FAST, "PYTHONUNBUFFERED": "1"}
    with ours, theirs, (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=theirs, stderr=log, env=environment)
        try:
            ours.settimeout(60)
            said = ours.recv(4096).decode()
        finally:
            server.terminate()
            server.wait(60)
    assert said.startswith("frameloom serves ")
    assert said.endswith("\n")


def test_a_server_under_nohup_is_not_ended_by_a_hang_up(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, for what is started
    try:
        with served(tmp_path / "data", *OPTIONS, environment=FAST) as server:
            os.kill(server.pid, signal.SIGHUP)
            time.sleep(0.5)
            assert server.ask("GET", "/health/live").status == 200
    finally:
        signal.signal(signal.SIGHUP, before)
