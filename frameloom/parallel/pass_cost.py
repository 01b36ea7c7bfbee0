"""What several ranks compute and send while a video passes the VAE: arithmetic, for what is not here.

Bytes are those that `World.sent_bytes` counts, where parts begin with whole tiles of Winograd's.
"""

import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import Reach
from frameloom.parallel.cost import Exchange, Link, Network, RankCost, predicted_s
from frameloom.parallel.picture import Axis, Range, Span, cut, grid
from frameloom.parallel.share import widened
from frameloom.parallel.vae_margin import margin_cells

_AGREED_BYTES = 9  # a length and a digit, which rank 0 tells every other before moments are gathered
_SURELY = 1.5  # a margin is chosen where it is that much faster: the times are predictions


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeWork:
    """A video through the VAE. `latent_THW` in cells; `steps` latent frames at a time.

    `folded`: doubling the picture is part of the convolution behind it, whose rows are then half as many.
    `columns`: parts that lie side by side; None as many as cost least.
    """

    spec: VaeSpec
    latent_THW: tuple[int, int, int]
    batch: int = 1
    encodes: bool = False
    steps: int = 1
    folded: bool = False
    columns: int | None = None
    overlaps: bool = True
    itemsize: int = 4

    @property
    def chunks(self) -> int:
        """How often the network is passed."""
        return 1 + -(-(self.latent_THW[0] - 1) // self.steps)

    @property
    def pixel_frames(self) -> int:
        """Frames of the video."""
        return 1 + (self.latent_THW[0] - 1) * self.spec.temporal_scale


class _Layer(NamedTuple):
    """A convolution; `scale` and `out_scale`: rows per latent cell of what it reads and of what it gives."""

    inputs: int
    outputs: int
    taps: int
    frames: int
    scale: int = 1
    out_scale: int = 1
    reach: Reach = Reach(1)

    def flops(self, cells: int) -> int:
        """For so many latent cells."""
        return 2 * self.taps * self.inputs * self.outputs * self.frames * cells * self.out_scale**2


_SAME = Reach.same(3)


def _causal(inputs: int, outputs: int, frames: int, scale: int) -> _Layer:
    return _Layer(inputs, outputs, 27, frames, scale, scale, _SAME)


def _point(inputs: int, outputs: int, frames: int, scale: int = 1) -> _Layer:
    return _Layer(inputs, outputs, 1, frames, scale, scale)


def _blocks(inputs: int, outputs: int, count: int, frames: int, scale: int) -> Iterator[_Layer]:
    for _ in range(count):
        yield _causal(inputs, outputs, frames, scale)
        yield _causal(outputs, outputs, frames, scale)
        if inputs != outputs:
            yield _point(inputs, outputs, frames, scale)
        inputs = outputs


def _middle(work: VaeWork) -> list[_Layer]:
    """What lies between the latents and the stages; the attention itself is counted apart."""
    spec, frames = work.spec, work.latent_THW[0]
    dim = _middle_channels(work)
    outer = 2 * spec.z_dim if work.encodes else spec.z_dim
    ends = [_point(outer, outer, frames)]
    ends.append(_causal(dim, outer, frames, 1) if work.encodes else _causal(outer, dim, frames, 1))
    return [*ends, *_blocks(dim, dim, 2, frames, 1), _point(dim, 3 * dim, frames), _point(dim, dim, frames)]


def _middle_channels(work: VaeWork) -> int:
    base = work.spec.base_dim if work.encodes else work.spec.decoder_base_dim or work.spec.base_dim
    return base * work.spec.dim_mult[-1]


def _up_stages(work: VaeWork) -> Iterator[_Layer]:
    spec, base = work.spec, work.spec.decoder_base_dim or work.spec.base_dim
    dims = [base * mult for mult in (spec.dim_mult[-1], *reversed(spec.dim_mult))]
    doubles_time = (*reversed(spec.temperal_downsample), None)
    frames, scale = work.latent_THW[0], 1
    for stage, (inputs, dim) in enumerate(itertools.pairwise(dims)):
        halved = stage > 0 and not spec.is_residual
        yield from _blocks(inputs // (1 + halved), dim, spec.num_res_blocks + 1, frames, scale)
        doubles = doubles_time[stage]
        if doubles is None:
            break
        if doubles:
            yield _Layer(dim, 2 * dim, 3, frames - 1, scale, scale)
            frames = 2 * frames - 1
        read = scale if work.folded else 2 * scale
        yield _Layer(dim, dim if spec.is_residual else dim // 2, 9, frames, read, 2 * scale, _SAME)
        scale *= 2
    yield _causal(dims[-1], spec.out_channels, frames, scale)


def _down_stages(work: VaeWork) -> Iterator[_Layer]:
    spec = work.spec
    dims = [spec.base_dim * mult for mult in (1, *spec.dim_mult)]
    frames, scale = work.pixel_frames, 1 << len(spec.temperal_downsample)
    yield _causal(spec.in_channels, dims[0], frames, scale)
    for (inputs, dim), halves in zip(itertools.pairwise(dims), (*spec.temperal_downsample, None), strict=True):
        yield from _blocks(inputs, dim, spec.num_res_blocks, frames, scale)
        if halves is None:
            return
        yield _Layer(dim, dim, 9, frames, scale, scale // 2, Reach(3, stride=2, below=1))
        scale //= 2
        if halves:
            frames = (frames + 1) // 2
            yield _Layer(dim, dim, 3, frames - 1, scale, scale)


def _stages(work: VaeWork) -> list[_Layer]:
    return list(_down_stages(work) if work.encodes else _up_stages(work))


class _Picture(NamedTuple):
    """How the cells are divided: the rows of part i are rows.part(i // columns), its columns those of i % columns."""

    rows: Axis
    columns: Axis

    @classmethod
    def of(cls, work: VaeWork, parts: int) -> "_Picture":
        (_, height, width), columns = work.latent_THW, work.columns
        down, across = grid(height, width, parts) if columns is None else (parts // columns, columns)
        return cls(Axis(bounds=cut(height, down), index=0), Axis(bounds=cut(width, across), index=0))

    def place(self, rank: int) -> tuple[Range, Range] | None:
        """Cells of a rank; None where there are none for it."""
        row, column = divmod(rank, self.columns.num_parts)
        if row >= self.rows.num_parts:
            return None
        part = self.rows.part(row), self.columns.part(column)
        return part if len(part[0]) and len(part[1]) else None

    @property
    def active(self) -> list[int]:
        """Ranks that have cells."""
        return [r for r in range(self.rows.num_parts * self.columns.num_parts) if self.place(r) is not None]


def pass_costs(work: VaeWork, num_ranks: int, *, parts: int | None = None) -> list[RankCost]:
    """Of each rank, where the first `parts` (None: all) have some rows, or a grid, and fetch what lies around."""
    picture = _Picture.of(work, parts or num_ranks)
    layers = _middle(work) + _stages(work)
    return [_cost_of_part(work, picture, layers, rank, num_ranks) for rank in range(num_ranks)]


def _cost_of_part(work: VaeWork, picture: _Picture, layers: Sequence[_Layer], rank: int, num_ranks: int) -> RankCost:
    cells = picture.place(rank)
    count = math.prod(map(len, cells)) if cells else 0
    halos = [_halo(work, picture, layer, rank) for layer in layers if layer.reach.kernel > 1]
    return RankCost(
        flops=work.batch * (sum(layer.flops(count) for layer in layers) + _attention_flops(work, count)),
        exchanges=(*halos, _keys(work, picture, rank, count), *_results(work, picture, rank, num_ranks)),
    )


def _attention_flops(work: VaeWork, queries: int) -> int:
    frames, height, width = work.latent_THW
    return 4 * frames * queries * height * width * _middle_channels(work)


def _halo(work: VaeWork, picture: _Picture, layer: _Layer, rank: int) -> Exchange:
    """Rows to those above and below, then columns to those beside, with the rows that were fetched."""
    cells, across = picture.place(rank), picture.columns.num_parts
    if cells is None:
        return Exchange(kind="halo", sends={}, rounds=0)
    row, column = divmod(rank, across)
    down, aside = picture.rows.spans(layer.scale, layer.reach), picture.columns.spans(layer.scale, layer.reach)
    number = layer.inputs * layer.frames * work.batch * work.itemsize
    wide, tall = len(aside[column].own), down[row].length
    sends = {index * across + column: rows * wide * number for index, rows in _given(down, row)}
    sends |= {row * across + index: columns * tall * number for index, columns in _given(aside, column)}
    inner = max(0, len(down[row].own) - sum(layer.reach[2:4])) / len(down[row].own)
    hidden = work.batch * layer.flops(math.prod(map(len, cells))) * inner * (work.overlaps and across == 1)
    return Exchange(kind="halo", sends=sends, rounds=work.chunks * (1 + (across > 1)), behind_flops=hidden)


def _given(spans: Sequence[Span], index: int) -> Iterator[tuple[int, int]]:
    """How many rows of part `index` each other part reads."""
    for other, span in enumerate(spans):
        count = len(span.reads.common(spans[index].own))
        if other != index and count:
            yield other, count


def _keys(work: VaeWork, picture: _Picture, rank: int, cells: int) -> Exchange:
    sent = 2 * work.batch * work.latent_THW[0] * cells * _middle_channels(work) * work.itemsize
    others = [other for other in picture.active if other != rank] if cells else []
    return Exchange(kind="attention", sends=dict.fromkeys(others, sent), rounds=work.chunks)


def _results(work: VaeWork, picture: _Picture, rank: int, num_ranks: int) -> list[Exchange]:
    """Frames to the first rank, as bytes; or moments to all."""
    cells, frames = math.prod(map(len, picture.place(rank) or ((), ()))), work.latent_THW[0]
    others = [other for other in range(num_ranks) if other != rank]
    if work.encodes:
        told = Exchange(kind="agreed", sends=dict.fromkeys([] if rank else others, _AGREED_BYTES), rounds=2)
        sent = work.batch * 2 * work.spec.z_dim * frames * cells * work.itemsize
        return [told, Exchange(kind="moments", sends=dict.fromkeys(others, sent) if sent else {}, rounds=1)]
    sent = work.batch * 3 * work.pixel_frames * cells * work.spec.spatial_scale**2
    return [Exchange(kind="frames", sends={0: sent} if rank and sent else {}, rounds=work.chunks)]


def margin_costs(work: VaeWork, num_ranks: int) -> list[RankCost]:
    """Of each rank, where all compute what lies around their cells, and the middle of the network as a whole."""
    picture, (_, height, width) = _Picture.of(work, num_ranks), work.latent_THW
    stages, middle = _stages(work), _middle(work)
    whole = sum(layer.flops(height * width) for layer in middle) + _attention_flops(work, height * width)
    costs = []
    for rank in range(num_ranks):
        cells = _cells_around(work, picture, rank)
        flops = work.batch * (whole * bool(cells) + sum(layer.flops(cells) for layer in stages))
        results = _middle_and_moments(work, picture, rank) if work.encodes else _results(work, picture, rank, num_ranks)
        costs.append(RankCost(flops=flops, exchanges=tuple(results)))
    return costs


def _cells_around(work: VaeWork, picture: _Picture, rank: int) -> int:
    """A rank's own cells and those of its margin; 0 where it has none."""
    if picture.place(rank) is None:
        return 0
    margin = margin_cells(work.spec, encodes=work.encodes)
    places = divmod(rank, picture.columns.num_parts)
    axes = (Axis(bounds=axis.bounds, index=index) for axis, index in zip(picture, places, strict=True))
    return math.prod(len(widened(axis, margin)) for axis in axes)


def _middle_and_moments(work: VaeWork, picture: _Picture, rank: int) -> list[Exchange]:
    """What an encoder's stages bring to its middle, to all; then the first rank's moments, for those without a part."""
    frames, height, width = work.latent_THW
    part, shape = picture.place(rank), [work.batch, 2 * work.spec.z_dim, frames, height, width]
    sent = work.batch * frames * math.prod(map(len, part or ((), ()))) * _middle_channels(work) * work.itemsize
    to_middle = [other for other in picture.active if other != rank] if part else []
    told = 8 + len(json.dumps(shape)) + math.prod(shape) * work.itemsize  # a length, the shape, the moments
    others = range(1, picture.rows.num_parts * picture.columns.num_parts) if rank == 0 else ()
    return [
        Exchange(kind="middle", sends=dict.fromkeys(to_middle, sent), rounds=work.chunks),
        Exchange(kind="moments", sends=dict.fromkeys(others, told), rounds=3),
    ]


def prefers_margin(work: VaeWork, num_ranks: int, link: Link, flops_per_s: float) -> tuple[bool, str]:
    """Whether computing what lies around a part is faster than fetching it, and why."""
    network = Network(inside=link)
    seconds = functools.partial(predicted_s, flops_per_s=flops_per_s, network=network)
    fetched_s, computed_s = seconds(pass_costs(work, num_ranks)), seconds(margin_costs(work, num_ranks))
    found = f"about {fetched_s:.2g} s with neighbours' rows fetched, {computed_s:.2g} s with them computed"
    rates = f"{link.bytes_per_s / 1e9:.3g} GB/s and {flops_per_s / 1e12:.3g} TFLOP/s"
    return _SURELY * computed_s < fetched_s, f"{found}, at {rates}"
