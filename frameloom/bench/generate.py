"""Whole requests against diffusers.WanPipeline on the same checkpoint: `frameloom bench generate`. Frames, no file."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frameloom.bench.paired import Side, check_words, in_turns, machine, reference_library
from frameloom.engine.build import build_engine
from frameloom.engine.engine import Engine
from frameloom.platform.device import DTYPES, choose_device
from frameloom.types import EngineConfig

_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCase:
    """One comparison. `model`: a checkpoint folder or hub id; `size`: height, width, frames, None the checkpoint's."""

    model: str
    prompt: str = "a red circle moving left"
    size: tuple[int, int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    dtype: str = "float32"
    device: str = "auto"
    rounds: int = 3
    exactness: str = "rounding"
    rewrites: tuple[str, ...] = ()
    compilation: str = "auto"
    attention: str = "auto"

    def check(self) -> None:
        """Raise RequestError for what cannot be run."""
        check_words(self, {"dtype": DTYPES})


def run_generate(case: GenerateCase) -> dict[str, Any]:
    """Time both sides in turns, from the prompt to frames; both have the checkpoint loaded."""
    case.check()
    device, _ = choose_device(case.device)
    config = EngineConfig(
        device=case.device, dtype=case.dtype, exactness=case.exactness, rewrites=case.rewrites,
        compilation=case.compilation, attention=case.attention, prompt_cache=False,
    )  # fmt: skip
    with build_engine(case.model, config) as engine:
        options = _options(case, engine)
        ours = _Ours(engine, case.prompt, options)
        theirs = _theirs(case, options, device)
        found = in_turns({"ours": ours, "diffusers": theirs}, device, rounds=case.rounds)
        apart = (ours() * 255).round() - (theirs() * 255).round()
        return {
            "case": asdict(case),
            "what": "{height}x{width}x{num_frames}, {steps} steps, guidance {guidance_scale:g}".format(**options),
            **found,
            "stages": ours.stages,
            "levels_apart": int(apart.abs().max()),
            "decisions": [str(decision) for decision in engine.decisions],
            "machine": machine(device),
        }


def _options(case: GenerateCase, engine: Engine) -> dict[str, Any]:
    """What both sides are asked, complete."""
    height, width, frames = case.size or (None, None, None)
    request = engine.resolve(
        case.prompt, height=height, width=width, num_frames=frames, steps=case.steps, guidance_scale=case.guidance
    )
    names = ("height", "width", "num_frames", "steps", "guidance_scale", "flow_shift")
    return {name: getattr(request, name) for name in names} | {"negative_prompt": request.negative_prompts[0]}


class _Ours:
    """Our side; keeps the seconds per stage of the last request."""

    def __init__(self, engine: Engine, prompt: str, options: dict[str, Any]) -> None:
        self._engine, self._prompt, self._options = engine, prompt, options
        self.stages: dict[str, float] = {}

    def __call__(self) -> Tensor:
        """Frames (T, H, W, 3) in 0..1."""
        video = self._engine.generate(self._prompt, seed=_SEED, **self._options)
        self.stages = dict(video.metadata["seconds"])
        return torch.from_numpy(video.frames.astype(np.float32) / 255)


def _theirs(case: GenerateCase, options: dict[str, Any], device: torch.device) -> Side:
    """Diffusers' side, its scheduler with the same shift, its VAE in float32 as its documentation says."""
    diffusers = reference_library()
    vae = diffusers.AutoencoderKLWan.from_pretrained(case.model, subfolder="vae", dtype=torch.float32)
    pipe = diffusers.WanPipeline.from_pretrained(case.model, vae=vae, dtype=DTYPES[case.dtype]).to(device)
    pipe.set_progress_bar_config(disable=True)
    if options["flow_shift"] is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=options["flow_shift"])
    asked = {**options, "num_inference_steps": options["steps"]}
    for name in ("steps", "flow_shift"):
        del asked[name]

    def run() -> Tensor:
        generator = torch.Generator("cpu").manual_seed(_SEED)
        return torch.from_numpy(pipe(case.prompt, generator=generator, output_type="np", **asked).frames[0])

    return run
