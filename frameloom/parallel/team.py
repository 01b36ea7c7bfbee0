"""Ranks that exchange tensors, and the count of the bytes that each sends.

A rank is one process with one device. Tensors travel as bytes, in any dtype; sums are added in float32 or wider. Both
ends give and take plain memory (contiguous tensors): what order the numbers lie in is agreed on by the callers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from frameloom.errors import InternalError

Shape = Sequence[int]


@dataclass(slots=True)
class Pending:
    """An exchange under way. `wait` returns what was received, by position in the team."""

    works: list[Any]
    received: dict[int, Tensor]

    def wait(self) -> dict[int, Tensor]:
        """Block until everything has arrived and what was sent may be overwritten."""
        for work in self.works:
            work.wait()
        self.works.clear()
        return self.received


class Team:
    """Some ranks, in order, of which this process is one. A team of one exchanges nothing.

    `index` is this process's position, `ranks[i]` the rank at position i. `sent_bytes` counts what this process
    handed to others.
    """

    def __init__(self, ranks: Sequence[int], rank: int, group: dist.ProcessGroup | None) -> None:
        self.ranks = tuple(ranks)
        self.index = self.ranks.index(rank)
        self.group = group
        self.sent_bytes = 0

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    @property
    def device(self) -> torch.device:
        """Where tensors must be to be exchanged."""
        if self.group is None or dist.get_backend(self.group) == "gloo":
            return torch.device("cpu")
        return torch.accelerator.current_accelerator() or torch.device("cpu")

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Pending:
        """Send each tensor to the position it is listed under, and fill those of `receives`, all at once.

        Every rank of the team that takes part lists what the others send it; the sizes must agree. Returns at once.
        """
        operations = []
        for position, x in sorted(sends.items()):
            operations.append(self._point(dist.isend, x, position))
            self.sent_bytes += x.nbytes
        for position, x in sorted(receives.items()):
            operations.append(self._point(dist.irecv, x, position))
        works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(list(works), dict(receives))

    def collect(self, mine: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """What each position has, in order; `shapes[i]` is the shape of position i's, and may hold no number at all."""
        return self.begin_collect(mine, shapes)()

    def begin_collect(self, mine: Tensor, shapes: Sequence[Shape]) -> Callable[[], list[Tensor]]:
        """`collect` that returns at once; call what it returns to wait."""
        return self.begin_scatter_all([mine.contiguous()] * self.size, shapes)

    def give_first(self, mine: Tensor, shapes: Sequence[Shape]) -> list[Tensor] | None:
        """`collect` for position 0 alone; the others get None."""
        mine = mine.contiguous()
        if self.index:
            self.exchange({0: mine} if mine.numel() else {}, {}).wait()
            return None
        receives = {p: mine.new_empty(tuple(shapes[p])) for p in range(1, self.size) if 0 not in shapes[p]}
        there = {**self.exchange({}, receives).wait(), 0: mine}
        return [there[p] if p in there else mine.new_empty(tuple(shapes[p])) for p in range(self.size)]

    def begin_scatter_all(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Callable[[], list[Tensor]]:
        """All-to-all: part i goes to position i. Returns at once; call what it returns to wait for what each position
        sent here, of the given shapes.
        """
        parts = [part.contiguous() for part in parts]
        like = parts[self.index]
        received = [like if p == self.index else like.new_empty(tuple(shape)) for p, shape in enumerate(shapes)]
        others = [position for position in range(self.size) if position != self.index]
        sends = {p: parts[p] for p in others if parts[p].numel()}
        pending = self.exchange(sends, {p: received[p] for p in others if received[p].numel()})

        def finish() -> list[Tensor]:
            pending.wait()
            return received

        return finish

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over the team, in float32 or wider, on every rank: the same bits on all of them."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        if self.size == 1:
            return wide
        if wide is x:
            wide = wide.clone()
        dist.all_reduce(wide, group=self.group)
        self.sent_bytes += 2 * (self.size - 1) * wide.nbytes // self.size  # what a ring sends
        return wide

    def broadcast(self, x: Tensor) -> Tensor:
        """Position 0's x on every rank, written into x."""
        if self.size > 1:
            if not x.is_contiguous():
                raise InternalError(f"a tensor of strides {x.stride()} cannot be broadcast")
            dist.broadcast(x.view(-1).view(torch.uint8), self.ranks[0], group=self.group)
            self.sent_bytes += x.nbytes * (self.size - 1) * (self.index == 0)
        return x

    def tensor_of_first(self, x: Tensor | None) -> Tensor:
        """Position 0's tensor, of any shape and dtype, on every rank where it is exchanged; x is None elsewhere."""
        shape, dtype = self.agree(None if x is None else [list(x.shape), str(x.dtype)])
        if x is None:
            x = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        return self.broadcast(x.to(self.device).contiguous())

    def agree(self, value: Any) -> Any:
        """Position 0's value on every rank; it is anything that JSON can hold."""
        if self.size == 1:
            return value
        device = self.device
        text = json.dumps(value).encode()
        length = self.broadcast(torch.tensor([len(text)], device=device))
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device) if self.index == 0 else None
        if data is None:
            data = torch.empty(int(length), dtype=torch.uint8, device=device)
        return json.loads(bytes(self.broadcast(data).cpu().numpy()))

    def first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on position 0, which alone calls it, on every rank; it is anything that JSON can hold."""
        return self.agree(make() if self.index == 0 else None)

    def least(self, value: int) -> int:
        """The smallest value of all ranks, on every rank."""
        if self.size == 1:
            return value
        mine = torch.tensor([value], device=self.device)
        return min(int(other) for other in self.collect(mine, [(1,)] * self.size))

    def _point(self, operation: Any, x: Tensor, position: int) -> dist.P2POp:
        if not x.is_contiguous():
            raise InternalError(f"a tensor of strides {x.stride()} cannot be exchanged")
        return dist.P2POp(operation, x.view(-1).view(torch.uint8), self.ranks[position], group=self.group)


class World:
    """All ranks of a run, and the teams they form."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.everyone = Team(range(size), rank, dist.group.WORLD if size > 1 else None)
        self._teams: dict[tuple[int, ...], Team] = {self.everyone.ranks: self.everyone}
        self._made = {self.everyone.ranks}  # by all ranks, whether this one is in or not

    def divide(self, teams: Sequence[Sequence[int]]) -> Team:
        """The team, of these, that this process is in; every rank of the world must be in one, and must call this.

        All calls of all ranks come in the same order with the same teams: torch makes groups in step.
        """
        for ranks in map(tuple, teams):
            if ranks not in self._made:
                self._made.add(ranks)
                group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
                if self.rank in ranks:
                    self._teams[ranks] = Team(ranks, self.rank, group)
        return next(self._teams[ranks] for ranks in map(tuple, teams) if self.rank in ranks)

    @property
    def sent_bytes(self) -> int:
        """What this process handed to others, in all its teams."""
        return sum(team.sent_bytes for team in self._teams.values())
