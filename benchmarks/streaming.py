"""A transformer larger than the memory that it may take: `python benchmarks/streaming.py`; writes benchmarks/results/.

Does one of 8 GB in bfloat16 (the blocks of 14B, fewer of them) denoise under a limit of 3 GB of address space, how much
longer does a step take than the larger of the two things it consists of, and are the bits those of resident weights?
The two: reading the weights of a step from the page cache into one buffer, and computing with resident weights. Every
run is a process of its own, in turns; the file is deleted afterwards.
"""

import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_weights import write_transformer
from records import keep

from frameloom.bench.paired import machine
from frameloom.engine.dit import load_plain_dit, make_fast_dit
from frameloom.engine.residence import Residents
from frameloom.memory.layout import Layout
from frameloom.memory.residency import Footprint, chain_of_dit, resident_bytes
from frameloom.memory.stream import Stream
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.registry import Policy
from frameloom.platform.allocator import keep_freed_memory
from frameloom.platform.device import peak_memory_bytes
from frameloom.types import Residence
from frameloom.weights.source import open_parts

SPEC = TransformerSpec(num_attention_heads=40, ffn_dim=13824, num_layers=11)  # 14B has 40 layers
LIMIT_BYTES, BAR = 3 * 10**9, 1.3
SIZES = {"4 tokens": (1, 4, 4), "16 tokens": (1, 8, 8), "60 tokens": (1, 12, 20)}  # latent frames, rows, columns
ROUNDS, STEPS = 3, 2
SIDES = ("read", "resident", "streamed")
CPU = torch.device("cpu")


def main() -> None:
    """Write the file, run all sides in turns, and keep what was found for each size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan2.1_t2v_bf16.safetensors"
        size_bytes = write_transformer(path, SPEC, repeats=True)
        keep(
            {
                "file": f"14B with {SPEC.num_layers} layers, bfloat16, {size_bytes} bytes",
                "limit of address space, bytes": LIMIT_BYTES,
                "predicted weights, bytes": _predicted(),
                "machine": machine(CPU),
            },
            "streaming-cpu",
        )
        for name, size in SIZES.items():
            found = _in_turns(path, list(size))
            print(name, json.dumps(found, indent=1), flush=True)
            keep({name: found}, "streaming-cpu")


def _in_turns(path: Path, latents: list[int]) -> dict[str, Any]:
    """All sides, each round beginning with another, once the file is in the page cache."""
    _child_of(path, "read", latents)
    rounds = []
    for turn in range(ROUNDS):
        first = turn % len(SIDES)
        rounds.append({side: _child_of(path, side, latents) for side in SIDES[first:] + SIDES[:first]})
    seconds = {side: [one[side]["step_seconds"] for one in rounds] for side in SIDES}
    larger = max(("read", "resident"), key=lambda side: statistics.median(seconds[side]))
    ratios = [one["streamed"]["step_seconds"] / one[larger]["step_seconds"] for one in rounds]
    return {
        "step_seconds": {side: _spread(found) for side, found in seconds.items()},
        "read_bytes": rounds[0]["read"]["bytes"],
        "the larger": "reading" if larger == "read" else "computing with resident weights",
        "streamed to the larger": {**_spread(ratios), "bar": BAR},
        "seconds of processors, streamed to resident": _spread(
            [one["streamed"]["cpu_seconds"] / one["resident"]["cpu_seconds"] for one in rounds]
        ),
        "peak of resident memory, bytes": max(one["streamed"]["peak_bytes"] for one in rounds),
        "the same bits": len({one[side]["sha256"] for one in rounds for side in SIDES[1:]}) == 1,
        "load of the machine, of the last minute": os.getloadavg()[0],
    }


def _spread(found: list[float]) -> dict[str, float]:
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def _predicted() -> dict[str, int]:
    with on_meta():
        dit = WanDiT(SPEC)
    footprint = Footprint.of(
        dit, chain_of_dit(dit), lambda name, value: value.numel() * (4 if dit.keep_in_fp32(name) else 2)
    )
    return {str(residence): resident_bytes(footprint, residence) for residence in Residence}


def _child_of(path: Path, side: str, latents: list[int]) -> dict[str, Any]:
    command = [sys.executable, __file__, side, path, json.dumps(latents)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the side '{side}' failed: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _read(path: Path, _: list[int]) -> dict[str, Any]:
    """Seconds of reading what a step needs, block after block, into a buffer of one tensor: the least that must be."""
    with on_meta():
        chain = chain_of_dit(WanDiT(SPEC))
    entries = open_parts(path)["transformer"].tensors
    wanted = [entries[name] for unit in chain.units[chain.cycle_from :] for name in unit]
    buffer = torch.zeros(max(entry.size_bytes for entry in wanted), dtype=torch.uint8).numpy().data
    seconds = []
    with path.open("rb", buffering=0) as file:
        for _step in range(STEPS):
            start = time.perf_counter()
            for entry in wanted:
                file.seek(entry.offset)
                assert file.readinto(buffer[: entry.size_bytes]) == entry.size_bytes
            seconds.append(time.perf_counter() - start)
    return {"step_seconds": statistics.median(seconds), "bytes": sum(entry.size_bytes for entry in wanted)}


def _compute(path: Path, latents: list[int], residents: Residents | None) -> dict[str, Any]:
    """Seconds of a guided step: both branches pass the network one after the other."""
    keep_freed_memory()
    plain = load_plain_dit(open_parts(path)["transformer"], SPEC, torch.bfloat16, CPU, residents=residents)
    policy = Policy(forced=dict.fromkeys(("dit.linear_packed", "dit.mlp_packed", "dit.qkv_fused"), False))
    dit = make_fast_dit(plain, policy=policy).dit
    torch.manual_seed(0)
    x, texts = torch.randn(1, 16, *latents), torch.randn(2, 1, 512, SPEC.text_dim)
    texts[:, :, 20:] = 0
    seconds, cpu_seconds = [], []
    with torch.inference_mode():
        prompts = [dit.read_prompt(text) for text in texts]
        for step in range(STEPS + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            velocities = dit.velocities(x, torch.tensor([900.0 - step]), prompts)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    told = hashlib.sha256(b"".join(v.view(torch.uint8).numpy().tobytes() for v in velocities)).hexdigest()
    return {
        "step_seconds": statistics.median(seconds[1:]),
        "cpu_seconds": statistics.median(cpu_seconds[1:]),
        "sha256": told,
        "peak_bytes": peak_memory_bytes(CPU),
    }


def _resident(path: Path, latents: list[int]) -> dict[str, Any]:
    return _compute(path, latents, None)


def _streamed(path: Path, latents: list[int]) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    layout = Layout(transformer=Residence.STREAMED)
    return _compute(path, latents, Residents(layout=layout, device=CPU, transformer=Stream(CPU)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        side = {"read": _read, "resident": _resident, "streamed": _streamed}[sys.argv[1]]
        print(json.dumps(side(Path(sys.argv[2]), json.loads(sys.argv[3]))))
    else:
        main()
