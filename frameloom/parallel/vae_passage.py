"""How a rank's part of a video passes the VAE, and how the parts come together again.

Shapes: B batch, C channels, T frames, H rows, W columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from frameloom.models.vae_state import CausalState, Frames, Passage
from frameloom.parallel.share import Share, assemble, gather, widened
from frameloom.parallel.vae_margin import MarginState
from frameloom.parallel.vae_split import ShardState

_ROWS, _COLUMNS = 3, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPassage(Passage):
    """A passage of this rank's part. `margin` None: neighbours' rows are fetched; else so many cells are computed."""

    share: Share
    margin: int | None = None
    encodes: bool = False

    def part(self, x_BCTHW: Tensor, cell: int = 1) -> Tensor:
        """This rank's part; with a margin, and for a decoder the whole, which passes its middle everywhere."""
        share = self.share
        if share.idle:
            return x_BCTHW[:, :, :, :0]
        if self.margin is not None and not self.encodes:
            return x_BCTHW
        for dim, axis in ((_ROWS, share.rows), (_COLUMNS, share.columns)):
            cells = axis.own if self.margin is None else widened(axis, self.margin)
            x_BCTHW = x_BCTHW.narrow(dim, cells.start * cell, len(cells) * cell)
        return x_BCTHW

    def join(self, x_BCTHW: Tensor) -> Tensor:
        """The whole of all parts, on every rank."""
        share = self.share
        if self.margin is not None and self.encodes:  # every rank but those without a part has it already
            return self._from_first(x_BCTHW)
        scale = share.team.agree(_scale(share, x_BCTHW))
        everyone = range(share.team.size)
        return assemble(share, dict(zip(everyone, gather(share, x_BCTHW, everyone, scale), strict=True)), scale)

    def collect(self, frames: Frames) -> Frames | None:
        """The whole frames (B, T, H, W, 3) on the first rank; they travel as bytes."""
        share = self.share
        mine = torch.from_numpy(frames).to(share.team.device).permute(0, 4, 1, 2, 3)
        scale = _scale(share, mine)  # of use on the first rank alone, which has a part
        shapes = [(*mine.shape[:3], *map(len, share.part_of(p, scale))) for p in range(share.team.size)]
        parts = share.team.give_first(mine, shapes)
        if parts is None:
            return None
        whole: Frames = assemble(share, dict(enumerate(parts)), scale).permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
        return whole

    def state(self) -> CausalState:
        """The state of a video's beginning."""
        if self.margin is None:
            return ShardState(self.share, channels_last=self.channels_last, tile_rows=self.tile_rows)
        return MarginState(
            self.share,
            self.margin,
            encodes=self.encodes,
            rows=self.rows,
            channels_last=self.channels_last,
            tile_rows=self.tile_rows,
        )

    def _from_first(self, x_BCTHW: Tensor) -> Tensor:
        team = self.share.team
        shape = team.agree(list(x_BCTHW.shape))
        return team.broadcast(x_BCTHW.contiguous() if x_BCTHW.numel() else x_BCTHW.new_empty(shape))

    def __str__(self) -> str:
        way = "neighbours' rows are fetched" if self.margin is None else f"with {self.margin} cells around it"
        return f"{self.steps} latent frame{'s' if self.steps > 1 else ''} at a time, {self.share}, {way}"


def _scale(share: Share, x_BCTHW: Tensor) -> int:
    return 1 if share.idle else x_BCTHW.shape[_ROWS] // len(share.rows.own)
