"""The networks of the published models by Diffusers' and transformers' own classes: names and shapes, no numbers.

Made with two layers, the second of which is then copied: Diffusers takes a second for ten, even on the meta device.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

from frameloom.weights.header import TensorEntry, stored_bytes

T2V_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
T2V_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
CLIP_BRANCH = {"image_dim": 1280, "added_kv_proj_dim": 5120}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Wan 2.1 T2V 1.3B": T2V_1_3B,
    "Wan 2.1 T2V 14B, or an expert of Wan 2.2 T2V A14B": T2V_14B,
    "Wan 2.1 I2V 14B": T2V_14B | CLIP_BRANCH | {"in_channels": 36},
    "Wan 2.1 FLF2V 14B": T2V_14B | CLIP_BRANCH | {"in_channels": 36, "pos_embed_seq_len": 514},
    "Wan 2.2 I2V A14B": T2V_14B | {"in_channels": 36},
    "Wan 2.2 TI2V 5B": {
        "num_attention_heads": 24,
        "ffn_dim": 14336,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
    },
    "Wan 2.1 VACE 1.3B": T2V_1_3B | {"vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96},
    "Wan 2.1 VACE 14B": T2V_14B | {"vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96},
}
VAES: dict[str, dict[str, Any]] = {
    "Wan VAE 2.1": {},
    "Wan VAE 2.2": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}
UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
CLIP = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}

Shapes = dict[str, tuple[int, ...]]


def transformer(**config: Any) -> Shapes:
    """A Wan DiT in Diffusers' names, with VACE where the config has its layers."""
    few: dict[str, Any] = {"in_channels": 16, "out_channels": 16} | config | {"num_layers": 2}
    if "vace_layers" not in config:
        return _grown(_made(WanTransformer3DModel, few), "blocks", config["num_layers"])
    shapes = _made(WanVACETransformer3DModel, few | {"vace_layers": [0, 1]})
    return _grown(_grown(shapes, "blocks", config["num_layers"]), "vace_blocks", len(config["vace_layers"]))


@cache
def published_transformer(model: str) -> Shapes:
    """The DiT of a published model."""
    return transformer(**TRANSFORMERS[model])


def vae(**config: Any) -> Shapes:
    """A Wan VAE in Diffusers' names."""
    return _made(AutoencoderKLWan, config)


def umt5(**changes: Any) -> Shapes:
    """The text encoder in transformers' names, as its files hold it: the embedding table once."""
    config = UMT5 | {"feed_forward_proj": "gated-gelu"} | changes
    shapes = _made(UMT5EncoderModel, {"config": UMT5Config(**config | {"num_layers": 2})})
    del shapes["encoder.embed_tokens.weight"]
    return _grown(shapes, "encoder.block", config["num_layers"])


def clip(**changes: Any) -> Shapes:
    """The image encoder in transformers' names."""
    config = CLIP | changes
    shapes = _made(CLIPVisionModelWithProjection, {"config": CLIPVisionConfig(**config | {"num_hidden_layers": 2})})
    return _grown(shapes, "vision_model.encoder.layers", config["num_hidden_layers"])


def _made(kind: type, config: dict[str, Any]) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in kind(**config).state_dict().items()}


def _grown(shapes: Shapes, place: str, count: int) -> Shapes:
    """The same network with so many layers at `place`."""
    second = {name: shape for name, shape in shapes.items() if name.startswith(f"{place}.1.")}
    more = {name.replace(".1.", f".{i}.", 1): shape for i in range(2, count) for name, shape in second.items()}
    return shapes | more


def listed(shapes: Shapes, *, dtype: str = "BF16", file: str = "model.safetensors") -> dict[str, TensorEntry]:
    """Entries of a file that holds tensors of these shapes, one after another."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        size = stored_bytes(dtype, shape)
        entries[name] = TensorEntry(
            name=name, dtype=dtype, shape=shape, file=Path(file), offset=offset, size_bytes=size
        )
        offset += size
    return entries
