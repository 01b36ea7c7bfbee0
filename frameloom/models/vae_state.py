"""What a pass over a video remembers: frames that came before, and rows of the picture that were not yet used up.

Shapes: B batch, C channels, T frames, H rows (height), W width. Two states, one protocol:

- `CausalState` is the plain one: whole pictures, differentiable, the reference of the other.
- `BandState` lets the picture pass in bands of rows. A convolution over three rows gives one row less than it was given
  at the top of the picture, keeps two rows for the next band, and catches up at the bottom; so nothing is computed
  twice, nothing is blended, and every row is the one that the whole picture would have given.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from frameloom.attention.core import Attend
from frameloom.errors import InternalError
from frameloom.platform.allocator import empty

Frames = npt.NDArray[np.uint8]


class Reach(NamedTuple):
    """How a convolution walks over rows: kernel height, stride, and the zero rows above and below the picture.

    `tile` rows are computed together, and a band ends between tiles: they lie where those of the whole picture lie.
    """

    kernel: int
    stride: int = 1
    above: int = 0
    below: int = 0
    tile: int = 1

    @classmethod
    def same(cls, kernel: int, *, tile: int = 1) -> "Reach":
        """As many rows out as in."""
        return cls(kernel, 1, kernel // 2, kernel // 2, tile)

    def steps(self, rows: int, pad: "RowPadding | None" = None) -> int:
        """How often it fits on so many rows and the zero rows around them."""
        return max(0, (rows + sum(pad or ()) - self.kernel) // self.stride + 1)


class RowPadding(NamedTuple):
    """Zero rows that a convolution must add by itself."""

    above: int
    below: int


class Prepare(Protocol):
    """What happens to a convolution's input on its way there, such as norm and activation."""

    def __call__(self, x_BCTHW: Tensor, /, *, out: Tensor | None = None) -> Tensor:
        """Return the prepared x, in `out` where one is given."""
        ...


Stage = Callable[[Tensor], Tensor]
"""Part of a network through which the rows of a picture may pass in bands."""

Convolution = Callable[[Tensor, RowPadding], Tensor]
"""A convolution of what surrounds a chunk, and the zero rows that it must add by itself."""


class CausalState:
    """The past of a video: the tail of every time convolution's input, and whether there is a past at all.

    A fresh state is the beginning of a video. Encoding or decoding a video in chunks of any length, handing the same
    state along, equals doing it in one piece.
    """

    repeats = False  # whether `repeated` may give what it gave before

    def __init__(self) -> None:
        self.at_start = True  # True until the first chunk has passed
        self._tails: dict[object, Tensor] = {}

    def surround(
        self, owner: nn.Module, x_BCTHW: Tensor, *, history: int, reach: Reach, prepare: Prepare | None = None
    ) -> tuple[Tensor, RowPadding]:
        """What `owner` must convolve, and the zero rows that it must add by itself.

        `history` frames before x are put in front (zeros before the beginning of the video) and the tail is remembered.
        """
        if prepare is not None:
            x_BCTHW = prepare(x_BCTHW)
        if history:
            tail = self._tails.get(owner)
            if tail is None:
                b, c, _, h, w = x_BCTHW.shape
                tail = x_BCTHW.new_zeros(b, c, history, h, w)
            x_BCTHW = torch.cat([tail, x_BCTHW], dim=2)
            self._tails[owner] = x_BCTHW[:, :, -history:].clone()  # a view would keep the whole chunk alive
        return x_BCTHW, RowPadding(reach.above, reach.below)

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
        """`run` on x with what surrounds it."""
        around, pad = self.surround(owner, x_BCTHW, history=history, reach=reach, prepare=prepare)
        del x_BCTHW  # what is convolved is a copy, and this may be the last name of a large picture
        return run(around, pad)

    def attend(self, attend: Attend, q_NLHK: Tensor, k_NLHK: Tensor, v_NLHK: Tensor) -> Tensor:
        """`attend` of the cells that are here to all cells of their frames."""
        return attend(q_NLHK, k_NLHK, v_NLHK)

    def align(self, owner: nn.Module, x_BCTHW: Tensor, rows: int) -> Tensor:
        """The next `rows` rows of a stream that must keep step with another one."""
        if x_BCTHW.shape[3] != rows:
            raise InternalError(f"two branches of {type(owner).__name__} have {x_BCTHW.shape[3]} and {rows} rows")
        return x_BCTHW

    def whole_groups(self, owner: nn.Module, x_BCTHW: Tensor, group: int) -> Tensor:
        """The rows of x that complete groups of `group` rows; whole pictures always do."""
        return x_BCTHW

    def repeated(self, key: object, x_BCTHW: Tensor, run: Stage) -> Tensor:
        """`run` on x; a state that `repeats` may give what the part of the network called `key` gave before."""
        return run(x_BCTHW)

    def by_rows(self, x_BCTHW: Tensor, stages: Sequence[Stage]) -> Tensor:
        """x through one stage after the other, in bands if the state is made for them."""
        for stage in stages:
            x_BCTHW = stage(x_BCTHW)
        return x_BCTHW


class Band(NamedTuple):
    """Which part of a picture passes a stage: its number, and whether the picture begins or ends with it."""

    number: int
    first: bool
    last: bool


class BandState(CausalState):
    """Whole pictures or bands of rows, through buffers that are written once; for inference only.

    `rows`: how many rows a stage of `by_rows` is given at most; None passes whole pictures. `channels_last`: the memory
    order of what is given to the convolutions. `tile_rows`: how many rows they give at a time, except those with tiles
    of their own; None all at once. A library sums in another order for another height: in tiles of one height, that lie
    where those of the whole picture lie, every row has the bits that it has there.
    """

    def __init__(self, *, rows: int | None = None, channels_last: bool = True, tile_rows: int | None = None) -> None:
        super().__init__()
        self._rows_per_band = rows
        self._channels_last = channels_last
        self._tile_rows = tile_rows
        self._taken: dict[nn.Module, int] = {}  # rows of the picture that a convolution took in earlier bands
        self._band: Band | None = None
        self._pending: dict[object, Tensor] = {}
        self._kept: dict[object, Tensor] = {}  # memory for what is remembered, and for a window

    def surround(
        self, owner: nn.Module, x_BCTHW: Tensor, *, history: int, reach: Reach, prepare: Prepare | None = None
    ) -> tuple[Tensor, RowPadding]:
        """As CausalState; in a band the rows that `owner` still needs are part of what it must convolve."""
        band = self._band if reach.kernel > 1 else None
        if prepare is None and history == 0 and band is None:
            return x_BCTHW, RowPadding(reach.above, reach.below)
        window = self._window(owner, x_BCTHW, history=history, reach=reach, band=band)
        rows = slice(window.top, window.top + x_BCTHW.shape[3])
        inner = window.whole[:, :, history:, rows]
        if prepare is None:
            inner.copy_(x_BCTHW)
        else:
            self._prepare(prepare, x_BCTHW, inner, self._taken_by(owner))
        if history:
            self._remember(owner, window.whole[:, :, :, rows], history)
        if band is None:
            return window.whole, RowPadding(reach.above, reach.below)
        return self._consume(owner, window.whole, reach, band), RowPadding(0, 0)

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
        """As CausalState, in tiles of rows."""
        taken, rows = self._taken_by(owner), x_BCTHW.shape[3]
        around, pad = self.surround(owner, x_BCTHW, history=history, reach=reach, prepare=prepare)
        del x_BCTHW
        self._taken[owner] = taken + rows
        return self._in_tiles(run, around, pad, reach, reach.steps(taken, RowPadding(reach.above, 0)))

    def align(self, owner: nn.Module, x_BCTHW: Tensor, rows: int) -> Tensor:
        """The next `rows` rows of x; what is left waits for the next band."""
        if self._band is None:
            return super().align(owner, x_BCTHW, rows)
        x_BCTHW = self._with_pending(("align", owner), x_BCTHW)
        if x_BCTHW.shape[3] < rows or (self._band.last and x_BCTHW.shape[3] != rows):
            raise InternalError(f"two branches of {type(owner).__name__} have {x_BCTHW.shape[3]} and {rows} rows")
        self._keep(("align", owner), x_BCTHW[:, :, :, rows:])
        return x_BCTHW[:, :, :, :rows]

    def whole_groups(self, owner: nn.Module, x_BCTHW: Tensor, group: int) -> Tensor:
        """The rows of x, with those that waited, that complete groups of `group` rows; the rest waits."""
        if self._band is None:
            return x_BCTHW
        x_BCTHW = self._with_pending(("group", owner), x_BCTHW)
        count = x_BCTHW.shape[3] // group * group
        self._keep(("group", owner), x_BCTHW[:, :, :, count:])
        return x_BCTHW[:, :, :, :count]

    def by_rows(self, x_BCTHW: Tensor, stages: Sequence[Stage]) -> Tensor:
        """x through the stages in bands; the rows that come out of the last one are put together."""
        if self._rows_per_band is None:
            return super().by_rows(x_BCTHW, stages)
        parts = list(self._flow(x_BCTHW, stages, [itertools.count() for _ in stages], last=True))
        self._band = None
        if self._pending:
            raise InternalError(f"{len(self._pending)} layers were left with rows that nobody asked for")
        return torch.cat(parts, dim=3)

    def _flow(
        self, x_BCTHW: Tensor, stages: Sequence[Stage], numbers: Sequence[Iterator[int]], *, last: bool
    ) -> Iterator[Tensor]:
        """What comes out of the stages for x, the next rows of the first one's input (`last`: there are no more).

        Each stage's rows go on before it is given more, cut again if they have become too many.
        """
        if not stages:
            yield x_BCTHW
            return
        assert self._rows_per_band is not None
        height, size = x_BCTHW.shape[3], self._rows_per_band
        for start in range(0, height, size):
            number, ends = next(numbers[0]), last and start + size >= height
            self._band = Band(number, first=number == 0, last=ends)
            rows = stages[0](x_BCTHW[:, :, :, start : start + size])
            yield from self._flow(rows, stages[1:], numbers[1:], last=ends)

    def _window(self, owner: nn.Module, x_BCTHW: Tensor, *, history: int, reach: Reach, band: Band | None) -> "_Window":
        """A buffer with place for x, and all that surrounds it written: past frames, rows above, zero rows."""
        b, c, t, h, w = x_BCTHW.shape
        above = self._pending.pop(owner, None) if band else None
        top = 0 if band is None else reach.above if band.first else 0 if above is None else above.shape[3]
        bottom = reach.below if band and band.last else 0
        # One window at a time: the convolution that asked is done before the next one asks.
        whole = self._memory("window", x_BCTHW, (b, c, history + t, top + h + bottom, w))
        if history:
            tail = self._tails.get(self._key(owner))
            past = whole[:, :, :history, top : top + h]
            if tail is None:
                past.zero_()
            else:
                past.copy_(tail)
        if above is not None:
            whole[:, :, :, :top].copy_(above)
        elif top:
            whole[:, :, :, :top].zero_()
        if bottom:
            whole[:, :, :, top + h :].zero_()
        return _Window(whole, top)

    def _consume(self, owner: nn.Module, whole: Tensor, reach: Reach, band: Band) -> Tensor:
        """The rows that a whole number of the kernel's steps and tiles covers; the rows needed again are kept."""
        steps = reach.steps(whole.shape[3])
        steps -= 0 if band.last else steps % reach.tile
        used = steps * reach.stride
        if not band.last:
            self._keep(owner, whole[:, :, :, used:])
        return whole[:, :, :, : used + reach.kernel - reach.stride if steps else 0]

    def _taken_by(self, owner: nn.Module) -> int:
        """Rows of this picture before those that come now."""
        return 0 if self._band is None or self._band.first else self._taken[owner]

    def _prepare(self, prepare: Prepare, x_BCTHW: Tensor, out: Tensor, before: int) -> None:
        """`prepare` x into `out`; `before`: rows of the picture that lie before x.

        Where channels lie apart in memory, torch sums them in another order at the end of what it takes at a time.
        """
        if self._channels_last:
            prepare(x_BCTHW, out=out)
        else:
            out.copy_(self._in_tiles(lambda x, _: prepare(x), x_BCTHW, RowPadding(0, 0), Reach(1), before))

    def _in_tiles(self, run: Convolution, x_BCTHW: Tensor, pad: RowPadding, reach: Reach, before: int) -> Tensor:
        """`run` on x, tile by tile; `before`: rows of the picture that lie before the first one that x gives."""
        steps, tile = reach.steps(x_BCTHW.shape[3], pad), self._tile_rows
        if tile is None or reach.tile > 1 or steps == 0:
            return run(x_BCTHW, pad)
        read = (tile - 1) * reach.stride + reach.kernel
        out: Tensor | None = None
        for start in range(-(before % tile), steps, tile):
            around = self._rows_of(x_BCTHW, start * reach.stride - pad.above, read, may_view=reach.kernel > 1)
            given = run(around, RowPadding(0, 0))
            doubled = given.shape[3] // tile  # by an upsampling that is part of the convolution
            if out is None:
                shape = (*given.shape[:3], steps * doubled, given.shape[4])
                out = self._in_order(empty(given, math.prod(shape)), shape)
            first, last = max(0, start), min(steps, start + tile)
            own = given[:, :, :, (first - start) * doubled : (last - start) * doubled]
            out[:, :, :, first * doubled : last * doubled].copy_(own)
        assert out is not None
        return out

    def _rows_of(self, x_BCTHW: Tensor, top: int, count: int, *, may_view: bool) -> Tensor:
        """`count` rows from `top` on, zeros where x has none; of a copy unless x has them and `may_view`.

        A library brings what it convolves into its own order first, and what is a view comes out as a copy does; but a
        matrix product takes another way to a view.
        """
        b, c, t, height, w = x_BCTHW.shape
        low, high = max(0, top), min(height, top + count)
        if may_view and high - low == count:
            return x_BCTHW[:, :, :, low:high]
        rows = self._memory("tile", x_BCTHW, (b, c, t, count, w))
        rows[:, :, :, : low - top].zero_()
        rows[:, :, :, low - top : high - top].copy_(x_BCTHW[:, :, :, low:high])
        rows[:, :, :, high - top :].zero_()
        return rows

    def _remember(self, owner: nn.Module, x_BCTHW: Tensor, history: int) -> None:
        key, end = self._key(owner), x_BCTHW[:, :, -history:]
        self._tails[key] = self._memory(("frames", key), end).copy_(end)

    def _key(self, owner: nn.Module) -> object:
        return owner if self._band is None else (owner, self._band.number)

    def _keep(self, key: object, x_BCTHW: Tensor) -> None:
        if x_BCTHW.shape[3]:
            self._pending[key] = self._memory(("rows", key), x_BCTHW).copy_(x_BCTHW)

    def _with_pending(self, key: object, x_BCTHW: Tensor) -> Tensor:
        waiting = self._pending.pop(key, None)
        if waiting is None:
            return x_BCTHW
        b, c, t, h, w = x_BCTHW.shape
        above = waiting.shape[3]
        joined = self._in_order(empty(x_BCTHW, b * c * t * (above + h) * w), (b, c, t, above + h, w))
        joined[:, :, :, :above].copy_(waiting)
        joined[:, :, :, above:].copy_(x_BCTHW)
        return joined

    def _memory(self, key: object, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Memory of this key for a tensor of the shape of `like` or another; what was in it before is gone."""
        shape = shape or like.shape
        size = math.prod(shape)
        flat = self._kept.pop(key, None)
        if flat is None or flat.numel() < size or flat.dtype != like.dtype:
            flat = None  # before the larger one is made
            flat = empty(like, size)
        self._kept[key] = flat
        return self._in_order(flat[:size], shape)

    def _in_order(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        """The numbers of `flat` as (B, C, T, H, W) in the memory order of this state."""
        b, c, t, h, w = shape
        if self._channels_last:
            return flat.view(b, t, h, w, c).permute(0, 4, 1, 2, 3)
        return flat.view(b, c, t, h, w)


class RepeatingState(BandState):
    """A BandState that computes no part of a network whose input and memory are those of the chunk before.

    The proof is an induction: what a part gives, and what it remembers then, depend on its input and on what it
    remembers, and on nothing else. Where neither has changed from one chunk to the next, it gives what it gave, and
    remembers what it remembers; so does the next chunk, as long as the input stays. That the input is the same is told
    by its being the same tensor: who has equal chunks hands over one of them. Memory is compared number by number.
    """

    repeats = True

    def __init__(self, *, rows: int | None = None, channels_last: bool = True, tile_rows: int | None = None) -> None:
        super().__init__(rows=rows, channels_last=channels_last, tile_rows=tile_rows)
        self._passed: dict[object, _Passed] = {}
        self._watched = False  # whether what is remembered is compared with what was
        self._changed = False

    def repeated(self, key: object, x_BCTHW: Tensor, run: Stage) -> Tensor:
        """What `run` gave for the last chunk, where it is known that it would give that again."""
        before = self._passed.pop(key, None)  # what it gave is let go while it runs
        is_same = before is not None and before.given is x_BCTHW and not self.at_start
        if before is not None and is_same and before.settled:
            self._passed[key] = before
            return before.made
        del before
        self._watched, self._changed = is_same, False
        made = run(x_BCTHW)
        self._passed[key] = _Passed(x_BCTHW, made, is_same and not self._changed)
        self._watched = False
        return made

    def _remember(self, owner: nn.Module, x_BCTHW: Tensor, history: int) -> None:
        if self._watched and not self._changed:
            tail, end = self._tails.get(self._key(owner)), x_BCTHW[:, :, -history:]
            self._changed = tail is None or tail.shape != end.shape or not torch.equal(tail, end)
        super()._remember(owner, x_BCTHW, history)


class _Passed(NamedTuple):
    """What a part of a network was given, what it made of it, and whether it would make that again of the same."""

    given: Tensor
    made: Tensor
    settled: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """How a video passes through the VAE: latent frames at a time, and rows per band at most (None: whole pictures).

    `tile_rows`: rows that a library's convolution gives at a time, None all. `buffers` False is the plain way of
    `CausalState`, which knows neither bands nor tiles. `repeats`: an encoder gives again what it gave for frames that
    do not change.
    """

    steps: int = 1
    rows: int | None = None
    tile_rows: int | None = None
    channels_last: bool = False
    buffers: bool = True
    repeats: bool = False

    def part(self, x_BCTHW: Tensor, cell: int = 1) -> Tensor:
        """What of latents, or of frames with `cell` pixels per latent cell each way, passes here: all of it."""
        return x_BCTHW

    def join(self, x_BCTHW: Tensor) -> Tensor:
        """The whole of what came out for the part that passed here, such as frames or moments."""
        return x_BCTHW

    def collect(self, frames: Frames) -> Frames | None:
        """The whole of finished frames (B, T, H, W, 3), where they are wanted; None elsewhere."""
        return frames

    def state(self) -> CausalState:
        """The state of a video's beginning."""
        if not self.buffers:
            return CausalState()
        kind = RepeatingState if self.repeats else BandState
        return kind(rows=self.rows, channels_last=self.channels_last, tile_rows=self.tile_rows)

    def __str__(self) -> str:
        pictures = "whole pictures" if self.rows is None else f"bands of {self.rows} rows"
        return f"{self.steps} latent frame{'s' if self.steps > 1 else ''} at a time, {pictures}"


class _Window(NamedTuple):
    """A buffer, and the row of it at which the input begins."""

    whole: Tensor
    top: int
