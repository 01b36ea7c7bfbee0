"""One video over several ranks: `python benchmarks/parallel.py cpu` measures here and writes benchmarks/results/.

A second argument picks the cases whose name holds it. `python benchmarks/parallel.py predict` prints the tables of
docs/parallel.md: what the cost model expects of 8 GPUs, with the assumptions that are constants here.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence

from records import keep

from frameloom.bench.parallel import ParallelCase
from frameloom.parallel.cost import Link, Network, RankCost, predicted_s
from frameloom.parallel.mesh import auto_plan
from frameloom.parallel.pass_cost import VaeWork, pass_costs, prefers_margin
from frameloom.parallel.step_cost import StepWork, step_costs
from frameloom.types import ParallelPlan

_DENOISE = "--stages denoise --layers 2 --size 192x320x9 --threads 1 --rounds 2"
CPU = {
    "step, 2 ranks, guidance": f"{_DENOISE} --parallel cfg=2",
    "step, 2 ranks, Ulysses": f"{_DENOISE} --parallel ulysses=2",
    "step, 2 ranks, ring": f"{_DENOISE} --parallel ring=2",
    "step, 2 ranks, tensor": f"{_DENOISE} --parallel tp=2",
    "decode, 2 and 4 ranks": "--stages decode --size 128x192x9 --threads 1 --rounds 2 --ranks 1,2,4",
}
PEAK, OF_PEAK_DIT, OF_PEAK_VAE = 790e12, 0.45, 0.2
NETWORKS = {
    "NVLink": Network(inside=Link(bytes_per_s=360e9, latency_s=20e-6)),
    "PCIe": Network(inside=Link(bytes_per_s=25e9, latency_s=30e-6)),
    "two nodes, 100 Gb/s": Network(
        inside=Link(bytes_per_s=360e9, latency_s=20e-6),
        between=Link(bytes_per_s=11e9, latency_s=50e-6),
        per_machine=4,
    ),
}
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
PLANS = {
    "cfg=2, ulysses=4": ParallelPlan(cfg=2, ulysses=4),
    "ulysses=8": ParallelPlan(ulysses=8),
    "ring=2, ulysses=4": ParallelPlan(ring=2, ulysses=4),
    "ring=8": ParallelPlan(ring=8),
    "cfg=2, tp=4": ParallelPlan(cfg=2, tp=4),
    "tp=8": ParallelPlan(tp=8),
}
SLOW = {"10 Gb/s": 1.1e9, "1 Gb/s": 0.11e9}


def main() -> None:
    """Measure, or predict."""
    device, wanted = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    if device == "predict":
        predict()
        return
    for name, options in CPU.items():
        if wanted in name:
            _measure(name, options, device)


def _measure(name: str, options: str, device: str) -> None:
    words = [sys.executable, "-m", "frameloom", "bench", "parallel", "--device", device, "--json", *options.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: failed: {done.stderr.strip()[-300:]}", flush=True)
        return
    record = json.loads(done.stdout)
    for row in itertools.chain.from_iterable(record["stages"].values()):
        seconds, expected_s = row["seconds"], row["predicted"]["seconds"]
        print(
            f"{name}: {row['ranks']} ranks {seconds['median']:.2f} s ({seconds['low']:.2f} to {seconds['high']:.2f}), "
            f"{row['cpu_seconds']:.2f} s of CPU, efficiency {row['efficiency']:.0%}, predicted {expected_s:.2f} s",
            flush=True,
        )
    keep({name: record}, f"parallel-{device}")


def predict() -> None:
    """Print the tables."""
    print(f"| 8 GPUs, 81 frames | one GPU | {' | '.join(NETWORKS)} |\n|---|---|{'---|' * len(NETWORKS)}")
    for dit in ("1.3B", "14B"):
        for size in SIZES:
            _print_row(
                f"{dit}, {size}, one step", [_of_step(_step(dit, size), network) for network in NETWORKS.values()]
            )
    for size in SIZES:
        _print_row(f"VAE 2.1, {size}, decode", [_of_decode(_video(size), network) for network in NETWORKS.values()])
    work = _step("14B", "720p")
    print(f"\n| 14B, 720p, one step | sent by a rank | {' | '.join(NETWORKS)} |\n|---|---|{'---|' * len(NETWORKS)}")
    for name, plan in PLANS.items():
        costs = step_costs(work, plan)
        found = [predicted_s(costs, PEAK * OF_PEAK_DIT, network) for network in NETWORKS.values()]
        sent = max(cost.sent_bytes for cost in costs)
        print(f"| `{name}` | {sent / 1e9:.2f} GB | {' | '.join(f'{seconds:.2f} s' for seconds in found)} |")
    for name, bytes_per_s in SLOW.items():
        print(
            name, prefers_margin(_video("480p"), 2, Link(bytes_per_s=bytes_per_s, latency_s=1e-4), PEAK * OF_PEAK_VAE)
        )


def _print_row(name: str, found: Sequence[tuple[float, float]]) -> None:
    alone_s = found[0][0]
    cells = [f"{seconds:.2f} s ({alone_s / 8 / seconds:.0%})" for _, seconds in found]
    print(f"| {name} | {alone_s:.2f} s | {' | '.join(cells)} |")


def _step(dit: str, size: str) -> StepWork:
    height, width = SIZES[size]
    spec = ParallelCase(dit=dit, layers=None).spec
    return StepWork(spec=spec, latent_THW=(21, height // 8, width // 8), text_tokens=128)


def _video(size: str) -> VaeWork:
    height, width = SIZES[size]
    spec = ParallelCase().vae_spec
    return VaeWork(spec=spec, latent_THW=(21, height // 8, width // 8), steps=4, itemsize=2)


def _of_step(work: StepWork, network: Network) -> tuple[float, float]:
    """Seconds of one GPU, and of eight by the plan that is chosen for them."""
    here = network.per_machine or 8
    plan, _ = auto_plan(8, work.spec, guided=True, per_machine=here, weights_fit=True)
    return _seconds(step_costs(work, ParallelPlan()), step_costs(work, plan), PEAK * OF_PEAK_DIT, network)


def _of_decode(work: VaeWork, network: Network) -> tuple[float, float]:
    return _seconds(pass_costs(work, 1), pass_costs(work, 8), PEAK * OF_PEAK_VAE, network)


def _seconds(
    alone: Sequence[RankCost], shared: Sequence[RankCost], flops_per_s: float, network: Network
) -> tuple[float, float]:
    return predicted_s(alone, flops_per_s, network), predicted_s(shared, flops_per_s, network)


if __name__ == "__main__":
    main()
