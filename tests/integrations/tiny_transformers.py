"""Small random transformers of Diffusers whose blocks are Wan's, inputs for each, and how they are taken and used."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from checkpoints import TRANSFORMER
from diffusers import (
    ChronoEditTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from frameloom.engine.rewrites import policy_of
from frameloom.integrations.diffusers.report import Entry
from frameloom.integrations.diffusers.swap import unswap
from frameloom.integrations.diffusers.transformers import take_transformer

TEXT_TOKENS = 512  # as Diffusers' processors expect them where an image comes with the text
WORDS = 30
IMAGE = {"in_channels": 9, "image_dim": 24, "added_kv_proj_dim": 64}
FACE = {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 24,
    "added_kv_proj_dim": 64,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
SIZE = (3, 6, 10)  # latent frames, rows, columns


@dataclass(frozen=True)
class Tiny:
    """A class, its configuration, and what it is called with beside latents, timestep and text."""

    kind: type
    config: dict[str, Any] = field(default_factory=dict)
    more: Callable[[int, torch.dtype], dict[str, Any]] = lambda batch, dtype: {}
    per_token: bool = False

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        """Random weights under which the prompt matters; what Diffusers keeps in float32 stays so."""
        torch.manual_seed(seed)
        model = self.kind(**(TRANSFORMER | self.config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".norm" in name and name.endswith("weight"):
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if any(part in name for part in ("attn2", "text_embedder", "image_embedder", "vace")):
                    parameter.mul_(1.5)
        kept = set(model._keep_in_fp32_modules)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
        return model

    def inputs(self, seed: int = 1, batch: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Arguments of the forward."""
        generator = torch.Generator().manual_seed(seed)
        channels = (TRANSFORMER | self.config)["in_channels"]
        x = torch.randn(batch, channels, *SIZE, generator=generator).to(dtype)
        text = torch.randn(batch, TEXT_TOKENS, TRANSFORMER["text_dim"], generator=generator).to(dtype)
        text[:, WORDS:] = 0
        timestep = torch.full((batch,), 500.0 - seed)
        if self.per_token:
            frames = torch.full((batch, SIZE[0]), 500.0 - seed)
            frames[:, 0] = 0
            timestep = frames.repeat_interleave(SIZE[1] * SIZE[2] // 4, dim=1)
        named = {"hidden_states": x, "timestep": timestep, "encoder_hidden_states": text}
        if "image_dim" in self.config:
            images = batch * (2 if "pos_embed_seq_len" in self.config else 1)
            named["encoder_hidden_states_image"] = torch.randn(images, 7, 24, generator=generator).to(dtype)
        return named | self.more(batch, dtype)


def _control(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "control_hidden_states": torch.randn(batch, 6, *SIZE, generator=generator).to(dtype),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]).to(dtype),
    }


def _face(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "pose_hidden_states": torch.randn(batch, 4, SIZE[0] - 1, *SIZE[1:], generator=generator).to(dtype),
        "face_pixel_values": torch.randn(batch, 3, 5, 16, 16, generator=generator).to(dtype),
    }


def _forcing(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"enable_diffusion_forcing": True, "timestep": torch.tensor([[0.0, 300.0, 700.0]]).expand(batch, -1)}


TINY = {
    "wan": Tiny(WanTransformer3DModel),
    "wan without cross norm": Tiny(WanTransformer3DModel, {"cross_attn_norm": False}),
    "wan with image": Tiny(WanTransformer3DModel, IMAGE),
    "wan with two images": Tiny(WanTransformer3DModel, IMAGE | {"pos_embed_seq_len": 14}),
    "wan with times of tokens": Tiny(WanTransformer3DModel, per_token=True),
    "vace": Tiny(WanVACETransformer3DModel, {"vace_layers": [0, 1], "vace_in_channels": 6}, _control),
    "animate": Tiny(WanAnimateTransformer3DModel, FACE, _face),
    "chronoedit": Tiny(
        ChronoEditTransformer3DModel,
        IMAGE | {"rope_temporal_skip_len": 8, "attention_head_dim": 36, "added_kv_proj_dim": 72},
    ),
    "skyreels": Tiny(SkyReelsV2Transformer3DModel),
    "skyreels with image": Tiny(SkyReelsV2Transformer3DModel, IMAGE),
    "skyreels by blocks of frames": Tiny(SkyReelsV2Transformer3DModel, {"num_frame_per_block": 3}),
    "skyreels with times of frames": Tiny(SkyReelsV2Transformer3DModel, more=_forcing),
}


def take(model: Any, exactness: str = "rounding") -> Entry | None:
    """Let it compute by ours."""
    return take_transformer("transformer", model, policy_of(exactness, ()))


def give_back(model: torch.nn.Module) -> None:
    """Restore it."""
    for module in model.modules():
        unswap(module)


@torch.no_grad()
def compute(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The velocity."""
    return model(**inputs).sample
