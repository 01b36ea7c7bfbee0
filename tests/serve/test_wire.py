"""Messages cross the socket in whatever pieces, and what is no message is noticed."""

import struct

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frameloom import wire
from frameloom.types import EngineConfig, Lora

MESSAGES = (
    wire.Beat(work=3),
    wire.News(job="a", fence=2, stage="denoise", step=1, total=4),
    wire.Failed(job="a", fence=2, code="out_of_memory", message="no room", again=True),
    wire.Foreseen(number=7, seconds=1.5, memory_bytes=2**40, resolved={"width": 64}),
    wire.Unable(message="é"),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a machine that is busy
@given(st.lists(st.sampled_from(MESSAGES), max_size=8), st.data())
def test_messages_arrive_whole_in_whatever_pieces(messages, data):
    stream = b"".join(map(wire.frame, messages))
    frames, found = wire.Frames(from_worker=True), []
    while stream:
        count = data.draw(st.integers(1, len(stream)))
        found += frames.feed(stream[:count])
        stream = stream[count:]
    assert found == list(messages)


@given(st.binary(max_size=200))
def test_garbage_is_messages_or_an_error_and_nothing_else(data):
    try:
        found = wire.Frames(from_worker=True).feed(data)
    except wire.FrameError:
        return
    assert all(isinstance(one, wire.Message) for one in found)


@given(st.integers(wire.MAX_BYTES + 1, 2**32 - 1))
def test_a_message_that_is_too_long_is_refused_by_its_length(length):
    with pytest.raises(wire.FrameError, match=f"{length} bytes"):
        wire.Frames(from_worker=True).feed(struct.pack(">I", length))


def test_a_message_that_is_too_long_is_not_sent():
    with pytest.raises(wire.FrameError, match="longer than"):
        wire.frame(wire.Unable(message="x" * wire.MAX_BYTES))


def test_each_side_takes_only_what_the_other_says():
    with pytest.raises(wire.FrameError, match="no message"):
        wire.Frames(from_worker=False).feed(wire.frame(wire.Beat(work=1)))
    with pytest.raises(wire.FrameError, match="no message"):
        wire.Frames(from_worker=True).feed(wire.frame(wire.Stop()))


def test_the_loras_of_an_order_arrive_as_they_were_and_nothing_else_does():
    loras = (Lora(path="/a"), Lora(path="/b", strength=-0.5, expert="low"))
    order = wire.Run(
        job="a", fence=1, request={"prompt": "p"}, output="o", thumbnail="t", sheet="s", preview="p", journal="j",
        loras=loras,
    )  # fmt: skip
    assert wire.Frames(from_worker=False).feed(wire.frame(order)) == [order]
    odd = msgspec.structs.replace(order, loras=(Lora(path="/a", expert="third"),))
    with pytest.raises(wire.FrameError, match="no message"):
        wire.Frames(from_worker=False).feed(wire.frame(odd))


def test_a_message_with_a_field_of_another_type_is_refused():
    right = wire.frame(wire.Beat(work=1))
    with pytest.raises(wire.FrameError, match="no message"):
        wire.Frames(from_worker=True).feed(right[:-1] + b"\xc0")  # None in the place of a number


def test_a_setup_is_what_it_was_after_it_has_been_an_argument():
    config = EngineConfig(device="cpu", loras=("high:a.safetensors:0.5", Lora(path="b")), vae_memory="2GB", memory=7)
    setup = wire.Setup(socket=5, name="n", parts={"vae": "v"}, config=config, ranks=2).with_pairs([(7, 8)])
    again = wire.Setup.of(setup.command()[-1])
    assert again.command() == setup.command()
    assert again.config.loras == ["high:a.safetensors:0.5", Lora(path="b")]
    assert (again.pairs, again.config.memory, again.config.vae_memory) == (((7, 8),), 7, "2GB")
