"""The VAE against diffusers.AutoencoderKLWan: `frameloom bench vae`. Random weights, configs of the released ones."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from frameloom.bench.paired import (
    Side,
    check_size,
    check_words,
    in_turns,
    machine,
    matmul_peak,
    peak_in_own_process,
    reference_library,
)
from frameloom.engine.rewrites import policy_of
from frameloom.engine.vae import make_fast
from frameloom.errors import RequestError
from frameloom.models.meta import on_meta
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import REFERENCE, prepare, without_weights
from frameloom.models.wan_vae import WanVAE
from frameloom.platform.allocator import keep_freed_memory
from frameloom.platform.device import DTYPES, choose_device, peak_memory_bytes, reset_peak_memory

# FORMATS of the released checkpoints: Wan 2.1 and 2.2-A14B; Wan 2.2-TI2V-5B.
CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "2.1": {"base_dim": 96, "z_dim": 16},
        "2.2": {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
        "tiny": {"base_dim": 16, "z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
    }
)
BASELINES = ("shipped", "channels_last")


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeCase:
    """One comparison. `frames` is 4k+1; `allocator` default or tuned; `memory_bytes` is the budget of our side.

    `peaks` False leaves out the runs that measure memory, one of each side.
    """

    vae: str = "2.1"
    direction: str = "decode"
    height: int = 240
    width: int = 320
    frames: int = 17
    dtype: str = "float32"
    baseline: str = "shipped"
    allocator: str = "tuned"
    device: str = "auto"
    rounds: int = 3
    exactness: str = "rounding"
    rewrites: tuple[str, ...] = ()
    memory_bytes: int | None = None
    peaks: bool = True

    def check(self) -> None:
        """Raise RequestError for what cannot be run."""
        words = {"vae": CONFIGS, "direction": ("decode", "encode"), "baseline": BASELINES}
        check_words(self, {**words, "allocator": ("default", "tuned"), "dtype": ("float32", "bfloat16")})
        check_size(self, multiple=16 if self.vae == "2.2" else 8, reason="the VAE")


def run_vae(case: VaeCase) -> dict[str, Any]:
    """Time both sides in turns, and measure the peak memory of each in a process of its own."""
    case.check()
    device, _ = choose_device(case.device)
    if case.allocator == "tuned" and device.type == "cpu":
        keep_freed_memory()
    theirs, ours, facts = _sides(case, device)
    flops = count_flops(case)
    found = in_turns({"ours": ours, "diffusers": theirs}, device, rounds=case.rounds)
    peak = matmul_peak(device, DTYPES[case.dtype])
    return {
        "case": asdict(case),
        **found,
        "flops": flops,
        "matmul_flops_per_s": peak,
        "fraction_of_peak": {name: flops / value / peak for name, value in found["seconds"].items()},
        "peak_bytes": _peaks(case, found["seconds"]) if case.peaks else {},
        **facts,
        "machine": machine(device),
    }


def run_one_side(case: VaeCase, name: str) -> int:
    """Run one side once and return the peak memory of this process or device, in bytes."""
    device, _ = choose_device(case.device)
    if case.allocator == "tuned" and device.type == "cpu":
        keep_freed_memory()
    theirs, ours, _ = _sides(case, device, only=name)
    reset_peak_memory(device)
    (ours if name == "ours" else theirs)()
    return peak_memory_bytes(device)


def count_flops(case: VaeCase) -> int:
    """Multiplications and additions of the plain model, counted on the meta device."""
    spec = VaeSpec.from_config(dict(CONFIGS[case.vae]))
    twin = without_weights(spec, torch.float32, REFERENCE)
    x = _input(case, spec, torch.device("meta"), torch.float32)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        (twin.decode if case.direction == "decode" else twin.encode)(x)
    return int(counter.get_total_flops())


def _sides(case: VaeCase, device: torch.device, *, only: str | None = None) -> tuple[Side, Side, dict[str, Any]]:
    """Diffusers' and our way to compute the case, with the same weights, and what is to be said of ours."""
    dtype = DTYPES[case.dtype]
    reference = _diffusers_vae(dict(CONFIGS[case.vae]))
    spec = VaeSpec.from_config(dict(reference.config))
    reference = reference.to(device, dtype)
    x = _input(case, spec, device, dtype)
    facts: dict[str, Any] = {}
    ours: Side = _nothing
    if only != "diffusers":
        ours, facts = our_side(case, spec, reference.state_dict(), x)
    if only == "ours":
        return _nothing, ours, facts
    if case.baseline == "channels_last":
        for module in reference.modules():
            if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d):
                last = torch.channels_last_3d if isinstance(module, torch.nn.Conv3d) else torch.channels_last
                module.weight.data = module.weight.data.contiguous(memory_format=last)
    theirs_x = x.contiguous(memory_format=torch.channels_last_3d) if case.baseline == "channels_last" else x

    def theirs() -> Tensor:
        with torch.inference_mode():
            if case.direction == "decode":
                out: Tensor = reference.decode(theirs_x).sample
            else:
                out = reference.encode(theirs_x).latent_dist.parameters
            return out

    return theirs, ours, facts


def our_side(case: VaeCase, spec: VaeSpec, weights: Mapping[str, Tensor], x: Tensor) -> tuple[Side, dict[str, Any]]:
    """The engine's way to compute a case on copies of these weights, and what is to be said of it."""
    with on_meta():
        vae = WanVAE(spec).eval()
    vae.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, strict=True, assign=True)
    fast = make_fast(vae, policy=policy_of(case.exactness, case.rewrites), budget_bytes=case.memory_bytes)
    plan = fast.planner.decode if case.direction == "decode" else fast.planner.encode
    prepare(vae.decoder if case.direction == "decode" else vae.encoder)
    passage = next(plan(tuple(x.shape)))

    def ours() -> Tensor:
        with torch.inference_mode():
            return vae.decode(x, passage) if case.direction == "decode" else vae.encode(x, passage)

    return ours, {"passage": str(passage), "decisions": [str(decision) for decision in fast.decisions]}


def _nothing() -> Tensor:
    raise RequestError("this side was not asked for")


def _diffusers_vae(config: dict[str, Any]) -> Any:
    """Diffusers' VAE with random weights of a realistic size: its own initialisation, from seed 0."""
    torch.manual_seed(0)
    return reference_library().AutoencoderKLWan(**config).eval()


def _input(case: VaeCase, spec: VaeSpec, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Noise: latents to decode, or frames in [-1, 1] to encode."""
    time, space = spec.temporal_scale, spec.spatial_scale
    size: tuple[int, ...] = (1, 3, case.frames, case.height, case.width)
    if case.direction == "decode":
        size = (1, spec.z_dim, 1 + (case.frames - 1) // time, case.height // space, case.width // space)
    if device.type == "meta":
        return torch.empty(size, device=device, dtype=dtype)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    return (x if case.direction == "decode" else x.clamp(-1, 1)).to(device, dtype)


def _peaks(case: VaeCase, names: Iterable[str]) -> dict[str, int]:
    return {name: peak_in_own_process("frameloom.bench.vae", case, name) for name in names}


if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    print(run_one_side(VaeCase(**{**asked, "rewrites": tuple(asked["rewrites"])}), sys.argv[1]))
