"""The VAE over several ranks: each has some rows (and columns) of every picture, and fetches what lies around them.

Shapes: B batch, C channels, T frames, H rows, W columns. The model is the one of a single process; it is handed another
state. Two ways: `ShardState` fetches, for every convolution, the rows that it needs from the neighbours, and computes
the others meanwhile; `MarginState` fetches nothing and computes the rows around its own as well, for slow links.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frameloom.attention.core import Attend
from frameloom.errors import InternalError
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import (
    BandState,
    CausalState,
    Convolution,
    Frames,
    Passage,
    Prepare,
    Reach,
    RowPadding,
    Stage,
)
from frameloom.parallel.picture import Axis, Range, Span, cut, grid
from frameloom.parallel.team import Team

_ROWS, _COLUMNS = 3, 4
_PADDED = RowPadding(0, 0)
_QUERY_BLOCK, _FEW_QUERIES = 256, 768  # torch's attention on CPUs takes blocks of 256 queries where there are 768


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
        idle = f", {spare} of {self.team.size} ranks idle: there are too few cells" if spare else ""
        across = f" and {sizes(self.columns)} columns" if self.columns.num_parts > 1 else ""
        return f"{sizes(self.rows)} rows{across} of latents{idle}"


class ShardState(BandState):
    """Part of a picture whose neighbours are on other ranks.

    Every convolution of rows gets what it reads of them: of the new frames alone, as what it had of the past is kept.
    Where the kernel computes tiles of rows, tiles lie where those of the whole picture lie, and what is computed beyond
    the part is thrown away: so the bits are those of the whole picture, if the kernel's are.
    """

    def __init__(self, share: Share, *, channels_last: bool = True) -> None:
        super().__init__(rows=None, channels_last=channels_last)
        self._share = share

    def convolve(
        self,
        owner: nn.Module,
        x_BCTHW: Tensor,
        run: Convolution,
        *,
        history: int,
        reach: Reach,
        prepare: Prepare | None = None,
    ) -> Tensor:
        """As CausalState, with the rows and columns of the neighbours."""
        if reach.kernel == 1:
            return super().convolve(owner, x_BCTHW, run, history=history, reach=reach, prepare=prepare)
        rows, columns = self._spans(x_BCTHW, reach)
        row, column = rows[self._share.rows.index], columns[self._share.columns.index]
        batch, channels, frames = x_BCTHW.shape[:3]
        shape = (batch, channels, history + frames, row.length, column.length)
        whole = self._memory("window", x_BCTHW, shape)
        new = whole[:, :, history:]
        self._put_past(owner, whole[:, :, :history])
        _put_zeros(new, row, column)
        own = new[:, :, :, row.at(row.own), column.at(column.own)]
        if prepare is None:
            own.copy_(x_BCTHW)
        elif self._share.columns.num_parts == 1:
            prepare(x_BCTHW, out=own)
        else:  # kernels write whole rows
            own.copy_(prepare(x_BCTHW))
        finish = self._swap(new, rows, columns)
        inner = _inner_rows(row, reach)
        if not (self._share.overlaps and self._share.columns.num_parts == 1 and len(inner)):
            finish()
            out = self._cropped(run(whole, _PADDED), row, column, reach)
        else:
            out = self._inner_first(whole, run, row, inner, reach, finish)
        if history:
            self._remember(owner, whole, history)
        return out

    def attend(self, attend: Attend, q_NLHK: Tensor, k_NLHK: Tensor, v_NLHK: Tensor) -> Tensor:
        """Own queries to the keys and values of all parts, which lie as those of the whole picture do."""
        share = self._share
        mine = torch.stack((k_NLHK, v_NLHK)).contiguous()
        pairs, frames, cells, *one = mine.shape
        if cells != len(share.rows.own) * len(share.columns.own):
            raise InternalError(f"attention over {cells} cells where {len(share.rows.own)} rows were expected")
        whole = mine.new_empty(pairs, frames, share.rows.cells, share.columns.cells, *one)
        others = [position for position in share.active if position != share.team.index]
        parts = {position: share.part_of(position) for position in share.active}
        blocks = {p: mine.new_empty(pairs, frames, *map(len, parts[p]), *one) for p in others}
        pending = share.team.exchange(dict.fromkeys(others, mine), blocks)
        there = {**pending.wait(), share.team.index: mine.view(pairs, frames, *map(len, parts[share.team.index]), *one)}
        for position, part in there.items():
            rows, columns = parts[position]
            whole[:, :, rows.start : rows.stop, columns.start : columns.stop] = part
        k, v = whole.flatten(2, 3)
        return self._attend_in_place(attend, q_NLHK, k, v)

    def _attend_in_place(self, attend: Attend, q_NLHK: Tensor, k_NLHK: Tensor, v_NLHK: Tensor) -> Tensor:
        """`attend` of own queries, among zeros where the other queries of their blocks lie.

        Torch's kernel for CPUs rounds by how many queries it takes at a time; so it takes the same as for all.
        """
        rows, columns = self._share.rows.own, self._share.columns.own
        width, total = self._share.columns.cells, k_NLHK.shape[1]
        low, high = _whole_blocks(rows.start * width, rows.stop * width, total)
        among = q_NLHK.new_zeros(q_NLHK.shape[0], high - low, *q_NLHK.shape[2:])
        begin = rows.start * width - low
        own = among[:, begin : begin + len(rows) * width].unflatten(1, (len(rows), width))  # type: ignore[no-untyped-call]
        own = own[:, :, columns.start : columns.stop]
        own.copy_(q_NLHK.view(own.shape))
        out = attend(among, k_NLHK, v_NLHK)[:, begin : begin + len(rows) * width]
        picture: Tensor = out.unflatten(1, (len(rows), width))  # type: ignore[no-untyped-call]
        return picture[:, :, columns.start : columns.stop].flatten(1, 2)

    def _spans(self, x_BCTHW: Tensor, reach: Reach) -> tuple[list[Span], list[Span]]:
        """What each part reads, along rows and along columns, where a latent cell has become some rows."""
        rows, columns = self._share.rows, self._share.columns
        scale = x_BCTHW.shape[_ROWS] // len(rows.own)
        if x_BCTHW.shape[_ROWS] != scale * len(rows.own) or x_BCTHW.shape[_COLUMNS] != scale * len(columns.own):
            raise InternalError(f"a part of {tuple(x_BCTHW.shape[_ROWS:])} is none of {len(rows.own)} latent rows")
        if columns.num_parts == 1:
            everything = Range(0, columns.cells * scale)
            return rows.spans(scale, reach), [Span(own=everything, reads=everything, zeros=(0, 0), first=0)]
        return rows.spans(scale, reach), columns.spans_aside(scale, reach)

    def _put_past(self, owner: nn.Module, past: Tensor) -> None:
        tail = self._tails.get(self._key(owner))
        if tail is None:
            past.zero_()
        else:
            past.copy_(tail)

    def _swap(self, new: Tensor, rows: Sequence[Span], columns: Sequence[Span]) -> Callable[[], None]:
        """Begin to fetch rows; what is returned waits for them, and then fetches columns, the fetched rows' too."""
        share, column = self._share, columns[self._share.columns.index]
        here = [share.position(row, share.columns.index) for row in range(share.rows.num_parts)]
        rows_in = self._swap_along(new[..., column.at(column.own)], _ROWS, rows, share.rows.index, here)

        def finish() -> None:
            rows_in()
            beside = [share.position(share.rows.index, c) for c in range(share.columns.num_parts)]
            self._swap_along(new, _COLUMNS, columns, share.columns.index, beside)()

        return finish

    def _swap_along(
        self, new: Tensor, dim: int, spans: Sequence[Span], index: int, positions: Sequence[int]
    ) -> Callable[[], None]:
        """Send every other part of an axis what it reads of this one, and the other way round."""
        mine = spans[index]
        sends, receives, places = {}, {}, []
        for other, (span, position) in enumerate(zip(spans, positions, strict=True)):
            if other == index:
                continue
            given, taken = span.reads.common(mine.own), mine.reads.common(span.own)
            if len(given):
                rows = _slice(new, dim, mine.at(given))
                buffer = self._memory(("send", dim, other), rows)
                buffer.copy_(rows)
                sends[position] = self._plain(buffer)
            if len(taken):
                place = _slice(new, dim, mine.at(taken))
                buffer = self._memory(("receive", dim, other), place)
                receives[position] = self._plain(buffer)
                places.append((place, buffer))
        pending = self._share.team.exchange(sends, receives)

        def finish() -> None:
            pending.wait()
            for place, buffer in places:
                place.copy_(buffer)

        return finish

    def _plain(self, x_BCTHW: Tensor) -> Tensor:
        """A buffer of this state as it lies in memory."""
        return x_BCTHW.permute(0, 2, 3, 4, 1) if self._channels_last else x_BCTHW

    def _inner_first(
        self, whole: Tensor, run: Convolution, row: Span, inner: Range, reach: Reach, finish: Callable[[], None]
    ) -> Tensor:
        """Rows that need no neighbour while the others are on their way; then those above and below."""

        def convolved(rows: Range) -> Tensor:
            """Of input rows, each with what it reads around it."""
            start = rows.start - row.first
            return run(whole.narrow(_ROWS, start, len(rows) + reach.kernel - reach.stride), _PADDED)

        end = row.first + (whole.shape[_ROWS] - reach.kernel + reach.stride)
        middle = convolved(inner)
        finish()
        above, below = Range(row.first, inner.start), Range(inner.stop, end)
        parts = [convolved(above)] * bool(len(above)) + [middle] + [convolved(below)] * bool(len(below))
        return self._cropped(torch.cat(parts, dim=_ROWS), row, None, reach)

    def _cropped(self, out: Tensor, row: Span, column: Span | None, reach: Reach) -> Tensor:
        """The part's own rows and columns of what was computed."""
        steps = (row.length - reach.kernel) // reach.stride + 1
        doubled = out.shape[_ROWS] // steps  # by an upsampling that is part of the convolution

        def scaled(count: int) -> int:
            return count * doubled // reach.stride

        out = out.narrow(_ROWS, scaled(row.own.start - row.first), scaled(len(row.own)))
        if column is None or self._share.columns.num_parts == 1:
            return out
        lead = column.own.start - column.reads.start + column.zeros[0]
        cropped = out.narrow(_COLUMNS, scaled(lead), scaled(len(column.own)))
        order = torch.channels_last_3d if self._channels_last else torch.contiguous_format
        return cropped.contiguous(memory_format=order)


class MarginState(BandState):
    """Part of a picture, computed with so many of the rows and columns around it that its own are right.

    `margin` in latent cells. The middle of the network, which sees all cells, is computed on every rank; what an
    encoder brings there is fetched, once per chunk.
    """

    def __init__(self, share: Share, margin: int, *, encodes: bool, rows: int | None, channels_last: bool) -> None:
        super().__init__(rows=rows, channels_last=channels_last)
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


def widened(axis: Axis, margin: int) -> Range:
    """This rank's cells and a margin around them; it begins and ends where Winograd's tiles do."""
    tile = 4
    return Range(
        max(0, (axis.own.start - margin) // tile * tile), min(axis.cells, -(-(axis.own.stop + margin) // tile) * tile)
    )


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
            return ShardState(self.share, channels_last=self.channels_last)
        return MarginState(
            self.share, self.margin, encodes=self.encodes, rows=self.rows, channels_last=self.channels_last
        )

    def _from_first(self, x_BCTHW: Tensor) -> Tensor:
        team = self.share.team
        shape = team.agree(list(x_BCTHW.shape))
        return team.broadcast(x_BCTHW.contiguous() if x_BCTHW.numel() else x_BCTHW.new_empty(shape))

    def __str__(self) -> str:
        way = "neighbours' rows are fetched" if self.margin is None else f"with {self.margin} cells around it"
        return f"{self.steps} latent frame{'s' if self.steps > 1 else ''} at a time, {self.share}, {way}"


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


def _whole_blocks(start: int, stop: int, total: int) -> tuple[int, int]:
    """The queries that torch's kernel for CPUs takes in the blocks that it also takes when there are all of them."""
    if total <= _FEW_QUERIES:
        return 0, total
    high = min(total, -(-stop // _QUERY_BLOCK) * _QUERY_BLOCK)
    return min(start, max(0, high - _FEW_QUERIES)) // _QUERY_BLOCK * _QUERY_BLOCK, high


def _scale(share: Share, x_BCTHW: Tensor) -> int:
    return 1 if share.idle else x_BCTHW.shape[_ROWS] // len(share.rows.own)


def _slice(x: Tensor, dim: int, rows: slice) -> Tensor:
    return x.narrow(dim, rows.start, rows.stop - rows.start)


def _put_zeros(new: Tensor, row: Span, column: Span) -> None:
    for dim, span in ((_ROWS, row), (_COLUMNS, column)):
        before, after = span.zeros
        if before:
            new.narrow(dim, 0, before).zero_()
        if after:
            new.narrow(dim, span.length - after, after).zero_()


def _inner_rows(row: Span, reach: Reach) -> Range:
    """The rows, in whole tiles, whose convolution reads nothing but this part and zeros."""
    start, stop, tile = row.first, row.own.stop, reach.tile
    if row.reads.start < row.own.start:
        start = -(-(row.own.start + reach.above) // tile) * tile
    if row.reads.stop > row.own.stop:
        stop = (row.own.stop - reach.below) // (tile * reach.stride) * tile * reach.stride
    return Range(start, stop)
