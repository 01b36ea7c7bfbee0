"""Writes the trained networks as a checkpoint in Diffusers layout, and its card."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.wan_vae import WanVAE
from frameloom.shapes.tokens import write_tokenizer
from frameloom.shapes.train_dit import NOISE_SHIFT, TEXT_CONFIG, LatentClips, TextAndVideo
from frameloom.shapes.train_vae import SPEC
from frameloom.shapes.world import FPS, NUM_FRAMES, SIZE

WEIGHTS = "diffusion_pytorch_model.safetensors"
_DIFFUSERS = "0.35.0"  # the layout's version, as a reader of the files expects one
DEFAULTS = {
    "width": SIZE,
    "height": SIZE,
    "num_frames": NUM_FRAMES,
    "fps": FPS,
    "steps": 25,
    "guidance_scale": 3.0,
    "flow_shift": NOISE_SHIFT,
}
INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": _DIFFUSERS,
    "boundary_ratio": None,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": _DIFFUSERS,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "flow_shift": NOISE_SHIFT,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "thresholding": False,
    "timestep_spacing": "linspace",
    "use_flow_sigmas": True,
}


def export(folder: Path, vae: WanVAE, networks: TextAndVideo, clips: LatentClips) -> None:
    """Write the checkpoint into `folder`. The DiT is stored in float16 (half the size), the rest in float32."""
    latents = {"latents_mean": clips.mean.tolist(), "latents_std": clips.std.tolist()}
    _write_json(folder / "model_index.json", INDEX)
    _write_json(folder / "frameloom.json", DEFAULTS)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "vae" / "config.json", _vae_config(vae.spec) | latents)
    _write_json(folder / "transformer" / "config.json", _transformer_config(networks.transformer.spec))
    _write_json(folder / "text_encoder" / "config.json", TEXT_CONFIG | {"architectures": ["UMT5EncoderModel"]})
    _write_weights(folder / "vae" / WEIGHTS, vae.state_dict())
    _write_weights(folder / "transformer" / WEIGHTS, networks.transformer.state_dict(), dtype=torch.float16)
    text = {k: v for k, v in networks.text_encoder.state_dict().items() if "embed_tokens" not in k}
    _write_weights(folder / "text_encoder" / "model.safetensors", text)
    write_tokenizer(folder / "tokenizer")


def read_back(folder: Path) -> tuple[WanVAE, dict[str, Tensor]]:
    """The VAE that `export` wrote into `folder`, and the weights of its TextAndVideo, in float32."""
    vae = WanVAE(SPEC)
    vae.load_state_dict(load_file(folder / "vae" / WEIGHTS))
    networks = {
        "transformer": load_file(folder / "transformer" / WEIGHTS),
        "text_encoder": load_file(folder / "text_encoder" / "model.safetensors"),
    }
    networks["text_encoder"]["encoder.embed_tokens.weight"] = networks["text_encoder"]["shared.weight"]
    return vae.eval(), {f"{part}.{name}": t.float() for part, found in networks.items() for name, t in found.items()}


def _vae_config(spec: VaeSpec) -> dict[str, Any]:
    config = asdict(spec)
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": _DIFFUSERS,
        "attn_scales": [],
        "dropout": 0.0,
    } | config


def _transformer_config(spec: TransformerSpec) -> dict[str, Any]:
    name = {"_class_name": "WanTransformer3DModel", "_diffusers_version": _DIFFUSERS}
    return name | {"qk_norm": "rms_norm_across_heads"} | asdict(spec)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    save_file({name: t.detach().to(dtype).contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
