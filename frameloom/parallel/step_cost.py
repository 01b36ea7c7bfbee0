"""What several ranks compute and send in a denoising step: arithmetic, for sizes and machines that are not here.

Bytes are those that `World.sent_bytes` counts.
Source of the forms: Ulysses (arXiv:2309.14509), ring (arXiv:2310.01889), a ring's sum (arXiv:1802.05799).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from frameloom.errors import RequestError
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.parallel.cost import Exchange, RankCost
from frameloom.parallel.sequence import WORTH_HIDING_BYTES, divide_frames
from frameloom.types import ParallelPlan

_WIDE = 4  # bytes of a sum's numbers: float32


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
        """How often the first half of a block is passed: each stream's first block's once for all branches."""
        calls, samples = self._split(branches)
        return [_Calls(self.streams, self.batch), _Calls(calls * (self.spec.num_blocks - self.streams), samples)]

    def reads(self, branches: int) -> _Calls:
        """How often the second half is."""
        calls, samples = self._split(branches)
        return _Calls(calls * self.spec.num_blocks, samples)

    @property
    def streams(self) -> int:
        """Token streams that pass blocks: the video's, and that of VACE's control beside it."""
        return 1 + isinstance(self.spec, VaceSpec)

    def beside(self, tokens: int, branches: int) -> int:
        """Operations of what VACE has besides blocks: the control as tokens, their start, and the hints."""
        spec = self.spec
        if not isinstance(spec, VaceSpec):
            return 0
        embedded = math.prod(self.grid) * spec.vace_in_channels * spec.patch_volume
        started = tokens * self.batch * spec.dim
        hinted = tokens * self.batch * branches * len(spec.vace_layers) * spec.dim
        return 2 * spec.dim * (embedded + started + hinted)

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
        return RankCost(
            flops=self._flops(),
            exchanges=tuple(itertools.chain.from_iterable(kinds)),
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
        return of_looks + of_reads + 2 * dim * (embedded + out) + self.work.beside(tokens, self.branches)

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
