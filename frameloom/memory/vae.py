"""Plans how a video passes through the VAE: how many frames at a time, in how many bands, under a memory budget."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from frameloom.errors import RequestError
from frameloom.memory.meter import peak_bytes
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import VaeChoices, without_weights
from frameloom.models.vae_state import Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.platform.device import free_memory_bytes
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)

_OVERHEAD = 1.1  # workspaces of the libraries and the allocator's rounding, which the prediction does not see
_SHARE_OF_FREE = 0.6  # of the free memory that a plan may take when nobody set a budget
_CHUNKS = (4, 2, 1)  # latent frames at a time
_FRAME_COPIES = 4  # of a chunk's frames that exist while they are rounded to bytes


@dataclass(frozen=True, kw_only=True)  # no slots: `_twin` is kept
class VaePlanner:
    """Finds the fastest way for a picture that fits the budget. `budget_bytes` None: a share of what is free."""

    spec: VaeSpec
    dtype: torch.dtype
    choices: VaeChoices
    device: torch.device
    budget_bytes: int | None = None

    def decode(self, shape_BZTHW: tuple[int, ...]) -> Iterator[Passage]:
        """Passages for latents of this shape, the best first; the next ones are for when memory ran out after all.

        Raises RequestError if not even the narrowest band fits the budget.
        """
        batch, channels, frames, height, width = shape_BZTHW
        return self._passages((batch, channels, height, width), frames - 1, encode=False)

    def encode(self, shape_BCTHW: tuple[int, ...]) -> Iterator[Passage]:
        """The same for frames (B, 3, T, H, W)."""
        batch, channels, frames, height, width = shape_BCTHW
        steps = (frames - 1) // self.spec.temporal_scale
        return self._passages((batch, channels, height, width), steps, encode=True)

    def needed(
        self, picture_BCHW: tuple[int, int, int, int], steps: int, passage: Passage, *, encode: bool = False
    ) -> int:
        """Bytes that a passage takes besides the weights; `steps` is the number of latent frames after the first."""
        batch, channels, height, width = picture_BCHW

        def run() -> None:
            state = passage.state()
            later = passage.steps * (self.spec.temporal_scale if encode else 1)
            for count in (1, later)[: 1 + min(steps, 1)]:
                x = torch.empty((batch, channels, count, height, width), device="meta", dtype=self.dtype)
                out = (self._twin.encode_chunk if encode else self._twin.decode_chunk)(x, state)
                out.new_empty(_FRAME_COPIES, *out.shape)

        with torch.inference_mode():
            return round(_OVERHEAD * peak_bytes(run))

    @functools.cached_property
    def _twin(self) -> WanVAE:
        return without_weights(self.spec, self.dtype, self.choices)

    def _passages(self, picture_BCHW: tuple[int, int, int, int], steps: int, *, encode: bool) -> Iterator[Passage]:
        height, width = picture_BCHW[2:]
        what = f"the VAE on {width}x{height}" + (" pixels" if encode else " latents")
        budget, whose = self._budget()
        needed = functools.partial(self.needed, picture_BCHW, steps, encode=encode)
        chosen, amount = self._first_that_fits(steps, height, needed, budget)
        if amount > budget:
            raise RequestError(
                f"{what} needs at least {_amount(amount)} besides its weights, and {whose} is {_amount(budget)}; "
                f"allow {amount} bytes or more, or ask for a smaller picture"
            )
        log.info("%s: %s; about %s, %s is %s", what, chosen, _amount(amount), whose, _amount(budget))
        narrower = _narrower(chosen, chosen.rows or height) if self.choices.bands else iter(())
        return itertools.chain([chosen], narrower)

    def _first_that_fits(
        self, steps: int, height: int, needed: Callable[[Passage], int], budget: int
    ) -> tuple[Passage, int]:
        """The passage and its bytes; the narrowest there is, and what it takes, where none fits."""
        plain = self.choices.passage
        for chunk in _CHUNKS if self.choices.chunks else (1,):
            if chunk <= max(1, steps):
                passage = replace(plain, steps=chunk)
                amount = needed(passage)
                if amount <= budget:
                    return passage, amount
        if height == 1 or not self.choices.bands:
            return passage, amount
        # Memory grows with the rows of a band by a straight line, over what the past of the video takes.
        half, quarter = -(-height // 2), -(-height // 4)
        upper, lower = needed(replace(plain, rows=half)), needed(replace(plain, rows=quarter))
        slope = (upper - lower) / max(1, half - quarter)
        rows = half if upper <= budget else int(quarter + (budget - lower) / max(1.0, slope) + 1e-6)
        if rows < 1:
            return replace(plain, rows=1), round(lower - slope * (quarter - 1))
        return replace(plain, rows=min(rows, half)), round(lower + slope * (min(rows, half) - quarter))

    def _budget(self) -> tuple[int, str]:
        if self.budget_bytes is not None:
            return self.budget_bytes, "the budget"
        return round(_SHARE_OF_FREE * free_memory_bytes(self.device)), "what may be used of the free memory"


def _narrower(passage: Passage, rows: int) -> Iterator[Passage]:
    """Half the band, and half of that, for when memory runs out although the plan fitted."""
    while rows > 1:
        rows = -(-rows // 2)
        yield replace(passage, steps=1, rows=rows)


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
