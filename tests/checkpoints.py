"""Builds small random Wan checkpoints with Diffusers' own classes, as `save_pretrained` writes them."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from frameloom.shapes.tokens import pieces

Kind = Literal["one expert", "two experts", "per-token timesteps"]
TEXT_DIM = 24
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


def build_pipeline(kind: Kind, *, seed: int = 0) -> WanPipeline:
    """A random pipeline whose prompt, timestep and experts all matter to the outcome."""
    torch.manual_seed(seed)
    per_token = kind == "per-token timesteps"
    vae_config = VAE_22 if per_token else VAE_21
    z_dim = vae_config["z_dim"]
    statistics = {"latents_mean": [0.05 * i for i in range(z_dim)], "latents_std": [1 + 0.1 * i for i in range(z_dim)]}
    return WanPipeline(
        tokenizer=T5Tokenizer(vocab=pieces(), extra_ids=0),
        text_encoder=_text_encoder(),
        vae=AutoencoderKLWan(**vae_config, **statistics).eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=_transformer(z_dim),
        transformer_2=_transformer(z_dim) if kind == "two experts" else None,
        boundary_ratio=0.875 if kind == "two experts" else None,
        expand_timesteps=per_token,
    )


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=256, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    return UMT5EncoderModel(config).eval()


def _transformer(channels: int) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
    ).eval()
    with torch.no_grad():  # as initialised, the text hardly moves the outcome
        for name, parameter in model.named_parameters():
            if "text_embedder" in name or "attn2" in name:
                parameter.mul_(3)
    return model


def save_checkpoint(folder: Path, kind: Kind = "one expert") -> Path:
    """Write the checkpoint of `build_pipeline` into `folder`."""
    build_pipeline(kind).save_pretrained(str(folder))
    return folder
