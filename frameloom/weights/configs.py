"""The config of a network, from the shapes of its tensors: in Diffusers' and transformers' words, which models/ reads.

What shapes do not say (heads of an unusual width, statistics of unusual latents) must be told; what is told besides
must agree with the shapes. Torch-free.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from frameloom.errors import CheckpointError
from frameloom.models.spec import VaeSpec
from frameloom.types import Expert
from frameloom.weights.header import TensorEntry

JsonObject = Mapping[str, Any]

_HEAD_DIM = 128  # of every published Wan transformer
_CLIP_HEAD_DIM = 80  # of ViT-H/14
_UMT5_DISTANCE = 128  # relative_attention_max_distance: no tensor depends on it
_COLOURS = 3

# The latents of Wan 2.2 TI2V-5B (48 channels), from the config.json of its Diffusers repository.
_WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

# Keys of the original repositories' config.json; the others (model_type, text_len, ...) decide no shape.
_ORIGINAL_KEYS: Mapping[str, str] = {
    "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "text_dim": "text_dim", "in_dim": "in_channels",
    "out_dim": "out_channels", "num_heads": "num_attention_heads", "num_layers": "num_layers", "eps": "eps",
    "patch_size": "patch_size", "cross_attn_norm": "cross_attn_norm", "vace_layers": "vace_layers",
    "vace_in_dim": "vace_in_channels",
}  # fmt: skip
# A key by which a config.json tells what network it is of.
_TELLTALES: Mapping[str, str] = {
    "attention_head_dim": "transformer", "z_dim": "vae", "d_model": "text_encoder", "hidden_size": "image_encoder",
    "vision_config": "image_encoder",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of a network's tensors under their native names; `where` names the file in messages."""

    tensors: Mapping[str, TensorEntry]
    where: str

    def of(self, name: str, num_dims: int) -> tuple[int, ...]:
        """A shape of `num_dims` sizes above 0. Raises CheckpointError if the tensor is missing or shaped otherwise."""
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.where} lacks '{name}'; it is a part of a network, so give the whole file")
        if len(entry.shape) != num_dims or 0 in entry.shape:
            raise CheckpointError(
                f"{self.where} has '{entry.name}' of shape {list(entry.shape)}, where Wan has {num_dims} dimensions; "
                "give another file"
            )
        return entry.shape

    def count(self, place: str, tail: str) -> int:
        """How many `place.0.tail`, `place.1.tail` ... there are without a gap."""
        number = 0
        while f"{place}.{number}.{tail}" in self.tensors:
            number += 1
        return number

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.tensors


def config_of(kind: str, tensors: Mapping[str, TensorEntry], *, told: JsonObject, where: str) -> dict[str, Any]:
    """The config of a network of natively named tensors. `told`: what a description says of it, empty without one.

    Raises CheckpointError for a network that is not Wan's, and where description and shapes disagree.
    """
    nested = told.get("vision_config")  # the config.json of a whole CLIP
    told = nested if isinstance(nested, Mapping) else told
    told = {key: value for key, value in told.items() if not key.startswith("_")}
    if told.get("out_channels", 0) is None:  # Diffusers lets null mean "as many as go in"
        del told["out_channels"]
    found = _READERS[kind](Shapes(tensors, where), told)
    for key in found.keys() & told.keys():
        if _plain(told[key]) != _plain(found[key]):
            raise CheckpointError(
                f"{where} has {key} {_plain(found[key])} by its tensors, but {_plain(told[key])} by its description; "
                "download both again"
            )
    return {**told, **found}


def translated(config: JsonObject) -> tuple[str, dict[str, Any]] | None:
    """What kind of network a config.json describes, and its words in those of Diffusers; None for none of Wan's.

    Raises CheckpointError if an original config has a width that its heads do not divide.
    """
    if "dim" not in config or "num_heads" not in config:
        kind = next((kind for key, kind in _TELLTALES.items() if key in config), None)
        return None if kind is None else (kind, dict(config))
    dim, heads = config["dim"], config["num_heads"]
    if type(dim) is not int or type(heads) is not int or heads < 1 or dim % heads:
        raise CheckpointError(f"config.json has dim {dim!r} and num_heads {heads!r}; the heads must divide the width")
    told = {native: config[key] for key, native in _ORIGINAL_KEYS.items() if key in config}
    return "transformer", {**told, "attention_head_dim": dim // heads}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- the transformer ---


def _transformer(shapes: Shapes, told: JsonObject) -> dict[str, Any]:
    dim, in_channels, *patch = shapes.of("patch_embedding.weight", 5)
    out, _ = shapes.of("proj_out.weight", 2)
    embedder = "condition_embedder"
    return {
        **_heads(dim, shapes, told),
        "patch_size": patch,
        "in_channels": in_channels,
        "out_channels": out // math.prod(patch),
        "text_dim": shapes.of(f"{embedder}.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shapes.of(f"{embedder}.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shapes.of("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": shapes.count("blocks", "attn1.to_q.weight"),
        "cross_attn_norm": shapes.has("blocks.0.norm2.weight"),
        **_image_branch(shapes),
        **_vace(shapes, told),
    }


def _heads(dim: int, shapes: Shapes, told: JsonObject) -> dict[str, Any]:
    heads, width = told.get("num_attention_heads"), told.get("attention_head_dim")
    if heads is None and width is None and dim % _HEAD_DIM == 0:
        return {"num_attention_heads": dim // _HEAD_DIM, "attention_head_dim": _HEAD_DIM}
    if heads is None or width is None:
        raise CheckpointError(
            f"{shapes.where} has a transformer {dim} wide, and no description says how many heads divide that; "
            f"Wan's heads are {_HEAD_DIM} wide: give a file with its config"
        )
    if type(heads) is not int or type(width) is not int or heads * width != dim:
        raise CheckpointError(
            f"{shapes.where} has a transformer {dim} wide, but its description says {heads!r} heads of {width!r}; "
            "download both again"
        )
    return {}


def _image_branch(shapes: Shapes) -> dict[str, Any]:
    """CLIP's features: Wan 2.1's image-to-video alone. Positions for two images: FLF2V."""
    image = "condition_embedder.image_embedder"
    branch, positions = shapes.has("blocks.0.attn2.add_k_proj.weight"), shapes.has(f"{image}.pos_embed")
    return {
        "image_dim": shapes.of(f"{image}.norm1.weight", 1)[0] if branch else None,
        "added_kv_proj_dim": shapes.of("blocks.0.attn2.add_k_proj.weight", 2)[1] if branch else None,
        "pos_embed_seq_len": shapes.of(f"{image}.pos_embed", 3)[1] if positions else None,
    }


def _vace(shapes: Shapes, told: JsonObject) -> dict[str, Any]:
    if not shapes.has("vace_patch_embedding.weight"):
        return {}
    channels = {"vace_in_channels": shapes.of("vace_patch_embedding.weight", 5)[1]}
    layers, hints = shapes.count("blocks", "attn1.to_q.weight"), shapes.count("vace_blocks", "attn1.to_q.weight")
    if told.get("vace_layers") is None:
        if hints == 0 or layers % hints:
            raise CheckpointError(
                f"{shapes.where} has {hints} VACE blocks for {layers} layers, and no description says after which "
                "layers they come; give a file with its config"
            )
        # As both published models have them: after every second layer of 30, after every fifth of 40.
        return {**channels, "vace_layers": list(range(0, layers, layers // hints))}
    if not isinstance(told["vace_layers"], list | tuple) or len(told["vace_layers"]) != hints:
        raise CheckpointError(
            f"{shapes.where} has {hints} VACE blocks, but vace_layers {told['vace_layers']!r}; download both again"
        )
    return channels


# --- the VAE ---


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stage:
    """One stage of the encoder: its channels, its residual blocks, whether it halves the frames (None: no size)."""

    width: int
    num_blocks: int
    halves_time: bool | None


def _vae(shapes: Shapes, told: JsonObject) -> dict[str, Any]:
    is_residual = shapes.has("encoder.down_blocks.0.resnets.0.conv1.weight")
    stages = list(_staged(shapes) if is_residual else _flat(shapes))
    base_dim, in_channels, *_ = shapes.of("encoder.conv_in.weight", 5)
    out_channels, decoder_width, *_ = shapes.of("decoder.conv_out.weight", 5)
    z_dim = shapes.of("post_quant_conv.weight", 5)[0]
    if not stages or any(stage.width % base_dim for stage in stages):
        raise CheckpointError(f"{shapes.where} holds a VAE whose stages are not Wan's; give a VAE of Wan 2.1 or 2.2")
    dim_mult = [stage.width // base_dim for stage in stages]
    decoder_dim = decoder_width // dim_mult[0]
    same = decoder_dim == base_dim and told.get("decoder_base_dim") is None
    return {
        "base_dim": base_dim,
        "decoder_base_dim": None if same else decoder_dim,
        "z_dim": z_dim,
        "dim_mult": dim_mult,
        "num_res_blocks": stages[0].num_blocks,
        "temperal_downsample": [bool(stage.halves_time) for stage in stages[:-1]],
        "is_residual": is_residual,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "patch_size": _patch(in_channels, shapes),
        **_statistics(z_dim, is_residual, shapes.where, told),
    }


def _staged(shapes: Shapes) -> Iterator[_Stage]:
    """The stages of Wan 2.2."""
    for stage in range(shapes.count("encoder.down_blocks", "resnets.0.conv2.weight")):
        place = f"encoder.down_blocks.{stage}"
        yield _Stage(
            width=shapes.of(f"{place}.resnets.0.conv2.weight", 5)[0],
            num_blocks=shapes.count(f"{place}.resnets", "conv2.weight"),
            halves_time=_halves_time(shapes, f"{place}.downsampler"),
        )


def _flat(shapes: Shapes) -> Iterator[_Stage]:
    """The stages of Wan 2.1, which lie in one list of blocks: a resampling ends a stage."""
    number, num_blocks, width = 0, 0, 0
    while shapes.has(f"encoder.down_blocks.{number}.conv2.weight") or num_blocks:
        place = f"encoder.down_blocks.{number}"
        if shapes.has(f"{place}.conv2.weight"):
            num_blocks, width = num_blocks + 1, shapes.of(f"{place}.conv2.weight", 5)[0]
        else:
            yield _Stage(width=width, num_blocks=num_blocks, halves_time=_halves_time(shapes, place))
            num_blocks = 0
        number += 1


def _halves_time(shapes: Shapes, place: str) -> bool | None:
    return shapes.has(f"{place}.time_conv.weight") if shapes.has(f"{place}.resample.1.weight") else None


def _patch(in_channels: int, shapes: Shapes) -> int | None:
    """How many pixels a side are folded into channels; None where none are."""
    patch = math.isqrt(in_channels // _COLOURS)
    if in_channels != _COLOURS * patch * patch:
        raise CheckpointError(f"{shapes.where} holds a VAE of {in_channels} channels of colour; Wan's have 3 or 12")
    return None if patch == 1 else patch


def _statistics(z_dim: int, is_residual: bool, where: str, told: JsonObject) -> dict[str, Any]:
    if told.get("latents_mean") is not None and told.get("latents_std") is not None:
        return {}
    if (z_dim, is_residual) == (16, False):
        spec = VaeSpec()
        return {"latents_mean": list(spec.latents_mean), "latents_std": list(spec.latents_std)}
    if (z_dim, is_residual) == (48, True):
        return {"latents_mean": list(_WAN22_MEAN), "latents_std": list(_WAN22_STD), "scale_factor_spatial": 16}
    raise CheckpointError(
        f"{where} holds a VAE of {z_dim} latent channels, whose mean and deviation only its config knows; "
        "Wan's have 16 (2.1) or 48 (2.2): give a file with its config"
    )


# --- the encoders ---


def _text_encoder(shapes: Shapes, told: JsonObject) -> dict[str, Any]:
    layer = "encoder.block.0.layer"
    buckets, heads = shapes.of(f"{layer}.0.SelfAttention.relative_attention_bias.weight", 2)
    inner, d_model = shapes.of(f"{layer}.0.SelfAttention.q.weight", 2)
    if inner % heads:
        raise CheckpointError(f"{shapes.where} has {heads} heads for a width of {inner}; give the text encoder UMT5")
    return {
        "vocab_size": shapes.of("shared.weight", 2)[0],
        "d_model": d_model,
        "d_kv": inner // heads,
        "d_ff": shapes.of(f"{layer}.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": shapes.count("encoder.block", "layer.0.SelfAttention.q.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": told.get("relative_attention_max_distance", _UMT5_DISTANCE),
    }


def _image_encoder(shapes: Shapes, told: JsonObject) -> dict[str, Any]:
    width, channels, patch, _ = shapes.of("vision_model.embeddings.patch_embedding.weight", 4)
    positions = shapes.of("vision_model.embeddings.position_embedding.weight", 2)[0]
    heads = told.get("num_attention_heads")
    if heads is None and width % _CLIP_HEAD_DIM:
        raise CheckpointError(
            f"{shapes.where} holds an image encoder {width} wide; Wan's is CLIP ViT-H/14, 1280 wide (clip_vision_h)"
        )
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": math.isqrt(positions - 1) * patch,  # one position is the class token's
        "intermediate_size": shapes.of("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": shapes.count("vision_model.encoder.layers", "self_attn.q_proj.weight"),
        "num_attention_heads": heads or width // _CLIP_HEAD_DIM,
        "hidden_act": told.get("hidden_act", "gelu"),  # of ViT-H/14; transformers' default is another
        "layer_norm_eps": told.get("layer_norm_eps", 1e-5),
    }


_READERS = {"transformer": _transformer, "vae": _vae, "text_encoder": _text_encoder, "image_encoder": _image_encoder}


# --- in words ---

_SIZES: Mapping[int, str] = {1536: "1.3B", 3072: "5B", 5120: "14B"}  # by width


def model_name(kind: str, config: JsonObject, *, expert: Expert | None = None) -> str:
    """What users call a network of this config, such as "Wan 2.1 I2V 14B".

    `expert`: which of two noise experts a transformer is said to be; not heeded of models that have none.
    """
    if kind == "vae":
        return "Wan VAE 2.2" if config["is_residual"] else "Wan VAE 2.1"
    if kind == "text_encoder":
        return "UMT5-XXL" if config.get("d_model") == 4096 else f"UMT5 ({config.get('num_layers', '?')} layers)"
    if kind == "image_encoder":
        layers = config.get("num_hidden_layers", "?")
        return "CLIP ViT-H/14" if config.get("hidden_size") == 1280 else f"CLIP ({layers} layers)"
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    size = _SIZES.get(dim, f"({config['num_layers']} layers, {dim} wide)")
    if expert is None or size in ("1.3B", "5B") or config["image_dim"] is not None:
        return _transformer_name(config, size)
    return f"{_transformer_name(config, size, is_expert=True)}, {expert}-noise expert"


def _transformer_name(config: JsonObject, size: str, *, is_expert: bool = False) -> str:
    """As far as shapes tell: the experts of T2V A14B have those of T2V 14B."""
    channels, out = config["in_channels"], config["out_channels"]
    # Behind the noise images have a mask of 4 frames a latent one, and their latents.
    if channels not in (out, 2 * out + 4):
        return f"Wan of {channels} channels in and {out} out {size}"
    if config.get("vace_in_channels") is not None:
        return f"Wan 2.1 VACE {size}"
    if config["image_dim"] is not None:
        return f"Wan 2.1 {'I2V' if config['pos_embed_seq_len'] is None else 'FLF2V'} {size}"
    if out == 48:
        return f"Wan 2.2 TI2V {size}"
    if channels != out or is_expert:
        return f"Wan 2.2 {'T2V' if channels == out else 'I2V'} {'A14B' if size == '14B' else size}"
    return f"Wan 2.1 T2V {size}" + (", or an expert of Wan 2.2 T2V A14B" if size == "14B" else "")
