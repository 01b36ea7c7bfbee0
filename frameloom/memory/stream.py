"""Weights that come to where they compute unit by unit, from where they are stored: while one computes, the next comes.

On a CPU they are computed with where they lie in their mapped files, if their numbers may; elsewhere, and where numbers
change their dtype, they are copied into buffers that are used again and again.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from frameloom.memory.lane import Lane, lane_to
from frameloom.models.dit_block import Block
from frameloom.models.wan_dit import Prompt, Step
from frameloom.ops.quantized import QuantizedWeight

_ALIGNMENT: Final = 64  # of tensors in a buffer, as torch's own


class Stored(Protocol):
    """A tensor that stays where it is stored (weights/windows.py). `quantized`: what its bytes mean, if they do."""

    @property
    def quantized(self) -> QuantizedWeight | None:
        """What its bytes mean, without them; None of plain numbers."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of what is seen."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is seen."""
        ...

    @property
    def computes(self) -> bool:
        """Whether a CPU can compute with it where it lies."""
        ...

    def look(self) -> Tensor:
        """All of it, on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """A tensor, and the dtype in which it is wanted. `copied`: it needs a place of its own to compute."""

    stored: Stored
    dtype: torch.dtype
    copied: bool

    @property
    def size_bytes(self) -> int:
        """Bytes where it computes."""
        return math.prod(self.stored.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What comes and goes together, by the names of the parameters; filled before it is asked for."""

    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def room_bytes(self) -> int:
        """Bytes of a buffer that it needs."""
        return sum(_aligned(part.size_bytes) for part in self.parts.values() if part.copied)

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes while it is there."""
        return sum(part.size_bytes for part in self.parts.values())


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """A place for one unit: its tensors, and the buffer of those that are copied, made when it is first needed."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    buffer: list[Tensor] = field(default_factory=list)


class Stream:
    """Brings units into a few slots: the one that is needed, and ahead of need the one that follows it.

    Units of several networks may share one stream, which then has room for one network's at a time.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        self._device = device
        self._lane = lane or lane_to(device)
        self._num_slots = 0
        self._followers: dict[Unit, Unit] = {}
        self._free: list[_Slot] = []
        self._held: dict[Unit, tuple[_Slot, Future[Any]]] = {}  # the one that was used longest ago comes first
        self._current: tuple[Unit, dict[str, Tensor]] | None = None
        self._units: list[Unit] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="frameloom-stream")

    def add(self, units: Sequence[Unit], *, slots: int, cycle_from: int = 0) -> None:
        """Units in the order in which they compute; after the last comes the one at `cycle_from` again.

        `slots`: so many units are there at a time; with one nothing comes ahead. Nothing may have been needed yet.
        """
        self._units += units
        self._num_slots = max(self._num_slots, slots)
        self._free = [_Slot() for _ in range(self._num_slots)]
        if slots > 1:
            following = [*units[1:], units[cycle_from]]
            self._followers.update(zip(units, following, strict=True))

    @property
    def held_bytes(self) -> int:
        """The most bytes that all slots take together where it computes."""
        return self._num_slots * max((unit.size_bytes for unit in self._units), default=0)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the host that are pinned."""
        return self._lane.pinned_bytes

    def need(self, unit: Unit) -> dict[str, Tensor]:
        """The tensors of a unit, on the device; good until others are needed. What follows it begins to come.

        Raises CheckpointError where they cannot be read.
        """
        if self._current is None or self._current[0] is not unit:
            self._current = None
            slot, brought = self._begin(unit)
            self._lane.wait(brought.result())
            self._current = unit, slot.tensors
            if (follower := self._followers.get(unit)) is not None:
                self._begin(follower)
        return self._current[1]

    def release(self) -> None:
        """Let go of all that is there; the next need begins anew."""
        self._current = None
        for _, future in self._held.values():
            future.exception()  # waits; who needed it has been told
        self._lane.drain()
        self._held.clear()
        self._free = [_Slot() for _ in range(self._num_slots)]

    def _begin(self, unit: Unit) -> "tuple[_Slot, Future[Any]]":
        """Have a unit brought, unless it is there or on its way, in place of the one used longest ago."""
        found = self._held.pop(unit, None)
        if found is None:
            slot = self._free.pop() if self._free else self._evicted()
            found = slot, self._worker.submit(self._bring, unit, slot, self._lane.computed())
        self._held[unit] = found
        return found

    def _evicted(self) -> _Slot:
        slot, _ = self._held.pop(next(iter(self._held)))
        return slot

    def _bring(self, unit: Unit, slot: _Slot, computed: Any) -> Any:
        """In the worker, one after the other: what computed in the slot before is over by then, and let go here."""
        slot.tensors.clear()
        self._lane.after(computed)
        start = 0
        for name, part in unit.parts.items():
            slot.tensors[name] = seen = part.stored.look()
            if part.copied:
                end = start + part.size_bytes
                place = self._buffer(slot)[start:end].view(part.dtype).view(seen.shape)
                self._lane.copy(place, seen)
                slot.tensors[name], start = place, _aligned(end)
        return self._lane.mark()

    def _buffer(self, slot: _Slot) -> Tensor:
        if not slot.buffer:
            room = max(unit.room_bytes for unit in self._units)
            slot.buffer.append(torch.empty(room, dtype=torch.uint8, device=self._device))
        return slot.buffer[0]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StreamedWeight:
    """A weight of a unit: `ops.quantized.HeldWeight`."""

    stream: Stream
    unit: Unit
    name: str

    form = "streamed"

    @property
    def copies(self) -> bool:
        """Quantized ones become plain for the call, too."""
        return self.unit.parts[self.name].stored.quantized is not None

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The weight; good until one of another unit is asked for."""
        numbers = self.stream.need(self.unit)[self.name]
        quantized = self.unit.parts[self.name].stored.quantized
        return numbers if quantized is None else replace(quantized, raw_U8=numbers).plain(dtype)


def streamed(
    stream: Stream, unit: Unit, name: str, stored: Stored, *, device: torch.device, dtype: torch.dtype
) -> StreamedWeight:
    """Put a tensor into a unit; returns what its layer holds. `dtype`: in which the layer computes."""
    wanted = stored.dtype if stored.quantized is not None else dtype
    in_place = device.type == "cpu" and stored.computes and wanted == stored.dtype
    unit.parts[name] = Part(stored=stored, dtype=wanted, copied=not in_place)
    return StreamedWeight(stream=stream, unit=unit, name=name)


def block_by_block(blocks: Sequence[Block], x_BLD: Tensor, step: Step, prompts: Sequence[Prompt], /) -> list[Tensor]:
    """`run_in_order`, but that every prompt passes a block before the next block: the weights come once for all."""
    first, *others = blocks
    looked = first.look(x_BLD, step.modulation(0), step.rope)
    times = [prompt.batch_size // x_BLD.shape[0] for prompt in prompts]
    steps = [step.repeated(repeats) for repeats in times]
    results = [
        first.read(looked.repeated(repeats), mine.modulation(0), prompt.of_blocks[0])
        for repeats, mine, prompt in zip(times, steps, prompts, strict=True)
    ]
    for index, block in enumerate(others, start=1):
        for place, (mine, prompt) in enumerate(zip(steps, prompts, strict=True)):
            results[place] = block(results[place], mine.modulation(index), mine.rope, prompt.of_blocks[index])
    return results


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
