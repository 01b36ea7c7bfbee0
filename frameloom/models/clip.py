"""The image encoder (CLIP) of Wan's image-to-video models, from transformers, which only this file imports.

It does so where it is needed: importing transformers takes longer than many a video from text. Straight from the
submodules: `from transformers import ...` would look at every optional library first.
Shapes: B images, T tokens of an image (257), D channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from frameloom.errors import CheckpointError
from frameloom.models.encoders import check_description
from frameloom.models.meta import on_meta

JsonObject = Mapping[str, Any]

# Only what decides the numbers is taken from a config.json: other keys can make the library fetch code.
_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEncoder:
    """A filled CLIP vision tower and its image processor."""

    model: Any
    processor: Any

    def __post_init__(self) -> None:
        _check_processor(self.processor, self.model.config.image_size)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed images as (B, T, D), the states before the last layer: Wan was trained on these."""
        device = next(self.model.parameters()).device
        pixels_BCHW = self.processor(images=list(images), return_tensors="pt").pixel_values.to(device)
        states: Tensor = self.model(pixel_values=pixels_BCHW, output_hidden_states=True).hidden_states[-2]
        return states


def image_tokens(config: JsonObject, *, where: str = "image_encoder/config.json") -> tuple[int, int]:
    """How many tokens an image has, and their width, by the config of the encoder. Raises CheckpointError."""
    found = _build(_only(_vision(config), where=where), where=where).config
    return 1 + (found.image_size // found.patch_size) ** 2, found.hidden_size


def build_image_encoder(config: JsonObject, *, where: str = "image_encoder/config.json") -> nn.Module:
    """Build the CLIP vision tower on the meta device, in eval mode. Raises CheckpointError.

    Its files may use other names: load them with `rename=image_encoder_key`.
    """
    model: nn.Module = _build(_only(_vision(config), where=where), where=where)
    # Not persistent, so no file holds it: one position per patch and one for the class token.
    positions = torch.arange(model.get_parameter("embeddings.position_embedding.weight").shape[0])
    model.get_submodule("embeddings").register_buffer("position_ids", positions[None], persistent=False)
    return model


def image_encoder_key(name: str) -> str | None:
    """The module's name of a stored CLIP tensor; None for parts that Wan does not use."""
    if name.startswith("visual_projection.") or name.endswith(".position_ids"):
        return None
    return name.removeprefix("vision_model.")


def load_image_processor(folder: Path | None) -> Any:
    """Read the image processor of a checkpoint (resizing by Pillow); None: the one that all of Wan's have.

    Raises CheckpointError.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if folder is None:
        return CLIPImageProcessorPil()
    try:
        return CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read ({type(error).__name__}: {error}); download it again") from None


def _vision(config: JsonObject) -> Any:
    return config.get("vision_config", config)  # a config.json of the whole CLIP nests it


def _check_processor(processor: Any, image_size: int) -> None:
    """Raise CheckpointError unless the pictures that it makes, also on the way, are those that the network takes."""
    on_the_way = dict(processor.size or {})
    made = dict(processor.crop_size or {}) if processor.do_center_crop else on_the_way
    bounded = all(isinstance(side, int) and side <= 4 * image_size for side in on_the_way.values())
    if made != {"height": image_size, "width": image_size} or not bounded or not processor.do_resize:
        raise CheckpointError(
            f"the image processor makes pictures of {made}, resized to {on_the_way}, and the image encoder takes "
            f"{image_size}x{image_size}; take both from the same checkpoint"
        )


def _only(config: Any, *, where: str) -> JsonObject:
    found = {name: value for name, value in check_description(config, where=where).items() if name in _FIELDS}
    for name, value in found.items():
        if isinstance(value, int) and value < 1:
            raise CheckpointError(f"{where} has {name} {value!r}; it must be 1 or more")
    return found


def _build(values: JsonObject, *, where: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    try:
        with on_meta():
            return CLIPVisionModel(CLIPVisionConfig(**values)).eval()
    except (StrictDataclassError, ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where} describes no network that can be built ({reason}); download it again") from None
