"""A rank's part of a picture, and the ranks that have the others."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from frameloom.parallel.picture import Axis, Range, cut, grid
from frameloom.parallel.team import Team


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """This rank's part of a picture, and the ranks that have the others: position r * columns + c has row r, column c.

    `overlaps`: rows that need no neighbour are computed while the others are on their way.
    """

    team: Team
    rows: Axis
    columns: Axis
    overlaps: bool = True

    @classmethod
    def of(
        cls,
        team: Team,
        height: int,
        width: int,
        *,
        parts: int | None = None,
        columns: int | None = None,
        overlaps: bool = True,
    ) -> "Share":
        """For a picture of so many latent cells, over the first `parts` ranks (None: all), in so many columns.

        `columns` None: the grid that costs least. Ranks past the parts are idle.
        """
        parts = parts or team.size
        down, across = grid(height, width, parts) if columns is None else (parts // columns, columns)
        row, column = divmod(team.index, across)
        spare = -(-team.size // across) - down
        return cls(
            team=team,
            rows=Axis(bounds=cut(height, down) + (height,) * spare, index=row),
            columns=Axis(bounds=cut(width, across), index=column),
            overlaps=overlaps,
        )

    @property
    def idle(self) -> bool:
        """Whether there is nothing for this rank."""
        return not (len(self.rows.own) and len(self.columns.own))

    @property
    def active(self) -> list[int]:
        """Positions that have a part."""
        return [self.position(row, column) for row in self.rows.active() for column in self.columns.active()]

    @property
    def largest(self) -> tuple[int, int]:
        """Rows and columns of the largest part."""
        return (
            max(len(self.rows.part(i)) for i in range(self.rows.num_parts)),
            max(len(self.columns.part(i)) for i in range(self.columns.num_parts)),
        )

    def position(self, row: int, column: int) -> int:
        """Of the rank that has a part."""
        return row * self.columns.num_parts + column

    def part_of(self, position: int, scale: int = 1) -> tuple[Range, Range]:
        """Rows and columns of a rank's part where a latent cell has become `scale` of them."""
        row, column = divmod(position, self.columns.num_parts)
        return self.rows.part(row, scale), self.columns.part(column, scale)

    def __str__(self) -> str:
        def sizes(axis: Axis) -> str:
            return "+".join(str(len(axis.part(index))) for index in axis.active())

        spare = self.team.size - len(self.active)
        idle = f", {spare} of {self.team.size} ranks have no part" if spare else ""
        across = f" and {sizes(self.columns)} columns" if self.columns.num_parts > 1 else ""
        return f"{sizes(self.rows)} rows{across} of latents{idle}"


def widened(axis: Axis, margin: int) -> Range:
    """This rank's cells and a margin around them; it begins and ends where Winograd's tiles do."""
    tile = 4
    return Range(
        max(0, (axis.own.start - margin) // tile * tile), min(axis.cells, -(-(axis.own.stop + margin) // tile) * tile)
    )


def gather(share: Share, mine: Tensor, positions: Sequence[int], scale: int = 1) -> list[Tensor]:
    """What each of some positions has, on each of them; a latent cell has become `scale` cells."""
    shapes = {p: (*mine.shape[:3], *map(len, share.part_of(p, scale))) for p in positions}
    mine = mine.contiguous()
    others = [p for p in positions if p != share.team.index]
    sends = dict.fromkeys(others, mine) if mine.numel() else {}
    receives = {p: mine.new_empty(shapes[p]) for p in others if 0 not in shapes[p]}
    there = {**share.team.exchange(sends, receives).wait(), share.team.index: mine}
    return [there[p] if p in there else mine.new_empty(shapes[p]) for p in positions]


def assemble(share: Share, parts: dict[int, Tensor], scale: int) -> Tensor:
    """Parts (B, C, T, h, w) of all positions that have one -> (B, C, T, H, W)."""
    like = parts[share.active[0]]
    whole = like.new_empty(*like.shape[:3], share.rows.cells * scale, share.columns.cells * scale)
    for position in share.active:
        rows, columns = share.part_of(position, scale)
        whole[:, :, :, rows.start : rows.stop, columns.start : columns.stop] = parts[position]
    return whole
