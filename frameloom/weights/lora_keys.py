"""How files of adapters name what they change: prefixes, suffixes and module names of every dialect. Torch-free.

Facts: PEFT and Diffusers (lora_A, transformer.), kohya and musubi (lora_unet_, dots as underscores), ComfyUI
(diffusion_model., original names), DiffSynth and LightX2V (no prefix; .diff, .diff_b, .diff_m), LyCORIS (hada_, lokr_).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from frameloom.types import Expert
from frameloom.weights.keymap import DIT_ORIGINAL

Part = Literal[
    "down", "up", "mid", "up_bias", "alpha", "magnitude", "diff", "diff_b", "set",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
]  # fmt: skip

_LYCORIS: tuple[Part, ...] = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
_SUFFIXES: Mapping[str, Part] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    ".diff_m": "diff",  # of the modulation beside the layers of a block, or of the head
    ".set_weight": "set",
    **{f".{part}": part for part in _LYCORIS},
}
_MODULATION = ".diff_m"
_ADAPTER_NAME = re.compile(r"\.default(?=\.|$)")  # what PEFT calls the only adapter of a model

# In front of module names, in any combination; those that end in an underscore have underscores for dots.
_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.", "pipe.dit.",
    "model.", "unet.", "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
_EXPERTS: Mapping[str, Expert] = {"transformer.": "high", "transformer_2.": "low"}
NO_LAYER = "this model has no such layer"
"""Why a key is not used that is of nothing known."""

_TEXT_ENCODER = re.compile(r"lora_te\d*_|text_encoder|text_model|lora_prior_te")
_IMAGE = re.compile(r"[kv]_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder")
_NOISE = re.compile(r"(?<![a-z])(high|low)(?:[-_ ]?noise)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key taken apart. `expert`: which of two Diffusers' prefixes name, None where there is neither."""

    name: str
    module: str
    part: Part
    expert: Expert | None


def split(name: str) -> Key | None:
    """A key taken apart; None where its suffix says nothing that an adapter is made of."""
    plain = _ADAPTER_NAME.sub("", name)
    for suffix, part in _SUFFIXES.items():
        if plain.endswith(suffix):
            module, expert = _bare(plain.removesuffix(suffix))
            if suffix == _MODULATION:
                module = f"{module}.modulation"
            return Key(name=name, module=module, part=part, expert=expert)
    return None


def _bare(module: str) -> tuple[str, Expert | None]:
    """The name of a module without prefixes, and the expert that one of them names."""
    expert: Expert | None = None
    while prefix := next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None):
        expert = _EXPERTS.get(prefix, expert)
        module = module.removeprefix(prefix)
    return module.replace(".processor.", "."), expert


def module_names(parameters: Iterable[str]) -> dict[str, str]:
    """What a module, or a parameter that belongs to a block itself, is called anywhere: its native name by each."""
    found: dict[str, str] = {}
    for parameter in parameters:
        native = _module(parameter)
        for name in _spellings(native, DIT_ORIGINAL.from_native(parameter)):
            found[name] = native
    return found


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight").removesuffix(".bias")


def _spellings(native: str, original: str | None) -> Iterator[str]:
    for name in (native, native if original is None else _module(original)):
        short = name.removesuffix(".0") if name.endswith(".to_out.0") else name
        for spelling in (name, short):
            yield spelling
            yield spelling.replace(".", "_")


def expert_of(name: str) -> Expert | None:
    """Which of two experts a file, by its name, is for: high_noise_model, HighNoise, x_LOW, ...; None: not said."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    said = {word.lower() for word in _NOISE.findall(spaced)}
    return ("high" if "high" in said else "low") if len(said) == 1 else None


def stranger(module: str) -> str:
    """Why a key whose module (without prefixes) the network does not have is not used."""
    if _TEXT_ENCODER.match(module):
        return "it is for the text encoder, which stays as it is"
    if _IMAGE.search(module):
        return "this model has no image branch"
    if module.startswith("vace"):
        return "this model has no VACE blocks"
    return NO_LAYER
