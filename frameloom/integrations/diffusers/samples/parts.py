"""Parts of random pipelines: VAEs, text encoders, a tokenizer, what sees pictures, and pictures."""

from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from PIL import Image
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    UMT5Config,
    UMT5EncoderModel,
)

from frameloom.integrations.diffusers.samples.sample import Scale, of_diffusers

TEXT_DIM = 24
IMAGE_DIM = 20
_Z = 16
_MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
_PICTURE = "<|image_pad|>"
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def wan_vae(scale: Scale, *, z_dim: int = _Z) -> Any:
    """Wan 2.1's, 8 pixels of a picture in a cell."""
    width = {"base_dim": 96} if scale.full else {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    return of_diffusers("AutoencoderKLWan", **width, z_dim=z_dim, **_statistics(z_dim))


def wan_22_vae(scale: Scale, *, z_dim: int = 48, in_channels: int = 12) -> Any:
    """Wan 2.2's, 16 pixels of a picture in a cell."""
    small = {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    width = {"base_dim": 160, "decoder_base_dim": 256} if scale.full else small
    return of_diffusers(
        "AutoencoderKLWan", **width, z_dim=z_dim, is_residual=True, in_channels=in_channels, out_channels=12,
        patch_size=2, scale_factor_spatial=16, **_statistics(z_dim),
    )  # fmt: skip


def qwen_vae(scale: Scale, *, channels: int = 3) -> Any:
    """Qwen-Image's: Wan 2.1's under other names. `channels` is 4 where pictures have layers."""
    width = {"base_dim": 96} if scale.full else {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    return of_diffusers("AutoencoderKLQwenImage", **width, z_dim=_Z, input_channels=channels, **_statistics(_Z))


def umt5(*, dim: int = TEXT_DIM) -> UMT5EncoderModel:
    """Wan's text encoder."""
    config = UMT5Config(
        vocab_size=len(tokenizer()), d_model=dim, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return UMT5EncoderModel(config)


def qwen_text(*, layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen-Image's text encoder, which sees pictures too; 16 wide."""
    words = tokenizer()
    marks = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in _SEEN.items()}
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(words), "rope_theta": 1e6, "bos_token_id": 0, "eos_token_id": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks))


_SEEN = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}


def tokenizer() -> Qwen2Tokenizer:
    """One token for each byte, and the marks of a conversation: it needs no file."""
    pieces = [*_MARKS, *_bytes()]
    made = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], chat_template=_TEMPLATE)
    made.add_special_tokens({"additional_special_tokens": list(_MARKS[1:])})
    return made


class Seeing:
    """Stands for a processor of Qwen's, which needs torchvision: a prompt's pictures as patches, and room for them."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)

    def __call__(self, text: Any, images: Any = None, **asked: Any) -> BatchFeature:
        """As Qwen's: a row of tokens for each text, with as many marks for a picture as the encoder makes of it."""
        texts = [text] if isinstance(text, str) else list(text)
        seen: dict[str, Any] = {}
        if images is not None:
            seen = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = iter((seen["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist())
            pieces = [one.split(_PICTURE) for one in texts]
            texts = [first + "".join(_PICTURE * next(counts) + one for one in rest) for first, *rest in pieces]
        known = {name: asked[name] for name in ("padding", "padding_side", "truncation", "max_length") if name in asked}
        words = self.tokenizer(texts, return_tensors="pt", **known)
        if seen:
            mark = self.tokenizer.convert_tokens_to_ids(_PICTURE)
            seen["mm_token_type_ids"] = (words["input_ids"] == mark).long()
        return BatchFeature({**words, **seen})

    def apply_chat_template(self, messages: Any, **asked: Any) -> Any:
        """A conversation as text."""
        return self.tokenizer.apply_chat_template(messages, **asked)


def _bytes() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary, as GPT-2's."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(b) for b in sorted(printing)] + [chr(0x100 + i) for i in range(256 - len(printing))]


def clip() -> dict[str, Any]:
    """What sees the first picture of image-to-video, and what fits pictures to it; 2x2 patches and a class token."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=24, projection_dim=8, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return {"image_encoder": CLIPVisionModelWithProjection(config), "image_processor": processor}


def flow_scheduler(**config: Any) -> Any:
    """Euler steps along a flow."""
    return of_diffusers("FlowMatchEulerDiscreteScheduler", **config)


def unipc() -> Any:
    """Wan's own scheduler."""
    return of_diffusers(
        "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


class Lenient(ModelMixin, ConfigMixin):
    """Stands where Cosmos wants a guardrail, and lets all pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.register_buffer("nothing", torch.zeros(1), persistent=False)

    def check_text_safety(self, prompt: str) -> bool:
        """Whatever it says."""
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        """Whatever they show."""
        return frames


def picture(scale: Scale, *, seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((scale.width, scale.height), Image.Resampling.BICUBIC)


def video(scale: Scale) -> list[Image.Image]:
    """A picture that becomes another."""
    first, last = picture(scale, seed=1), picture(scale, seed=2)
    return [Image.blend(first, last, i / max(1, scale.frames - 1)) for i in range(scale.frames)]


def _statistics(z_dim: int) -> dict[str, list[float]]:
    return {"latents_mean": [0.01 * i for i in range(z_dim)], "latents_std": [1 + 0.02 * i for i in range(z_dim)]}
