"""A denoising step against diffusers.WanTransformer3DModel: `frameloom bench dit`. Random weights, released configs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from frameloom.attention.core import Attend
from frameloom.bench.paired import Side, check_size, check_words, in_turns, machine, matmul_peak, reference_library
from frameloom.engine.dit import FastDit, make_fast_dit
from frameloom.engine.rewrites import policy_of
from frameloom.errors import RequestError
from frameloom.models.dit_block import Attention
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.registry import relative_error
from frameloom.pipeline.stages import Predictor
from frameloom.platform.allocator import keep_freed_memory
from frameloom.platform.device import DTYPES, choose_device, timed
from frameloom.sampling.guidance import guide

# Of the released checkpoints: Wan 2.1 T2V 1.3B and 14B (and each expert of 2.2 A14B), Wan 2.2 TI2V-5B.
CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        "5B": {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        "tiny": {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2, "text_dim": 24},
    }
)
BASELINES = ("shipped", "compiled")
_SPATIAL_SCALES = {"5B": 16}  # of the VAE; 8 for the others
_TEXT_TOKENS = 512
_PROMPT_LENGTHS = (30, 120)  # tokens of a usual prompt, and of the usual negative one
_SCALE = 5.0
_LINEAR = ("addmm", "::mm", "bmm", "linear", "gemm", "matmul")
_ATTENTION = ("scaled_dot_product", "flash", "attention", "fmha", "softmax")


@dataclass(frozen=True, kw_only=True, slots=True)
class DitCase:
    """One comparison. `frames` is 4k+1; `layers` None: all there are; `guided`: with and without the prompt."""

    dit: str = "1.3B"
    layers: int | None = None
    height: int = 240
    width: int = 416
    frames: int = 17
    dtype: str = "float32"
    guided: bool = True
    baseline: str = "shipped"
    device: str = "auto"
    rounds: int = 3
    exactness: str = "rounding"
    rewrites: tuple[str, ...] = ()
    compilation: str = "auto"
    attention: str = "auto"

    def check(self) -> None:
        """Raise RequestError for what cannot be run."""
        check_words(self, {"dit": CONFIGS, "baseline": BASELINES, "dtype": ("float32", "bfloat16")})
        check_size(self, multiple=2 * _SPATIAL_SCALES.get(self.dit, 8), reason="VAE x patch")
        if self.layers is not None and self.layers < 1:
            raise RequestError(f"{self.layers} layers compute nothing; use 1 or more")

    @property
    def config(self) -> dict[str, Any]:
        """The transformer's."""
        config = dict(CONFIGS[self.dit])
        return config if self.layers is None else {**config, "num_layers": self.layers}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(B, C, T, H, W)."""
        space = _SPATIAL_SCALES.get(self.dit, 8)
        channels = self.config.get("in_channels", 16)
        return 1, channels, 1 + (self.frames - 1) // 4, self.height // space, self.width // space


@torch.inference_mode()
def run_dit(case: DitCase) -> dict[str, Any]:
    """Time a step of both sides in turns; the prompt is read before, as it is in a video of many steps."""
    case.check()
    device, _ = choose_device(case.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = DTYPES[case.dtype]
    exact = _reference(case)
    reference = _in_dtype(exact, dtype).to(device)
    inputs = _inputs(case, device)
    errors = {} if dtype == torch.float32 else _error_of_reference(exact, reference, inputs, case)
    del exact
    fast = _fast_twin(case, reference)
    theirs, (ours, prompt_seconds, why) = _their_side(case, reference, inputs), _our_side(fast, inputs, device)
    found = in_turns({"ours": ours, "diffusers": theirs}, device, rounds=case.rounds)
    flops, peak = count_flops(case), matmul_peak(device, dtype)
    for module in fast.dit.modules():
        if isinstance(module, Attention):
            module.attend = _told_apart(module.attend)
    if errors:
        errors["ours"] = relative_error(ours(), errors.pop("exact"))
    return {
        "case": asdict(case),
        "tokens": math.prod(fast.dit.token_grid(*inputs[0].shape[2:])),
        **found,
        "prompt_seconds": prompt_seconds,
        "relative_error_to_float32": errors,
        "flops": flops,
        "matmul_flops_per_s": peak,
        "fraction_of_peak": {name: flops / value / peak for name, value in found["seconds"].items()},
        "shares": {name: _shares(side, device) for name, side in (("ours", ours), ("diffusers", theirs))},
        "guidance": why,
        "decisions": [str(decision) for decision in fast.decisions],
        "machine": machine(device),
    }


def count_flops(case: DitCase) -> int:
    """Multiplications and additions of the plain model in a step, its reading of the prompt included, on meta."""
    with on_meta():
        dit = WanDiT(TransformerSpec(**case.config)).eval()
    x, t, texts = _inputs(case, torch.device("meta"))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        for text in texts:
            dit(x, t, text)
    return int(counter.get_total_flops())


def _reference(case: DitCase) -> Any:
    torch.manual_seed(0)
    return reference_library().WanTransformer3DModel(**case.config).eval()


def _in_dtype(reference: Any, dtype: torch.dtype) -> Any:
    """A copy as `from_pretrained(torch_dtype=...)` loads it: some parts stay in float32."""
    if dtype == torch.float32:
        return reference
    with on_meta():
        narrow = type(reference)(**reference.config).eval()
    weights = {
        name: tensor.clone() if WanDiT.keep_in_fp32(name) else tensor.to(dtype)
        for name, tensor in reference.state_dict().items()
    }
    narrow.load_state_dict(weights, strict=True, assign=True)
    narrow.rope = reference.rope  # its tables are no weights, and were made on the meta device
    return narrow


def _inputs(case: DitCase, device: torch.device) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents, a timestep, and the text of the prompt (and of the negative prompt), zeros past its end."""
    width = case.config.get("text_dim", 4096)
    texts = [torch.zeros(1, _TEXT_TOKENS, width, device=device) for _ in range(1 + case.guided)]
    if device.type == "meta":
        return torch.empty(case.latent_shape, device=device), torch.empty(1, device=device), texts
    generator = torch.Generator().manual_seed(1)
    for text, length in zip(texts, _PROMPT_LENGTHS, strict=False):
        text[:, :length] = torch.randn(1, length, width, generator=generator).to(device)
    x = torch.randn(case.latent_shape, generator=generator).to(device)
    return x, torch.tensor([500.0], device=device), texts


def _their_side(case: DitCase, reference: Any, inputs: tuple[Tensor, Tensor, list[Tensor]]) -> Side:
    x, t, texts = inputs
    model = torch.compile(reference) if case.baseline == "compiled" else reference
    dtype = DTYPES[case.dtype]

    def step() -> Tensor:
        with torch.inference_mode():
            outs = [model(x.to(dtype), t, text.to(dtype), return_dict=False)[0] for text in texts]
            return guide(outs[0], outs[1], _SCALE) if len(outs) > 1 else outs[0]

    return step


def _fast_twin(case: DitCase, reference: Any) -> FastDit:
    with on_meta():
        dit = WanDiT(TransformerSpec(**case.config)).eval()
    dit.load_state_dict({name: tensor.clone() for name, tensor in reference.state_dict().items()}, assign=True)
    policy = policy_of(case.exactness, case.rewrites, compilation=case.compilation)
    return make_fast_dit(dit, policy=policy, attention=case.attention)


def _our_side(
    fast: FastDit, inputs: tuple[Tensor, Tensor, list[Tensor]], device: torch.device
) -> tuple[Side, float, str]:
    """A step, the seconds that reading the prompt took, and how guidance is computed."""
    x, t, texts = inputs
    choices, why = fast.planner.loop(tuple(x.shape), guided=len(texts) > 1)
    predictor = Predictor([text.to(fast.dit.dtype) for text in texts], choices)

    def step() -> Tensor:
        with torch.inference_mode():
            outs = predictor(fast.dit, x, t)
            return guide(outs[0], outs[1], _SCALE) if len(outs) > 1 else outs[0]

    first, second = timed(step, device), timed(step, device)
    return step, max(0.0, first - second), why


def _error_of_reference(
    exact: Any, narrow: Any, inputs: tuple[Tensor, Tensor, list[Tensor]], case: DitCase
) -> dict[str, Any]:
    """The float32 result, and how far the reference's own narrow one is from it."""
    full = replace(case, dtype="float32")
    on_device = exact.to(inputs[0].device)
    expected = _their_side(full, on_device, inputs)()
    return {"exact": expected, "diffusers": relative_error(_their_side(case, narrow, inputs)(), expected)}


def _shares(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Which part of the time goes into matrix products, into attention, and into everything else."""
    activities = [ProfilerActivity.CPU] if device.type == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        whole = timed(run, device)
    sums = {"linear": 0.0, "attention": 0.0}
    for event in seen.key_averages():
        name = event.key.lower()
        kinds = (("attention", _ATTENTION), ("linear", _LINEAR))
        kind = next((kind for kind, words in kinds if any(word in name for word in words)), None)
        if kind is not None:
            sums[kind] += event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
    shares = {kind: microseconds / 1e6 / whole for kind, microseconds in sums.items()}
    return {**shares, "other": 1 - sum(shares.values())}


def _told_apart(attend: Attend) -> Attend:
    """The same under a name that the profiler sees: a compiled kernel has none there."""

    def named(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, bias_BS: Tensor | None = None, /) -> Tensor:
        with record_function("attention"):
            return attend(q_BLHK, k_BSHK, v_BSHK, bias_BS)

    return named
