"""Builds small random Wan checkpoints with Diffusers' own classes, as `save_pretrained` writes them."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from frameloom.shapes.tokens import pieces

Kind = Literal[
    "one expert",
    "two experts",
    "per-token timesteps",
    "image",
    "image, two experts",
    "first and last image",
    "vace",
    "vace, two experts",
]
FROM_IMAGE: tuple[Kind, ...] = ("image", "image, two experts", "first and last image")
TEXT_DIM = 24
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 72,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}
"""A small one by itself; those of the checkpoints below have the dimensions of their VAE and text encoder."""
CLIP: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "gelu",
}
CLIP_TOKENS = 1 + (28 // 14) ** 2
VAE_21: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
VAE_22: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 6,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


def build_pipeline(kind: Kind, *, seed: int = 0) -> WanPipeline | WanImageToVideoPipeline | WanVACEPipeline:
    """A random pipeline whose prompt, image, timestep and experts all matter to the outcome."""
    torch.manual_seed(seed)
    per_token = kind == "per-token timesteps"
    vae_config = VAE_22 if per_token else VAE_21
    z_dim = vae_config["z_dim"]
    statistics = {"latents_mean": [0.05 * i for i in range(z_dim)], "latents_std": [1 + 0.1 * i for i in range(z_dim)]}
    is_pair = "two experts" in kind
    is_vace = kind.startswith("vace")
    transformer = _vace_transformer if is_vace else _image_transformer if kind in FROM_IMAGE else _transformer
    parts: dict[str, Any] = {
        "tokenizer": T5Tokenizer(vocab=pieces(), extra_ids=0),
        "text_encoder": _text_encoder(),
        "vae": AutoencoderKLWan(**vae_config, **statistics).eval(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": transformer(z_dim, kind),
        "transformer_2": transformer(z_dim, kind) if is_pair else None,
        "boundary_ratio": 0.875 if is_pair else None,
    }
    if is_vace:
        return WanVACEPipeline(**parts)
    parts["expand_timesteps"] = per_token
    if kind not in FROM_IMAGE:
        return WanPipeline(**parts)
    if not is_pair:
        parts |= {"image_encoder": _image_encoder(), "image_processor": _image_processor()}
    return WanImageToVideoPipeline(**parts)


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=256, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    return UMT5EncoderModel(config).eval()


def _image_encoder() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()


def _image_processor() -> CLIPImageProcessorPil:
    side = CLIP["image_size"]
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _image_transformer(z_dim: int, kind: Kind) -> WanTransformer3DModel:
    """With a mask and latents beside the noise; with CLIP's features, but for two experts."""
    branch: dict[str, Any] = {}
    if kind != "image, two experts":
        branch = {"image_dim": CLIP["hidden_size"], "added_kv_proj_dim": 32}
    if kind == "first and last image":
        branch["pos_embed_seq_len"] = 2 * CLIP_TOKENS
    return _transformer(z_dim, kind, in_channels=2 * z_dim + 4, **branch)


def _vace_transformer(z_dim: int, kind: Kind) -> WanVACETransformer3DModel:
    """With two blocks beside, the second after the last of three layers."""
    beside = {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 2 * z_dim + 8 * 8}
    return _transformer(z_dim, kind, WanVACETransformer3DModel, **beside)


def _transformer(
    channels: int,
    kind: Kind,
    network: type[WanTransformer3DModel | WanVACETransformer3DModel] = WanTransformer3DModel,
    **differences: Any,
) -> Any:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
    }
    model = network(**config | differences).eval()
    with torch.no_grad():  # as initialised, the text, the image and the control hardly move the outcome
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("text_embedder", "attn2", "image_embedder", "vace")):
                parameter.mul_(3)
            if "pos_embed" in name:
                parameter.normal_()
    return model


def save_checkpoint(folder: Path, kind: Kind = "one expert") -> Path:
    """Write the checkpoint of `build_pipeline` into `folder`."""
    build_pipeline(kind).save_pretrained(str(folder))
    return folder
