"""Peak memory of decoding, each run in a process of its own: `python benchmarks/memory.py`; writes benchmarks/results/.

Is it less than Diffusers'? Does it grow with the number of frames? Does half the memory give the same pixels? Wan 2.1's
config, random weights, on a CPU.
"""

import ctypes
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import keep

from frameloom.bench.paired import machine
from frameloom.bench.vae import CONFIGS
from frameloom.engine.vae import make_fast
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import prepare
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Policy
from frameloom.pipeline import stages
from frameloom.platform.allocator import is_glibc, keep_freed_memory
from frameloom.platform.device import peak_memory_bytes

HEIGHT, WIDTH = 240, 320
LARGE = {"height": 480, "width": 832, "frames": 17, "allocator": "default"}
DIRECT = ("vae.conv_winograd", "vae.conv_winograd_plain", "vae.upsample_winograd", "vae.norm_silu_native")  # off


def main() -> None:
    """Run the comparisons and write one record."""
    with tempfile.TemporaryDirectory() as folder:
        short, long = _decode(17), _decode(81)
        whole = _decode(9, steps=4, into=f"{folder}/whole.npy")
        half = _decode(9, budget=whole["working_bytes"] // 2, into=f"{folder}/half.npy")
        alike = _decode(9, steps=half["steps"])
        apart = np.abs(np.load(f"{folder}/whole.npy").astype(int) - np.load(f"{folder}/half.npy"))
    direct = {side: _peak(side) for side in ("ours", "diffusers")}
    record = {
        "direct path without a compiler, 480x832x17, peak bytes": direct,
        "ours to diffusers": direct["ours"] / direct["diffusers"],
        "size": f"{HEIGHT}x{WIDTH}, Wan 2.1, float32",
        "17 frames": short,
        "81 frames": long,
        "81 frames to 17": long["peak_bytes"] / short["peak_bytes"],
        "whole pictures": whole,
        "half of that": half,
        "half, levels of 255 apart at most": int(apart.max()),
        "half, share of values that are apart": float((apart > 0).mean()),
        "whole pictures, as many frames at a time as the half": alike,
        "the same bits as those": alike["sha256"] == half["sha256"],
        "machine": machine(torch.device("cpu")),
    }
    print(json.dumps(record, indent=1))
    keep(record, "vae-memory")


def _peak(side: str) -> int:
    """Bytes of a process that decodes once by direct convolutions, or as Diffusers does."""
    case = {**LARGE, "device": "cpu", "rewrites": [f"{name}=off" for name in DIRECT]}
    command = [sys.executable, "-m", "frameloom.bench.vae", side, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the run of {side} failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def _decode(frames: int, *, budget: int | None = None, steps: int | None = None, into: str = "") -> dict[str, Any]:
    """One process. `steps`: whole pictures, so many latent frames at a time; None: what the planner says."""
    asked = {"frames": frames, "budget": budget, "steps": steps, "into": into}
    command = [sys.executable, __file__, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the run with {frames} frames failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(frames: int, budget: int | None, steps: int | None, into: str) -> dict[str, Any]:
    """Decode noise; the resident peak of this process, and how much of it came after the weights were there."""
    keep_freed_memory()
    torch.manual_seed(0)
    vae = WanVAE(VaeSpec.from_config(dict(CONFIGS["2.1"]))).eval()
    fast = make_fast(vae, policy=Policy(), budget_bytes=budget)
    prepare(vae.decoder)
    z = torch.randn(1, 16, 1 + (frames - 1) // 4, HEIGHT // 8, WIDTH // 8)
    plain = fast.planner.choices.passage
    passage = next(fast.planner.decode(tuple(z.shape))) if steps is None else replace(plain, steps=steps)
    predicted = fast.planner.needed((1, 16, *z.shape[3:]), z.shape[2] - 1, passage)
    loaded = _resident_bytes()
    digest, kept = hashlib.sha256(), []
    for part in stages.decode(vae, z, iter([passage]), lambda _: None):
        digest.update(part.tobytes())
        if into:
            kept.append(part)
    peak = peak_memory_bytes(torch.device("cpu"))
    if into:
        np.save(into, np.concatenate(kept, axis=1))
    return {
        "frames": frames,
        "passage": str(passage),
        "steps": passage.steps,
        "predicted_bytes": predicted,
        "peak_bytes": peak,
        "working_bytes": peak - loaded,
        "sha256": digest.hexdigest(),
    }


def _resident_bytes() -> int:
    """What this process holds, without what the allocator keeps of freed memory."""
    if is_glibc():
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * 4096


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_child(**json.loads(sys.argv[1]))))
    else:
        main()
