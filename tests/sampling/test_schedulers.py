"""Our samplers against the reference schedulers, step by step, and against an exactly solved equation."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from frameloom.errors import InternalError, RequestError
from frameloom.sampling.flow import Euler, FlowSchedule, Sampler, unipc_schedule
from frameloom.sampling.unipc import UniPC, make_sampler

with warnings.catch_warnings():  # importing the reference may warn about optional packages; not ours to fix
    warnings.simplefilter("ignore")
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

STEPS = [1, 2, 3, 5, 20, 50]
SHIFTS = [1.0, 3.0, 5.0, 8.0, 12.0, 16.0]
ODD_SHAPE = (2, 3, 5, 7, 1)


def unipc_config(**changes: Any) -> dict[str, Any]:
    wan = {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "num_train_timesteps": 1000,
        "solver_order": 2,
    }
    return wan | changes


def euler_config(**changes: Any) -> dict[str, Any]:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0} | changes


def reference_for(config: dict[str, Any], num_steps: int) -> Any:
    classes = {c.__name__: c for c in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)}
    reference = classes[config["_class_name"]].from_config(config)
    reference.set_timesteps(num_steps)
    reference.set_begin_index(0)
    return reference


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_parity(
    config: dict[str, Any],
    num_steps: int,
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    shape: tuple[int, ...] = ODD_SHAPE,
    steps_compared: int | None = None,
    tolerance: float = 0.0,
) -> None:
    """Both walk their own latents with the same random velocities; `dtypes`: of latents, of velocity.

    A tolerance of zero: every value of every step is the reference's.
    """
    reference, sampler = reference_for(config, num_steps), make_sampler(config, num_steps)
    generator = torch.Generator().manual_seed(num_steps)
    latents = torch.randn(shape, generator=generator).to(dtypes[0])
    state, theirs = sampler.start(), latents
    for t in reference.timesteps[:steps_compared]:
        velocity = torch.randn(shape, generator=generator).to(dtypes[1])
        latents, state = sampler.step(velocity, latents, state)
        theirs = reference.step(velocity, t, theirs, return_dict=False)[0]
        assert latents.dtype == theirs.dtype
        assert torch.isfinite(latents).all()
        assert relative_error(latents, theirs) <= tolerance, f"step {state.step} of {num_steps}"
    assert state.step == len(reference.timesteps[:steps_compared])


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_schedule_equals_the_reference_bit_for_bit(make_config, num_steps, shift):
    config = make_config() | {"flow_shift": shift, "shift": shift}
    reference, schedule = reference_for(config, num_steps), make_sampler(config, num_steps).schedule
    assert torch.equal(schedule.sigmas, reference.sigmas)
    assert torch.equal(schedule.timesteps, reference.timesteps)
    assert schedule.timesteps.dtype == reference.timesteps.dtype
    assert schedule.num_steps == num_steps
    assert schedule.num_train_timesteps == 1000


@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_schedule_of_another_training_length_equals_the_reference(make_config):
    config = make_config(num_train_timesteps=777)
    reference, schedule = reference_for(config, 9), make_sampler(config, 9).schedule
    assert torch.equal(schedule.sigmas, reference.sigmas)
    assert torch.equal(schedule.timesteps, reference.timesteps)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_every_step_equals_the_reference(make_config, num_steps, shift):
    assert_parity(make_config() | {"flow_shift": shift, "shift": shift}, num_steps)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("disabled", [[], [0], [0, 1, 2], [3, 19, 400]])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 20])
def test_unipc_variants_equal_the_reference(order, disabled, num_steps):
    tolerance = 1e-6 if order == 3 else 0.0  # the reference sums order 3 in a matrix product, in another order
    config = unipc_config(solver_order=order, disable_corrector=disabled)
    assert_parity(config, num_steps, tolerance=tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 2, 6, 10), (2, 5, 3), (1, 48, 1, 1, 1)])
@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_any_shape_equals_the_reference(make_config, shape):
    assert_parity(make_config(), 5, shape=shape)


@pytest.mark.parametrize("num_steps", [1, 5, 20])
@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_float32_latents_with_bfloat16_velocity_equal_the_reference(make_config, num_steps):
    assert_parity(make_config(), num_steps, dtypes=(torch.float32, torch.bfloat16))


@pytest.mark.parametrize("num_steps", [1, 5, 20])
@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_bfloat16_latents_equal_the_reference(make_config, num_steps):
    assert_parity(make_config(), num_steps, dtypes=(torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_bh1_equals_the_reference_up_to_its_last_step_where_the_reference_is_nan(num_steps):
    config = unipc_config(solver_type="bh1")
    assert_parity(config, num_steps, steps_compared=num_steps - 1)
    reference = reference_for(config, 1)
    noise = torch.ones(1, 2, 3)
    assert reference.step(noise, reference.timesteps[0], noise, return_dict=False)[0].isnan().all()
    assert make_sampler(config, 1).step(noise, noise, make_sampler(config, 1).start())[0].isfinite().all()


@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_flow_shift_overrides_the_config(make_config):
    key = {"UniPCMultistepScheduler": "flow_shift"}.get(make_config()["_class_name"], "shift")
    overridden = make_sampler(make_config(), 7, flow_shift=12.0).schedule
    assert torch.equal(overridden.sigmas, make_sampler(make_config(**{key: 12.0}), 7).schedule.sigmas)
    assert not torch.equal(overridden.sigmas, make_sampler(make_config(), 7).schedule.sigmas)


def gaussian_velocity(x: Tensor, sigma: float) -> Tensor:
    """Exact velocity when the data are N(2, 0.5^2): E[noise - x0 | x]."""
    variance = (1 - sigma) ** 2 * 0.25 + sigma**2
    return -2.0 + (sigma - (1 - sigma) * 0.25) / variance * (x - (1 - sigma) * 2.0)


def gaussian_error(make: Callable[[FlowSchedule], Sampler], num_steps: int) -> float:
    """Distance to the exact solution for eleven starting points, over equal steps of log-SNR from -4 to 4.

    Only the inner steps are walked: the one to sigma 0 is of order one whatever the solver.
    """
    inner = torch.sigmoid(-torch.linspace(-2, 2, num_steps + 1, dtype=torch.float64))
    sigmas = torch.cat([inner, inner.new_zeros(1)]).float()
    sampler = make(FlowSchedule(sigmas=sigmas, timesteps=sigmas[:-1] * 1000, num_train_timesteps=1000))
    levels = sigmas.double()
    mean, std = (1 - levels) * 2.0, ((1 - levels) ** 2 * 0.25 + levels**2).sqrt()
    z = torch.linspace(-2, 2, 11, dtype=torch.float64)
    x, state = mean[0] + std[0] * z, sampler.start()
    for sigma in levels[:num_steps].tolist():
        x, state = sampler.step(gaussian_velocity(x, sigma), x, state)
    return (x - (mean[num_steps] + std[num_steps] * z)).abs().max().item()


def unipc_with(**options: Any) -> Callable[[FlowSchedule], Sampler]:
    return lambda schedule: UniPC(schedule, **options)


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (Euler, 1),
        (unipc_with(order=1), 2),
        (unipc_with(order=2), 3),
        (unipc_with(order=1, solver_type="bh1"), 2),
        (unipc_with(order=2, solver_type="bh1"), 3),
        (unipc_with(order=1, disable_corrector=range(64)), 1),
        (unipc_with(order=2, disable_corrector=range(64)), 2),
    ],
)
def test_halving_the_step_divides_the_error_as_the_order_says(make, order):
    # UniP of order p is of order p, with its corrector of order p + 1 (arXiv:2302.04867)
    ratio = gaussian_error(make, 32) / gaussian_error(make, 64)
    assert 2**order * 0.9 < ratio < 2**order * 1.1


def test_unipc_of_order_three_is_the_most_exact():
    third, second = (gaussian_error(unipc_with(order=order), 64) for order in (3, 2))
    assert third < second / 2


@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_float64_latents_keep_their_digits(make_config):
    sampler = make_sampler(make_config(), 1)
    latents = torch.full((1, 2, 3), 1 + 2.0**-40, dtype=torch.float64)
    assert torch.equal(sampler.step(torch.zeros_like(latents), latents, sampler.start())[0], latents)


@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_step_writes_to_none_of_its_arguments(make_config):
    sampler = make_sampler(make_config(), 4)
    latents, state = torch.randn(1, 2, 3), sampler.start()
    for _ in range(4):
        velocity = torch.randn(1, 2, 3)
        held = [velocity, latents, *state.history.values()]
        copies = [x.clone() for x in held]
        latents, state = sampler.step(velocity, latents, state)
        assert all(torch.equal(x, copy) for x, copy in zip(held, copies, strict=True))


@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_coefficients_stay_on_the_host_under_another_default_device(make_config):
    expected = make_sampler(make_config(), 5)
    with torch.device("meta"):
        sampler = make_sampler(make_config(), 5)
    assert sampler.schedule.digest == expected.schedule.digest
    x = torch.ones(1, 2, 3)
    assert torch.equal(sampler.step(x, x, sampler.start())[0], expected.step(x, x, expected.start())[0])


@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_a_step_runs_where_no_number_can_be_read_back(make_config):
    # a meta tensor has no values: anything that waits for the device (.item(), bool, .cpu()) would raise
    sampler = make_sampler(make_config(), 4)
    latents, state = torch.empty(1, 2, 3, device="meta"), sampler.start()
    for _ in range(4):
        latents, state = sampler.step(torch.empty(1, 2, 3, device="meta"), latents, state)
    assert latents.is_meta


@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
def test_a_step_past_the_last_is_refused(make_config):
    sampler = make_sampler(make_config(), 1)
    x = torch.ones(1, 2, 3)
    _, state = sampler.step(x, x, sampler.start())
    with pytest.raises(InternalError, match="step 2 of 1"):
        sampler.step(x, x, state)


@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
@pytest.mark.parametrize("num_steps", [0, -3])
def test_no_steps_are_refused(make_config, num_steps):
    with pytest.raises(RequestError, match=f"{num_steps} denoising steps .* at least 1"):
        make_sampler(make_config(), num_steps)


@pytest.mark.parametrize("make_config", [unipc_config, euler_config])
@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_flow_shift_that_is_not_positive_is_refused(make_config, shift):
    with pytest.raises(RequestError, match="not a positive number"):
        make_sampler(make_config(), 4, flow_shift=shift)


def test_steps_too_dense_for_float32_are_refused():
    with pytest.raises(RequestError, match="equal noise levels"):
        unipc_schedule(20, shift=1e7)
