"""The VAE over several ranks: each has some rows (and columns) of every picture, and fetches what lies around them.

Shapes: B batch, C channels, T frames, H rows, W columns. The model is the one of a single process; it is handed another
state. For every convolution that gets the rows it needs from the neighbours, and computes the others meanwhile.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from frameloom.attention.core import Attend
from frameloom.errors import InternalError
from frameloom.models.vae_state import BandState, Convolution, Prepare, Reach, RowPadding
from frameloom.parallel.picture import Range, Span
from frameloom.parallel.share import Share

_ROWS, _COLUMNS = 3, 4
_PADDED = RowPadding(0, 0)
_QUERY_BLOCK, _FEW_QUERIES = 256, 768  # torch's attention on CPUs takes blocks of 256 queries where there are 768


class ShardState(BandState):
    """Part of a picture whose neighbours are on other ranks.

    Every convolution of rows gets what it reads of them: of the new frames alone, as what it had of the past is kept.
    Where the kernel computes tiles of rows, tiles lie where those of the whole picture lie, and what is computed beyond
    the part is thrown away: so the bits are those of the whole picture, if the kernel's are.
    """

    def __init__(self, share: Share, *, channels_last: bool = True, tile_rows: int | None = None) -> None:
        super().__init__(rows=None, channels_last=channels_last, tile_rows=tile_rows)
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
        rows, columns = self._spans(x_BCTHW, reach)
        if reach.kernel == 1:
            around, pad = self.surround(owner, x_BCTHW, history=history, reach=reach, prepare=prepare)
            return self._in_tiles(run, around, pad, reach, rows[self._share.rows.index].first)
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
            self._prepare(prepare, x_BCTHW, own, row.own.start)
        else:  # kernels write whole rows
            own.copy_(prepare(x_BCTHW))
        finish = self._swap(new, rows, columns)
        inner = _inner_rows(row, reach)
        if not (self._share.overlaps and self._share.columns.num_parts == 1 and len(inner)):
            finish()
            out = self._in_tiles(run, whole, _PADDED, reach, row.first // reach.stride)
            out = self._cropped(out, row, column, reach)
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
            read = whole.narrow(_ROWS, rows.start - row.first, len(rows) + reach.kernel - reach.stride)
            return self._in_tiles(run, read, _PADDED, reach, rows.start // reach.stride)

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


def _whole_blocks(start: int, stop: int, total: int) -> tuple[int, int]:
    """The queries that torch's kernel for CPUs takes in the blocks that it also takes when there are all of them."""
    if total <= _FEW_QUERIES:
        return 0, total
    high = min(total, -(-stop // _QUERY_BLOCK) * _QUERY_BLOCK)
    return min(start, max(0, high - _FEW_QUERIES)) // _QUERY_BLOCK * _QUERY_BLOCK, high


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
