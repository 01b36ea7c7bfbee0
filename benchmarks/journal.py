"""What keeping a job costs: the same request with and without one, in turns, and the seconds spent in the journal.

`python benchmarks/journal.py [--rounds 9] [--record FILE]`: the built-in model on the CPU, with its own defaults.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import frameloom
from frameloom.bench.paired import machine

PROMPT = "a red circle rising"


def run(engine: frameloom.Engine, output: Path, *, job: bool) -> dict[str, Any]:
    """One request: its seconds, and those of the journal."""
    begun = time.perf_counter()
    made = engine.generate_to(output, PROMPT, job=job)
    return {"seconds": time.perf_counter() - begun, "journal": made.get("journal_seconds", 0.0)}


def main() -> None:
    """Measure, print, and record where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    logging.getLogger("frameloom").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, frameloom.load(device="cpu") as engine:
        os.environ["FRAMELOOM_JOBS"] = f"{folder}/jobs"
        output = Path(folder) / "video.mp4"
        run(engine, output, job=True)
        rounds = [(run(engine, output, job=False), run(engine, output, job=True)) for _ in range(options.rounds)]
    ratios = sorted(kept["seconds"] / plain["seconds"] for plain, kept in rounds)
    shares = sorted(kept["journal"] / kept["seconds"] for _, kept in rounds)
    record = {
        "what": f"{PROMPT}, the built-in model's own size, frames and steps",
        "with a job against without": {
            "median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1],
        },
        "share of the seconds spent writing the journal": {
            "median": statistics.median(shares), "low": shares[0], "high": shares[-1],
        },
        "seconds without, median": statistics.median(plain["seconds"] for plain, _ in rounds),
        "rounds": options.rounds,
        "machine": machine(torch.device("cpu")),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
