"""How a picture is divided over ranks: uneven parts of whole latent cells, in rows, columns or both."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from frameloom.models.vae_state import Reach

_UNITS = (4, 2)  # latent cells: Winograd's tiles of the smallest picture lie whole in one part
_UNEVEN = 1.1  # the largest part may grow by that much for it
_CROP_COLUMNS = 1.5  # latent columns that a cut between columns costs: computed, and thrown away
_HALO = 0.5  # of a cell's computation: what it costs to fetch one
_LEAST_COLUMNS = 8  # latent columns that a part keeps, where there are several side by side
_WORTH = 0.9  # of the cost in rows alone that a grid may have: in rows more kernels give the bits of the whole picture


def cut(cells: int, parts: int) -> tuple[int, ...]:
    """Bounds of `parts` parts: part i is bounds[i] to bounds[i + 1]. Where cells are too few, the last are empty."""
    even = -(-cells // parts)
    for unit in _UNITS:
        units = -(-cells // unit)
        if units >= parts and unit * -(-units // parts) <= _UNEVEN * even:
            return tuple(min(cells, unit * (part * units // parts)) for part in range(parts + 1))
    if cells < parts:
        return tuple(min(part, cells) for part in range(parts + 1))
    return tuple(part * cells // parts for part in range(parts + 1))


def grid(height: int, width: int, parts: int) -> tuple[int, int]:
    """Parts along rows and along columns, for a picture of so many latent cells: rows, unless a grid costs less.

    A cost is the largest part's cells and what it fetches.
    """
    in_rows = parts, 1
    grids = [
        (rows, parts // rows)
        for rows in range(1, parts)
        if parts % rows == 0 and width // (parts // rows) >= _LEAST_COLUMNS
    ]
    best = min([in_rows, *grids], key=lambda shape: _cost(height, width, *shape))
    return best if _cost(height, width, *best) <= _WORTH * _cost(height, width, *in_rows) else in_rows


def _cost(height: int, width: int, rows: int, columns: int) -> float:
    tall, wide = _largest(cut(height, rows)), _largest(cut(width, columns))
    halo = 2 * wide * (rows > 1) + 2 * tall * (columns > 1)
    return tall * (wide + _CROP_COLUMNS * (columns > 1)) + _HALO * halo


def _largest(bounds: Sequence[int]) -> int:
    return max(end - start for start, end in itertools.pairwise(bounds))


class Range(NamedTuple):
    """Rows or columns of a picture, from `start` to before `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def common(self, other: "Range") -> "Range":
        """What both have."""
        return Range(max(self.start, other.start), min(self.stop, other.stop))


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What one part of an axis has, and what it works on to convolve that: rows (or columns) of the whole picture.

    `own` is the part itself, `reads` all that is fetched or there, `zeros` how many lie before and after that, beyond
    the picture or in place of what is not looked at, and `first` the first one that is computed.
    """

    own: Range
    reads: Range
    zeros: tuple[int, int]
    first: int

    @property
    def length(self) -> int:
        """Of the memory that holds all of it."""
        return self.zeros[0] + len(self.reads) + self.zeros[1]

    def at(self, rows: Range) -> slice:
        """Where some rows of the picture lie in that memory."""
        offset = self.zeros[0] - self.reads.start
        return slice(rows.start + offset, rows.stop + offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of the picture, divided at `bounds` (latent cells); this rank has part `index`."""

    bounds: tuple[int, ...]
    index: int

    @property
    def own(self) -> Range:
        """This rank's cells."""
        return self.part(self.index)

    @property
    def num_parts(self) -> int:
        """Parts, the empty ones counted."""
        return len(self.bounds) - 1

    @property
    def cells(self) -> int:
        """Of the whole axis."""
        return self.bounds[-1]

    def part(self, index: int, scale: int = 1) -> Range:
        """Part `index` where a latent cell has become `scale` rows."""
        return Range(self.bounds[index] * scale, self.bounds[index + 1] * scale)

    def spans(self, scale: int, reach: Reach) -> list[Span]:
        """For a convolution of rows: what every part reads. Zeros above and below the picture are part of it."""
        return [self._span(index, scale, reach) for index in range(self.num_parts)]

    def spans_aside(self, scale: int, reach: Reach) -> list[Span]:
        """For columns, which the convolution pads by itself: a part begins with whole tiles that are thrown away."""
        return [_padded_aside(span, self.cells * scale, reach) for span in self.spans(scale, reach)]

    def _span(self, index: int, scale: int, reach: Reach) -> Span:
        own, end = self.part(index, scale), self.cells * scale
        if not len(own):
            return Span(own=own, reads=own, zeros=(0, 0), first=own.start)
        first, last = own.start // reach.tile * reach.tile, -(-own.stop // reach.tile) * reach.tile
        low, high = first - reach.above, last + reach.below
        zeros = max(0, -low), reach.below if high > end else 0
        return Span(own=own, reads=Range(max(0, low), min(end, high)), zeros=zeros, first=first)

    def active(self) -> Iterator[int]:
        """Parts that are not empty."""
        return (index for index in range(self.num_parts) if len(self.part(index)))


def _padded_aside(span: Span, end: int, reach: Reach) -> Span:
    """The convolution pads: no zeros at the picture's edge, and inside of it as many as make the tiles lie right."""
    before = 0 if span.reads.start == 0 or not reach.above else reach.tile - reach.above
    return Span(own=span.own, reads=span.reads, zeros=(before, 0), first=span.first)
