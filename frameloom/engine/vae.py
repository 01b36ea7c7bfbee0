"""Loads the VAE of a checkpoint: as the reference computes it, or with the rewrites that a policy allows."""

import logging
from dataclasses import dataclass

import torch

from frameloom.engine.modules import fill, set_attention
from frameloom.engine.ranks import Ranks, single
from frameloom.memory.vae import VaePlanner
from frameloom.models.meta import on_meta
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_blocks import AttentionBlock
from frameloom.models.vae_fast import choose, install
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Decision, Policy
from frameloom.platform.device import free_memory_bytes, platform_of
from frameloom.platform.tuning import Tuner
from frameloom.settings import LOGGER_NAME
from frameloom.weights.checkpoint import Component

log = logging.getLogger(LOGGER_NAME)

# Weights at the points take five times their memory. In each half of the network, at most this part of the memory that
# the machine has, so that it is the same for one process and for several, and this part of what is free for each.
_OF_TOTAL, _OF_FREE = 8, 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FastVae:
    """A VAE with its kernels, what plans its memory, and what was decided."""

    vae: WanVAE
    planner: VaePlanner
    decisions: tuple[Decision, ...]


def load_plain_vae(component: Component, spec: VaeSpec, dtype: torch.dtype, device: torch.device) -> WanVAE:
    """The VAE as the reference computes it."""
    with on_meta():
        vae = WanVAE(spec).eval()
    fill(vae, component, dtype, device)
    set_attention(vae, AttentionBlock, expected=2)  # one in the middle of the encoder, one of the decoder
    return vae


def load_fast_vae(
    component: Component,
    spec: VaeSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    policy: Policy,
    budget_bytes: int | None = None,
    ranks: Ranks | None = None,
) -> FastVae:
    """The VAE with the rewrites that `policy` allows and that are fastest here; `budget_bytes` None: what is free."""
    vae = load_plain_vae(component, spec, dtype, device)
    return make_fast(vae, policy=policy, budget_bytes=budget_bytes, ranks=ranks)


def winograd_bytes(free_bytes: int, total_bytes: int, processes: int = 1) -> int:
    """What Winograd's weights may take, in each half of the network of each process."""
    return min(free_bytes // _OF_FREE // processes, total_bytes // _OF_TOTAL)


def make_fast(vae: WanVAE, *, policy: Policy, budget_bytes: int | None = None, ranks: Ranks | None = None) -> FastVae:
    """Give a loaded VAE its kernels, the same on all ranks; it keeps no other form of its weights."""
    planner = kernels_for(vae, policy=policy, budget_bytes=budget_bytes, ranks=ranks)
    install(vae, planner.choices)
    return FastVae(vae=vae, planner=planner, decisions=planner.choices.decisions)


def kernels_for(
    vae: WanVAE, *, policy: Policy, budget_bytes: int | None = None, ranks: Ranks | None = None
) -> VaePlanner:
    """What plans the memory of a loaded VAE, with the kernels that were chosen for it, which it has not got yet."""
    weight = next(vae.parameters())
    ranks = ranks or single(weight.device)
    processes = ranks.sharing_memory
    total = platform_of(weight.device).total_memory_bytes(weight.device.index)
    bound = ranks.world.everyone.least(winograd_bytes(free_memory_bytes(weight.device), total, processes))
    choices = choose(vae, policy, Tuner(weight.device, agreed=ranks.agreed), winograd_bytes=bound)
    if choices.num_short:
        log.info(
            "the VAE: %d layers go without Winograd's weights, for which %.2f GB in each process are too little; with "
            "more memory, or fewer processes, they round otherwise",
            choices.num_short, bound / 1e9,
        )  # fmt: skip
    return VaePlanner(
        spec=vae.spec,
        dtype=weight.dtype,
        choices=choices,
        device=weight.device,
        budget_bytes=budget_bytes,
        processes=processes,
    )
