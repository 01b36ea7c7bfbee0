"""The published models by name, as checkpoints without files: their configs and the shapes of their tensors.

Sources: the model_index.json and config.json files of the Diffusers repositories of Wan 2.1 and 2.2.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from frameloom.models.encoders import build_text_encoder
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.vace import make_dit
from frameloom.models.wan_vae import WanVAE
from frameloom.weights.assemble import assemble
from frameloom.weights.checkpoint import Checkpoint, Component
from frameloom.weights.header import TensorEntry

_SMALL: Mapping[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_LARGE: Mapping[str, Any] = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_TI2V: Mapping[str, Any] = {
    "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48,
}  # fmt: skip
_IMAGE: Mapping[str, Any] = {**_LARGE, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_VACE_SMALL: Mapping[str, Any] = {**_SMALL, "vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96}
_VACE_LARGE: Mapping[str, Any] = {**_LARGE, "vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96}
# Of each name: the config of its transformers, and how many there are.
_MODELS: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "Wan2.1-T2V-1.3B": (_SMALL, 1),
    "Wan2.1-T2V-14B": (_LARGE, 1),
    "Wan2.1-I2V-14B-480P": (_IMAGE, 1),
    "Wan2.1-I2V-14B-720P": (_IMAGE, 1),
    "Wan2.1-FLF2V-14B-720P": ({**_IMAGE, "pos_embed_seq_len": 514}, 1),
    "Wan2.1-VACE-1.3B": (_VACE_SMALL, 1),
    "Wan2.1-VACE-14B": (_VACE_LARGE, 1),
    "Wan2.2-T2V-A14B": (_LARGE, 2),
    "Wan2.2-I2V-A14B": ({**_LARGE, "in_channels": 36}, 2),
    "Wan2.2-TI2V-5B": (_TI2V, 1),
}
NAMES = tuple(_MODELS)
"""As their owner calls them, without what stands before and behind."""

_TEXT: Mapping[str, Any] = {
    "model_type": "umt5", "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_CLIP: Mapping[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
}  # fmt: skip
_CLIP_PARAMETERS = 630_766_080  # of the vision tower of ViT-H/14
_VAE_22: Mapping[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "clip_output": False,
    "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,  # nothing is decoded with them
}  # fmt: skip
_NOWHERE = Path("published")


def published(name: str) -> Checkpoint | None:
    """The model that is meant by "Wan-AI/Wan2.1-T2V-14B-Diffusers" or "wan2.2-t2v-a14b"; None where none is.

    Nothing is fetched. Tensors are listed as they are computed with, in bfloat16, but for the VAE's.
    """
    known = {one.lower(): one for one in _MODELS}
    found = known.get(_plain(name))
    if found is None:
        return None
    config, num_experts = _MODELS[found]
    is_ti2v = config is _TI2V
    transformer = {**config, "attention_head_dim": 128, "text_dim": 4096}
    vae = _VAE_22 if is_ti2v else {}
    components = {
        "transformer": without_files("transformer", transformer, _dit(transformer)),
        "vae": without_files("vae", vae, _vae(vae), dtype="F32", itemsize=4),
        "text_encoder": without_files("text_encoder", _TEXT, build_text_encoder(_TEXT)),
        "tokenizer": without_files("tokenizer", {}, nn.Module()),
    }
    if num_experts == 2:
        components["transformer_2"] = without_files("transformer_2", transformer, _dit(transformer))
    if config.get("image_dim"):
        components["image_encoder"] = _image_encoder()
    return assemble(components, facts={"expand_timesteps": is_ti2v}, name=f"Wan-AI/{found}", path=_NOWHERE)


def _plain(name: str) -> str:
    return re.sub(r"-diffusers$", "", name.lower().rpartition("/")[2])


def _dit(config: Mapping[str, Any]) -> nn.Module:
    with on_meta():
        return make_dit(TransformerSpec.from_config(config))


def _vae(config: Mapping[str, Any]) -> nn.Module:
    with on_meta():
        return WanVAE(VaeSpec.from_config(config))


def without_files(
    name: str, config: Mapping[str, Any], network: nn.Module, *, dtype: str = "BF16", itemsize: int = 2
) -> Component:
    """A component that lies nowhere: its config, and the shapes of a network that may be on the meta device."""
    tensors = {
        key: _entry(key, dtype, tuple(value.shape), value.numel() * itemsize)
        for key, value in network.named_parameters()
    }
    return Component(
        name=name, folder=_NOWHERE, described_by=_NOWHERE / name / "config.json", class_name="", config=config,
        files=(), tensors=tensors,
    )  # fmt: skip


def _image_encoder() -> Component:
    """Its parameters as one tensor: only their bytes count, and building it would import transformers."""
    whole = _entry("vision_model", "F32", (_CLIP_PARAMETERS,), 4 * _CLIP_PARAMETERS)
    return replace(without_files("image_encoder", _CLIP, nn.Module()), tensors={whole.name: whole})


def _entry(name: str, dtype: str, shape: tuple[int, ...], size_bytes: int) -> TensorEntry:
    return TensorEntry(name=name, dtype=dtype, shape=shape, file=_NOWHERE, offset=0, size_bytes=size_bytes)
