"""Which checkpoint is asked for what, and what a frameloom.json may say."""

import dataclasses

import pytest

from frameloom.errors import CheckpointError
from frameloom.models.defaults import WAN_NEGATIVE_PROMPT, Defaults, defaults_for
from frameloom.models.spec import TransformerSpec

CLIP = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
TI2V_5B = {"num_attention_heads": 24, "num_layers": 30, "in_channels": 48, "out_channels": 48}


@pytest.mark.parametrize(
    ("spec", "facts", "wanted"),
    [
        ({"num_attention_heads": 12, "num_layers": 30}, {}, (832, 480, 81, 16, 50, 5.0, None)),  # 2.1 T2V-1.3B
        ({}, {}, (832, 480, 81, 16, 50, 5.0, None)),  # 2.1 T2V-14B
        (CLIP, {}, (832, 480, 81, 16, 40, 5.0, None)),  # 2.1 I2V-14B
        (CLIP | {"pos_embed_seq_len": 514}, {}, (1280, 720, 81, 16, 50, 5.0, None)),  # 2.1 FLF2V-14B
        ({}, {"two_experts": True}, (1280, 720, 81, 16, 40, 4.0, 3.0)),  # 2.2 T2V-A14B
        ({"in_channels": 36}, {"two_experts": True}, (1280, 720, 81, 16, 40, 3.5, 3.5)),  # 2.2 I2V-A14B
        (TI2V_5B, {"expand_timesteps": True}, (1280, 704, 121, 24, 50, 5.0, None)),  # 2.2 TI2V-5B
    ],
)
def test_published_checkpoints(spec, facts, wanted):
    found = defaults_for(TransformerSpec(**spec), **facts)
    values = (found.width, found.height, found.num_frames, found.fps, found.steps)
    assert (*values, found.guidance_scale, found.guidance_scale_2) == wanted
    assert (found.flow_shift, found.negative_prompt, found.dtype) == (None, "", "bfloat16")


def test_an_unknown_architecture_gets_the_values_of_the_reference():
    found = defaults_for(TransformerSpec(num_attention_heads=2, attention_head_dim=12, num_layers=2))
    assert found == Defaults()
    assert (found.width, found.height, found.steps, found.dtype) == (832, 480, 50, None)


def test_the_checkpoints_own_values_win():
    own = {"width": 96, "height": 64, "num_frames": 17, "fps": 8, "steps": 8, "guidance_scale": 2, "dtype": "float32"}
    own |= {"guidance_scale_2": None, "flow_shift": 3, "negative_prompt": "blur"}
    found = defaults_for(TransformerSpec(), two_experts=True, own=own)
    assert dataclasses.asdict(found) == own
    assert isinstance(found.guidance_scale, float)
    assert isinstance(found.flow_shift, float)
    assert defaults_for(TransformerSpec(), own={"steps": 4}) == dataclasses.replace(
        defaults_for(TransformerSpec()), steps=4
    )


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"step": 4}, r"unknown key 'step'; did you mean 'steps'\?"),
        ({"zzz": 4}, "unknown key 'zzz'; known are width, height"),
        ({"width": 0}, "width 0; it must be a number of pixels above 0"),
        ({"width": 96.0}, r"width 96\.0"),
        ({"height": True}, "height True"),
        ({"num_frames": 16}, r"num_frames 16; it must be a whole number 4k\+1"),
        ({"num_frames": -3}, "num_frames -3"),
        ({"fps": "16"}, "fps '16'"),
        ({"steps": None}, "steps None"),
        ({"guidance_scale": -1}, "guidance_scale -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"guidance_scale": True}, "guidance_scale True"),
        ({"guidance_scale_2": "x"}, "guidance_scale_2 'x'"),
        ({"flow_shift": 0}, "flow_shift 0"),
        ({"flow_shift": float("inf")}, "flow_shift inf"),
        ({"negative_prompt": None}, "negative_prompt None; it must be a text"),
        ({"dtype": "int8"}, "dtype 'int8'; it must be null or one of float32, bfloat16, float16"),
        ({"dtype": ["float32"]}, "dtype "),
    ],
)
def test_refuses_a_frameloom_json_it_cannot_honour(own, match):
    with pytest.raises(CheckpointError, match=match):
        defaults_for(TransformerSpec(), own=own)


def test_the_negative_prompt_of_the_original_is_there_on_request():
    assert WAN_NEGATIVE_PROMPT.startswith("色调艳丽，过曝")
    assert WAN_NEGATIVE_PROMPT.endswith("倒着走")
    assert WAN_NEGATIVE_PROMPT.count("，") == 27
