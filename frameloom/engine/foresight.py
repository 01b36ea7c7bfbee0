"""What networks take that are not there: their ways, their weights, and the tensors of a stage, all by shapes."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from frameloom.engine.blueprint import Blueprint
from frameloom.engine.footprints import footprints
from frameloom.engine.machine import Machine
from frameloom.engine.vae import winograd_bytes
from frameloom.memory.dit import StepPlanner
from frameloom.memory.layout import Weights
from frameloom.memory.meter import peak_bytes
from frameloom.memory.residency import Footprint
from frameloom.memory.vae import VaePlanner
from frameloom.models import dit_fast, vae_fast
from frameloom.models.dit_rewrites import QKV_FUSED
from frameloom.models.encoders import TEXT_LENGTH, build_text_encoder
from frameloom.models.meta import on_meta
from frameloom.models.vace import make_dit
from frameloom.models.vae_rewrites import TILES
from frameloom.models.vae_state import Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.ops import vae_rewrites
from frameloom.ops.dit_rewrites import LINEAR_PACKED, MLP_PACKED
from frameloom.ops.registry import Policy, Rewrite
from frameloom.ops.winograd import bytes_at_points
from frameloom.platform.tuning import Foreseen
from frameloom.types import Residence, Stage
from frameloom.weights.load import Quantized
from frameloom.weights.tensors import is_quantized

# A process takes more than its tensors: allocators round, and find some places of freed memory not again. Measured on
# this package's CPU path (benchmarks/planner.py); of accelerators, whose allocators are torch's own, assumed.
_OF_STEP_HERE, _OF_VAE_HERE, _OF_TEXT_HERE, _ELSEWHERE = 2.0, 1.25, 2.25, 1.1
_OF_NARROW_STEP_HERE, _OF_NARROW_STREAMED_HERE = 1.85, 1.5  # of two bytes a number
_NARROW_WORKSPACE_BYTES = 17_000_000  # besides, whatever the size of such a step
_USUAL_TOKENS = 256  # of a prompt where its padding is one key; a longer one adds little
_ON_CPUS: tuple[Rewrite, ...] = (
    LINEAR_PACKED, MLP_PACKED, TILES, vae_rewrites.UNFOLDED, vae_rewrites.WINOGRAD, vae_rewrites.WINOGRAD_PLAIN,
    vae_rewrites.UPSAMPLED_WINOGRAD, vae_rewrites.NORM_SILU_NATIVE, vae_rewrites.NORM_SILU_TILED,
)  # fmt: skip
_OF_PLAIN_WEIGHTS: tuple[Rewrite, ...] = (LINEAR_PACKED, MLP_PACKED, QKV_FUSED)


@dataclass(frozen=True, kw_only=True)  # no slots: what was counted is kept
class Foresight:
    """The networks of a blueprint on a machine. `processes`: that share the memory."""

    plan: Blueprint
    machine: Machine
    policy: Policy
    quantized: Quantized = "keep"
    processes: int = 1
    vae_bytes_at_most: int | None = None

    @functools.cached_property
    def tuner(self) -> Foreseen:
        """What is known of this machine."""
        return Foreseen(self.machine.device)

    @functools.cached_property
    def step_planner(self) -> StepPlanner:
        """Of the first transformer, with the ways that it would have, resident."""
        return self._step_planner(held=self._plain_bytes > 0, by_block=False)

    @functools.cached_property
    def held_step_planner(self) -> StepPlanner:
        """The same of one whose weights come and go."""
        return self._step_planner(held=True, by_block=True)

    @functools.cached_property
    def vae_planner(self) -> VaePlanner:
        """Of the VAE, with the ways that it would have."""
        with on_meta():
            vae = WanVAE(self.plan.vae).eval().to(self.plan.vae_dtype)
        machine = self.machine
        bound = winograd_bytes(machine.memory_bytes, machine.total_bytes, self.processes)
        choices = vae_fast.choose(vae, self._policy, self.tuner, winograd_bytes=bound)
        return VaePlanner(spec=self.plan.vae, dtype=self.plan.vae_dtype, choices=choices, device=self._stand_in)

    @property
    def text_tokens(self) -> int:
        """Keys of a prompt that are attended to."""
        own = _USUAL_TOKENS if self.step_planner.choices.collapses_padding else TEXT_LENGTH
        return own + (257 if self.plan.experts[0].image_dim is not None else 0)

    def weights(self, *, encodes: bool, with_image: bool) -> list[Weights]:
        """Of every component that is needed."""
        stages: Mapping[str, tuple[Stage, ...]] = {
            "text_encoder": ("text",), "transformer": ("denoise",), "transformer_2": ("denoise",),
            "image_encoder": ("image",), "vae": ("image", "decode"),
        }  # fmt: skip
        count = functools.partial(self.vae_planner.held_bytes, encodes=encodes)
        held = dict(self._footprints) | {"vae": Footprint(stays=self._kept(f"VAE {encodes}", count))}
        needed = [name for name in stages if name in held and (with_image or name != "image_encoder")]
        return [Weights(name=name, footprint=held[name], stages=stages[name]) for name in needed]

    def _kept(self, what: str, count: Callable[[], int]) -> int:
        """What `count` found for these networks before, on whatever machine; else what it finds now."""
        vae, step = self.vae_planner, self.step_planner
        ways = (dict(vae.choices.kernels), vae.choices.norm, vae.choices.passage, step.choices.loop)
        packs = (step.choices.packs_linear, step.choices.packs_mlp, step.choices.fuses_qkv)
        about = (self.plan.experts, step.dtype, vae.spec, vae.dtype, ways, packs, self.machine.platform, what)
        key = f"bytes {hashlib.sha256(repr(about).encode()).hexdigest()[:24]}"
        if (known := self.tuner.number(key)) is None:
            known = count()
            self.tuner.note(key, known)
        return int(known)

    def step_bytes(
        self, latents_BCTHW: tuple[int, ...], *, branches: int, batched: bool, residence: Residence = Residence.RESIDENT
    ) -> int:
        """Of a denoising step, besides the weights."""
        held = residence is not Residence.RESIDENT
        tokens, planner = self.text_tokens, self.held_step_planner if held else self.step_planner
        count = functools.partial(
            planner.counted, latents_BCTHW, branches=branches, batched=batched, text_tokens=tokens
        )
        counted = self._kept(f"step {latents_BCTHW} {branches} {batched} {tokens} {held}", count)
        kept = planner.prompt_bytes(latents_BCTHW[0], branches=branches, text_tokens=tokens)
        narrow = self.machine.is_host and self.plan.dtype.itemsize == 2
        growth = _OF_NARROW_STREAMED_HERE if narrow and held else self._growth
        return round(growth * counted) + kept + self._plain_bytes + narrow * _NARROW_WORKSPACE_BYTES

    def vae_bytes(self, shape_BCTHW: tuple[int, ...], passage: Passage, *, encode: bool = False) -> int:
        """Of a passage of latents, or of frames, besides the weights."""
        batch, channels, frames, height, width = shape_BCTHW
        steps = (frames - 1) // self.plan.vae.temporal_scale if encode else frames - 1
        picture = (batch, channels, height, width)
        count = functools.partial(self.vae_planner.counted, picture, steps, passage, encode=encode)
        counted = self._kept(f"passage {picture} {min(steps, passage.steps)} {passage} {encode}", count)
        if not self.machine.is_host:
            return round(_ELSEWHERE * counted)
        return round(_OF_VAE_HERE * counted) + self._winograd_workspace

    def passages(self, shape_BCTHW: tuple[int, ...], *, encode: bool = False) -> list[Passage]:
        """How latents, or frames, may pass within the budget of the VAE, the fastest first; the narrowest at least."""
        ways = list({str(way): way for way in self.vae_planner.ways(shape_BCTHW, encode=encode)}.values())
        most = self.vae_bytes_at_most
        if most is None:
            return ways
        return [way for way in ways if self.vae_bytes(shape_BCTHW, way, encode=encode) <= most] or ways[-1:]

    def text_bytes(self, prompts: int) -> int:
        """Of reading prompts, besides the weights; one layer takes what the others take."""
        config = {**self.plan.checkpoint.components["text_encoder"].config, "num_layers": 1}

        def count() -> int:
            encoder = build_text_encoder(config).to(self.plan.dtype)
            ids = torch.empty(prompts, TEXT_LENGTH, dtype=torch.long, device="meta")
            with torch.inference_mode():
                return peak_bytes(lambda: encoder(ids, torch.ones_like(ids)))

        growth = _OF_TEXT_HERE if self.machine.is_host else _ELSEWHERE
        return round(growth * self._kept(f"{prompts} {config}", count))

    @property
    def _growth(self) -> float:
        """What a process takes for a byte of the tensors of a transformer."""
        if not self.machine.is_host:
            return _ELSEWHERE
        return _OF_STEP_HERE if self.plan.dtype.itemsize > 2 else _OF_NARROW_STEP_HERE

    @functools.cached_property
    def _winograd_workspace(self) -> int:
        """What the largest of Winograd's kernels works on at a time: half of its weights' bytes, going and coming."""
        with on_meta():
            modules = dict(WanVAE(self.plan.vae).named_modules())
        used = [modules[name] for name, way in self.vae_planner.choices.kernels.items() if "winograd" in way]
        return max((bytes_at_points(getattr(module, "conv", module).weight) // 2 for module in used), default=0)

    @functools.cached_property
    def _footprints(self) -> Mapping[str, Footprint]:
        return footprints(self.plan, self.quantized)

    @functools.cached_property
    def _plain_bytes(self) -> int:
        """Of the two largest weights of a transformer that are stored quantized and made plain for a call."""
        entries = self.plan.transformers[0].tensors.values() if self.quantized == "keep" else ()
        return 2 * max((math.prod(e.shape) * self.plan.dtype.itemsize for e in entries if is_quantized(e)), default=0)

    def _step_planner(self, *, held: bool, by_block: bool) -> StepPlanner:
        spec, policy = self.plan.experts[0], self._policy
        if held:
            policy = _without(policy, _OF_PLAIN_WEIGHTS)
        with on_meta():
            dit = make_dit(replace(spec.first_layers(2), image_dim=None, added_kv_proj_dim=None)).eval()
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if dit.keep_in_fp32(name) else self.plan.dtype)
        choices = dit_fast.choose(dit, policy, self.tuner, platform_name=self.machine.platform)
        return StepPlanner(spec=spec, dtype=self.plan.dtype, choices=choices, device=self._stand_in, by_block=by_block)

    @property
    def _policy(self) -> Policy:
        return self.policy if self.machine.is_host else _without(self.policy, _ON_CPUS)

    @property
    def _stand_in(self) -> torch.device:
        """The device that planners are asked for: of an accelerator only that it is no CPU matters."""
        return torch.device("cpu" if self.machine.is_host else "meta")


def _without(policy: Policy, rewrites: Sequence[Rewrite]) -> Policy:
    """The same without some rewrites, unless they were asked for by name."""
    return replace(policy, forced={**{rewrite.name: False for rewrite in rewrites}, **policy.forced})
