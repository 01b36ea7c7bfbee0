"""Runs cases of `frameloom bench` one after the other, each in a process of its own, and keeps their records."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def run_cases(command: str, cases: Mapping[str, str], *, device: str, wanted: str) -> None:
    """`frameloom bench COMMAND` for every case (name: options) whose name holds `wanted`; one record each."""
    for name, options in cases.items():
        if wanted not in name:
            continue
        words = [
            sys.executable,
            "-m",
            "frameloom",
            "bench",
            command,
            "--device",
            device,
            "--json",
            *shlex.split(options),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed: {done.stderr.strip()[-300:]}", flush=True)
            continue
        record = json.loads(done.stdout)
        print(f"{name}: {_summary(record)}", flush=True)
        keep({name: record}, f"{command}-{device}")


def keep(records: Mapping[str, Any], name: str) -> None:
    """Add records to the file of this name and day; those of the same case are replaced."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{time.strftime('%Y-%m-%d')}.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, **records}, indent=1) + "\n", encoding="utf-8")


def _summary(record: Mapping[str, Any]) -> str:
    if "pipelines" in record:
        return "; ".join(f"{found['pipeline']} {_summary(found)}" for found in record["pipelines"])
    speedup, peak = record["speedup"], record.get("peak_bytes")
    memory = f", memory {peak.get('ours', peak.get('accelerated')) / peak['diffusers']:.2f}x" if peak else ""
    error = f"relative error {record['relative_error']:.1e}"
    return f"{speedup['median']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f}){memory}, {error}"
