"""Reading scheduler_config.json: what is honoured, what is refused, and that each refusal says what to do."""

import warnings

import pytest
import torch

from frameloom.errors import CheckpointError
from frameloom.sampling.flow import Euler
from frameloom.sampling.unipc import UniPC, make_sampler

with warnings.catch_warnings():  # importing the reference may warn about optional packages; not ours to fix
    warnings.simplefilter("ignore")
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
WAN = UNIPC | {
    "_diffusers_version": "0.33.0.dev0",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "lower_order_final": True,
    "thresholding": False,
    "disable_corrector": [],
    "flow_shift": 3.0,
}


def test_the_config_of_wan_gives_unipc():
    sampler = make_sampler(WAN, 50)
    assert isinstance(sampler, UniPC)
    assert sampler.schedule.num_steps == 50


@pytest.mark.parametrize("reference", [UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_every_option_that_the_reference_writes_is_known(reference):
    config = dict(reference().config) | {"_class_name": reference.__name__}
    config |= (
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if reference is UniPCMultistepScheduler else {}
    )
    assert make_sampler(config, 3).schedule.num_steps == 3


@pytest.mark.parametrize(("config", "sampler_class"), [(UNIPC, UniPC), (EULER, Euler)])
def test_absent_keys_mean_the_default_of_the_reference(config, sampler_class):
    classes = {c.__name__: c for c in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)}
    reference = classes[config["_class_name"]].from_config(config)
    full = dict(reference.config) | {"_class_name": config["_class_name"]}
    bare, explicit = make_sampler(config, 6), make_sampler(full, 6)
    assert isinstance(bare, sampler_class)
    assert bare.start().sampler == explicit.start().sampler
    reference.set_timesteps(6)
    assert torch.equal(bare.schedule.sigmas, reference.sigmas)


def test_leftovers_of_a_swapped_scheduler_are_ignored():
    swapped = dict(FlowMatchEulerDiscreteScheduler.from_config(dict(WAN), shift=5.0).config)
    swapped["_class_name"] = "FlowMatchEulerDiscreteScheduler"
    assert "solver_order" in swapped
    assert make_sampler(swapped, 4).start().sampler == make_sampler(EULER | {"shift": 5.0}, 4).start().sampler


def test_the_solver_names_of_dpm_solver_mean_bh2():
    assert (
        make_sampler(UNIPC | {"solver_type": "midpoint"}, 4).start().sampler == make_sampler(UNIPC, 4).start().sampler
    )


@pytest.mark.parametrize("name", ["UniPCScheduler", "EulerDiscreteScheduler", None, 7])
def test_an_unknown_class_is_refused_with_the_supported_ones_and_the_nearest(name):
    nearest = "FlowMatchEulerDiscreteScheduler" if name == "EulerDiscreteScheduler" else "UniPCMultistepScheduler"
    with pytest.raises(CheckpointError) as caught:
        make_sampler(WAN | {"_class_name": name}, 4)
    message = str(caught.value)
    assert repr(name) in message
    assert "UniPCMultistepScheduler and FlowMatchEulerDiscreteScheduler" in message
    if isinstance(name, str):
        assert message.endswith(nearest)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "epsilon"),
        ("prediction_type", "v_prediction"),
        ("use_flow_sigmas", False),
        ("thresholding", True),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("use_dynamic_shifting", True),
        ("shift_terminal", 0.1),
        ("final_sigmas_type", "sigma_min"),
        ("lower_order_final", False),
        ("predict_x0", False),
        ("solver_order", 4),
        ("solver_type", "bh3"),
        ("solver_p", {"_class_name": "DDIMScheduler"}),
        ("disable_corrector", 3),
        ("disable_corrector", ["0"]),
        ("flow_shift", "3"),
        ("flow_shift", 0),
        ("num_train_timesteps", 1000.5),
        ("num_train_timesteps", 0),
    ],
)
def test_a_unipc_option_that_we_do_not_compute_is_refused(key, value):
    with pytest.raises(CheckpointError, match=f"scheduler_config.json has {key}="):
        make_sampler(WAN | {key: value}, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dynamic_shifting", True),
        ("stochastic_sampling", True),
        ("invert_sigmas", True),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("shift_terminal", 0.02),
        ("shift", None),
        ("num_train_timesteps", True),
    ],
)
def test_an_euler_option_that_we_do_not_compute_is_refused(key, value):
    with pytest.raises(CheckpointError, match=f"scheduler_config.json has {key}="):
        make_sampler(EULER | {key: value}, 4)


@pytest.mark.parametrize(("key", "supported"), [("use_flow_sigmas", "True"), ("prediction_type", "'flow_prediction'")])
def test_an_absent_key_whose_default_we_do_not_compute_is_refused(key, supported):
    with pytest.raises(CheckpointError, match=f"leaves out, and so means, {key}=.*only {supported} is supported"):
        make_sampler({name: value for name, value in WAN.items() if name != key}, 4)


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(CheckpointError, match=r"'flow_shfit', which .* the nearest, 'flow_shift'"):
        make_sampler(WAN | {"flow_shfit": 5.0}, 4)
