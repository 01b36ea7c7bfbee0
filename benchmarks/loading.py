"""Loading a large single file against reading it with cat: `python benchmarks/loading.py`; writes benchmarks/results/.

Is a warm file of random bfloat16 weights loaded at 70 % of the rate of `cat FILE > /dev/null`, until every page of them
is in the process? At which of plain reads into as much memory of its own, which cat does without? Is each byte read
once? Does the process peak at the file and a tenth? Every run is a process of its own; the file is deleted afterwards.
"""

import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_weights import write_transformer
from records import keep

from frameloom.bench.paired import machine
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import WanDiT
from frameloom.platform.device import peak_memory_bytes
from frameloom.weights.files import read_file
from frameloom.weights.load import load_module
from frameloom.weights.source import open_parts

SPEC = TransformerSpec(num_attention_heads=12, ffn_dim=8960, num_layers=22)  # 1.3B with fewer layers: 2.1 GB
ROUNDS = 5
BAR_SPEED, BAR_MEMORY = 0.7, 1.1


def main() -> None:
    """Write the file, time both sides in turns, count, and keep one record."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan2.1_t2v_bf16.safetensors"
        size = write_transformer(path, SPEC)
        rounds = [_round(path, turn) for turn in range(-1, ROUNDS)][1:]  # the first warms the page cache
    peak = max(one["peak_bytes"] - one["before_bytes"] for one in rounds)
    record = {
        "file": f"{path.name}, original names, random, {size} bytes",
        "rounds": rounds,
        "GB/s": {side: size / 1e9 / _median(rounds, f"{side}_seconds") for side in ("cat", "read", "load")},
        "load to the rate of cat": {**_ratio(rounds, "cat"), "bar": BAR_SPEED},
        "load to the rate of plain reads into own memory": _ratio(rounds, "read"),
        "bytes read or mapped to bytes of the file, at most": max(
            one["read_bytes"] + one["mapped_bytes"] for one in rounds
        )
        / size,
        "peak of resident memory, less what was resident before": {
            "bytes": peak, "to the file": peak / size, "bar": BAR_MEMORY,
        },
        "load of the machine, of the last minute": os.getloadavg()[0],
        "machine": machine(torch.device("cpu")),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    keep(record, "loading-cpu")


def _median(rounds: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(one[key] for one in rounds))


def _ratio(rounds: list[dict[str, Any]], side: str) -> dict[str, float]:
    """Our rate to that of a side in the same round."""
    ratios = [one[f"{side}_seconds"] / one["load_seconds"] for one in rounds]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def _round(path: Path, turn: int) -> dict[str, Any]:
    """Every side once, each time in another order."""
    sides: list[Callable[[], dict[str, Any]]] = [
        lambda: {"cat_seconds": _cat(path)},
        lambda: _child_of(path, "read"),
        lambda: _child_of(path, "load"),
    ]
    first = turn % len(sides)
    found: dict[str, Any] = {}
    for side in sides[first:] + sides[:first]:
        found.update(side())
    return found


def _cat(path: Path) -> float:
    """Seconds of cat, from before it starts."""
    start = time.perf_counter()
    with Path("/dev/null").open("wb") as sink:
        subprocess.run(["cat", path], stdout=sink, check=True)
    return time.perf_counter() - start


def _child_of(path: Path, side: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, side, path], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the side '{side}' failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _read(path: Path) -> dict[str, Any]:
    """Seconds of reading every tensor into fresh memory, and nothing else: what any loader without mapping must do."""
    entries = sorted(read_file(path).entries.values(), key=lambda entry: entry.offset)
    kept, start = [], time.perf_counter()
    with path.open("rb", buffering=0) as file:
        for entry in entries:
            kept.append(torch.empty(entry.size_bytes, dtype=torch.uint8))
            file.seek(entry.offset)
            assert file.readinto(kept[-1].numpy().data) == entry.size_bytes
    return {"read_seconds": time.perf_counter() - start}


def _load(path: Path) -> dict[str, Any]:
    """Open the file and fill a transformer with it: what that took, read and held beyond what was there before.

    The network is made before, as it is from a config; imports are done. All tensors stay bfloat16. A page of a mapped
    file counts as loaded when one of its bytes was looked at.
    """
    cpu = torch.device("cpu")
    with on_meta():
        dit = WanDiT(SPEC)
    before, read_before, start = _resident_bytes(), _read_bytes(), time.perf_counter()
    report = load_module(dit, open_parts(path)["transformer"], dtype=torch.bfloat16)
    returned = time.perf_counter() - start
    for value in dit.state_dict().values():
        value.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].max()
    seconds = time.perf_counter() - start
    return {
        "load_seconds": seconds,
        "returned_seconds": returned,
        "read_bytes": _read_bytes() - read_before,
        "mapped_bytes": _mapped_bytes(path),
        "held_bytes": report.size_bytes,
        "before_bytes": before,
        "peak_bytes": peak_memory_bytes(cpu),
    }


def _mapped_bytes(path: Path) -> int:
    """Bytes of a mapped file that are in this process."""
    found, within = 0, False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if "-" in line.split(" ", 1)[0]:  # the first line of a mapping
            within = line.endswith(path.name)
        elif within and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def _resident_bytes() -> int:
    return mmap.PAGESIZE * int(Path("/proc/self/statm").read_text("ascii").split()[1])


def _read_bytes() -> int:
    """Bytes that this process has read by system calls, from the page cache or not."""
    lines = Path("/proc/self/io").read_text("ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar:")))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps({"read": _read, "load": _load}[sys.argv[1]](Path(sys.argv[2]))))
    else:
        main()
