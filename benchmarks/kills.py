"""Runs that are killed at random moments and gone on with: every one ends, with the bytes of a run left in peace.

`python benchmarks/kills.py [--kills 300] [--seed 0] [--record FILE]`: the built-in model on the CPU; exit code 1 if a
promise was broken. Every run is a process of its own, forked before torch has computed anything; kills are SIGKILL.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import frameloom
from frameloom.bench.paired import machine
from frameloom.engine import build, resume  # noqa: F401  imported here, so that no run has to
from frameloom.settings import ask_for_same_sums

PROMPT = "a red circle rising"
SIZE = {"width": 64, "height": 64, "num_frames": 17, "steps": 60, "seed": 3}
PARTS = 3  # in which its frames are decoded: 1, 8, 8
PATIENCE_S = 120.0
AGAIN = 0.3  # how often a resumed run is killed, too


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of the runs."""

    kills: int = 0  # of runs that had a job
    resumed: int = 0
    too_early: int = 0  # before there was a job
    too_late: int = 0  # the video was there
    stages: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def generate(output: Path) -> None:
    """One whole request, with a job."""
    with frameloom.load(device="cpu") as engine:
        engine.generate_to(output, PROMPT, job=True, **SIZE)


def run(work: Callable[..., object], *given: object, kill_after_s: float | None = None) -> tuple[int, float]:
    """The exit status of `work` in a process of its own, and its seconds; -SIGKILL if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work(*given)
            code = 0
        os._exit(code)
    begun, killed = time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - begun
        if done:
            return os.waitstatus_to_exitcode(status), passed
        if (not killed and kill_after_s is not None and passed >= kill_after_s) or passed > PATIENCE_S:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.001)


def stage_of(folder: Path) -> str:
    """How far a job was when it was killed."""
    names = [path.name for path in folder.iterdir()]
    if sum(name.startswith("frames-") for name in names) == PARTS:
        return "encode"
    for start, stage in (("frames-", "decode"), ("latents", "decode"), ("step-", "denoise"), ("prompts", "denoise")):
        if any(name.startswith(start) for name in names):
            return stage
    return "text"


def kill_and_resume(tally: Tally, output: Path, wanted: str, *, lasts_s: float, rng: random.Random) -> None:
    """One video: a run that is killed, and runs that go on with it, of which some are killed as well."""
    output.unlink(missing_ok=True)
    before = {job["name"] for job in frameloom.jobs()}
    code, _ = run(generate, output, kill_after_s=rng.uniform(0, 1.05 * lasts_s))
    new = [job for job in frameloom.jobs() if job["name"] not in before]
    if not new:
        tally.too_early += 1
        return
    if new[0]["state"] == "damaged":
        tally.broken.append(f"unreadable: {new[0]['prompt']}")
        return
    if new[0]["state"] == "finished":
        tally.too_late += 1
        return
    name = new[0]["name"]
    tally.kills += code == -signal.SIGKILL
    stage = stage_of(frameloom.job_to_resume(name).folder)
    tally.stages[stage] = tally.stages.get(stage, 0) + 1
    while rng.random() < AGAIN:
        code, _ = run(frameloom.resume, name, kill_after_s=rng.uniform(0, lasts_s))
        tally.kills += code == -signal.SIGKILL
        if code == 0:
            break
    else:
        code, _ = run(frameloom.resume, name)
    if code:
        tally.broken.append(f"{name} ({stage}): a resumed run ended with {code}")
        return
    tally.resumed += 1
    if hashlib.sha256(output.read_bytes()).hexdigest() != wanted:
        tally.broken.append(f"{name} ({stage}): other bytes")
    if left := [path.name for path in output.parent.iterdir() if path != output]:
        tally.broken.append(f"{name} ({stage}): left {left}")
        for path in left:
            (output.parent / path).unlink()


def main() -> None:
    """Measure, print, and record where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    ask_for_same_sums()
    logging.getLogger("frameloom").setLevel(logging.ERROR)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FRAMELOOM_JOBS"] = f"{folder}/jobs"
        output = Path(folder) / "videos" / "video.mp4"
        output.parent.mkdir()
        undisturbed = [run(generate, output) for _ in range(3)]
        wanted = hashlib.sha256(output.read_bytes()).hexdigest()
        lasts_s = statistics.median(seconds for _, seconds in undisturbed)
        tally = Tally(broken=[f"undisturbed: {code}" for code, _ in undisturbed if code])
        while tally.kills < options.kills and not tally.broken:
            kill_and_resume(tally, output, wanted, lasts_s=lasts_s, rng=rng)
    record = {
        "what": f"{PROMPT}, {SIZE}", "seed": options.seed, "sha256": wanted, "lasts_s": round(lasts_s, 2),
        "kills": tally.kills, "resumed": tally.resumed, "before a job": tally.too_early,
        "after the video": tally.too_late, "stages": tally.stages, "broken": tally.broken,
        "machine": machine(torch.device("cpu")),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if tally.broken else 0)


if __name__ == "__main__":
    main()
