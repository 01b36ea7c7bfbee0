"""The rewrites of the denoiser as a whole: what is computed once, and what is computed together."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import FrameTimes, WanDiT
from frameloom.ops.dit_rewrites import OPERATIONS
from frameloom.ops.registry import Rewrite, Sizes

_TEXT_TOKENS = 24
_SMALL: Mapping[str, Any] = MappingProxyType(
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 16,
        "ffn_dim": 40,
        "num_layers": 2,
    }
)


def small_network(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """A small random network, latents of at most seven rows and columns of tokens, two timesteps and two prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(sizes.seed)
        dit = WanDiT(TransformerSpec(**_SMALL)).eval()
        height, width = (2 * (1 + min(side, 12) // 2) for side in (sizes.height, sizes.width))
        x = torch.randn(sizes.batch, 4, 1 + min(sizes.frames, 3), height, width)
        prompts = torch.randn(2, sizes.batch, _TEXT_TOKENS, _SMALL["text_dim"])
        for prompt, length in zip(prompts, (1 + sizes.in_channels % 20, 1 + sizes.out_channels % 9), strict=True):
            prompt[:, length:] = 0
        times = torch.rand(2) * 900 + 50
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(device, torch.float32 if dit.keep_in_fp32(name) else dtype)
    return dit, x.to(device), times.to(device), prompts.to(device, dtype)


def plainly(dit: WanDiT, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
    """Each timestep and each prompt for itself, as the reference pipeline calls the network."""
    calls = [dit(x, t.expand(x.shape[0]), prompt) for t in times for prompt in prompts]
    return torch.stack(calls)


def _prompt_once(dit: WanDiT, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
    read = [dit.read_prompt(prompt) for prompt in prompts]
    return torch.stack([v for t in times for prompt in read for v in dit.velocities(x, t.expand(x.shape[0]), [prompt])])


def _shared(dit: WanDiT, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
    read = [dit.read_prompt(prompt) for prompt in prompts]
    return torch.stack([v for t in times for v in dit.velocities(x, t.expand(x.shape[0]), read)])


def _together(dit: WanDiT, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
    read = [dit.read_prompt(prompts.flatten(0, 1))]
    both = [v.chunk(2) for t in times for v in dit.velocities(x, t.expand(x.shape[0]), read)]
    return torch.stack([velocity for pair in both for velocity in pair])


def _collapsed(dit: WanDiT, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
    short = deepcopy(dit)
    short.collapses_padding = True
    return plainly(short, x, times, prompts)


def _frame_times(x: Tensor, times: Tensor) -> FrameTimes:
    """The first frame is given, hence clean; the others have the second of two timesteps."""
    values = torch.stack((torch.zeros_like(times[1]), times[1])).expand(x.shape[0], -1)
    return FrameTimes(values, (torch.arange(x.shape[2], device=x.device) > 0).long())


def _each_token(dit: WanDiT, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
    values, index = _frame_times(x, times)
    per_frame = values[:, index]
    tokens = x.shape[3] * x.shape[4] // dit.spec.patch_volume
    velocity: Tensor = dit(x, per_frame.repeat_interleave(tokens, dim=1), prompts[0])
    return velocity


def _distinct(dit: WanDiT, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
    velocity: Tensor = dit(x, _frame_times(x, times), prompts[0])
    return velocity


def _fused_qkv(dit: WanDiT, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
    fused = deepcopy(dit)
    for block in fused.block_list:
        block.attn1.fuse_projections()
    return plainly(fused, x, times, prompts)


def _never(*_: object) -> None:
    """Applies to every network."""


def _rewrite(
    name: str,
    fast: Callable[..., Tensor],
    *,
    replaces: str,
    because: str,
    exactness: Any = "rounding",
    reference: Callable[..., Tensor] = plainly,
) -> Rewrite:
    return Rewrite(
        name=name,
        exactness=exactness,
        replaces=replaces,
        reference=torch.inference_mode()(reference),
        fast=torch.inference_mode()(fast),
        refuses=_never,
        example=small_network,
        tolerance=0.0 if exactness == "bitwise" else 1e-5,
        because=because,
        dtypes=(torch.float32, torch.bfloat16),
    )


PROMPT_ONCE = _rewrite(
    "dit.prompt_once",
    _prompt_once,
    exactness="bitwise",
    replaces="embedding the prompt, and its keys and values in every block, anew in every step",
    because="the same numbers are kept",
)
SHARED_BRANCHES = _rewrite(
    "dit.shared_branches",
    _shared,
    exactness="bitwise",
    replaces="computing twice, with and without the prompt, what comes before the prompt is read: the timestep, the "
    "patches, the first self-attention",
    because="the same numbers are used twice",
)
TOGETHER = _rewrite(
    "dit.guidance_batched",
    _together,
    replaces="the predictions with and without the prompt one after the other, by one batch",
    because="a matrix product over more rows may be cut up in another way by the library",
)
COLLAPSED_PADDING = _rewrite(
    "dit.collapsed_padding",
    _collapsed,
    replaces="attention to every one of the equal keys that fill the text up to 512, by one key with log(n) added",
    because="one product with a weight of n stands for a sum of n equal ones",
)
DISTINCT_TIMESTEPS = _rewrite(
    "dit.distinct_timesteps",
    _distinct,
    reference=_each_token,
    replaces="a timestep embedding and modulation for every token, by one for every value there is",
    because="a matrix product over fewer rows may be cut up in another way by the library",
)
QKV_FUSED = _rewrite(
    "dit.qkv_fused",
    _fused_qkv,
    replaces="three products for queries, keys and values of the self-attention, by one",
    because="a matrix product over more columns may be cut up in another way by the library",
)
NETWORK = (PROMPT_ONCE, SHARED_BRANCHES, TOGETHER, COLLAPSED_PADDING, DISTINCT_TIMESTEPS, QKV_FUSED)
DIT_REWRITES = (*NETWORK, *OPERATIONS)
