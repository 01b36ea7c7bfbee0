"""The VAE over several ranks that fetch nothing: each computes the rows around its own as well, for slow links.

Shapes: B batch, C channels, T frames, H rows, W columns.
"""

from collections.abc import Sequence

from torch import Tensor

from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import BandState, Stage
from frameloom.parallel.share import Share, assemble, gather, widened

_ROWS, _COLUMNS = 3, 4


class MarginState(BandState):
    """Part of a picture, computed with so many of the rows and columns around it that its own are right.

    `margin` in latent cells. The middle of the network, which sees all cells, is computed on every rank; what an
    encoder brings there is fetched, once per chunk.
    """

    def __init__(
        self,
        share: Share,
        margin: int,
        *,
        encodes: bool,
        rows: int | None,
        channels_last: bool,
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(rows=rows, channels_last=channels_last, tile_rows=tile_rows)
        self._share, self._margin, self._encodes = share, margin, encodes

    def by_rows(self, x_BCTHW: Tensor, stages: Sequence[Stage]) -> Tensor:
        """The stages on this part and its margin; the margin is thrown away."""
        share = self._share
        around = [widened(axis, self._margin) for axis in (share.rows, share.columns)]
        if not self._encodes:
            for dim, cells in zip((_ROWS, _COLUMNS), around, strict=True):
                x_BCTHW = x_BCTHW.narrow(dim, cells.start, len(cells))
        out = super().by_rows(x_BCTHW, stages)
        for dim, cells, axis in zip((_ROWS, _COLUMNS), around, (share.rows, share.columns), strict=True):
            scale = out.shape[dim] // len(cells)
            out = out.narrow(dim, (axis.own.start - cells.start) * scale, len(axis.own) * scale)
        return self._joined(out) if self._encodes else out

    def _joined(self, mine: Tensor) -> Tensor:
        share = self._share
        parts = gather(share, mine, share.active)
        return assemble(share, dict(zip(share.active, parts, strict=True)), 1)


def margin_cells(spec: VaeSpec, *, encodes: bool) -> int:
    """How far, in latent cells, a convolution reaches between the middle of the network and the pixels."""
    levels = len(spec.dim_mult)
    blocks = spec.num_res_blocks + (0 if encodes else 1)
    reach = 1 / 2 ** (levels - 1)  # the first or the last convolution, on pixels
    for level in range(levels):  # of 2 ** level rows per latent cell
        reach += 2 * blocks / 2**level
        if level < levels - 1:
            reach += 1 / 2 ** (level + 1)  # the convolution that goes with doubling or halving
    return int(reach) + 1
