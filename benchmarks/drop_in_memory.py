"""Peak memory of WanPipeline with Wan 2.1's VAE, accelerated and as it comes: `python benchmarks/drop_in_memory.py`.

Float32 on a CPU, random weights, each run in a process of its own; writes benchmarks/results/.
"""

import torch
from records import keep

from frameloom.bench.drop_in import DropInCase
from frameloom.bench.paired import machine, peak_in_own_process

SIZES = ((128, 192, 9), (256, 448, 9), (480, 832, 5))
SIDES = ("diffusers", "accelerated")


def main() -> None:
    """Measure both sides at every size, and write one record."""
    found = {}
    for height, width, frames in SIZES:
        case = DropInCase(height=height, width=width, frames=frames, steps=1, device="cpu")
        peaks = {side: peak_in_own_process("frameloom.bench.drop_in", case, side) for side in SIDES}
        print(f"{height}x{width}x{frames}: {peaks}", flush=True)
        found[f"{height}x{width}x{frames}, peak bytes"] = peaks
    keep({"Wan 2.1": {**found, "machine": machine(torch.device("cpu"))}}, "drop-in-memory-cpu")


if __name__ == "__main__":
    main()
