"""The text encoder of Wan: prompts, cleaned and cut into tokens, through UMT5.

Shapes: B prompts, L tokens, D channels.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ftfy
import torch
from torch import Tensor

from frameloom.errors import CheckpointError, RequestError
from frameloom.models.meta import on_meta
from frameloom.models.tokenizer import Tokenizer
from frameloom.models.umt5 import Umt5Encoder, Umt5Spec

JsonObject = Mapping[str, Any]

TEXT_LENGTH = 512  # tokens the Wan transformers were trained with (text_len of the original config.json)

# The encoder's embedding table has two names; files hold the second one.
TIED: Mapping[str, str] = {"encoder.embed_tokens.weight": "shared.weight"}


def clean_prompt(text: str) -> str:
    """Repair broken unicode, resolve HTML entities (also doubly escaped ones), collapse white space.

    As WanPipeline does before it tokenizes: it changes the tokens, so it is part of the model.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoder:
    """A filled UMT5 encoder and its tokenizer."""

    model: Umt5Encoder
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        rows = self.model.shared.num_embeddings
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
        ids_BL, mask_BL = self.tokenizer.encode([clean_prompt(text) for text in prompts], length=max_sequence_length)
        ids_BL, mask_BL = ids_BL.to(self.model.device), mask_BL.to(self.model.device)
        x_BLD: Tensor = self.model(ids_BL, mask_BL).to(self.model.dtype)
        return x_BLD.masked_fill(mask_BL[..., None] == 0, 0)


def build_text_encoder(config: JsonObject, *, where: str = "text_encoder/config.json") -> Umt5Encoder:
    """Build the UMT5 encoder on the meta device, in eval mode; load it with `tied=TIED`.

    Raises CheckpointError if the config describes no UMT5 encoder.
    """
    if check_description(config, where=where).get("model_type", "umt5") != "umt5":
        raise CheckpointError(f"{where} describes {config['model_type']!r}; Wan's text encoder is umt5")
    spec = Umt5Spec.from_config(config, where=where)
    with on_meta():
        return Umt5Encoder(spec).eval()


def check_description(config: Any, *, where: str) -> JsonObject:
    """The config of a network that is not quantized. Raises CheckpointError."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} holds no description of a network; download it again")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{where} describes quantized weights, which are not supported; use the plain checkpoint")
    return config


def text_encoder_keeps_fp32(dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Which UMT5 weights stay float32 when the rest is loaded as `dtype`: `wo`, for float16 alone.

    It overflows there (the reference's `_keep_in_fp32_modules`, which spares bfloat16).
    """
    return lambda name: dtype == torch.float16 and "wo" in name.split(".")
