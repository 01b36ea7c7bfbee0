"""Peak memory of a rank that decodes its part, beside one process: `python benchmarks/parallel_memory.py`.

Wan 2.1's config, random weights, 480x832x9 in whole pictures by direct convolutions, float32, on a CPU; writes
benchmarks/results/. Arguments, if any: HEIGHT WIDTH FRAMES and the numbers of ranks.
"""

import ctypes
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from records import keep

from frameloom.bench.paired import machine
from frameloom.bench.vae import CONFIGS
from frameloom.engine.ranks import Ranks, single
from frameloom.engine.vae import make_fast
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import prepare
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Policy
from frameloom.parallel.rendezvous import join
from frameloom.pipeline import stages
from frameloom.platform.allocator import is_glibc, keep_freed_memory
from frameloom.platform.device import peak_memory_bytes
from frameloom.settings import launched
from frameloom.types import ParallelPlan

DIRECT = ("vae.conv_winograd", "vae.conv_winograd_plain", "vae.upsample_winograd", "vae.bands")  # off
CPU = torch.device("cpu")
BUDGET = 64 << 30  # whatever it takes: what it takes is the question


def main(height: int = 480, width: int = 832, frames: int = 9, *counts: int) -> None:
    """One run for each number of ranks, and their peaks beside that of one process."""
    found = {count: _run(count, height, width, frames) for count in counts or (1, 4)}
    alone = found[1]
    record = {
        "size": f"{height}x{width}x{frames}, Wan 2.1, float32, whole pictures, direct convolutions",
        "ranks": found,
        "largest peak to one process": {
            count: max(one["peak_bytes"]) / alone["peak_bytes"][0] for count, one in found.items()
        },
        "largest working memory to one process": {
            count: max(one["working_bytes"]) / alone["working_bytes"][0] for count, one in found.items()
        },
        "the same bytes": len({one["sha256"] for one in found.values()}) == 1,
        "machine": machine(CPU),
    }
    print(json.dumps(record, indent=1))
    keep(record, "parallel-memory")


def _run(count: int, *size: int) -> dict[str, Any]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *start, __file__, "decode", *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the run with {count} ranks failed: {done.stderr.strip()[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.inference_mode()
def _decode(height: int, width: int, frames: int) -> None:
    """This process's part of a video of noise; the first prints what all of them took."""
    keep_freed_memory()
    place = launched()
    ranks = single(CPU)
    if place is not None:
        world = join(place, device=CPU, facts={})
        plan = ParallelPlan(vae=world.size)
        ranks = Ranks(world=world, plan=plan, mesh=None, device=CPU, per_machine=world.size)
    torch.manual_seed(0)
    vae = WanVAE(VaeSpec.from_config(dict(CONFIGS["2.1"]))).eval()
    fast = make_fast(vae, policy=Policy(forced=dict.fromkeys(DIRECT, False)), budget_bytes=BUDGET, ranks=ranks)
    prepare(vae.decoder)
    noise = torch.Generator().manual_seed(0)
    z = torch.randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8, generator=noise)
    passages = ranks.vae_planner(fast.planner, vae.spec).decode(tuple(z.shape))
    loaded = _resident_bytes()
    digest = hashlib.sha256()
    for part in stages.decode(vae, z, passages, lambda _: None):
        digest.update(part.tobytes())
    peak = peak_memory_bytes(CPU)
    team = ranks.world.everyone
    told = team.collect(torch.tensor([peak, peak - loaded]), [(2,)] * team.size)
    if team.index == 0:
        peaks, working = ([int(one[index]) for one in told] for index in (0, 1))
        print(json.dumps({"peak_bytes": peaks, "working_bytes": working, "sha256": digest.hexdigest()}))


def _resident_bytes() -> int:
    """What this process holds, without what the allocator keeps of freed memory."""
    if is_glibc():
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * 4096


if __name__ == "__main__":
    if sys.argv[1:2] == ["decode"]:
        _decode(*map(int, sys.argv[2:]))
    else:
        main(*map(int, sys.argv[1:]))
