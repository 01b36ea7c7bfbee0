"""The recipe of distilled models: four steps of Euler at their noise levels, and one prediction in each."""

import pytest
import torch

import frameloom
from frameloom.errors import RequestError
from frameloom.sampling.flow import distilled_schedule
from frameloom.sampling.unipc import make_sampler

SIZE = {"width": 32, "height": 32, "num_frames": 5}


def test_the_levels_are_those_that_the_models_were_distilled_for():
    schedule = distilled_schedule(4, shift=5.0)
    expected = [5 * s / (1 + 4 * s) for s in (1, 0.75, 0.5, 0.25)]
    assert torch.allclose(schedule.timesteps, torch.tensor(expected) * 1000)
    assert [round(t, 1) for t in schedule.timesteps.tolist()] == [1000.0, 937.5, 833.3, 625.0]
    assert schedule.sigmas[-1] == 0


def test_its_scheduler_steps_straight_along_the_velocity():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0, "even_levels": True}
    sampler = make_sampler(config, 4)
    x, state = torch.ones(1, 2, 1, 2, 2), sampler.start()
    for _ in range(4):
        x, state = sampler.step(torch.full_like(x, 2.0), x, state)
    assert torch.allclose(x, torch.full_like(x, -1.0))  # from sigma 1 to 0: x - 2 in all


@pytest.mark.parametrize("kind", ["one expert", "two experts"])
def test_four_steps_predict_four_times(kind, checkpoint_of):
    with frameloom.load(checkpoint_of(kind), device="cpu", preset="lightning") as engine:
        request = engine.resolve("a red circle", **SIZE)
        assert (request.steps, request.guidance_scale, request.guidance_scale_2, request.flow_shift) == (4, 1, None, 5)
        calls = []
        for expert in engine._pipeline.experts:
            forward = expert.velocities
            expert.velocities = lambda *args, forward=forward: calls.append(len(args[2])) or forward(*args)
        engine.generate("a red circle", output="latents", **SIZE)
    assert calls == [1, 1, 1, 1]


def test_what_is_asked_for_by_name_wins(checkpoint_of):
    with frameloom.load(checkpoint_of("one expert"), device="cpu", preset="lightning") as engine:
        request = engine.resolve("a red circle", steps=8, flow_shift=3.0, **SIZE)
        assert (request.steps, request.flow_shift) == (8, 3.0)


def test_a_second_scale_without_guidance_is_not_used_and_the_log_says_so(checkpoint_of, caplog):
    with frameloom.load(checkpoint_of("two experts"), device="cpu", preset="lightning") as engine:
        assert engine.resolve("a red circle", guidance_scale_2=3.0, **SIZE).guidance_scale_2 is None
        assert engine.resolve("a red circle", guidance_scale=4.0, guidance_scale_2=3.0, **SIZE).guidance_scale_2 == 3
    (line,) = [record.message for record in caplog.records if "scale" in record.message]
    assert line == "guidance scale 2 (3) is not used: with a guidance scale of 1 there is no guidance"


def test_an_unknown_preset_is_refused_before_anything_is_opened():
    with pytest.raises(RequestError, match="there is no preset 'fast'; use lightning"):
        frameloom.load("no such model", preset="fast")
