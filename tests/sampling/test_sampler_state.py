"""A sampler state that was kept and read again continues bit for bit; one of another run is refused."""

import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch

from frameloom.engine.journal import Journal
from frameloom.errors import CheckpointError
from frameloom.sampling.flow import Euler, SamplerState, euler_schedule, unipc_schedule
from frameloom.sampling.unipc import UniPC

SHAPE = (1, 3, 2, 5, 7)


def samplers(num_steps=6):
    return [
        Euler(euler_schedule(num_steps, shift=3.0)),
        UniPC(unipc_schedule(num_steps, shift=3.0)),
        UniPC(unipc_schedule(num_steps, shift=5.0), order=3, disable_corrector=[1]),
    ]


def velocity_at(step, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)).to(dtype)


def walk(sampler, latents, state, *, until, dtype=torch.float32):
    while state.step < until:
        latents, state = sampler.step(velocity_at(state.step, dtype), latents, state)
    return latents, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", range(7))
@pytest.mark.parametrize("index", range(3))
def test_a_restored_state_continues_bit_identically(tmp_path, index, stop, dtype):
    noise = velocity_at(99, dtype)
    expected, _ = walk(samplers()[index], noise, samplers()[index].start(), until=6, dtype=dtype)
    latents, state = walk(samplers()[index], noise, samplers()[index].start(), until=stop, dtype=dtype)
    journal = Journal(tmp_path, "a job")
    journal.put("step-000001", {"latents": latents, **state.history}, {"step": str(stop), "sampler": state.sampler})
    latents, restored = journal.walked()
    assert restored.step == state.step == stop
    assert restored.history.keys() == state.history.keys()
    assert all(restored.history[name].dtype == x.dtype for name, x in state.history.items())
    continued, end = walk(samplers()[index], latents, restored, until=6, dtype=dtype)
    assert torch.equal(continued, expected)
    assert end.step == 6


def test_the_history_matters():
    # with its history forgotten the same walk must end elsewhere, or the test above shows nothing
    sampler = samplers()[1]
    latents, state = walk(sampler, velocity_at(99), sampler.start(), until=3)
    zeros = {name: torch.zeros_like(x) for name, x in state.history.items()}
    forgetful = SamplerState(step=state.step, sampler=state.sampler, history=zeros)
    assert not torch.equal(walk(sampler, latents, state, until=6)[0], walk(sampler, latents, forgetful, until=6)[0])


def test_a_state_is_frozen_and_crosses_processes():
    sampler = samplers()[1]
    _, state = walk(sampler, velocity_at(99), sampler.start(), until=2)
    with pytest.raises(FrozenInstanceError):
        state.step = 0
    copy = pickle.loads(pickle.dumps(state))
    assert (copy.step, copy.sampler) == (state.step, state.sampler)
    assert all(torch.equal(copy.history[name], x) for name, x in state.history.items())


def test_to_moves_the_history():
    sampler = samplers()[1]
    _, state = walk(sampler, velocity_at(99), sampler.start(), until=2)
    moved = state.to("meta")
    assert all(x.is_meta for x in moved.history.values())
    assert (moved.step, moved.sampler) == (state.step, state.sampler)


def test_a_state_of_another_run_is_refused():
    runs = [
        *samplers(),
        Euler(euler_schedule(7, shift=3.0)),
        Euler(euler_schedule(6, shift=5.0)),
        UniPC(unipc_schedule(6, shift=5.0)),
        UniPC(unipc_schedule(6, shift=3.0), disable_corrector=[0]),
        UniPC(unipc_schedule(6, shift=3.0), solver_type="bh1"),
    ]
    for made in runs:
        _, state = walk(made, velocity_at(99), made.start(), until=1)
        for used in runs:
            if used is not made:
                with pytest.raises(CheckpointError, match="same scheduler, steps and shift"):
                    used.step(velocity_at(0), velocity_at(1), state)


def test_a_state_of_another_size_is_refused():
    sampler = samplers()[1]
    _, state = walk(sampler, velocity_at(99), sampler.start(), until=1)
    with pytest.raises(CheckpointError, match="same size and frames"):
        sampler.step(torch.ones(1, 2, 3), torch.ones(1, 2, 3), state)


def test_a_state_without_its_history_is_refused():
    sampler = samplers()[1]
    _, state = walk(sampler, velocity_at(99), sampler.start(), until=2)
    partial = {name: x for name, x in state.history.items() if name != "x0_1"}
    with pytest.raises(CheckpointError, match="lacks one of"):
        sampler.step(velocity_at(2), velocity_at(1), SamplerState(step=2, sampler=state.sampler, history=partial))
