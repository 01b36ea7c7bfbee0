"""What several ranks compute, send and wait for: arithmetic, for sizes and machines that are not here.

Bytes are those that `World.sent_bytes` counts. Seconds follow from a rate of computing and from links, and are a model:
all ranks compute at one rate, and an exchange takes what its busiest end takes.
Source of the forms: Ulysses (arXiv:2309.14509), ring (arXiv:2310.01889), a ring's sum (arXiv:1802.05799).
"""

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from frameloom.errors import RequestError
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.vae_state import Reach
from frameloom.parallel.picture import Axis, Range, Span, cut, grid
from frameloom.parallel.sequence import WORTH_HIDING_BYTES, divide_frames
from frameloom.parallel.vae_split import margin_cells, widened
from frameloom.types import ParallelPlan

_WIDE = 4  # bytes of a sum's numbers: float32
_AGREED_BYTES = 9  # a length and a digit, which rank 0 tells every other before moments are gathered
_LIVE_TOKENS = 6  # copies of the token stream that a block has at once, besides its hidden channels
_SURELY = 1.5  # a margin is chosen where it is that much faster: the times are predictions
_LIVE_ACTIVATIONS = 4  # of the VAE's largest: input, window, output, what is added to it


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What one end sends per second, in one direction, and what every exchange costs besides."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """`inside`: of a rank within its machine. `between`: of a whole machine of `per_machine` ranks, to the others."""

    inside: Link
    between: Link | None = None
    per_machine: int | None = None

    def machine(self, rank: int) -> int:
        """Where a rank is."""
        return rank // self.per_machine if self.per_machine else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What one rank sends in all exchanges of one kind, and what it computes meanwhile. All ranks list the same."""

    kind: str
    sends: Mapping[int, int]  # bytes to each rank
    rounds: int
    behind_flops: float = 0

    @property
    def sent_bytes(self) -> int:
        """To all others together."""
        return sum(self.sends.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCost:
    """What one rank does in a step or in a pass, and roughly what it holds."""

    flops: float
    exchanges: tuple[Exchange, ...]
    weight_bytes: int = 0
    activation_bytes: int = 0

    @property
    def sent_bytes(self) -> int:
        """In all exchanges."""
        return sum(exchange.sent_bytes for exchange in self.exchanges)

    def sent_as(self, kind: str) -> int:
        """Bytes of one kind."""
        return sum(exchange.sent_bytes for exchange in self.exchanges if exchange.kind == kind)


def predicted_s(costs: Sequence[RankCost], flops_per_s: float, network: Network) -> float:
    """Seconds until the last rank is done, where each computes so fast."""
    computing_s = max(cost.flops for cost in costs) / flops_per_s
    lists = zip(*(cost.exchanges for cost in costs), strict=True)
    return computing_s + sum(_waiting_s(each, flops_per_s, network) for each in lists)


def _waiting_s(of_ranks: Sequence[Exchange], flops_per_s: float, network: Network) -> float:
    """Of an exchange that all ranks make: until its busiest end is done, less what is computed meanwhile."""
    inside, between = [0] * (2 * len(of_ranks)), [0] * (2 * len(of_ranks))  # by sender, and by receiver
    for rank, exchange in enumerate(of_ranks):
        here = network.machine(rank)
        for peer, sent_bytes in exchange.sends.items():
            there = network.machine(peer)
            ends, busy = ((rank, peer), inside) if here == there else ((here, there), between)
            busy[2 * ends[0]] += sent_bytes
            busy[2 * ends[1] + 1] += sent_bytes
    rounds = max(exchange.rounds for exchange in of_ranks)
    seconds = 0.0
    for link, busy in ((network.inside, inside), (network.between, between)):
        if link is not None and any(busy):
            seconds = max(seconds, max(busy) / link.bytes_per_s + rounds * link.latency_s)
    return max(0.0, seconds - min(exchange.behind_flops for exchange in of_ranks) / flops_per_s)


# The transformer.


class _Calls(NamedTuple):
    """So many calls of a part of a block with so many samples each."""

    calls: int
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """One denoising step; prompts were read before. `latent_THW` in cells.

    `branches`: 2 with guidance; `batched`: both in one batch. `text_tokens`: keys of a prompt that are attended to.
    """

    spec: TransformerSpec
    latent_THW: tuple[int, int, int]
    batch: int = 1
    branches: int = 2
    batched: bool = False
    text_tokens: int = 512
    itemsize: int = 2

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along frames, rows and columns."""
        frames, height, width = map(int.__floordiv__, self.latent_THW, self.spec.patch_size)
        return frames, height, width

    def looks(self, branches: int) -> list[_Calls]:
        """How often the first half of a block is passed: the first block's once for all branches."""
        calls, samples = self._split(branches)
        return [_Calls(1, self.batch), _Calls(calls * (self.spec.num_layers - 1), samples)]

    def reads(self, branches: int) -> _Calls:
        """How often the second half is."""
        calls, samples = self._split(branches)
        return _Calls(calls * self.spec.num_layers, samples)

    def _split(self, branches: int) -> tuple[int, int]:
        return (1, self.batch * branches) if self.batched else (branches, self.batch)


class _Place(NamedTuple):
    """Where a rank is along the axes of a plan."""

    cfg: int
    ring: int
    ulysses: int
    tp: int

    def rank(self, plan: ParallelPlan) -> int:
        return ((self.cfg * plan.ring + self.ring) * plan.ulysses + self.ulysses) * plan.tp + self.tp


def step_costs(work: StepWork, plan: ParallelPlan) -> list[RankCost]:
    """Of each rank. Raises RequestError for weights that are divided at rest, of which torch sends what it will."""
    if plan.fsdp > 1:
        raise RequestError(f"there is no prediction for fsdp={plan.fsdp}; leave fsdp out")
    places = itertools.starmap(_Place, itertools.product(*map(range, (plan.cfg, plan.ring, plan.ulysses, plan.tp))))
    return [_RankOfStep(work, plan, place).cost() for place in places]


class _RankOfStep:
    """One rank's part of a step."""

    def __init__(self, work: StepWork, plan: ParallelPlan, place: _Place) -> None:
        self.work, self.plan, self.place, self.spec = work, plan, place, work.spec
        self.shares = divide_frames(work.grid, ring=plan.ring, ulysses=plan.ulysses)
        self.frames = self.shares.num_frames
        self.branches = work.branches // min(plan.cfg, work.branches)
        heads = work.spec.num_attention_heads // plan.tp
        self.heads = [heads // plan.ulysses + (index < heads % plan.ulysses) for index in range(plan.ulysses)]
        self.looks = work.looks(self.branches)
        self.reads = work.reads(self.branches)
        self.mine = self.frames * self.shares.widths[place.ring][place.ulysses]
        self.computed = max(self.mine, self.frames)  # a rank without tokens passes some that it borrowed

    def cost(self) -> RankCost:
        kinds = [self._ulysses(), self._ring(), self._tensor(), self._cells(), self._guidance()]
        spec, samples = self.spec, self.reads.samples
        live = samples * self.computed * (_LIVE_TOKENS * spec.dim + spec.ffn_dim // self.plan.tp)
        return RankCost(
            flops=self._flops(),
            exchanges=tuple(itertools.chain.from_iterable(kinds)),
            weight_bytes=num_parameters(spec, tp=self.plan.tp) * self.work.itemsize,
            activation_bytes=live * self.work.itemsize,
        )

    def _attention_flops(self, samples: int) -> float:
        tokens = self.frames * self.shares.of_places[self.place.ring]
        width = self.heads[self.place.ulysses] * self.spec.attention_head_dim
        return 4 * samples * tokens * math.prod(self.work.grid) * width

    def _flops(self) -> float:
        dim, ffn, tokens = self.spec.dim, self.spec.ffn_dim, self.computed
        look = 10 * dim**2 * tokens / self.plan.tp
        read = (2 * dim**2 + 4 * dim * ffn + 4 * dim * self.work.text_tokens) * tokens / self.plan.tp
        of_looks = sum(count * (samples * look + self._attention_flops(samples)) for count, samples in self.looks)
        of_reads = self.reads.calls * self.reads.samples * read
        embedded = math.prod(self.work.grid) * self.spec.in_channels * self.spec.patch_volume * self.work.batch
        out = tokens * self.spec.out_channels * self.spec.patch_volume * self.work.batch * self.branches
        return of_looks + of_reads + 2 * dim * (embedded + out)

    def _rank(self, **moved: int) -> int:
        return self.place._replace(**moved).rank(self.plan)

    def _ulysses(self) -> Iterator[Exchange]:
        """Queries, keys and values to those who have their heads, and the results back to those who have the tokens."""
        widths, here = self.shares.widths[self.place.ring], self.place.ulysses
        others = [index for index in range(self.plan.ulysses) if index != here]
        head = self.spec.attention_head_dim * self.work.itemsize
        back = self.frames * self.heads[here]
        for count, samples in self.looks:
            bytes_to = {i: 3 * self.mine * self.heads[i] + back * widths[i] for i in others}
            sends = {self._rank(ulysses=i): count * samples * head * bytes_to[i] for i in others}
            yield from self._in_pieces("ulysses", sends, count, samples)

    def _in_pieces(self, kind: str, sends: dict[int, int], count: int, samples: int) -> Iterator[Exchange]:
        """Where it is worth hiding, half of what is sent is under way while there is something to attend to."""
        tokens = self.frames * self.shares.of_places[self.place.ring]
        inputs = 3 * samples * tokens * sum(self.heads) * self.spec.attention_head_dim * self.work.itemsize
        hides = inputs // self.plan.ulysses >= WORTH_HIDING_BYTES and sum(self.heads) >= 2 * self.plan.ulysses
        behind = count * self._attention_flops(samples) if hides else 0
        second = {rank: sent // 2 if hides else 0 for rank, sent in sends.items()}
        yield Exchange(kind=kind, sends={rank: sends[rank] - second[rank] for rank in sends}, rounds=2 * count)
        yield Exchange(kind=kind, sends=second, rounds=2 * count * hides, behind_flops=behind)

    def _ring(self) -> Iterator[Exchange]:
        """Keys and values go around: all but the block that comes to the next rank last, which is its own."""
        size, following = self.plan.ring, (self.place.ring + 1) % self.plan.ring
        passed_on = self.frames * (sum(self.shares.of_places) - self.shares.of_places[following])
        number = 2 * self.heads[self.place.ulysses] * self.spec.attention_head_dim * self.work.itemsize
        for count, samples in self.looks:
            sent = count * samples * number * passed_on
            yield Exchange(
                kind="ring",
                sends={self._rank(ring=following): sent} if size > 1 else {},
                rounds=count * (size - 1),
                behind_flops=count * self._attention_flops(samples) * (size - 1) / size,
            )

    def _tensor(self) -> Iterator[Exchange]:
        """Sums over the ranks in float32: of every layer divided by rows, and of the mean squares of the norms."""
        size, following = self.plan.tp, (self.place.tp + 1) % self.plan.tp

        def summed(count: int, samples: int, values: int) -> int:
            return count * (2 * (size - 1) * _WIDE * samples * self.computed * values // size)

        for count, samples in self.looks:
            sent = summed(count, samples, self.spec.dim) + 3 * summed(count, samples, 1)
            rounds = 4 * count * 2 * (size - 1)
            yield Exchange(kind="tensor", sends={self._rank(tp=following): sent} if size > 1 else {}, rounds=rounds)
        sent, rounds = 2 * summed(*self.reads, self.spec.dim), 2 * self.reads.calls * 2 * (size - 1)
        yield Exchange(kind="tensor", sends={self._rank(tp=following): sent} if size > 1 else {}, rounds=rounds)

    def _cells(self) -> Iterator[Exchange]:
        """The velocities of this rank's tokens to its place, then those of the place around the ring."""
        cell = self.branches * self.work.batch * self.spec.out_channels * self.spec.patch_volume * self.work.itemsize
        place = self.frames * self.shares.of_places[self.place.ring]
        for axis, size, here, tokens in (
            ("ulysses", self.plan.ulysses, self.place.ulysses, self.mine),
            ("ring", self.plan.ring, self.place.ring, place),
        ):
            others = {self._rank(**{axis: index}): cell * tokens for index in range(size) if index != here}
            yield Exchange(kind="cells", sends=others, rounds=self.branches * bool(others))

    def _guidance(self) -> Iterator[Exchange]:
        """The velocity under one branch for that under the other."""
        if self.plan.cfg == 1 or self.work.branches == 1:
            yield Exchange(kind="guidance", sends={}, rounds=0)
            return
        cells = self.work.batch * self.spec.out_channels * math.prod(self.work.latent_THW)
        yield Exchange(
            kind="guidance", sends={self._rank(cfg=1 - self.place.cfg): cells * self.work.itemsize}, rounds=1
        )


def num_parameters(spec: TransformerSpec, *, tp: int = 1) -> int:
    """Of a transformer without an image branch, or what each of `tp` ranks holds of it."""
    dim, ffn = spec.dim, spec.ffn_dim
    divided = 8 * dim**2 + 2 * dim * ffn + ffn + 10 * dim  # of a block: matrices, their biases, the norms of q and k
    whole = 3 * dim + 6 * dim + 2 * dim * spec.cross_attn_norm  # biases after a sum, modulation, norm
    cells = spec.patch_volume * (spec.in_channels + spec.out_channels)
    embedded = (spec.text_dim + spec.freq_dim + 2 * dim + 6 * dim) * dim + 10 * dim
    once = cells * dim + dim + spec.patch_volume * spec.out_channels + 2 * dim + embedded
    return spec.num_layers * (divided // tp + whole) + once


# The VAE.


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeWork:
    """A video through the VAE. `latent_THW` in cells; `steps` latent frames at a time.

    `folded`: doubling the picture is part of the convolution behind it, whose rows are then half as many.
    """

    spec: VaeSpec
    latent_THW: tuple[int, int, int]
    batch: int = 1
    encodes: bool = False
    steps: int = 1
    folded: bool = False
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

    @property
    def history(self) -> int:
        """Frames that it remembers."""
        return 2 if self.taps in (3, 27) else 0


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
    def of(cls, work: VaeWork, parts: int, columns: int | None) -> "_Picture":
        _, height, width = work.latent_THW
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


def pass_costs(
    work: VaeWork, num_ranks: int, *, parts: int | None = None, columns: int | None = None
) -> list[RankCost]:
    """Of each rank, where the first `parts` (None: all) have some rows, or a grid, and fetch what lies around."""
    picture = _Picture.of(work, parts or num_ranks, columns)
    layers = _middle(work) + _stages(work)
    return [_cost_of_part(work, picture, layers, rank, num_ranks) for rank in range(num_ranks)]


def _cost_of_part(work: VaeWork, picture: _Picture, layers: Sequence[_Layer], rank: int, num_ranks: int) -> RankCost:
    cells = picture.place(rank)
    count = math.prod(map(len, cells)) if cells else 0
    halos = [_halo(work, picture, layer, rank) for layer in layers if layer.reach.kernel > 1]
    return RankCost(
        flops=work.batch * (sum(layer.flops(count) for layer in layers) + _attention_flops(work, count)),
        exchanges=(*halos, _keys(work, picture, rank, count), *_results(work, picture, rank, num_ranks)),
        weight_bytes=work.itemsize * sum(layer.taps * layer.inputs * layer.outputs for layer in layers),
        activation_bytes=work.itemsize * work.batch * _held(work, layers, count),
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


def _held(work: VaeWork, layers: Sequence[_Layer], cells: int) -> int:
    """Numbers: the past that every layer keeps, and a few of the largest activations."""
    past = sum(layer.history * layer.inputs * layer.scale**2 for layer in layers)
    largest = max(
        max(layer.inputs * layer.scale**2, layer.outputs * layer.out_scale**2) * -(-layer.frames // work.chunks)
        for layer in layers
    )
    return cells * (past + _LIVE_ACTIVATIONS * largest)


def margin_costs(work: VaeWork, num_ranks: int) -> list[RankCost]:
    """Of each rank, where all compute what lies around their cells, and the middle of the network as a whole."""
    picture, (_, height, width) = _Picture.of(work, num_ranks, None), work.latent_THW
    stages, middle = _stages(work), _middle(work)
    whole = sum(layer.flops(height * width) for layer in middle) + _attention_flops(work, height * width)
    costs = []
    for rank in range(num_ranks):
        cells = _cells_around(work, picture, rank)
        flops = work.batch * (whole * bool(cells) + sum(layer.flops(cells) for layer in stages))
        results = _middle_and_moments(work, picture, rank) if work.encodes else _results(work, picture, rank, num_ranks)
        held = work.itemsize * work.batch * max(_held(work, stages, cells), _held(work, middle, height * width))
        costs.append(RankCost(flops=flops, exchanges=tuple(results), activation_bytes=held))
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
