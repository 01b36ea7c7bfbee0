"""Plans how a picture passes the VAE of several ranks: who has which part, and whether rows are fetched or computed."""

import functools
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from frameloom.errors import RequestError
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import Passage
from frameloom.parallel.cost import Link
from frameloom.parallel.link import measure_flops, measure_link
from frameloom.parallel.pass_cost import VaeWork, prefers_margin
from frameloom.parallel.share import Share, widened
from frameloom.parallel.team import Team
from frameloom.parallel.vae_margin import margin_cells
from frameloom.parallel.vae_passage import SharedPassage
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)
Shape = tuple[int, ...]


class PlansVae(Protocol):
    """Says how latents or frames of a shape pass through a single process: the best way first."""

    def decode(self, shape_BZTHW: Shape) -> Iterator[Passage]:
        """Passages for latents."""
        ...

    def encode(self, shape_BCTHW: Shape) -> Iterator[Passage]:
        """Passages for frames."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: the link is measured once
class SharedVaePlanner:
    """The passage of this rank's part, the same way on all ranks: the first one decides.

    `parts`: ranks that have one. `whole` plans parts that pass in one piece, `bands` those that may pass in bands of
    rows, which needs a margin instead of neighbours. A margin is computed where memory is short or the link is slow.
    There is one way and no second: a rank that runs out of memory cannot go on alone.
    """

    spec: VaeSpec
    dtype: torch.dtype
    device: torch.device
    team: Team
    parts: int
    whole: PlansVae
    bands: PlansVae
    overlaps: bool

    def decode(self, shape_BZTHW: Shape) -> Iterator[Passage]:
        """Passages for latents. Raises RequestError where memory will not do."""
        *_, height, width = shape_BZTHW
        return self._passage(self._share(height, width), shape_BZTHW, encodes=False)

    def encode(self, shape_BCTHW: Shape) -> Iterator[Passage]:
        """Passages for frames."""
        *_, height, width = shape_BCTHW
        scale = self.spec.spatial_scale
        return self._passage(self._share(height // scale, width // scale), shape_BCTHW, encodes=True)

    def _share(self, height: int, width: int) -> Share:
        columns = 1 if self.device.type == "cpu" else None  # in columns libraries sum in another order: other bits
        return Share.of(self.team, height, width, parts=self.parts, columns=columns, overlaps=self.overlaps)

    def _passage(self, share: Share, shape: Shape, *, encodes: bool) -> Iterator[Passage]:
        link = self._link
        way = self.team.first(lambda: self._way(share, shape, link, encodes=encodes))
        passage = SharedPassage(**way, share=share, encodes=encodes)
        log.info("the VAE over %d ranks: %s", self.parts, passage)
        return iter([passage])

    @functools.cached_property
    def _link(self) -> Link:
        """The slowest between ranks; every rank asks for it."""
        return measure_link(self.team)

    def _way(self, share: Share, shape: Shape, link: Link, *, encodes: bool) -> dict[str, Any]:
        """What a passage has, and its margin."""
        cell = self.spec.spatial_scale if encodes else 1
        try:
            found = self._plan(self.whole, share.largest, shape, cell)
            computes, why = self._prefers_margin(share, shape, found.steps, link, encodes=encodes)
        except RequestError as error:
            computes, why = True, str(error)
        log.info("the VAE %s what lies around a part: %s", "computes" if computes else "fetches", why)
        if not computes:
            return asdict(replace(found, rows=None))
        margin = margin_cells(self.spec, encodes=encodes)
        around = len(widened(share.rows, margin)), len(widened(share.columns, margin))
        found = self._plan(self.bands, around, shape, cell)
        return asdict(found) | {"margin": margin}

    def _prefers_margin(self, share: Share, shape: Shape, steps: int, link: Link, *, encodes: bool) -> tuple[bool, str]:
        batch, _, frames, height, width = shape
        scale, time = (self.spec.spatial_scale, self.spec.temporal_scale) if encodes else (1, 1)
        work = VaeWork(
            spec=self.spec,
            latent_THW=(1 + (frames - 1) // time, height // scale, width // scale),
            batch=batch,
            encodes=encodes,
            steps=steps,
            columns=share.columns.num_parts,
            overlaps=self.overlaps,
            itemsize=self.dtype.itemsize,
        )
        return prefers_margin(work, self.parts, link, self._flops)

    @functools.cached_property
    def _flops(self) -> float:
        return measure_flops(self.device, self.dtype)

    @staticmethod
    def _plan(planner: PlansVae, cells: tuple[int, int], shape: Shape, cell: int) -> Passage:
        part = (*shape[:3], cells[0] * cell, cells[1] * cell)
        return next(planner.encode(part) if cell > 1 else planner.decode(part))
