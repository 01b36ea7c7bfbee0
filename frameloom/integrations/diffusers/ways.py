"""How the modules of one transformer compute here: chosen for the device and dtype that a call comes with."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from frameloom.attention.core import Attend, choose, cuda_capability, sdpa
from frameloom.engine.compiled import COMPILER
from frameloom.engine.dit import MEASURED, fastest_attention
from frameloom.errors import RequestError
from frameloom.integrations.diffusers.plain import Told
from frameloom.models.dit_rewrites import COLLAPSED_PADDING, DISTINCT_TIMESTEPS
from frameloom.ops.dit_ops import Ops, ops_for
from frameloom.ops.registry import Policy, Rewrite
from frameloom.platform.device import platform_of
from frameloom.platform.tuning import Tuner


class Heads(NamedTuple):
    """What the choice of an attention backend depends on beside the place."""

    num: int
    dim: int


class Padding(NamedTuple):
    """Of an embedded text, which begins at position `start`: `length` positions stand for all of it.

    bias_N (length,) is for their keys.
    """

    start: int
    length: int
    bias_N: Tensor


class Paddings:
    """What is known of the texts that a forward embeds: for as long as the tensor lives, and is not written to."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._known)

    def put(self, text_BSD: Tensor, padding: Padding) -> None:
        """Keep it; not of a tensor of torch's inference mode, which does not count how often it was written to."""
        if not text_BSD.is_inference():
            self._known[text_BSD] = text_BSD._version, padding

    def of(self, text_BSD: Tensor) -> Padding | None:
        """The padding of this very tensor, as it is."""
        version, padding = self._known.get(text_BSD, (None, None))
        return padding if padding is None or text_BSD._version == version else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """The operations and the attention for a place; which rewrites the operations are, and why this attention."""

    ops: Ops
    attend: Attend
    rewrites: tuple[str, ...]
    attention: str


class Ways:
    """What one transformer's modules share: their choices, and the paddings of texts. Made by the taker."""

    def __init__(self, policy: Policy, heads: Heads) -> None:
        self.policy = policy
        self.heads = heads
        self.paddings = Paddings()
        self.told = Told()
        self._ways: dict[tuple[torch.device, torch.dtype], Way] = {}

    def allows(self, rewrite: Rewrite) -> bool:
        """Whether the user's wishes do."""
        return self.policy.refuses(rewrite) is None

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

    def _choose(self, device: torch.device, dtype: torch.dtype) -> Way:
        try:
            platform = platform_of(device).name
        except RequestError as error:
            return Way(ops=Ops(), attend=sdpa, rewrites=(), attention=f"sdpa: {error}")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldWays:
    """What a taken module holds."""

    ways: Ways

    def release(self) -> None:
        """There is nothing to let go."""
