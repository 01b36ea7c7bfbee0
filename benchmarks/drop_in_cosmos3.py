"""What Cosmos 3 conditions on, prepared by Diffusers, with the frames in use alone, and with the VAE here as well.

`python benchmarks/drop_in_cosmos3.py [HEIGHTxWIDTHxFRAMES] [ROUNDS]`: Wan 2.1's VAE in full width with random weights,
both sides in turns in one process; writes benchmarks/results/.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from records import keep

from frameloom.bench.paired import in_turns, machine
from frameloom.engine.rewrites import policy_of
from frameloom.integrations.diffusers.accelerate import accelerate_pipeline
from frameloom.integrations.diffusers.conditioning import take_conditioning
from frameloom.integrations.diffusers.samples.catalogue import sample_of
from frameloom.integrations.diffusers.samples.parts import picture, video
from frameloom.integrations.diffusers.samples.sample import Scale
from frameloom.platform.allocator import keep_freed_memory

SIZE = "128x160x33"
ROUNDS = 2
HISTORY = 5  # frames of a video that is continued
CPU = torch.device("cpu")


def main() -> None:
    """Time all, print and write one record for each kind of request."""
    keep_freed_memory()
    height, width, frames = map(int, (sys.argv[1] if len(sys.argv) > 1 else SIZE).split("x"))
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS
    scale = Scale(height=height, width=width, frames=frames, full=True)
    plain, frames_alone, accelerated = (sample_of("Cosmos3OmniPipeline").build(scale) for _ in range(3))
    take_conditioning(frames_alone, policy_of("rounding", ()))
    accelerate_pipeline(accelerated, "rounding", vae=True, transformer=False, text_encoder=False)
    asked: dict[str, dict[str, Any]] = {
        "text to video": {},
        "image to video": {"image": picture(scale)},
        "video to video": {"video": video(scale)[:HISTORY]},
    }
    for kind, condition in asked.items():
        theirs = _preparing(plain, scale, condition)
        record: dict[str, Any] = {"size": [height, width, frames], "machine": machine(CPU)}
        for name, pipe in {"the frames in use alone": frames_alone, "accelerated": accelerated}.items():
            sides = {"ours": _preparing(pipe, scale, condition), "diffusers": theirs}
            record[name] = in_turns(sides, CPU, rounds=rounds)
            speedup, seconds = record[name]["speedup"], record[name]["seconds"]
            print(
                f"{kind}, {name}: {seconds['diffusers']:.3f} s -> {seconds['ours']:.3f} s, {speedup['median']:.1f}x "
                f"({speedup['low']:.1f} to {speedup['high']:.1f}), relative error {record[name]['relative_error']:.1e}",
                flush=True,
            )
        keep({f"{kind}, {height}x{width}x{frames}": record}, "drop-in-cosmos3-cpu")


def _preparing(pipe: Any, scale: Scale, condition: dict[str, Any]) -> Callable[[], torch.Tensor]:
    size = {"num_frames": scale.frames, "height": scale.height, "width": scale.width}

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            made = pipe.prepare_latents(**size, **condition, generator=generator, device="cpu", dtype=torch.float32)
        latents: torch.Tensor = made[0]
        assert np.isfinite(latents.numpy()).all()
        return latents

    return run


if __name__ == "__main__":
    main()
