"""Long videos of the built-in model: `python benchmarks/long_videos.py [memory] [seams] [preview]`; writes results/.

Memory: does the peak of a whole request grow with its frames? Seams: how much neighbouring frames differ where windows
meet, and whether colour and shape stay. Preview: what drawing it costs.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import keep

import frameloom
from frameloom.bench.paired import machine
from frameloom.pipeline.media import Video, contact_sheet
from frameloom.sampling.windows import windows_over
from frameloom.shapes.evaluate import Trial, trials
from frameloom.shapes.reader import read_clip

FRAMES = (81, 321, 1281)
TRAINED = 17
OVERLAPS = (4, 8)
PROMPTS = 6
LENGTH = 65  # four times as much as was trained, in latent frames
STEPS = 15


def main() -> None:
    """Run what is asked for, or all, and write one record."""
    parts: Mapping[str, Callable[[], dict[str, Any]]] = {"memory": memory, "seams": seams, "preview": preview}
    for name in sys.argv[1:] or parts:
        record = parts[name]()
        print(json.dumps(record, indent=1), flush=True)
        keep({name: {**record, "machine": machine(torch.device("cpu"))}}, "long-videos-cpu")


def memory() -> dict[str, Any]:
    """Peak bytes of a process that writes a video of so many frames, with a journal, in windows."""
    peaks = {frames: _peak(frames) for frames in FRAMES}
    return {"peak_bytes": peaks, "largest to smallest": max(peaks.values()) / min(peaks.values())}


def _peak(frames: int) -> int:
    """VmHWM of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--write", str(frames), f"{folder}/video.mp4"]
        done = subprocess.run(
            words, env=os.environ | {"FRAMELOOM_JOBS": folder}, check=True, capture_output=True, text=True
        )
    return int(done.stdout.split()[-1])


def write(frames: int, path: str) -> None:
    """Make the video, and print the peak memory of this process in bytes."""
    torch.set_num_threads(1)
    with frameloom.load() as engine:
        engine.generate_to(path, "a red circle rising", num_frames=frames, steps=2, windows=True, job=True)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))


def seams() -> dict[str, Any]:
    """Long videos with several overlaps against videos of the length that was trained, judged alike."""
    torch.set_num_threads(1)
    chosen = trials(PROMPTS)
    with frameloom.load() as engine:

        def make(trial: Trial, **options: Any) -> Video:
            return engine.generate(trial.prompt, seed=trial.seed, steps=STEPS, **options)

        found = {"trained length": judged(chosen, [make(trial) for trial in chosen], overlap=None)}
        for overlap in OVERLAPS:
            videos = [make(trial, num_frames=LENGTH, windows=True, window_overlap=overlap) for trial in chosen]
            found[f"overlap {overlap}"] = judged(chosen, videos, overlap=overlap)
            print(overlap, found[f"overlap {overlap}"], flush=True)
            contact_sheet(videos, [trial.prompt for trial in chosen], frames_per_video=17).save(
                Path(tempfile.gettempdir()) / f"long-videos-{overlap}.png"
            )
        whole = [make(trial, num_frames=LENGTH) for trial in chosen]
        found["whole, no windows"] = judged(chosen, whole, overlap=None)
    return found


def judged(chosen: list[Trial], videos: list[Video], *, overlap: int | None) -> dict[str, Any]:
    """Shares of right readings of every piece of the trained length, and mean levels between neighbouring frames."""
    readings = [
        (trial, read_clip(video.frames[start : start + TRAINED]))
        for trial, video in zip(chosen, videos, strict=True)
        for start in range(0, len(video.frames) - TRAINED + 1, TRAINED - 1)
    ]
    steps = np.stack([np.abs(np.diff(video.frames.astype(np.float64), axis=0)).mean((1, 2, 3)) for video in videos])
    told: dict[str, Any] = {
        name: sum(getattr(reading, name) == getattr(trial.scene, name) for trial, reading in readings) / len(readings)
        for name in ("colour", "shape")
    }
    told["levels between neighbours"] = float(steps.mean())
    if overlap is not None:
        at_seam = in_overlaps(overlap)
        told["at seams"], told["elsewhere"] = float(steps[:, at_seam].mean()), float(steps[:, ~at_seam].mean())
        told["seams to elsewhere"] = told["at seams"] / told["elsewhere"]
    return told


def in_overlaps(overlap: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of the differences between neighbouring frames lie where windows share frames, or at their edges."""
    windows = windows_over((LENGTH - 1) // 4, (TRAINED - 1) // 4, overlap // 4)
    flags = np.zeros(LENGTH - 1, dtype=bool)
    for before, after in itertools.pairwise(windows):
        flags[4 * after.start : 4 * before.stop + 1] = True  # pixel frame 4k+1 is the first of latent frame k+1
    return flags


def preview() -> dict[str, Any]:
    """Seconds of denoising with and without a preview, in turns."""
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder, frameloom.load() as engine:
        for _ in range(5):
            for name, given in (("without", None), ("with", f"{folder}/preview.png")):
                begun = time.perf_counter()
                made = engine.generate_to(f"{folder}/video.mp4", "a red circle rising", preview=given, seed=3)
                taken[name].append(made["seconds"]["denoise"])
                print(name, time.perf_counter() - begun, flush=True)
    best = {name: min(values) for name, values in taken.items()}
    return {"denoise_s": taken, "best with to without": best["with"] / best["without"]}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(int(sys.argv[2]), sys.argv[3])
    else:
        main()
