"""What a checkpoint is asked for when the user says nothing: size, frames, steps, guidance.

Sources, cited per line: [D] the defaults of the Diffusers pipelines, [W1] and [W2] generate.py and
wan/configs of the original Wan 2.1 and 2.2 repositories, [C] the checkpoint's own files.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from frameloom.errors import CheckpointError, RequestError
from frameloom.models.spec import LARGEST, TransformerSpec

# The default of the original Wan code (shared_config.py, sample_neg_prompt). Not ours: the reference
# pipelines use an empty one, and equal numbers are the promise. Give it as negative_prompt for the original
# behaviour.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """Generation defaults: sizes in pixels, fps in frames per second. Unchanged they fit any Wan model."""

    width: int = 832  # [D] 480 x 832, also [W1] --size of T2V-1.3B
    height: int = 480
    num_frames: int = 81  # [D], [W1] frame_num, [W2] frame_num; what the model was trained on, too
    fps: int = 16  # [W1] sample_fps, [W2] sample_fps of A14B
    steps: int = 50  # [D], [W1] sample_steps
    guidance_scale: float = 5.0  # [D], [W1] sample_guide_scale
    guidance_scale_2: float | None = None  # of transformer_2; None: the same as guidance_scale [D]
    # None: flow_shift of the checkpoint's scheduler_config.json, which is what Diffusers computes with. The
    # original code often differs (T2V-A14B 12 for 3, I2V-A14B 5 for 3, T2V 5 for 3): give it to follow that
    # code.
    flow_shift: float | None = None
    negative_prompt: str = ""  # [D] an absent one means the empty one
    dtype: str | None = None  # of transformer and text encoder; None: as stored


# The published weights are run in bfloat16 by the documentation of [D] and by [W1] [W2] (param_dtype,
# t5_dtype), though some are stored as float32.
_PUBLISHED = Defaults(dtype="bfloat16")

# 14B too, though [W1] says 1280x720 for it: the flow_shift 3 of its scheduler [C] is the one for 480p.
_WAN21_T2V = _PUBLISHED
# [W1] sample_steps 40 for i2v. The 720P files describe the same network as the 480P ones.
_WAN21_I2V = replace(_PUBLISHED, steps=40)
# [W1] size of flf2v-14B; its steps stay 50.
_WAN21_FLF2V = replace(_PUBLISHED, width=1280, height=720)
# [W2] --size and sample_steps; sample_guide_scale there is (low noise, high noise): (3, 4) and (3.5, 3.5).
_WAN22_T2V = replace(_PUBLISHED, width=1280, height=720, steps=40, guidance_scale=4.0, guidance_scale_2=3.0)
_WAN22_I2V = replace(_PUBLISHED, width=1280, height=720, steps=40, guidance_scale=3.5, guidance_scale_2=3.5)
# [W2] size, frame_num and sample_fps of ti2v-5B.
_WAN22_TI2V = replace(_PUBLISHED, width=1280, height=704, num_frames=121, fps=24)

# (dim, layers, input channels, one timestep per token, two experts, CLIP branch) -> defaults, facts of the
# published transformer/config.json files [C]. A flf2v transformer is an i2v one with a table of image
# positions.
_Facts = tuple[int, int, int, bool, bool, bool]
_KNOWN: Mapping[_Facts, Defaults] = {
    (1536, 30, 16, False, False, False): _WAN21_T2V,  # 2.1 T2V-1.3B
    (5120, 40, 16, False, False, False): _WAN21_T2V,  # 2.1 T2V-14B
    (5120, 40, 36, False, False, True): _WAN21_I2V,  # 2.1 I2V-14B, 480P and 720P
    (5120, 40, 16, False, True, False): _WAN22_T2V,  # 2.2 T2V-A14B
    (5120, 40, 36, False, True, False): _WAN22_I2V,  # 2.2 I2V-A14B
    (3072, 30, 48, True, False, False): _WAN22_TI2V,  # 2.2 TI2V-5B
}


def defaults_for(
    transformer: TransformerSpec,
    *,
    two_experts: bool = False,
    expand_timesteps: bool = False,
    own: Mapping[str, Any] | None = None,
) -> Defaults:
    """Defaults of a checkpoint, from its architecture; `own` (its frameloom.json) wins, key by key.

    `two_experts` says that it has a transformer_2. The pipeline class adds nothing: what it could tell apart
    the input channels do. An unknown but valid architecture gets the values of the reference pipelines.
    Raises CheckpointError if `own` has an unknown key or a value out of range.
    """
    image_branch = transformer.image_dim is not None
    facts = (transformer.dim, transformer.num_layers, transformer.in_channels)
    found = _KNOWN.get((*facts, expand_timesteps, two_experts, image_branch), Defaults())
    if found is _WAN21_I2V and transformer.pos_embed_seq_len is not None:
        found = _WAN21_FLF2V
    return replace(found, **_checked(own or {}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A recipe that replaces a checkpoint's own: its scheduler, and defaults by name."""

    scheduler: Mapping[str, Any]
    defaults: Mapping[str, Any]


PRESETS: Mapping[str, Preset] = {
    # LightX2V's distilled LoRAs and models of 4 steps: no guidance, so that the empty prompt is not predicted either.
    "lightning": Preset(
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0, "even_levels": True},
        defaults={"steps": 4, "guidance_scale": 1.0, "guidance_scale_2": None, "flow_shift": 5.0},
    ),
}


def preset_of(name: str | None) -> Preset | None:
    """The recipe of a name, None for none. Raises RequestError."""
    if name is not None and name not in PRESETS:
        raise RequestError(f"there is no preset {name!r}; use {' or '.join(PRESETS)}")
    return None if name is None else PRESETS[name]


# What the scheduler_config.json of all Diffusers repositories of Wan says, but for flow_shift.
_SCHEDULER: Mapping[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "solver_type": "bh2",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


def scheduler_of(transformer: TransformerSpec, *, expand_timesteps: bool) -> dict[str, Any]:
    """The scheduler of a checkpoint that brings none, as a scheduler_config.json.

    flow_shift is that of the Diffusers repository of the same model [C]: 16 for FLF2V, 5 for TI2V-5B, 3 for all others,
    so that a model makes the same video from whichever files. The original code [W1] [W2] takes 5 for T2V, 5 for I2V
    (3 at 480p), 12 for T2V-A14B and 5 for I2V-A14B where that has 3: give flow_shift to follow it.
    """
    flow_shift = 16.0 if transformer.pos_embed_seq_len is not None else 5.0 if expand_timesteps else 3.0
    return {**_SCHEDULER, "flow_shift": flow_shift}


def boundary_ratio_of(transformer: TransformerSpec) -> float:
    """Where two experts change place: 0.875 for text, 0.9 for images, [C] and [W2] alike."""
    return 0.875 if transformer.in_channels == transformer.out_channels else 0.9


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= LARGEST


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # type: ignore[operator]


def _is_guidance(value: object) -> bool:
    return _is_number(value) and value >= 0  # type: ignore[operator]


# Per key of frameloom.json: the test, and what it asks for.
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "width": (_is_count, "a number of pixels above 0"),
    "height": (_is_count, "a number of pixels above 0"),
    "num_frames": (lambda value: _is_count(value) and value % 4 == 1, "a whole number 4k+1, as 81"),
    "fps": (_is_count, "a whole number above 0"),
    "steps": (_is_count, "a whole number above 0"),
    "guidance_scale": (_is_guidance, "a number, 0 or more"),
    "guidance_scale_2": (lambda value: value is None or _is_guidance(value), "a number, 0 or more, or null"),
    "flow_shift": (
        lambda value: value is None or (_is_number(value) and value > 0),
        "a number above 0, or null",
    ),
    "negative_prompt": (lambda value: isinstance(value, str), "a text"),
    "dtype": (lambda value: value is None or value in DTYPES, f"null or one of {', '.join(DTYPES)}"),
}


def _checked(own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` with numbers as floats where a float is meant."""
    names = [field.name for field in fields(Defaults)]
    for key, value in own.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(names)}"
            raise CheckpointError(f"frameloom.json has the unknown key '{key}'; {hint}")
        test, wanted = _RULES[key]
        if not test(value):
            raise CheckpointError(f"frameloom.json has {key} {value!r}; it must be {wanted}")
    floats = {key for key in ("guidance_scale", "guidance_scale_2", "flow_shift") if own.get(key) is not None}
    return {key: float(value) if key in floats else value for key, value in own.items()}
