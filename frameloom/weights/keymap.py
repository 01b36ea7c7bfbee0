"""How the layouts of Wan checkpoints name the same tensors: one immutable table per layout, read in both directions.

Native are the names of the engine's modules: Diffusers' of the transformer and the VAE, transformers' of the encoders.
Facts: the published files of both layouts and Diffusers' convert_wan_to_diffusers.py. Torch-free.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

Pair = tuple[str, str]  # a name in the layout, the native name

_NUMBER = re.compile(r"\.(0|[1-9]\d{0,3})\.")
_BOTH = ("weight", "bias")
_WEIGHT = ("weight",)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyMap:
    """The names of one layout. Names are templates: `{i}` stands for the first number, such as that of a block."""

    layout: str
    natives: Mapping[str, str]
    stored: Mapping[str, str]

    def to_native(self, name: str) -> str | None:
        """The native name of a stored tensor; None for a name that the layout does not have."""
        return _translated(name, self.natives)

    def from_native(self, name: str) -> str | None:
        """The layout's name of a native tensor; None where the layout has no such tensor."""
        return _translated(name, self.stored)

    def of_natives(self, layout: str) -> "KeyMap":
        """The table of the layout whose names are the native ones: every name is its own."""
        return key_map(layout, ((name, name) for name in self.stored))


def key_map(layout: str, pairs: Iterable[Pair]) -> KeyMap:
    """The table of pairs of names, each at most once on either side."""
    listed = tuple(pairs)
    natives = MappingProxyType(dict(listed))
    stored = MappingProxyType({native: name for name, native in listed})
    assert len(natives) == len(stored) == len(listed), f"{layout}: two names for one tensor"
    return KeyMap(layout=layout, natives=natives, stored=stored)


def _translated(name: str, table: Mapping[str, str]) -> str | None:
    if (exact := table.get(name)) is not None and "{i}" not in exact:
        return exact
    number = _NUMBER.search(name)
    if number is None:
        return None
    found = table.get(f"{name[: number.start()]}.{{i}}.{name[number.end() :]}")
    return None if found is None else found.replace("{i}", number[1])


def _tensors(leaves: Iterable[str], *pairs: Pair) -> Iterator[Pair]:
    """The pairs of modules, with the names of their tensors."""
    for leaf in leaves:
        yield from ((f"{stored}.{leaf}", f"{native}.{leaf}") for stored, native in pairs)


# --- the transformer ---


def _dit_attention(stored: str, native: str) -> Iterator[Pair]:
    for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
        yield from _tensors(_BOTH, (f"{stored}.{part}", f"{native}.{name}"))
    yield from _tensors(_WEIGHT, *((f"{stored}.{norm}", f"{native}.{norm}") for norm in ("norm_q", "norm_k")))


def _dit_block(place: str) -> Iterator[Pair]:
    """A block; the norm with weights is the third one here, and Diffusers' second."""
    look, read = f"{place}.cross_attn", f"{place}.attn2"
    yield f"{place}.modulation", f"{place}.scale_shift_table"
    yield from _dit_attention(f"{place}.self_attn", f"{place}.attn1")
    yield from _dit_attention(look, read)
    yield from _tensors(_BOTH, (f"{look}.k_img", f"{read}.add_k_proj"), (f"{look}.v_img", f"{read}.add_v_proj"))
    yield from _tensors(_WEIGHT, (f"{look}.norm_k_img", f"{read}.norm_added_k"))
    yield from _tensors(_BOTH, (f"{place}.norm3", f"{place}.norm2"))
    yield from _tensors(_BOTH, (f"{place}.ffn.0", f"{place}.ffn.net.0.proj"), (f"{place}.ffn.2", f"{place}.ffn.net.2"))


def _dit() -> Iterator[Pair]:
    condition = "condition_embedder"
    yield from _tensors(_BOTH, ("patch_embedding", "patch_embedding"), ("head.head", "proj_out"))
    yield "head.modulation", "scale_shift_table"
    for what in ("text", "time"):
        for stored, native in (("0", "linear_1"), ("2", "linear_2")):
            yield from _tensors(_BOTH, (f"{what}_embedding.{stored}", f"{condition}.{what}_embedder.{native}"))
    yield from _tensors(_BOTH, ("time_projection.1", f"{condition}.time_proj"))
    for stored, native in (("0", "norm1"), ("1", "ff.net.0.proj"), ("3", "ff.net.2"), ("4", "norm2")):
        yield from _tensors(_BOTH, (f"img_emb.proj.{stored}", f"{condition}.image_embedder.{native}"))
    yield "img_emb.emb_pos", f"{condition}.image_embedder.pos_embed"
    yield from _dit_block("blocks.{i}")


def _vace() -> Iterator[Pair]:
    yield from _tensors(_BOTH, ("vace_patch_embedding", "vace_patch_embedding"))
    yield from _dit_block("vace_blocks.{i}")
    for stored, native in (("before_proj", "proj_in"), ("after_proj", "proj_out")):
        yield from _tensors(_BOTH, (f"vace_blocks.{{i}}.{stored}", f"vace_blocks.{{i}}.{native}"))


DIT_ORIGINAL = key_map("original", (*_dit(), *_vace()))
DIT_DIFFUSERS = DIT_ORIGINAL.of_natives("diffusers")


# --- the VAE ---


def _vae_residual(stored: str, native: str) -> Iterator[Pair]:
    yield from _tensors(
        ("gamma",), (f"{stored}.residual.0", f"{native}.norm1"), (f"{stored}.residual.3", f"{native}.norm2")
    )
    for part, name in (("residual.2", "conv1"), ("residual.6", "conv2"), ("shortcut", "conv_shortcut")):
        yield from _tensors(_BOTH, (f"{stored}.{part}", f"{native}.{name}"))


def _vae_resample(stored: str, native: str) -> Iterator[Pair]:
    yield from _tensors(_BOTH, *((f"{stored}.{part}", f"{native}.{part}") for part in ("resample.1", "time_conv")))


def _vae_ends() -> Iterator[Pair]:
    """What both generations share: all but the stages."""
    yield from _tensors(_BOTH, ("conv1", "quant_conv"), ("conv2", "post_quant_conv"))
    for side in ("encoder", "decoder"):
        middle = f"{side}.mid_block"
        yield from _tensors(_BOTH, (f"{side}.conv1", f"{side}.conv_in"), (f"{side}.head.2", f"{side}.conv_out"))
        yield from _tensors(("gamma",), (f"{side}.head.0", f"{side}.norm_out"))
        yield from _vae_residual(f"{side}.middle.0", f"{middle}.resnets.0")
        yield from _tensors(("norm.gamma",), (f"{side}.middle.1", f"{middle}.attentions.0"))
        for part in ("to_qkv", "proj"):
            yield from _tensors(_BOTH, (f"{side}.middle.1.{part}", f"{middle}.attentions.0.{part}"))
        yield from _vae_residual(f"{side}.middle.2", f"{middle}.resnets.1")


def vae_21(*, num_res_blocks: int = 2, num_stages: int = 4) -> KeyMap:
    """Wan VAE 2.1, original names: one flat list on either side, which Diffusers keeps for the encoder alone."""
    pairs = list(_vae_ends())
    pairs += _vae_residual("encoder.downsamples.{i}", "encoder.down_blocks.{i}")
    pairs += _vae_resample("encoder.downsamples.{i}", "encoder.down_blocks.{i}")
    for stage in range(num_stages):
        first, native = stage * (num_res_blocks + 2), f"decoder.up_blocks.{stage}"
        for block in range(num_res_blocks + 1):
            pairs += _vae_residual(f"decoder.upsamples.{first + block}", f"{native}.resnets.{block}")
        pairs += _vae_resample(f"decoder.upsamples.{first + num_res_blocks + 1}", f"{native}.upsamplers.0")
    return key_map("original", pairs)


def vae_22(*, num_res_blocks: int = 2) -> KeyMap:
    """Wan VAE 2.2, original names: stages of blocks, the last of which resamples."""
    pairs = list(_vae_ends())
    for side, way, num_blocks in (("encoder", "down", num_res_blocks), ("decoder", "up", num_res_blocks + 1)):
        stored, native = f"{side}.{way}samples.{{i}}.{way}samples", f"{side}.{way}_blocks.{{i}}"
        for block in range(num_blocks):
            pairs += _vae_residual(f"{stored}.{block}", f"{native}.resnets.{block}")
        pairs += _vae_resample(f"{stored}.{num_blocks}", f"{native}.{way}sampler")
    return key_map("original", pairs)


# --- the text encoder ---


def _umt5(block: str, *, ends: Iterable[Pair], parts: Mapping[str, str]) -> Iterator[Pair]:
    """`parts`: the layout's name of each part of a layer, by its native name."""
    yield from _tensors(_WEIGHT, *ends)
    for native, stored in parts.items():
        yield from _tensors(_WEIGHT, (f"{block}.{stored}", f"encoder.block.{{i}}.layer.{native}"))


UMT5_ORIGINAL = key_map(
    "original",
    _umt5(
        "blocks.{i}",
        ends=(("token_embedding", "shared"), ("norm", "encoder.final_layer_norm")),
        parts={
            "0.layer_norm": "norm1",
            "0.SelfAttention.q": "attn.q",
            "0.SelfAttention.k": "attn.k",
            "0.SelfAttention.v": "attn.v",
            "0.SelfAttention.o": "attn.o",
            "0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
            "1.layer_norm": "norm2",
            "1.DenseReluDense.wi_0": "ffn.gate.0",
            "1.DenseReluDense.wi_1": "ffn.fc1",
            "1.DenseReluDense.wo": "ffn.fc2",
        },
    ),
)
UMT5_LLAMA_CPP = key_map(
    "llama.cpp",
    _umt5(
        "enc.blk.{i}",
        ends=(("token_embd", "shared"), ("enc.output_norm", "encoder.final_layer_norm")),
        parts={
            "0.layer_norm": "attn_norm",
            "0.SelfAttention.q": "attn_q",
            "0.SelfAttention.k": "attn_k",
            "0.SelfAttention.v": "attn_v",
            "0.SelfAttention.o": "attn_o",
            "0.SelfAttention.relative_attention_bias": "attn_rel_b",
            "1.layer_norm": "ffn_norm",
            "1.DenseReluDense.wi_0": "ffn_gate",
            "1.DenseReluDense.wi_1": "ffn_up",
            "1.DenseReluDense.wo": "ffn_down",
        },
    ),
)
UMT5_TRANSFORMERS = UMT5_ORIGINAL.of_natives("transformers")


# --- the image encoder ---


def _clip() -> Iterator[Pair]:
    """`name[k]` is the k-th third of the rows of the tensor `name`: queries, keys and values are one tensor."""
    stored, native = "visual.transformer.{i}", "vision_model.encoder.layers.{i}"
    yield "visual.cls_embedding", "vision_model.embeddings.class_embedding"
    yield "visual.pos_embedding", "vision_model.embeddings.position_embedding.weight"
    yield "visual.patch_embedding.weight", "vision_model.embeddings.patch_embedding.weight"
    for name, module in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm")):  # misspelt there
        yield from _tensors(_BOTH, (f"visual.{name}", f"vision_model.{module}"))
    for leaf in _BOTH:
        for k, letter in enumerate("qkv"):
            yield f"{stored}.attn.to_qkv.{leaf}[{k}]", f"{native}.self_attn.{letter}_proj.{leaf}"
    for name, module in (
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("attn.proj", "self_attn.out_proj"),
        ("mlp.0", "mlp.fc1"),
        ("mlp.2", "mlp.fc2"),
    ):
        yield from _tensors(_BOTH, (f"{stored}.{name}", f"{native}.{module}"))


CLIP_ORIGINAL = key_map("original", _clip())
CLIP_TRANSFORMERS = CLIP_ORIGINAL.of_natives("transformers")
