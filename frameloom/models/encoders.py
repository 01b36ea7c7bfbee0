"""The text encoder (UMT5) and image encoder (CLIP) of Wan, from transformers, which only this file imports.

Shapes: B prompts or images, L tokens, T tokens of an image (257), D channels.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor, nn

# Straight from the submodules: `from transformers import ...` would look at every optional library first.
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from frameloom.errors import CheckpointError, RequestError

JsonObject = Mapping[str, Any]

TEXT_LENGTH = 512  # tokens the Wan transformers were trained with (text_len of the original config.json)

# The encoder's embedding table has two names; files hold the second one.
TIED: Mapping[str, str] = {"encoder.embed_tokens.weight": "shared.weight"}

# Only what decides the numbers is taken from a config.json: other keys can make the library fetch code.
_UMT5_FIELDS = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "pad_token_id", "eos_token_id",
    "relative_attention_num_buckets", "relative_attention_max_distance",
    "layer_norm_epsilon", "feed_forward_proj",
)  # fmt: skip
_CLIP_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip


def clean_prompt(text: str) -> str:
    """Repair broken unicode, resolve HTML entities (also doubly escaped ones), collapse white space.

    As WanPipeline does before it tokenizes: it changes the tokens, so it is part of the model.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoder:
    """A filled UMT5 encoder and its tokenizer."""

    model: nn.Module
    tokenizer: Any

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise CheckpointError("the tokenizer has no pad_token, which fills prompts up; download it again")
        rows = self.model.get_parameter("shared.weight").shape[0]
        if len(self.tokenizer) > rows:
            raise CheckpointError(
                f"the tokenizer knows {len(self.tokenizer)} tokens, the text encoder only {rows}; "
                "take both from the same checkpoint"
            )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, max_sequence_length: int = TEXT_LENGTH) -> Tensor:
        """Embed prompts as (B, max_sequence_length, D) in the encoder's dtype, zeros past each prompt.

        Longer prompts are cut. The encoder runs on all `max_sequence_length` tokens, as the reference does: masked
        keys weigh exactly nothing, but a shorter run rounds differently, and that grows over the denoising steps.
        """
        if not prompts:
            raise RequestError("no prompt was given; give at least one, it may be empty")
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=max_sequence_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        table = self.model.get_parameter("shared.weight")
        mask_BL = tokens.attention_mask.to(table.device)
        x_BLD: Tensor = self.model(tokens.input_ids.to(table.device), mask_BL).last_hidden_state.to(table.dtype)
        return x_BLD.masked_fill(mask_BL[..., None] == 0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEncoder:
    """A filled CLIP vision tower and its image processor."""

    model: nn.Module
    processor: Any

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed images as (B, T, D), the states before the last layer: Wan was trained on these."""
        device = next(self.model.parameters()).device
        pixels_BCHW = self.processor(images=list(images), return_tensors="pt").pixel_values.to(device)
        states: Tensor = self.model(pixel_values=pixels_BCHW, output_hidden_states=True).hidden_states[-2]
        return states


def build_text_encoder(config: JsonObject, *, where: str = "text_encoder/config.json") -> nn.Module:
    """Build the UMT5 encoder on the meta device, in eval mode; load it with `tied=TIED`.

    Raises CheckpointError if the config describes no UMT5 encoder.
    """
    if config.get("model_type", "umt5") != "umt5":
        raise CheckpointError(f"{where} describes {config['model_type']!r}; Wan's text encoder is umt5")
    model: nn.Module = _build(UMT5EncoderModel, UMT5Config, _only(config, _UMT5_FIELDS, where=where), where=where)
    return model


def text_encoder_keeps_fp32(dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Which UMT5 weights stay float32 when the rest is loaded as `dtype`: `wo`, for float16 alone.

    It overflows there (the reference's `_keep_in_fp32_modules`, which spares bfloat16).
    """
    return lambda name: dtype == torch.float16 and "wo" in name.split(".")


def build_image_encoder(config: JsonObject, *, where: str = "image_encoder/config.json") -> nn.Module:
    """Build the CLIP vision tower on the meta device, in eval mode. Raises CheckpointError.

    Its files may use other names: load them with `rename=image_encoder_key`.
    """
    vision = config.get("vision_config", config)  # a config.json of the whole CLIP nests it
    model: nn.Module = _build(CLIPVisionModel, CLIPVisionConfig, _only(vision, _CLIP_FIELDS, where=where), where=where)
    # Not persistent, so no file holds it: one position per patch and one for the class token.
    positions = torch.arange(model.get_parameter("embeddings.position_embedding.weight").shape[0])
    model.get_submodule("embeddings").register_buffer("position_ids", positions[None], persistent=False)
    return model


def image_encoder_key(name: str) -> str | None:
    """The module's name of a stored CLIP tensor; None for parts that Wan does not use."""
    if name.startswith("visual_projection.") or name.endswith(".position_ids"):
        return None
    return name.removeprefix("vision_model.")


def load_tokenizer(folder: Path) -> Any:
    """Read the tokenizer of a checkpoint: nothing is fetched, no code is run. Raises CheckpointError."""
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; save the tokenizer again with transformers 5")
    return _read_folder(T5Tokenizer, folder)


def build_tokenizer(pieces: Sequence[tuple[str, float]]) -> Any:
    """A T5 tokenizer of the given pieces and scores; the first three are padding, end and unknown."""
    return T5Tokenizer(vocab=list(pieces), extra_ids=0)


def load_image_processor(folder: Path) -> Any:
    """Read the image processor of a checkpoint (resizing by Pillow). Raises CheckpointError."""
    return _read_folder(CLIPImageProcessorPil, folder)


def _read_folder(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise CheckpointError(f"{folder} cannot be read ({type(error).__name__}: {error}); download it again") from None


def _only(config: Any, names: tuple[str, ...], *, where: str) -> JsonObject:
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} holds no description of a network; download it again")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{where} describes quantized weights, which are not supported; use the plain checkpoint")
    found = {name: config[name] for name in names if name in config}
    for name, value in found.items():
        if isinstance(value, int) and value < 1 and not name.endswith("_token_id"):
            raise CheckpointError(f"{where} has {name} {value!r}; it must be 1 or more")
    buckets, distance = (found.get(f"relative_attention_{name}") for name in ("num_buckets", "max_distance"))
    if isinstance(buckets, int) and isinstance(distance, int) and distance <= buckets // 4:
        raise CheckpointError(
            f"{where} has relative_attention_max_distance {distance}; it must be above {buckets // 4}, "
            "a quarter of relative_attention_num_buckets"
        )
    return found


def _build(model: Any, config: Any, values: JsonObject, *, where: str) -> Any:
    try:
        with torch.device("meta"):
            return model(config(**values)).eval()
    except (StrictDataclassError, ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where} describes no network that can be built ({reason}); download it again") from None
