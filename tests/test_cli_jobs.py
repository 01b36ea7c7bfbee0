"""The commands about jobs: what is kept, how one goes on with it, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import frameloom

SMALL = ("--width", "64", "--height", "32", "--frames", "9", "--seed", "4")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of jobs of this test alone."""
    monkeypatch.setenv("FRAMELOOM_JOBS", str(tmp_path / "jobs"))
    return tmp_path / "jobs"


def started(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(frameloom.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "frameloom", *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(folder, pattern, process):
    """Until a job has kept something."""
    for _ in range(6000):
        if list(folder.glob(f"*/{pattern}")):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError(f"nothing like {pattern} was kept")


def ended(process, sent, *, stderr_has=""):
    process.send_signal(sent)
    _, err = process.communicate(timeout=240)
    assert stderr_has in err
    return err


@pytest.mark.parametrize(
    ("sent", "said"),
    [(signal.SIGKILL, ""), (signal.SIGINT, "interrupted; nothing was written"), (signal.SIGTERM, "terminated")],
)
def test_a_run_that_ends_early_is_gone_on_with_by_a_command(sent, said, checkpoint_of, folder, tmp_path, run):
    asked = ("a cat", "--model", checkpoint_of(), *SMALL, "--steps", "400", "--quality", "40")
    assert run("generate", *asked, "-o", tmp_path / "whole.mp4")[0] == 0
    process = started("generate", *asked, "-o", tmp_path / "a.mp4")
    wait_for(folder, "loop*", process)
    err = ended(process, sent, stderr_has=said)
    (name,) = [job["name"] for job in frameloom.jobs() if job["state"] == "unfinished"]
    if sent != signal.SIGKILL:
        assert f"`frameloom resume {name}` goes on" in err
    code, out, _ = run("resume", "--json")
    made = json.loads(out)
    assert (code, made["output"], made["prompt"]) == (0, str(tmp_path / "a.mp4"), "a cat")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    code, _, err = run("resume", name)
    assert code == 2
    assert "is finished, and its video is at" in err


def test_several_ranks_are_gone_on_with_as_they_were(checkpoint_of, folder, tmp_path, run):
    asked = ("a cat", "--model", checkpoint_of(), *SMALL, "--steps", "120", "--device", "cpu", "--gpus", "2")
    whole = started("generate", *asked, "-o", tmp_path / "whole.mp4")
    _, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    process = started("generate", *asked, "-o", tmp_path / "a.mp4")
    wait_for(folder, "loop*", process)
    err = ended(process, signal.SIGINT, stderr_has="`frameloom resume 2")
    assert err.count("frameloom resume") == 1
    again = started("resume")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_jobs_are_listed_and_removed(checkpoint_of, folder, tmp_path, run):
    assert run("jobs", "--json")[1] == '{"jobs": []}\n'
    assert (
        run("generate", "a cat", "--model", checkpoint_of(), *SMALL, "-o", tmp_path / "a.mp4", "--keep-latents")[0] == 0
    )
    code, out, _ = run("jobs")
    assert code == 0
    assert "finished" in out
    assert "a cat" in out
    (job,) = json.loads(run("jobs", "--json")[1])["jobs"]
    assert (folder / job["name"] / "latents.safetensors").exists()
    assert run("jobs", "--forget", "none")[0] == 2
    assert run("jobs", "--forget", job["name"])[0] == 0
    assert not (folder / job["name"]).exists()


def test_nothing_is_kept_where_that_is_asked_for(checkpoint_of, folder, tmp_path, run):
    assert (
        run("generate", "a cat", "--model", checkpoint_of(), *SMALL, "-o", tmp_path / "a.mp4", "--no-journal")[0] == 0
    )
    assert not folder.exists()
    code, _, err = run("resume")
    assert code == 2
    assert "is unfinished; `frameloom jobs` lists all" in err


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that even root cannot write to")
def test_a_folder_of_jobs_that_cannot_be_written_costs_the_journal_alone(checkpoint_of, tmp_path, run, monkeypatch):
    monkeypatch.setenv("FRAMELOOM_JOBS", "/proc/jobs")
    code, _, err = run("generate", "a cat", "--model", checkpoint_of(), *SMALL, "-o", tmp_path / "a.mp4")
    assert code == 0
    assert "no job can be kept in /proc/jobs" in err
    assert "cannot be resumed" in err


def test_listing_needs_no_torch(folder):
    code = "import sys; from frameloom.engine import jobs; print(jobs.all_jobs(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"
