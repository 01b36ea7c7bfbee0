"""The tokens of a video divided over ranks: Ulysses (arXiv:2309.14509), a ring (arXiv:2310.01889), and their product.

Every rank has some tokens of every frame, so what belongs to a frame is the same for all ranks; uneven parts need no
padding and no mask. Only self-attention reads tokens of other ranks, and the velocities are gathered at the end. A
rank without tokens passes one of another rank through the network, whose operations want some, and shows it to nobody.
Shapes: B batch, L tokens, H heads, K head dimension, F frames, P values of a patch; N ranks.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frameloom.attention.backend import Attend
from frameloom.attention.blockwise import attend_block, merge
from frameloom.errors import InternalError, RequestError
from frameloom.models.dit_block import SelfAttention
from frameloom.models.wan_dit import ComputeCells, FrameTimes, Prompt, Tokens, WanDiT
from frameloom.ops.patch import Grid
from frameloom.ops.rope import RotaryTable
from frameloom.parallel.team import Team
from frameloom.platform.base import first_line
from frameloom.platform.device import is_memory_error
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)

WORTH_HIDING_BYTES = 1 << 23  # queries, keys and values of a rank: 0.3 ms at 25 GB/s, many times a latency


def check_heads(num_heads: int, ulysses: int) -> None:
    """Raise RequestError for more ranks than there are heads to give them."""
    if ulysses > num_heads:
        raise RequestError(
            f"ulysses={ulysses} is more than the {num_heads} heads that there are to divide; "
            f"use ulysses={num_heads} or less, and the ring for more ranks"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """How many tokens of every frame each rank has: `widths[r][u]` for place u of Ulysses in place r of the ring."""

    num_frames: int
    widths: tuple[tuple[int, ...], ...]

    @property
    def of_places(self) -> tuple[int, ...]:
        """Tokens of every frame in each place of the ring."""
        return tuple(map(sum, self.widths))

    def span(self, place: int, index: int) -> slice:
        """Which tokens of every frame."""
        before = sum(self.of_places[:place]) + sum(self.widths[place][:index])
        return slice(before, before + self.widths[place][index])


def divide_frames(grid: Grid, *, ring: int, ulysses: int) -> Shares:
    """As even as it can be; where a frame has fewer tokens than there are ranks, the last ones have none."""
    num_frames, height, width = grid
    parts = iter(_evenly(height * width, ring * ulysses))
    return Shares(num_frames=num_frames, widths=tuple(tuple(itertools.islice(parts, ulysses)) for _ in range(ring)))


class SequenceParallel:
    """Ranks in `ring` places of `ulysses` each: this one's two teams, and how they attend together.

    Inside a place every rank attends for some of the heads, by the network's own backend. Around the ring keys and
    values travel while each rank attends to those it has, by the kernels of attention/blockwise.py. From
    `worth_hiding_bytes` on, Ulysses sends some heads while it attends for others.
    """

    def __init__(self, *, ulysses: Team, ring: Team, worth_hiding_bytes: int = WORTH_HIDING_BYTES) -> None:
        self.ulysses = ulysses
        self.ring = ring
        self.worth_hiding_bytes = worth_hiding_bytes
        self._shares: Shares | None = None  # of the tokens under way

    def install(self, dit: WanDiT) -> None:
        """Divide the work of a network from now on. Raises RequestError where it has too few heads."""
        check_heads(dit.spec.num_attention_heads, self.ulysses.size)
        changed = 0
        for module in dit.modules():
            if isinstance(module, SelfAttention):
                module.attend = functools.partial(self._attend, module.attend)
                changed += 1
        if changed != dit.spec.num_blocks:
            raise InternalError(f"{changed} self-attentions were divided, of {dit.spec.num_blocks} layers")
        dit.share_tokens = self._share_tokens
        if self.ring.size > 1:
            log.info(
                "attention around the ring: block by block, by torch's kernels, which tell the sums that are needed"
            )

    def _share_tokens(self, compute: ComputeCells, tokens: Tokens, prompts: Sequence[Prompt], /) -> list[Tensor]:
        """See `ShareTokens`: this rank's tokens are computed here, and every rank gets all cells."""
        shares = divide_frames(tokens.grid, ring=self.ring.size, ulysses=self.ulysses.size)
        span = shares.span(self.ring.index, self.ulysses.index)
        borrowed = slice(0, 1)
        self._shares = shares
        try:
            cells = compute(_tokens_of(tokens, borrowed if span.start == span.stop else span), prompts)
            return [self._gathered(cells_BLP, shares) for cells_BLP in cells]
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
            raise self._out_of_memory(error) from error
        finally:
            self._shares = None

    def _attend(
        self, inner: Attend, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, bias_BS: Tensor | None = None, /
    ) -> Tensor:
        """See `Attend`: this rank's queries to the keys of all ranks."""
        if self._shares is None or bias_BS is not None:
            raise InternalError("a divided self-attention was called outside of its network, or with a bias")
        length = self._shares.num_frames * self._shares.widths[self.ring.index][self.ulysses.index]
        if length == q_BLHK.shape[1]:
            return self._attend_together(inner, (q_BLHK, k_BLHK, v_BLHK), self._shares)
        if length:
            raise InternalError(f"{q_BLHK.shape[1]} tokens came to a rank that has {length}")
        self._attend_together(inner, (q_BLHK[:, :0], k_BLHK[:, :0], v_BLHK[:, :0]), self._shares)
        return torch.zeros_like(q_BLHK)

    def _attend_together(self, inner: Attend, qkv_BLHK: Sequence[Tensor], shares: Shares) -> Tensor:
        if self.ring.size > 1:
            lengths = [shares.num_frames * width for width in shares.of_places]
            inner = functools.partial(attend_around, team=self.ring, lengths=lengths)
        if self.ulysses.size == 1:
            return inner(*qkv_BLHK)
        lengths = [shares.num_frames * width for width in shares.widths[self.ring.index]]
        pieces = self._pieces(qkv_BLHK[0], sum(lengths))
        return attend_by_heads(inner, qkv_BLHK, team=self.ulysses, lengths=lengths, pieces=pieces)

    def _pieces(self, q_BLHK: Tensor, num_tokens: int) -> int:
        """In how many the heads are sent: the same on all ranks of the team."""
        batch, _, num_heads, head_dim = q_BLHK.shape
        sent_bytes = 3 * batch * num_tokens * num_heads * head_dim * q_BLHK.element_size() // self.ulysses.size
        return 2 if sent_bytes >= self.worth_hiding_bytes and num_heads >= 2 * self.ulysses.size else 1

    def _gathered(self, cells_BLP: Tensor, shares: Shares) -> Tensor:
        """Every token's cells, in order, on every rank."""
        batch, _, values = cells_BLP.shape
        frames, here = shares.num_frames, shares.widths[self.ring.index]
        mine = cells_BLP.reshape(batch, frames, -1, values)[:, :, : here[self.ulysses.index]]
        place = torch.cat(self.ulysses.collect(mine, [(batch, frames, n, values) for n in here]), dim=2)
        shapes = [(batch, frames, n, values) for n in shares.of_places]
        return torch.cat(self.ring.collect(place, shapes), dim=2).flatten(1, 2)

    def _out_of_memory(self, error: BaseException) -> RequestError:
        """An error that nobody answers by computing in another way: the other ranks would wait for ever."""
        rank, count = self.ulysses.ranks[self.ulysses.index], self.ulysses.size * self.ring.size
        return RequestError(
            f"rank {rank} ran out of memory with its share of the tokens over {count} ranks ({first_line(error)}); "
            f"use more ranks or a smaller size"
        )


def attend_by_heads(
    attend: Attend, qkv_BLHK: Sequence[Tensor], *, team: Team, lengths: Sequence[int], pieces: int = 1
) -> Tensor:
    """Attention of this rank's queries to the keys of all; each rank attends for some of the heads.

    `lengths[i]`: the tokens of position i. With several pieces one is attended to while others are under way.
    """
    batch, length, num_heads, head_dim = qkv_BLHK[0].shape
    heads = [_evenly(count, pieces) for count in _heads(num_heads, team)]  # of each rank, in each piece
    sizes = [size for row in heads for size in row]
    parts = [torch.stack(part) for part in zip(*(x.split_with_sizes(sizes, dim=2) for x in qkv_BLHK), strict=True)]
    coming = []
    for piece, size in enumerate(heads[team.index]):
        there = [(3, batch, count, size, head_dim) for count in lengths]
        coming.append(team.begin_scatter_all(parts[piece::pieces], there))
    going = []
    for piece, arrive in enumerate(coming):
        q, k, v = torch.cat(arrive(), dim=2).unbind(0)
        out = attend(q, k, v) if q.shape[2] else q
        back = [(batch, length, row[piece], head_dim) for row in heads]
        going.append(team.begin_scatter_all(out.split_with_sizes(list(lengths), dim=1), back))
    return torch.cat([x for row in zip(*(arrive() for arrive in going), strict=True) for x in row], dim=2)


def attend_around(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, team: Team, lengths: Sequence[int]) -> Tensor:
    """Attention of this rank's queries to the keys of all; `lengths[i]`: those of position i.

    The next keys and values are under way while those here are attended to. Summed in float32 or wider.
    """
    batch, _, heads, head_dim = k_BLHK.shape
    shapes = [(2, batch, length, heads, head_dim) for length in lengths]
    block = torch.stack((k_BLHK, v_BLHK))
    whole = None
    for step in range(team.size):
        fetch = _pass_on(block, team, shapes, step) if step + 1 < team.size else None
        part = attend_block(q_BLHK, *block)
        whole = part if whole is None else merge(whole, part)
        if fetch is not None:
            block = fetch()
    assert whole is not None
    return whole.out_BLHK.to(q_BLHK.dtype)


def _pass_on(block: Tensor, team: Team, shapes: Sequence[Sequence[int]], step: int) -> Callable[[], Tensor]:
    """Send the block on and begin to receive the next; `step` blocks came before. Empty ones are not sent."""
    to, source = (team.index + 1) % team.size, (team.index - 1) % team.size
    coming = block.new_empty(tuple(shapes[(source - step) % team.size]))
    pending = team.exchange({to: block} if block.numel() else {}, {source: coming} if coming.numel() else {})

    def fetch() -> Tensor:
        pending.wait()
        return coming

    return fetch


def _tokens_of(tokens: Tokens, span: slice) -> Tokens:
    """The tokens of a span of every frame."""
    num_frames = tokens.grid[0]
    timestep = tokens.timestep
    if not isinstance(timestep, FrameTimes) and timestep.ndim == 2:  # one per token
        timestep = _of_every_frame(timestep, num_frames, span, dim=1)
    rope = RotaryTable(*(_of_every_frame(angles, num_frames, span, dim=0) for angles in tokens.rope))
    x_BLD = _of_every_frame(tokens.x_BLD, num_frames, span, dim=1)
    return Tokens(x_BLD, timestep, rope, tokens.grid)


def _of_every_frame(x: Tensor, num_frames: int, span: slice, *, dim: int) -> Tensor:
    frames = x.reshape(*x.shape[:dim], num_frames, -1, *x.shape[dim + 1 :])
    return frames.narrow(dim + 1, span.start, span.stop - span.start).flatten(dim, dim + 1)


def _heads(num_heads: int, team: Team) -> list[int]:
    if num_heads < team.size:
        raise InternalError(f"{num_heads} heads came to be divided over {team.size} ranks")
    return _evenly(num_heads, team.size)


def _evenly(total: int, parts: int) -> list[int]:
    """`total` in whole numbers that differ by one at most, the larger ones first."""
    each, left = divmod(total, parts)
    return [each + (index < left) for index in range(parts)]
