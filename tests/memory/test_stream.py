"""Weights that come unit by unit are the right ones in whatever order, on whatever device, and few at a time."""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from frameloom.errors import CheckpointError
from frameloom.memory.lane import AtOnce, Ferry
from frameloom.memory.stream import Stream, StreamedWeight, Unit, block_by_block, streamed
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import WanDiT, run_in_order
from frameloom.ops.quantized import QuantizedWeight

CPU = torch.device("cpu")


@dataclass
class Kept:
    """Numbers that are somewhere, and who is looking at them."""

    numbers: Tensor
    computes: bool = True
    looks: list = field(default_factory=list)
    quantized: QuantizedWeight | None = None
    readable: bool = True

    @property
    def dtype(self):
        return self.numbers.dtype

    @property
    def shape(self):
        return tuple(self.numbers.shape)

    def look(self):
        if not self.readable:
            raise CheckpointError("the disk is gone")
        seen = self.numbers.clone()
        self.looks.append(weakref.ref(seen))
        return seen


def make(count, *, lane=None, slots=2, dtype=torch.float32, **options):
    """A stream of units that each hold one weight of its own number."""
    stream, stored = Stream(CPU, lane), [Kept(torch.full((4, 4), float(i)), **options) for i in range(count)]
    units = [Unit() for _ in stored]
    stream.add(units, slots=slots)
    weights = [
        streamed(stream, unit, "weight", one, device=CPU, dtype=dtype) for unit, one in zip(units, stored, strict=True)
    ]
    return stream, stored, weights


@given(st.lists(st.integers(0, 5), max_size=30), st.booleans(), st.integers(1, 3), st.booleans())
def test_every_weight_is_itself_in_whatever_order_it_is_asked_for(order, computes, slots, converts):
    dtype = torch.bfloat16 if converts else torch.float32
    stream, _, weights = make(6, computes=computes, slots=slots, dtype=dtype)
    for index in order:
        assert torch.equal(weights[index].plain(dtype), torch.full((4, 4), index, dtype=dtype))
    stream.release()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_as_many_units_are_there_as_there_are_slots(slots):
    stream, stored, weights = make(6, slots=slots)
    for _ in range(2):
        for weight in weights:
            weight.plain(torch.float32)
            there = sum(ref() is not None for one in stored for ref in one.looks)
            assert 1 <= there <= slots
    assert stream.held_bytes == slots * 64
    stream.release()
    assert all(ref() is None for one in stored for ref in one.looks)


def test_the_next_unit_comes_while_one_computes_and_after_the_last_that_of_the_cycle():
    stream, stored = Stream(CPU), [Kept(torch.full((2,), float(i))) for i in range(4)]
    units = [Unit() for _ in stored]
    stream.add(units, slots=2, cycle_from=1)
    for unit, one in zip(units, stored, strict=True):
        streamed(stream, unit, "x", one, device=CPU, dtype=torch.float32)
    came = []
    for unit in units:
        stream.need(unit)
        came.append([len(one.looks) for one in settled(stream, stored)])
    assert came == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 2, 1, 1]]


def settled(stream, stored):
    """What is stored, once nothing is on its way."""
    for _, future in stream._held.values():
        future.result()
    return stored


def test_what_comes_for_its_stage_comes_once():
    _, stored, weights = make(1, slots=1)
    for _ in range(5):
        weights[0].plain(torch.float32)
    assert len(stored[0].looks) == 1


def test_a_unit_that_cannot_be_read_is_told_to_whom_needs_it_and_to_nobody_else():
    stream, stored, weights = make(3)
    stored[1].readable = False
    assert torch.equal(weights[0].plain(torch.float32), stored[0].numbers)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        weights[1].plain(torch.float32)
    assert torch.equal(weights[2].plain(torch.float32), stored[2].numbers)
    stream.release()


def test_quantized_weights_come_as_their_bytes_and_are_plain_for_the_call():
    stream, unit = Stream(CPU), Unit()
    meaning = QuantizedWeight(
        raw_U8=torch.empty(0, dtype=torch.uint8), dtype_name="I8", shape=(2, 3), scale=torch.ones(1) / 4
    )
    stream.add([unit], slots=1)
    raw = torch.arange(6, dtype=torch.uint8)
    weight = streamed(stream, unit, "w", Kept(raw, quantized=meaning), device=CPU, dtype=torch.bfloat16)
    assert isinstance(weight, StreamedWeight)
    assert (weight.form, weight.copies, unit.size_bytes) == ("streamed", True, 6)
    assert torch.equal(weight.plain(torch.bfloat16), (torch.arange(6) / 4).view(2, 3).bfloat16())


# --- a device that does things later ---


class Later:
    """A device with two queues that run when they are told to: copies on one, computation on the other."""

    pinned_bytes = 0

    def __init__(self):
        self.copies, self.computation = [], []

    def copy(self, out, seen):
        self.copies.append(lambda: out.copy_(seen))

    def mark(self):
        return len(self.copies)

    def computed(self):
        return len(self.computation)

    def after(self, point):
        self.copies.append(("after", point))

    def wait(self, point):
        self.computation.append(("after", point))

    def drain(self):
        pass

    def run(self, *, eager):
        """Both queues to their ends; the eager one goes as far as it may before the other takes a step."""
        queues, done = {"copies": self.copies, "computation": self.computation}, {"copies": 0, "computation": 0}
        first, second = (eager, *(queues.keys() - {eager}))

        def step(name, other):
            if done[name] == len(queues[name]):
                return False
            work = queues[name][done[name]]
            if isinstance(work, tuple):
                if done[other] < work[1]:
                    return False
            else:
                work()
            done[name] += 1
            return True

        while step(first, second) or step(second, first):
            pass
        assert done == {name: len(queue) for name, queue in queues.items()}


@pytest.mark.parametrize("eager", ["copies", "computation"])
@given(order=st.lists(st.integers(0, 4), max_size=20), slots=st.integers(2, 3))
def test_a_device_computes_with_what_has_come_and_nothing_comes_over_what_computes(eager, order, slots):
    device = Later()
    stream, _, weights = make(5, lane=device, computes=False, slots=slots)
    results = []
    for index in order:
        weight = weights[index].plain(torch.float32)
        for _, future in stream._held.values():
            future.result()  # the host's part of the next unit; the device's may come at any time
        device.computation.append(lambda weight=weight: results.append(weight.clone()))
    device.run(eager=eager)
    assert [result.unique().tolist() for result in results] == [[index] for index in order]


def test_the_lane_of_a_cpu_converts_as_it_copies():
    out = torch.empty(3)
    AtOnce().copy(out, torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    assert out.tolist() == [1, 2, 3]


@dataclass
class Queue:
    """A queue that does its work when somebody waits for an event in it."""

    name: str
    work: list = field(default_factory=list)
    waits: list = field(default_factory=list)

    def wait_event(self, event):
        self.waits.append(event)

    def run(self):
        while self.work:
            self.work.pop(0)()


class Event:
    def record(self, queue):
        self.queue = queue

    def synchronize(self):
        self.queue.run()


class Standin:
    """A platform whose copies are made when their queue is waited for, from what the pinned memory holds then."""

    def __init__(self):
        self.own, self.computing = Queue("own"), Queue("computing")

    def stream(self, _):
        return self.own

    def current(self, _):
        return self.computing

    def event(self):
        return Event()

    def pinned(self, count):
        return torch.empty(count, dtype=torch.uint8)

    @contextmanager
    def on(self, queue):
        def later(target, piece, *, non_blocking):
            assert non_blocking
            queue.work.append(lambda: copy_now(target, piece))

        copy_now = Tensor.copy_
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "copy_", later)
            yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pinned_piece_is_written_again_when_its_last_copy_has_left_it(dtype):
    platform = Standin()
    lane = Ferry(CPU, platform, piece_bytes=16)
    numbers, out = torch.arange(23.0).bfloat16(), torch.zeros(23, dtype=dtype)
    lane.copy(out, numbers)
    assert not torch.equal(out.float(), numbers.float()), "the last pieces are still on their way"
    lane.mark().synchronize()
    assert torch.equal(out.float(), numbers.float())
    assert lane.pinned_bytes == 32


def test_queues_of_a_device_wait_for_each_other_and_the_host_for_neither():
    platform = Standin()
    lane = Ferry(CPU, platform, piece_bytes=16)
    computed, mark = lane.computed(), lane.mark()
    assert (computed.queue, mark.queue) == (platform.computing, platform.own)
    lane.after(computed)
    lane.wait(mark)
    assert (platform.own.waits, platform.computing.waits) == ([computed], [mark])


# --- the order of a network ---


@torch.inference_mode()
def test_block_by_block_has_the_bits_of_prompt_by_prompt():
    torch.manual_seed(0)
    spec = TransformerSpec(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=40, num_layers=3,
    )  # fmt: skip
    dit = WanDiT(spec).eval()
    x, time = torch.randn(1, 4, 2, 6, 4), torch.tensor([300.0])
    prompts = [dit.read_prompt(torch.randn(batch, 20, 12)) for batch in (1, 2, 1)]
    found = []
    for dit.run_blocks in (run_in_order, block_by_block):
        found.append(dit.velocities(x, time, prompts))
    assert [len(velocity) for velocity in found[1]] == [1, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][2])
