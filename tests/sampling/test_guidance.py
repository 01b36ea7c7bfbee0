"""Guidance, the choice of the expert and the per-token timesteps, against the lines of the reference loop."""

import pytest
import torch

from frameloom.errors import CheckpointError, InternalError
from frameloom.sampling.guidance import ExpertSwitch, expand_timesteps, guide
from frameloom.sampling.unipc import make_sampler

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, 5.0])
def test_guide_rounds_as_the_reference(dtype, scale):
    cond, uncond = (torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    guided = guide(cond, uncond, scale)
    assert guided.dtype == dtype
    assert torch.equal(guided, uncond + scale * (cond - uncond))
    if scale > 1:  # the algebraic twin rounds otherwise: the order is part of the contract
        assert not torch.equal(guided, scale * cond + (1 - scale) * uncond)


@pytest.mark.parametrize("config", [UNIPC, EULER])
@pytest.mark.parametrize("num_steps", [1, 4, 40, 50])
@pytest.mark.parametrize("ratio", [None, 0.0, 0.5, 0.875, 0.9, 1.0])
@pytest.mark.parametrize("shift", [1.0, 12.0])
def test_the_expert_is_the_one_of_the_reference(config, num_steps, ratio, shift):
    switch = ExpertSwitch(boundary_ratio=ratio, guidance_scale=4.0, guidance_scale_2=3.0)
    boundary_timestep = None if ratio is None else ratio * 1000
    for t in make_sampler(config, num_steps, flow_shift=shift).schedule.timesteps:
        high = boundary_timestep is None or t >= boundary_timestep
        assert switch.for_timestep(t) == ((0, 4.0) if high else (1, 3.0))
        assert switch.for_timestep(t.item()) == switch.for_timestep(t)


def test_the_boundary_itself_belongs_to_the_high_noise_expert():
    switch = ExpertSwitch(boundary_ratio=0.875, guidance_scale=4.0, guidance_scale_2=3.0)
    assert switch.for_timestep(875) == (0, 4.0)
    assert switch.for_timestep(874) == (1, 3.0)
    assert switch.for_timestep(torch.tensor(874.99)) == (1, 3.0)


def test_the_boundary_rounds_to_float32_as_in_the_reference():
    ratio = 0.8750000000001  # times 1000: above 875 in float64, 875 in float32
    assert ratio * 1000 > 875
    assert torch.tensor(875) >= ratio * 1000
    switch = ExpertSwitch(boundary_ratio=ratio)
    assert switch.for_timestep(875)[0] == switch.for_timestep(875.0)[0] == 0


def test_the_boundary_counts_training_timesteps():
    assert ExpertSwitch(boundary_ratio=0.5, num_train_timesteps=100).for_timestep(50)[0] == 0
    assert ExpertSwitch(boundary_ratio=0.5, num_train_timesteps=1000).for_timestep(50)[0] == 1


def test_the_second_scale_defaults_to_the_first():
    assert ExpertSwitch(boundary_ratio=0.9, guidance_scale=3.5).for_timestep(1) == (1, 3.5)
    assert ExpertSwitch(boundary_ratio=0.9, guidance_scale=3.5, guidance_scale_2=0.0).for_timestep(1) == (
        1,
        0.0,
    )


def test_only_the_first_scale_decides_whether_to_guide():
    assert ExpertSwitch(guidance_scale=1.01).guided
    assert not ExpertSwitch(boundary_ratio=0.9, guidance_scale=1.0, guidance_scale_2=5.0).guided


@pytest.mark.parametrize("ratio", [-0.1, 1.1, 875, float("nan")])
def test_a_boundary_outside_of_the_schedule_is_refused(ratio):
    with pytest.raises(CheckpointError, match=r"not in 0\.\.1"):
        ExpertSwitch(boundary_ratio=ratio)


@pytest.mark.parametrize("t", [torch.tensor(937), torch.tensor(937.25), 937])
@pytest.mark.parametrize("given", [(), (0,), (0, 4)])
@pytest.mark.parametrize("grid", [(5, 4, 6), (5, 2, 2)])
def test_expand_timesteps_equals_the_lines_of_the_reference(t, given, grid):
    mask = torch.ones(2, 1, *grid)
    mask[:, :, list(given)] = 0
    expected = (mask[0][0][:, ::2, ::2] * t).flatten().unsqueeze(0).expand(2, -1)
    conditioned = torch.zeros(5, dtype=torch.bool)
    conditioned[list(given)] = True
    ours = expand_timesteps(t, grid, conditioned=conditioned, batch_size=2)
    assert ours.dtype == expected.dtype == torch.float32
    assert torch.equal(ours, expected)
    if not given:
        assert torch.equal(expand_timesteps(t, grid, batch_size=2), expected)


def test_expand_timesteps_knows_other_patches():
    conditioned = torch.tensor([True, True, False, False])
    ours = expand_timesteps(8.0, (4, 6, 8), patch_size=(2, 3, 8), conditioned=conditioned)
    assert ours.tolist() == [[0.0, 0.0, 8.0, 8.0]]


def test_expand_timesteps_follows_the_device_of_t():
    assert expand_timesteps(torch.empty((), device="meta"), (1, 2, 2)).is_meta


def test_expand_timesteps_refuses_what_does_not_divide():
    with pytest.raises(InternalError, match=r"\(5, 3, 4\) is not a multiple"):
        expand_timesteps(1.0, (5, 3, 4))
    with pytest.raises(InternalError, match="one flag per latent frame"):
        expand_timesteps(1.0, (5, 2, 4), conditioned=torch.zeros(4, dtype=torch.bool))
