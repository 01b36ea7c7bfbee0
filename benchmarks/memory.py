"""Peak memory of decoding, each run in a process of its own: `python benchmarks/memory.py`; writes benchmarks/results/.

Does it grow with the number of frames? Does half the memory give the same pixels? Wan 2.1's config, random weights.
"""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEIGHT, WIDTH = 240, 320


def main() -> None:
    """Run the comparisons and write one record."""
    short, long = _decode(17), _decode(81)
    whole = _decode(9, whole=True)
    half = _decode(9, budget=whole["working_bytes"] // 2)
    record = {
        "size": f"{HEIGHT}x{WIDTH}, Wan 2.1, float32",
        "17 frames": short,
        "81 frames": long,
        "81 frames to 17": long["peak_bytes"] / short["peak_bytes"],
        "whole pictures": whole,
        "half of that": half,
        "same pixels": whole["sha256"] == half["sha256"],
    }
    print(json.dumps(record, indent=1))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"vae-memory-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _decode(frames: int, *, budget: int | None = None, whole: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, json.dumps({"frames": frames, "budget": budget, "whole": whole})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the run with {frames} frames failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(frames: int, budget: int | None, whole: bool) -> dict[str, Any]:
    """Decode noise; the resident peak of this process, and how much of it came after the weights were there."""
    import torch

    from frameloom.bench import CONFIGS
    from frameloom.engine.vae import make_fast
    from frameloom.models.spec import VaeSpec
    from frameloom.models.vae_fast import prepare
    from frameloom.models.vae_state import Passage
    from frameloom.models.wan_vae import WanVAE
    from frameloom.ops.registry import Policy
    from frameloom.pipeline import stages
    from frameloom.platform.allocator import keep_freed_memory
    from frameloom.platform.device import peak_memory_bytes

    keep_freed_memory()
    torch.manual_seed(0)
    vae = WanVAE(VaeSpec.from_config(dict(CONFIGS["2.1"]))).eval()
    fast = make_fast(vae, policy=Policy(), budget_bytes=budget)
    prepare(vae.decoder)
    z = torch.randn(1, 16, 1 + (frames - 1) // 4, HEIGHT // 8, WIDTH // 8)
    passages = iter([Passage(steps=4, channels_last=True)]) if whole else fast.planner.decode(tuple(z.shape))
    passage = next(passages)
    loaded = _resident_bytes()
    digest = hashlib.sha256()
    for part in stages.decode(vae, z, iter([passage]), lambda _: None):
        digest.update(part.tobytes())
    peak = peak_memory_bytes(torch.device("cpu"))
    return {
        "frames": frames,
        "passage": str(passage),
        "peak_bytes": peak,
        "working_bytes": peak - loaded,
        "sha256": digest.hexdigest(),
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * 4096


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_child(**json.loads(sys.argv[1]))))
    else:
        main()
