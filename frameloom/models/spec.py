"""What a network looks like, as data: one frozen dataclass per network, read from a checkpoint's config.json.

Sources: the config.json files of the Diffusers repositories of Wan 2.1 and 2.2 (arXiv:2503.20314).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType, UnionType
from typing import Any, NewType, Self, get_args, get_origin, get_type_hints

from frameloom.errors import CheckpointError

JsonObject = Mapping[str, Any]
Index = NewType("Index", int)  # of a layer: from 0

MAX_LAYERS = 1000
LARGEST = 1_000_000  # of any number in a config: ten times the widest Wan layer, and nothing overflows


def _known_fields(spec: type, config: JsonObject, *, where: str, fixed: JsonObject) -> dict[str, Any]:
    """Fields of `spec` found in `config`; a key that is neither known nor at its only supported value is an error."""
    names = {field.name for field in fields(spec)}
    for key, value in config.items():
        if key.startswith("_") or key in names:
            continue
        if key not in fixed:
            raise CheckpointError(
                f"{where} has '{key}', which this version does not know; use a Wan 2.1 or 2.2 checkpoint"
            )
        if value != fixed[key]:
            raise CheckpointError(f"{where} has {key}={value!r}; only {fixed[key]!r} is supported")
    found = {name: config[name] for name in names if name in config}
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    for name, kind in get_type_hints(spec).items():
        if name in plain and not _fits(plain[name], kind):
            raise CheckpointError(f"{where} has {name} {config[name]!r}; it must be {_wanted(kind)}")
    return plain


def _fits(value: object, kind: Any) -> bool:
    """Whether a JSON value (lists as tuples) is what a field's annotation says; numbers must also be sensible."""
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if not isinstance(value, tuple):
            return False
        if kinds[-1] is Ellipsis:
            return all(_fits(item, kinds[0]) for item in value)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind in (int, Index):
        return type(value) is int and (kind is int) <= value <= LARGEST
    if kind is float:
        return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # type: ignore[operator]
    return type(value) is kind


def _wanted(kind: Any) -> str:
    """`kind` in the words of JSON."""
    if get_origin(kind) is UnionType:
        return " or ".join(_wanted(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        items = {int: "whole numbers above 0", Index: "whole numbers", float: "numbers", bool: "true and false"}[first]
        return f"a list of {items}" if rest == [Ellipsis] else f"a list of {len(rest) + 1} {items}"
    return {
        int: f"a whole number from 1 to {LARGEST}",
        float: "a number",
        bool: "true or false",
        NoneType: "null",
    }[kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSpec:
    """The Wan DiT (reference: WanTransformer3DModel). Lengths in channels or tokens; patch in cells (t, h, w)."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    @property
    def dim(self) -> int:
        """Width of the residual stream: heads x head_dim."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_volume(self) -> int:
        """Latent cells per token."""
        return math.prod(self.patch_size)

    @property
    def num_blocks(self) -> int:
        """Blocks altogether: one for each layer."""
        return self.num_layers

    def first_layers(self, count: int) -> "TransformerSpec":
        """The same network with so many layers at most."""
        return replace(self, num_layers=min(count, self.num_layers))

    @staticmethod
    def from_config(config: JsonObject, *, where: str = "transformer/config.json") -> "TransformerSpec":
        """Read a Diffusers transformer config, a `VaceSpec` where it has VACE layers.

        Raises CheckpointError on a key or value we cannot compute.
        """
        if config.get("out_channels", 0) is None:  # the reference lets null mean "as many as go in"
            config = {**config, "out_channels": config.get("in_channels", 16)}
        fixed: JsonObject = {"qk_norm": "rms_norm_across_heads"}
        if config.get("vace_layers") is None:
            plain = {**fixed, "vace_layers": None, "vace_in_channels": None}
            spec = TransformerSpec(**_known_fields(TransformerSpec, config, where=where, fixed=plain))
        else:
            spec = VaceSpec(**_known_fields(VaceSpec, config, where=where, fixed=fixed))
        if spec.num_layers > MAX_LAYERS:
            raise CheckpointError(
                f"{where} has num_layers {spec.num_layers}; Wan has 40, more than {MAX_LAYERS} is a slip"
            )
        if not spec.eps > 0:
            raise CheckpointError(f"{where} has eps {spec.eps}; it must be above 0, as 1e-06")
        return spec


@dataclass(frozen=True, kw_only=True, slots=True)
class VaceSpec(TransformerSpec):
    """A Wan DiT with VACE blocks beside (reference: WanVACETransformer3DModel), which give hints after some layers."""

    vace_layers: tuple[Index, ...]
    vace_in_channels: int = 96

    @property
    def num_blocks(self) -> int:
        """Blocks altogether: those of the layers, and those beside."""
        return self.num_layers + len(self.vace_layers)

    def first_layers(self, count: int) -> "VaceSpec":
        """The same network with so many layers at most, and the hints after those."""
        kept = tuple(layer for layer in self.vace_layers if layer < count)
        return replace(self, num_layers=min(count, self.num_layers), vace_layers=kept)


# Statistics of the Wan 2.1 latents, the defaults of the reference's config (16 channels).
_WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeSpec:
    """The 3D causal WanVAE, 2.1 and 2.2 (reference: AutoencoderKLWan); `temperal` is the config's spelling."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _WAN21_MEAN
    latents_std: tuple[float, ...] = _WAN21_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent cell, in height and in width (from the stages; scale_factor_spatial is not used)."""
        return (1 << (len(self.dim_mult) - 1)) * (self.patch_size or 1)

    @property
    def temporal_scale(self) -> int:
        """Frames per latent frame after the first."""
        return 1 << sum(self.temperal_downsample)

    @property
    def given_channels(self) -> int:
        """Channels of a frame that is encoded: 3 of RGB, 4 with transparency."""
        return self.in_channels // (self.patch_size or 1) ** 2

    @property
    def made_channels(self) -> int:
        """Channels of a frame that is decoded."""
        return self.out_channels // (self.patch_size or 1) ** 2

    @property
    def decoder_reach(self) -> int:
        """Latent frames before its own on which a decoded frame depends: each causal convolution sees two before."""
        convolutions = 2 * (self.num_res_blocks + 1)  # of a stage
        reach, rate = 2.0 * (1 + 4), 1  # the first, and those of the two blocks in the middle
        for doubles in (*reversed(self.temperal_downsample), False):
            reach += 2 * convolutions / rate
            if doubles:
                reach, rate = reach + 2 / rate, 2 * rate
        return math.ceil(reach + 2 / rate)

    @classmethod
    def from_config(cls, config: JsonObject, *, where: str = "vae/config.json") -> Self:
        """Read a Diffusers VAE config. Raises CheckpointError on a key or value we cannot compute."""
        if (channels := config.get("input_channels")) is not None:  # as AutoencoderKLQwenImage says it
            rest = {key: value for key, value in config.items() if key != "input_channels"}
            config = {"in_channels": channels, "out_channels": channels, **rest}
        fixed: JsonObject = {"attn_scales": [], "dropout": 0.0, "clip_output": config.get("clip_output")}
        found = _known_fields(cls, config, where=where, fixed=fixed)
        spec = cls(**found)
        if len(spec.latents_mean) != spec.z_dim or len(spec.latents_std) != spec.z_dim:
            raise CheckpointError(
                f"{where} lists {len(spec.latents_mean)} latents_mean for z_dim {spec.z_dim}; one per channel is needed"
            )
        if len(spec.temperal_downsample) != len(spec.dim_mult) - 1:
            raise CheckpointError(
                f"{where}: temperal_downsample needs one entry per stage but the last ({len(spec.dim_mult) - 1})"
            )
        if not all(std > 0 for std in spec.latents_std):
            raise CheckpointError(f"{where} has latents_std {list(spec.latents_std)}; each must be above 0")
        return spec
