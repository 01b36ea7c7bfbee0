"""Diffusers' pipelines as they come and accelerated: `frameloom bench drop-in`. Random weights, or a folder's."""

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from frameloom.bench.paired import Side, check_size, check_words, in_turns, machine, peak_in_own_process
from frameloom.bench.vae import VaeCase, our_side
from frameloom.errors import RequestError
from frameloom.integrations.diffusers.accelerate import accelerate_pipeline
from frameloom.integrations.diffusers.samples.catalogue import SAMPLES, sample_in, sample_of
from frameloom.integrations.diffusers.samples.sample import Sample, Scale
from frameloom.models.spec import VaeSpec
from frameloom.platform.allocator import keep_freed_memory
from frameloom.platform.device import choose_device, peak_memory_bytes, reset_peak_memory, timed

ALL = "all"
_SIDES = ("accelerated", "diffusers")


@dataclass(frozen=True, kw_only=True, slots=True)
class DropInCase:
    """One comparison. `pipeline`: a class, one of its kinds, or "all"; `model`: a folder instead, as Diffusers saves.

    `widths` full or small: of the VAEs of random pipelines. `frames` is 4k+1. `allocator` default or tuned, for both
    sides. `peaks` False leaves out the runs that measure memory, one of each side.
    """

    pipeline: str = "WanPipeline"
    model: str | None = None
    widths: str = "full"
    height: int = 256
    width: int = 320
    frames: int = 17
    steps: int = 2
    rounds: int = 3
    exactness: str = "rounding"
    allocator: str = "tuned"
    device: str = "auto"
    peaks: bool = True

    def check(self) -> None:
        """Raise RequestError for what cannot be run."""
        check_words(self, {"widths": ("full", "small"), "allocator": ("default", "tuned")})
        check_size(self, multiple=32, reason="the pipelines' VAEs and patches")
        if self.steps < 1:
            raise RequestError(f"{self.steps} steps make nothing; use 1 or more")

    @property
    def scale(self) -> Scale:
        """What is asked of a pipeline."""
        size = {"height": self.height, "width": self.width, "frames": self.frames, "steps": self.steps}
        return Scale(**size, full=self.widths == "full")

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The pipelines that are compared, without those that cannot be built here unless they are named."""
        if self.model is not None:
            return (sample_in(self.model),)
        if self.pipeline == ALL:
            return tuple(sample for sample in SAMPLES if not sample.missing)
        return (sample_of(self.pipeline),)


def run_drop_in(case: DropInCase) -> dict[str, Any]:
    """Time each pipeline accelerated and as it comes, in turns, and measure the peak memory in processes of their own.

    Where it has a VAE of Wan, also its decoding alone, beside that of the engine here: which share of the engine's gain
    is reached.
    """
    case.check()
    device = _prepared(case)
    return {
        "case": asdict(case),
        "pipelines": [_compared(case, sample, device) for sample in case.samples],
        "machine": machine(device),
    }


def run_one_side(case: DropInCase, name: str) -> int:
    """Run one side of a pipeline once and return the peak memory of this process or device, in bytes."""
    device = _prepared(case)
    (sample,) = case.samples
    pipe = sample.build(case.scale).to(device)
    if name == "accelerated":
        accelerate_pipeline(pipe, case.exactness, vae=True, transformer=True, text_encoder=False)
    reset_peak_memory(device)
    sample.run(pipe, case.scale)
    return peak_memory_bytes(device)


def _prepared(case: DropInCase) -> torch.device:
    device, _ = choose_device(case.device)
    if case.allocator == "tuned" and device.type == "cpu":
        keep_freed_memory()
    return device


def _compared(case: DropInCase, sample: Sample, device: torch.device) -> dict[str, Any]:
    plain, ours = (sample.build(case.scale).to(device) for _ in _SIDES)
    report = accelerate_pipeline(ours, case.exactness, vae=True, transformer=True, text_encoder=False)
    pipes = dict(zip(_SIDES, (ours, plain), strict=True))
    made: dict[str, Tensor] = {}

    def side(name: str) -> Side:
        def run() -> Tensor:
            made[name] = sample.run(pipes[name], case.scale)
            return made[name]

        return run

    found = in_turns({name: side(name) for name in _SIDES}, device, rounds=case.rounds)
    apart = made["accelerated"] - made["diffusers"]
    return {
        "pipeline": sample.name,
        **found,
        "levels_apart": float(apart.abs().max()) * 255,
        "report": [asdict(entry) for entry in report.entries],
        "peak_bytes": _peaks(case, sample) if case.peaks else {},
        "decode": _decoded(case, plain, ours, device),
    }


def _decoded(case: DropInCase, plain: Any, ours: Any, device: torch.device) -> dict[str, Any] | None:
    """Seconds to decode one video: in Diffusers, accelerated and by the engine here, whose gain is the measure."""
    if type(plain.vae).__name__ != "AutoencoderKLWan":
        return None
    spec = VaeSpec.from_config(dict(plain.vae.config))
    frames, space = 1 + (case.frames - 1) // 4, plain.vae.config.scale_factor_spatial
    size = (1, spec.z_dim, frames, case.height // space, case.width // space)
    latents = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device)
    vae_case = VaeCase(height=case.height, width=case.width, frames=case.frames, exactness=case.exactness)
    engine, _ = our_side(vae_case, spec, plain.vae.state_dict(), latents)
    sides = {"diffusers": _decoder(plain.vae, latents), "accelerated": _decoder(ours.vae, latents), "engine": engine}
    seconds = _medians(sides, device, case.rounds)
    return {"seconds": seconds, "share_of_gain": share_of_gain(seconds)}


def share_of_gain(seconds: Mapping[str, float]) -> float | None:
    """What share of the seconds that the engine here saves is saved in the pipeline; None where it saves none."""
    gain = seconds["diffusers"] - seconds["engine"]
    return (seconds["diffusers"] - seconds["accelerated"]) / gain if gain > 0 else None


def _decoder(vae: Any, latents: Tensor) -> Side:
    def run() -> Tensor:
        with torch.inference_mode():
            out: Tensor = vae.decode(latents, return_dict=False)[0]
        return out

    return run


def _medians(sides: Mapping[str, Side], device: torch.device, rounds: int) -> dict[str, float]:
    """Each in turn, another first in each round, after one that warms up."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        sides[name]()
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed(sides[name], device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _peaks(case: DropInCase, sample: Sample) -> dict[str, int]:
    alone = replace(case, pipeline=sample.name)
    return {name: peak_in_own_process("frameloom.bench.drop_in", alone, name) for name in _SIDES}


if __name__ == "__main__":
    print(run_one_side(DropInCase(**json.loads(sys.argv[2])), sys.argv[1]))
