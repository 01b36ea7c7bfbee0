"""Whether several small requests are faster as one batch than one after the other, on this machine.

    python benchmarks/batching.py --rounds 5

Both ways take turns. A batch starts from one draw of noise, so its videos are other ones than those of single requests:
what is compared is time, and how far the frames are from those made alone is told beside it.
"""

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
from records import keep

import frameloom
from frameloom.engine.engine import Engine
from frameloom.platform.device import device_name

PROMPTS = ["a red circle moving left", "a blue square moving up", "a green triangle growing", "a red square turning"]
CASES: dict[str, dict[str, Any]] = {
    "built-in defaults": {"num_frames": 17, "steps": 25},
    "few tiny steps": {"width": 32, "height": 32, "num_frames": 9, "steps": 2},
    "320 tokens": {"width": 128, "height": 128, "num_frames": 17, "steps": 3},
    "900 tokens": {"width": 160, "height": 160, "num_frames": 33, "steps": 3},
}


def main() -> None:
    """Time every case and keep its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    with frameloom.load(device=asked.device) as engine:
        for name, case in CASES.items():
            for count in (2, 4):
                record = compare(engine, PROMPTS[:count], case, asked.rounds)
                low, high, cpu = record["low"], record["high"], record["cpu_ratio"]
                print(f"{name}, {count}: a batch takes {record['ratio']:.2f} ({low:.2f} to {high:.2f}) of the time,")
                print(f"  {cpu:.2f} of the cores' time", flush=True)
                keep({f"{name}, {count} requests": record}, f"batching-{engine.pipeline.device.type}")


def compare(engine: Engine, prompts: list[str], case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of a batch over those of single requests: the median of rounds, and how far it was off."""

    def batch() -> list[np.ndarray]:
        return [video.frames for video in engine.generate(prompts, seed=1, **case)]

    def single() -> list[np.ndarray]:
        return [engine.generate(prompt, seed=1, **case).frames for prompt in prompts]

    together, alone = batch(), single()  # both ways have run once before the clock counts
    rows = []
    for index in range(rounds):
        ways = (batch, single) if index % 2 else (single, batch)
        spent = {way: timed(way) for way in ways}
        rows.append((*spent[batch], *spent[single]))
    ratios = sorted(batch_s / single_s for batch_s, _, single_s, _ in rows)
    batch_s, batch_cpu_s, single_s, single_cpu_s = map(statistics.median, zip(*rows, strict=True))
    apart = max(float(np.abs(a.astype(int) - b.astype(int)).mean()) for a, b in zip(together, alone, strict=True))
    return {
        "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1], "rounds": rounds,
        "cpu_ratio": statistics.median(batch_cpu / single_cpu for _, batch_cpu, _, single_cpu in rows),
        "batch_s": batch_s, "single_s": single_s, "batch_cpu_s": batch_cpu_s, "single_cpu_s": single_cpu_s,
        "requests": len(prompts), "case": case, "mean_levels_apart": apart,
        "device": device_name(engine.pipeline.device), "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(), "torch": str(torch.__version__), "frameloom": frameloom.__version__,
    }  # fmt: skip


def timed(way: Any) -> tuple[float, float]:
    """Seconds of one call, on the clock and of this process's cores: what else runs here delays the first alone."""
    begun, begun_cpu = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - begun, time.process_time() - begun_cpu


if __name__ == "__main__":
    main()
