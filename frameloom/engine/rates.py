"""How fast devices compute the networks: by data sheets, by a quick look at this machine, and by what was run here.

A run teaches the next plan: the rate of every stage is kept beside the measured choices, for its network, its dtype and
how much there was to compute, as small work is slower for what it is.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.parallel.step_cost import StepWork
from frameloom.platform.device import timed
from frameloom.platform.specs import DeviceSpec
from frameloom.platform.tuning import Tuner

# What is reached of a data sheet's rate: docs/parallel.md has the assumptions; nothing of it was measured.
_OF_PRODUCTS, _OF_ATTENTION, _OF_CONVOLUTIONS = 0.36, 0.36, 0.3
# On a CPU, of the rate of a square product: measured on one, see benchmarks/planner.py.
_ATTENTION_HERE = 0.85
_WINOGRAD_GAIN, _WINOGRAD_CHANNELS = 2.6, 50  # convolutions of b channels: gain x b / (b + channels)
_TEXT_SHARE = 0.8
_SIDE = 1024
_SIZES = range(16, 64)  # runs of so many operations are told apart, as powers of two
_COPIED = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """FLOP/s of the parts of a request, and bytes per second of memory, of the host's link and between devices.

    `attention`: of the operations of self-attention. `decode` and `encode` count direct convolutions, whatever computes
    them. `source`: where the numbers are from.
    """

    products: float
    attention: float
    text: float
    decode: float
    encode: float
    bandwidth: float
    link: float
    peer: float
    source: str

    def step_s(self, flops: float, attention_flops: float) -> float:
        """Seconds of a step of so many operations, some of them of self-attention."""
        return (flops - attention_flops) / self.products + attention_flops / self.attention


def sheet_rates(spec: DeviceSpec, dtype: torch.dtype, vae_dtype: torch.dtype) -> Rates:
    """Of a device that is not here."""
    name = str(dtype).removeprefix("torch.")
    rate, vae_rate = getattr(spec, name), getattr(spec, str(vae_dtype).removeprefix("torch."))
    return Rates(
        products=_OF_PRODUCTS * rate,
        attention=_OF_ATTENTION * rate,
        text=_OF_PRODUCTS * rate,
        decode=_OF_CONVOLUTIONS * vae_rate,
        encode=_OF_CONVOLUTIONS * vae_rate,
        bandwidth=spec.bandwidth_bytes_per_s,
        link=spec.link_bytes_per_s,
        peer=spec.peer_bytes_per_s,
        source=f"the data sheet of {spec.name}, of which {_OF_PRODUCTS:.0%} are assumed to be reached",
    )


def glance(device: torch.device, dtype: torch.dtype, vae_channels: int, *, tuner: Tuner) -> Rates:
    """Of this machine, by products of squares and a copy, which `tuner` remembers; the VAE's by its width."""
    product, single = (
        _noted(tuner, f"products of {each}", functools.partial(_product_rate, device, each))
        for each in (dtype, torch.float32)
    )
    copied = _noted(tuner, "copies", functools.partial(_copy_rate, device))
    convolutions = single * _WINOGRAD_GAIN * vae_channels / (vae_channels + _WINOGRAD_CHANNELS)
    return Rates(
        products=product,
        attention=product * _ATTENTION_HERE,
        text=product * _TEXT_SHARE,
        decode=convolutions,
        encode=convolutions,
        bandwidth=copied,
        link=copied / 2,
        peer=copied / 2,
        source="a glance at this machine; the first run here makes it exact",
    )


def _noted(tuner: Tuner, what: str, measure: Callable[[], float]) -> float:
    """What was measured once on this machine, with as many threads."""
    key = f"glance at {what}, {torch.get_num_threads()} threads"
    if (known := tuner.number(key)) is None:
        known = measure()
        tuner.note(key, known)
        tuner.save()
    return known


def _copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return float(2 * _COPIED / min(timed(lambda: target.copy_(source), device) for _ in range(3)))


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    x = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    return float(2 * _SIDE**3 / min(timed(lambda: F.linear(x, x), device) for _ in range(3)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Book:
    """Rates that runs left behind, for networks that compute in certain dtypes with as many threads.

    `work`, everywhere: FLOPs of a stage, of denoising those of one step.
    """

    tuner: Tuner
    dit: TransformerSpec
    dtype: torch.dtype
    vae: VaeSpec
    vae_dtype: torch.dtype
    text: Mapping[str, Any]

    def corrected(self, rates: Rates, work: Mapping[str, float]) -> Rates:
        """The same, with what runs of the stages in `work` have taught."""
        found = {stage: self._taught(stage, flops) for stage, flops in work.items()}
        known: dict[str, float] = {stage: rate for stage, rate in found.items() if rate is not None}
        if "denoise" in known:
            products = known.pop("denoise")
            known |= {"products": products, "attention": products * rates.attention / rates.products}
        if "image" in known:
            known["encode"] = known.pop("image")
        if not known:
            return rates
        what = "all of it" if len(found) == sum(rate is not None for rate in found.values()) else "in part"
        return replace(rates, **known, source=f"earlier runs on this machine ({what})")

    def lessons(self, rates: Rates, work: Mapping[str, float]) -> dict[str, tuple[str, float]]:
        """Of each stage in `work` the key to keep its rate under, and the rate that was expected."""
        expected = {"text": rates.text, "denoise": rates.products, "decode": rates.decode, "image": rates.encode}
        return {stage: (self._sized(stage, round(math.log2(flops))), expected[stage]) for stage, flops in work.items()}

    def _taught(self, stage: str, flops: float) -> float | None:
        """The rate of runs of about that size: between two, what lies between them; else that of the nearest."""
        rates = {size: self.tuner.number(self._sized(stage, size)) for size in _SIZES}
        known: dict[int, float] = {size: rate for size, rate in rates.items() if rate is not None}
        if not known:
            return None
        place = math.log2(flops)
        below = max((size for size in known if size <= place), default=min(known))
        above = min((size for size in known if size >= place), default=max(known))
        share = (place - below) / (above - below) if above > below else 0.0
        return float(known[below] ** (1 - share) * known[above] ** share)

    def _sized(self, stage: str, size: int) -> str:
        return f"{self._key(stage)}, 2^{size} FLOP"

    def _key(self, stage: str) -> str:
        dit = self.dit
        network = {
            "denoise": (dit.dim, dit.ffn_dim, dit.attention_head_dim, self.dtype),
            "text": (dict(self.text), self.dtype),
        }
        what = network.get(stage, (self.vae, self.vae_dtype))
        digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
        return f"rate of {stage} {digest} {torch.get_num_threads()} threads"


def attention_flops(work: StepWork) -> float:
    """Of self-attention in a step, on one rank that has all of it."""
    frames, rows, columns = work.grid
    tokens = frames * rows * columns
    passes = sum(calls * samples for calls, samples in work.looks(work.branches))
    return 4.0 * tokens**2 * work.spec.dim * passes


def text_flops(config: Mapping[str, Any], prompts: int, tokens: int) -> float:
    """Of the text encoder, which computes all tokens of every prompt."""
    width, inner = config["d_model"], config["d_kv"] * config["num_heads"]
    layer = 4 * width * inner + 3 * width * config["d_ff"]
    return float(2 * prompts * tokens * config["num_layers"] * (layer + 2 * tokens * inner))
