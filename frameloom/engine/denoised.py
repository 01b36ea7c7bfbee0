"""A video between its last step and its first frame."""

from dataclasses import dataclass

from torch import Tensor

from frameloom.pipeline.wan import StageClock
from frameloom.types import ResolvedRequest


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Denoised:
    """What `Engine.denoise` makes of one prompt, and `Engine.write_to` makes a file of.

    `request`: what was asked for this one; `latents`: float32 (1, C, T', H', W'), normalised as the sampler sees them.
    `clock`: the seconds that the batch took; `together`: the videos in it.
    """

    request: ResolvedRequest
    latents: Tensor
    clock: StageClock
    together: int
