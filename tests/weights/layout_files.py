"""Small random Wan models, and writers of the files that users have of them, independent of the engine's own tables.

Every number is exact in float32, bfloat16 and float16, so that files of any of these dtypes hold the same model.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from quantized_files import plain, write_gguf
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from frameloom.shapes.world import vocabulary
from frameloom.weights.loose import open_file

State = dict[str, Tensor]
Opened = tuple[Path | None, dict[str, Path]]
"""What `frameloom.load` is given: a model, and parts."""

TEXT_DIM = 256
VAE = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
VAE_22 = {"decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12}
VAE_22 |= {"patch_size": 2, "scale_factor_spatial": 16}
CLIP = {"hidden_size": 80, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 1, "patch_size": 14}
_SHIFTS = {"per-token timesteps": 5.0, "last image": 16.0}  # of the published checkpoints
_GOOGLE = "google/umt5-xxl"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline of Diffusers in float32, and the sentencepiece file of its tokenizer."""

    pipeline: WanPipeline | WanImageToVideoPipeline | WanVACEPipeline
    spiece: Path
    is_22: bool = False
    states: dict[str, State] = field(default_factory=dict)

    def state(self, part: str) -> State:
        """The tensors of a network under their native names, the text encoder's table once."""
        if part not in self.states:
            found = getattr(self.pipeline, part).state_dict()
            self.states[part] = {name: x.contiguous() for name, x in found.items() if "embed_tokens" not in name}
        return self.states[part]

    def has(self, part: str) -> bool:
        """Whether there is such a part."""
        return getattr(self.pipeline, part, None) is not None


def build_model(folder: Path, *, heads: int = 3, kind: str = "text", layers: int = 2) -> Model:
    """kind: text, two experts (of images, no CLIP), image, last image (both with CLIP), per-token timesteps, VACE."""
    torch.manual_seed(heads)
    is_22 = kind == "per-token timesteps"
    vae = _vae_22(folder) if is_22 else AutoencoderKLWan(**VAE)
    channels = 48 if is_22 else 16
    config: dict[str, Any] = {"num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers}
    config |= {"in_channels": channels, "out_channels": channels, "text_dim": TEXT_DIM, "ffn_dim": 256}
    network = WanVACETransformer3DModel if kind == "VACE" else WanTransformer3DModel
    clip, from_image = kind in ("image", "last image"), kind in ("two experts", "image", "last image")
    if from_image:
        config["in_channels"] = 36
    if clip:
        config |= {"image_dim": CLIP["hidden_size"], "added_kv_proj_dim": heads * 128}
    if kind == "last image":
        config["pos_embed_seq_len"] = 514
    if kind == "VACE":
        config |= {"vace_layers": [0, 1], "vace_in_channels": 96}
    parts: dict[str, Any] = {
        "tokenizer": T5Tokenizer.from_pretrained(str(_spiece(folder).parent), extra_ids=0),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(
                vocab_size=256, d_model=TEXT_DIM, d_kv=32, d_ff=256, num_layers=2, num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        ),
        "vae": vae,
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=_SHIFTS.get(kind, 3.0)
        ),
        "transformer": network(**config),
        "transformer_2": network(**config) if kind == "two experts" else None,
    }  # fmt: skip
    if clip:
        parts |= {
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP, hidden_act="gelu")),
            "image_processor": CLIPImageProcessorPil(),
        }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            _make_exact(part.eval())
    parts["boundary_ratio"] = 0.9 if kind == "two experts" else None
    if kind == "VACE":
        pipeline: Any = WanVACEPipeline(**parts)
    elif from_image:
        pipeline = WanImageToVideoPipeline(**parts)
    else:
        pipeline = WanPipeline(**parts, expand_timesteps=is_22)
    return Model(pipeline=pipeline, spiece=_spiece(folder), is_22=is_22)


@torch.no_grad()
def _make_exact(module: torch.nn.Module) -> None:
    for name, value in module.named_parameters():
        if "text_embedder" in name or "attn2" in name or "image_embedder" in name:
            value.mul_(3)  # as initialised, the text and the image hardly move the outcome
        if "pos_embed" in name or ("vace" in name and "proj" in name):
            value.normal_(std=0.05)  # as initialised, these are zero
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.bfloat16().half())


def _vae_22(folder: Path) -> AutoencoderKLWan:
    """With the statistics of Wan 2.2's latents, which test_identify.py compares with the published ones."""
    vae = AutoencoderKLWan(**VAE, **VAE_22, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    save_file(original_vae(vae.state_dict(), is_22=True), folder / "vae22.safetensors")
    config = open_file(folder / "vae22.safetensors").components["vae"].config
    return AutoencoderKLWan(**VAE, **VAE_22, latents_mean=config["latents_mean"], latents_std=config["latents_std"])


def _spiece(folder: Path) -> Path:
    """A sentencepiece model of a few words, as umt5-xxl's."""
    place = folder / "tokenizer"
    if not place.exists():
        place.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(vocabulary()), "a red circle moves"] * 10),
            model_prefix=str(place / "spiece"), vocab_size=120, hard_vocab_limit=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    return place / "spiece.model"


# --- names ---

_DIT = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    ".proj_in.": ".before_proj.",
    ".proj_out.": ".after_proj.",
    "proj_out": "head.head",
    ".scale_shift_table": ".modulation",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_out.0.": ".o.",
    ".to_": ".",
    ".add_k_proj.": ".k_img.",
    ".add_v_proj.": ".v_img.",
    ".norm_added_k.": ".norm_k_img.",
    ".norm2.": ".norm3.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
}
_VAE = {
    "norm1.gamma": "residual.0.gamma",
    "norm2.gamma": "residual.3.gamma",
    ".conv1.": ".residual.2.",
    ".conv2.": ".residual.6.",
    "conv_shortcut": "shortcut",
    "conv_in": "conv1",
    "conv_out": "head.2",
    "norm_out": "head.0",
    "post_quant_conv": "conv2",
    "quant_conv": "conv1",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
}
_T5 = {
    "shared": "token_embedding",
    "encoder.final_layer_norm": "norm",
    "encoder.block.": "blocks.",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.0.layer_norm": "norm1",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
_T5_GGUF = {
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "encoder.block.": "enc.blk.",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.SelfAttention.": "attn_",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}
_CLIP = {
    "vision_model.embeddings.class_embedding": "cls_embedding",
    "vision_model.embeddings.position_embedding.weight": "pos_embedding",
    "vision_model.embeddings.": "",
    "vision_model.pre_layrnorm": "pre_norm",
    "vision_model.post_layernorm": "post_norm",
    "vision_model.encoder.layers": "transformer",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


def _renamed(state: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    found = dict(state)
    for native, stored in table.items():
        found = {name.replace(native, stored): value for name, value in found.items()}
    assert len(found) == len(state)
    return found


def original_dit(state: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """The transformer in the names of the original code."""
    found = _renamed(state, _DIT)
    found["head.modulation"] = found.pop("scale_shift_table")
    return {prefix + name: value for name, value in found.items()}


def original_vae(state: State, *, is_22: bool) -> State:
    """The VAE in the names of the original code; Diffusers has the decoder of Wan 2.1 in stages, Wan has one list."""
    blocks = VAE["num_res_blocks"]
    found = _renamed(state, _VAE)
    for pattern, name in _stages_22(blocks) if is_22 else _stages_21(blocks):
        found = {re.sub(pattern, name, key): value for key, value in found.items()}
    assert len(found) == len(state)
    return found


def _stages_21(blocks: int) -> list[tuple[str, Callable[[re.Match[str]], str]]]:
    def upsample(match: re.Match[str]) -> str:
        inner = blocks + 1 if match[2] == "upsamplers" else int(match[3])
        return f"decoder.upsamples.{int(match[1]) * (blocks + 2) + inner}"

    return [
        (r"encoder\.down_blocks", lambda _: "encoder.downsamples"),
        (r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)", upsample),
    ]


def _stages_22(blocks: int) -> list[tuple[str, str]]:
    return [
        (r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.downsamples.\1.downsamples"),
        (r"encoder\.down_blocks\.(\d)\.downsampler", rf"encoder.downsamples.\1.downsamples.{blocks}"),
        (r"decoder\.up_blocks\.(\d)\.resnets", r"decoder.upsamples.\1.upsamples"),
        (r"decoder\.up_blocks\.(\d)\.upsampler", rf"decoder.upsamples.\1.upsamples.{blocks + 1}"),
    ]


def original_t5(state: Mapping[str, Any]) -> dict[str, Any]:
    """The text encoder in the names of the original code."""
    return _renamed(state, _T5)


def llama_t5(state: Mapping[str, Any]) -> dict[str, Any]:
    """The text encoder in the names of llama.cpp's GGUF files."""
    return _renamed(state, _T5_GGUF)


def original_clip(state: State) -> State:
    """The image encoder as open_clip has it, beside its text tower: queries, keys and values in one matrix."""
    found = _renamed(state, _CLIP)
    for i in range(CLIP["num_hidden_layers"]):
        for leaf in ("weight", "bias"):
            parts = [found.pop(f"transformer.{i}.self_attn.{letter}_proj.{leaf}") for letter in "qkv"]
            found[f"transformer.{i}.attn.to_qkv.{leaf}"] = torch.cat(parts)
    found["cls_embedding"] = found["cls_embedding"].view(1, 1, -1)
    found["pos_embedding"] = found["pos_embedding"][None]
    found["head"] = found.pop("visual_projection.weight").T.contiguous()
    found = {f"visual.{name}": x for name, x in found.items() if not name.endswith("position_ids")}
    return found | {"log_scale": torch.zeros(()), "textual.blocks.0.weight": torch.ones(2)}


# --- layouts ---


def narrow(state: Mapping[str, Tensor], dtype: torch.dtype) -> State:
    """The same numbers in another dtype."""
    return {name: value.to(dtype) for name, value in state.items()}


def with_vocabulary(state: Mapping[str, Tensor], model: Model, *, name: str = "spiece_model") -> State:
    """With the sentencepiece file as a tensor, as ComfyUI's files have it."""
    return {**state, name: torch.frombuffer(bytearray(model.spiece.read_bytes()), dtype=torch.uint8)}


def diffusers_shards(model: Model, folder: Path) -> Opened:
    """A Diffusers folder whose components are cut into several files."""
    model.pipeline.save_pretrained(str(folder), max_shard_size="300KB")
    assert len(list((folder / "transformer").glob("*-of-*"))) > 1
    return folder, {}


def diffusers_variant(model: Model, folder: Path) -> Opened:
    """A Diffusers folder of float16 files that say so in their names."""
    model.pipeline.save_pretrained(str(folder), variant="fp16")
    for path in folder.rglob("*.fp16.safetensors"):
        save_file(narrow(model.state(path.parent.name), torch.float16), path)
    return folder, {}


def original_repository(model: Model, folder: Path) -> Opened:
    """The repository of the original code: pickles, and an expert in each folder where there are two."""
    pair = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    for part, place in pair.items() if model.has("transformer_2") else [("transformer", ".")]:
        (folder / place).mkdir(exist_ok=True)
        state = original_dit(model.state(part))
        save_file(narrow(state, torch.bfloat16), folder / place / "diffusion_pytorch_model.safetensors")
        config = getattr(model.pipeline, part).config
        told = {
            "_class_name": "WanModel", "model_type": "t2v", "text_len": 512, "dim": config.num_attention_heads * 128,
            "num_heads": config.num_attention_heads, "ffn_dim": config.ffn_dim, "num_layers": config.num_layers,
            "in_dim": config.in_channels, "out_dim": config.out_channels, "freq_dim": 256, "eps": 1e-6,
        }  # fmt: skip
        (folder / place / "config.json").write_text(json.dumps(told))
    t5 = original_t5(model.state("text_encoder"))
    torch.save(narrow(t5, torch.bfloat16), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    name = "Wan2.2_VAE.pth" if model.is_22 else "Wan2.1_VAE.pth"
    torch.save(original_vae(model.state("vae"), is_22=model.is_22), folder / name)
    if model.has("image_encoder"):
        clip = original_clip(model.state("image_encoder"))
        name = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        torch.save(narrow(clip, torch.float16), folder / name)
    model.pipeline.tokenizer.save_pretrained(str(folder / _GOOGLE))
    return folder, {}


def single_files(model: Model, folder: Path) -> Opened:
    """A file for each network, without prefixes; of two experts the other one is found by its name."""
    parts = {"vae": folder / "wan_vae.safetensors", "text_encoder": folder / "umt5_xxl_fp16.safetensors"}
    save_file(original_vae(model.state("vae"), is_22=model.is_22), parts["vae"])
    t5 = narrow(model.state("text_encoder"), torch.float16)
    save_file(with_vocabulary(t5, model), parts["text_encoder"])
    parts["transformer"] = _experts(model, folder, prefix="", dtype=torch.float16)
    if model.has("image_encoder"):
        parts["image_encoder"] = folder / "clip_vision_h.safetensors"
        save_file(narrow(model.state("image_encoder"), torch.float16), parts["image_encoder"])
    return None, parts


def comfyui_folder(model: Model, folder: Path) -> Opened:
    """ComfyUI's folders of repackaged files, with its prefix before the transformer's names."""
    for name in ("diffusion_models", "text_encoders", "vae", "clip_vision"):
        (folder / name).mkdir()
    _experts(model, folder / "diffusion_models", prefix="model.diffusion_model.", dtype=torch.bfloat16)
    t5 = narrow(model.state("text_encoder"), torch.bfloat16)
    save_file(with_vocabulary(t5, model), folder / "text_encoders" / "umt5_xxl_bf16.safetensors")
    save_file(original_vae(model.state("vae"), is_22=model.is_22), folder / "vae" / "wan_vae.safetensors")
    if model.has("image_encoder"):
        save_file(model.state("image_encoder"), folder / "clip_vision" / "clip_vision_h.safetensors")
    return folder, {}


def all_in_one(model: Model, folder: Path) -> Opened:
    """One file with everything; of two experts the second in a file of its own."""
    vae = original_vae(model.state("vae"), is_22=model.is_22)
    tensors = {f"vae.{name}": value for name, value in vae.items()}
    encoder = model.state("text_encoder").items()
    tensors |= {f"text_encoders.umt5xxl.transformer.{name}": value for name, value in encoder}
    tensors = with_vocabulary(tensors, model, name="text_encoders.spiece_model")
    if model.has("image_encoder"):
        clip = model.state("image_encoder").items()
        tensors |= {f"clip_vision.{name}": value for name, value in clip}
    path = _experts(model, folder, prefix="model.diffusion_model.", dtype=torch.float32, beside=tensors)
    return path, {}


def mixed(model: Model, folder: Path) -> Opened:
    """A Diffusers folder, and the transformer and the VAE from elsewhere."""
    model.pipeline.save_pretrained(str(folder / "whole"))
    for name in ("transformer", "transformer_2", "vae"):
        shutil.rmtree(folder / "whole" / name, ignore_errors=True)
    save_file(original_vae(model.state("vae"), is_22=model.is_22), folder / "wan_vae.safetensors")
    path = _experts(model, folder, prefix="diffusion_model.", dtype=torch.float32)
    return folder / "whole", {"vae": folder / "wan_vae.safetensors", "transformer": path}


def gguf_files(model: Model, folder: Path) -> Opened:
    """Transformer and text encoder in GGUF; two experts in folders that say which they are."""
    pair = {"transformer": "HighNoise", "transformer_2": "LowNoise"}
    for part, name in pair.items() if model.has("transformer_2") else [("transformer", "Wan")]:
        (folder / name).mkdir()
        tensors = {key: plain(value.half()) for key, value in original_dit(model.state(part)).items()}
        write_gguf(folder / name / f"Wan-{name}-F16.gguf", tensors, architecture="wan", fold=name == "Wan")
    t5 = {key: plain(value.half()) for key, value in llama_t5(model.state("text_encoder")).items()}
    _, parts = single_files(model, folder)
    parts["tokenizer"] = model.spiece
    parts["text_encoder"] = write_gguf(folder / "umt5-xxl-encoder-F16.gguf", t5, architecture="t5encoder")
    parts["transformer"] = next(path for path in folder.glob("*/*.gguf") if "Low" not in path.name)
    return None, parts


def _experts(model: Model, folder: Path, *, prefix: str, dtype: torch.dtype, beside: State | None = None) -> Path:
    """The transformer, named as ComfyUI names it; where there are two the path is the high-noise one's."""
    name = "wan2.1_t2v_1.3B.safetensors"
    if model.has("transformer_2"):
        name = "wan2.2_i2v_high_noise_14B.safetensors"
        low = narrow(original_dit(model.state("transformer_2"), prefix=prefix), dtype)
        save_file(low, folder / name.replace("high", "low"))
    high = narrow(original_dit(model.state("transformer"), prefix=prefix), dtype)
    save_file({**high, **(beside or {})}, folder / name)
    return folder / name


LAYOUTS: Mapping[str, Callable[[Model, Path], Opened]] = {
    "Diffusers, sharded": diffusers_shards,
    "Diffusers, variant fp16": diffusers_variant,
    "original repository": original_repository,
    "single files": single_files,
    "ComfyUI's folders": comfyui_folder,
    "all in one": all_in_one,
    "mixed": mixed,
    "GGUF": gguf_files,
}
