"""How the modules of one transformer compute here: chosen for the device and dtype that a call comes with."""

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from frameloom.attention.core import Attend, choose, cuda_capability, sdpa
from frameloom.engine.compiled import COMPILER
from frameloom.engine.dit import MEASURED, fastest_attention
from frameloom.errors import RequestError
from frameloom.integrations.diffusers.remembered import Remembered
from frameloom.models.dit_rewrites import COLLAPSED_PADDING, DISTINCT_TIMESTEPS, PROMPT_ONCE
from frameloom.ops.dit_ops import Ops, ops_for
from frameloom.ops.registry import Policy, Rewrite
from frameloom.platform.device import platform_of
from frameloom.platform.tuning import Tuner
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)
PROMPTS_KEPT = 2  # both branches of the guidance


class Heads(NamedTuple):
    """What the choice of an attention backend depends on beside the place."""

    num: int
    dim: int


class Padding(NamedTuple):
    """Of an embedded text: its first `length` positions stand for all, with this bias (length,) on their keys."""

    length: int
    bias_S: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """The operations and the attention for a place; which rewrites the operations are, and why this attention."""

    ops: Ops
    attend: Attend
    rewrites: tuple[str, ...]
    attention: str


class Ways:
    """What one transformer's modules share: their choices, and what they know of texts. Made by the taker."""

    def __init__(self, policy: Policy, heads: Heads) -> None:
        self.policy = policy
        self.heads = heads
        self.padding: Remembered[Padding] = Remembered(PROMPTS_KEPT)
        self.texts: Remembered[Tensor] = Remembered(PROMPTS_KEPT)  # of what was joined with an image, the text
        self._ways: dict[tuple[torch.device, torch.dtype], Way] = {}
        self._told: set[str] = set()

    def allows(self, rewrite: Rewrite) -> bool:
        """Whether the user's wishes do."""
        return self.policy.refuses(rewrite) is None

    @property
    def remembers_prompts(self) -> bool:
        """Whether what does not depend on the step is computed once."""
        return self.allows(PROMPT_ONCE)

    @property
    def collapses_padding(self) -> bool:
        """Whether one key may stand for all of the padding."""
        return self.allows(COLLAPSED_PADDING)

    @property
    def embeds_frames(self) -> bool:
        """Whether tokens of one frame may share the embedding of their timestep."""
        return self.allows(DISTINCT_TIMESTEPS)

    def of(self, x: Tensor) -> Way:
        """For inputs like this one."""
        return self.at(x.device, x.dtype)

    def at(self, device: torch.device, dtype: torch.dtype) -> Way:
        """For a place; chosen at the first call there."""
        key = device, dtype
        if key not in self._ways:
            self._ways[key] = self._choose(device, dtype)
        return self._ways[key]

    def tell(self, kind: str, reason: str) -> None:
        """Say once that the plain class computes, and why."""
        line = f"{kind} computes as Diffusers has it: {reason}"
        if line not in self._told:
            self._told.add(line)
            log.info("%s", line)

    def forget(self) -> None:
        """Let go what is known of texts."""
        self.padding.clear()
        self.texts.clear()

    def _choose(self, device: torch.device, dtype: torch.dtype) -> Way:
        try:
            platform = platform_of(device).name
        except RequestError as error:
            return Way(ops=Ops(), attend=sdpa, rewrites=(), attention=f"sdpa: {error}")
        with torch.random.fork_rng(devices=()):  # what is measured draws numbers, and the user's seed is the user's
            ops, decisions = ops_for(platform, policy=self.policy, compiler=COMPILER, dtype=dtype)
            attend, reason = self._attention(platform, device, dtype)
        return Way(
            ops=ops,
            attend=attend,
            rewrites=tuple(decision.name for decision in decisions if decision.used),
            attention=reason,
        )

    def _attention(self, platform: str, device: torch.device, dtype: torch.dtype) -> tuple[Attend, str]:
        name, because = "auto", None
        if self.policy.exactness == "bitwise":
            name, because = "sdpa", "other kernels round otherwise"
        elif platform == "cpu":
            name, because = fastest_attention(self.heads.num, self.heads.dim, dtype, Tuner(device)), MEASURED
        return choose(
            name,
            platform=platform,
            head_dim=self.heads.dim,
            dtype=dtype,
            biased=self.collapses_padding,
            capability=cuda_capability(device, platform),
            because=because,
        )
