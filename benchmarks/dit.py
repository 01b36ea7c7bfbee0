"""The transformer against Diffusers here: `python benchmarks/dit.py cpu` or `cuda`; writes benchmarks/results/.

A second argument picks the cases whose name holds it. `timesteps`: frames with their own timestep against one for all.
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from records import keep, run_cases

from frameloom.bench.dit import CONFIGS
from frameloom.bench.paired import in_turns, machine
from frameloom.engine.dit import make_fast_dit
from frameloom.memory.meter import peak_bytes
from frameloom.models.dit_fast import without_weights
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import FrameTimes, WanDiT
from frameloom.ops.registry import Policy
from frameloom.platform.allocator import keep_freed_memory
from frameloom.platform.device import choose_device

CPU = {
    "guided step, float32": "--layers 6 --rounds 5",
    "guided step, bfloat16": "--layers 6 --rounds 5 --dtype bfloat16",
    "step without guidance, float32": "--layers 6 --rounds 3 --no-guided",
}
CUDA = {
    f"{dit} {size} against {baseline}": f"--dit {dit} --size {size} --dtype bfloat16 --baseline {baseline}"
    for dit in ("1.3B", "14B")
    for size in ("480x832x81",)
    for baseline in ("shipped", "compiled")
}
TIMESTEPS = "timesteps of frames, 5B width"
_LATENTS = (1, 48, 5, 30, 52)


def main() -> None:
    """Run the cases of one device and write one record each."""
    device, wanted = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    run_cases("dit", CUDA if device == "cuda" else CPU, device=device, wanted=wanted)
    if wanted in TIMESTEPS:
        record = timesteps(device)
        print(f"{TIMESTEPS}: {json.dumps(record)}", flush=True)
        keep({TIMESTEPS: record}, f"dit-{device}")


@torch.inference_mode()
def timesteps(name: str) -> dict[str, Any]:
    """Two layers at the width of TI2V-5B: a step with a timestep for the first frame, and one with one for all."""
    device, _ = choose_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    spec = TransformerSpec(**{**CONFIGS["5B"], "num_layers": 2})
    fast = make_fast_dit(WanDiT(spec).eval().to(device), policy=Policy())
    x, t = torch.randn(_LATENTS, device=device), torch.tensor([500.0], device=device)
    frames = FrameTimes(
        torch.tensor([[0.0, 500.0]], device=device), (torch.arange(_LATENTS[2], device=device) > 0).long()
    )
    prompt = fast.dit.read_prompt(torch.randn(1, 512, spec.text_dim, device=device))
    found = in_turns(
        {
            "frames": lambda: fast.dit.velocities(x, frames, [prompt])[0],
            "one": lambda: fast.dit.velocities(x, t, [prompt])[0],
        },
        device,
        rounds=5,
    )
    twin = without_weights(spec, torch.float32, replace(fast.choices, collapses_padding=False))
    peaks = {key: _peak(twin, value) for key, value in (("frames", frames), ("one", t))}
    return {
        "seconds": found["seconds"],
        "time, one to frames": found["speedup"],
        "peak_bytes": peaks,
        "memory, frames to one": peaks["frames"] / peaks["one"],
        "machine": machine(device),
    }


def _peak(twin: WanDiT, timestep: torch.Tensor | FrameTimes) -> int:
    """Bytes of a step, counted without computing it."""
    meta = torch.device("meta")
    x, text = torch.empty(_LATENTS, device=meta), torch.empty(1, 512, twin.spec.text_dim, device=meta)
    if isinstance(timestep, FrameTimes):
        timestep = FrameTimes(timestep.values_BM.to(meta), timestep.index_F.to(meta))
    else:
        timestep = timestep.to(meta)
    prompt = twin.read_prompt(text)
    return peak_bytes(lambda: twin.velocities(x, timestep, [prompt]))


if __name__ == "__main__":
    main()
