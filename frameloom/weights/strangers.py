"""What a file seems to be that is no network of Wan's, or a relative of Wan that this version does not compute."""

import re
from collections.abc import Iterable, Mapping

from frameloom.errors import CheckpointError

# Found in some name of the file. The first that fits is said.
_SEEMS: Mapping[str, str] = {
    r"\.(lora_[AB]|lora_up|lora_down|hada_w1_a|lokr_w1|lokr_w1_a)(\.|$)|\.lora\.(up|down)\.|_lora\.(up|down)\."
    r"|\.diff(_b|_m)?$": "is a LoRA, which changes a model and is none; give it with --lora",
    r"(^|\.)vace_blocks\.0\.": "is the VACE part of a model alone, without the model; give the whole VACE model",
    r"(^|\.)double_blocks\.0\.": "seems to be a Flux or HunyuanVideo model, which is not Wan's",
    r"(^|\.)single_transformer_blocks\.0\.": "seems to be a Flux model, which is not Wan's",
    r"(^|\.)joint_blocks\.0\.": "seems to be a Stable Diffusion 3 model, which is not Wan's",
    r"(^|\.)(input_blocks|down_blocks)\.0\.\d+\.(emb_layers|op|0|attentions)": "seems to be a Stable Diffusion model",
    r"(^|\.)(input_blocks\.1\.|time_embed\.0\.|conv_in\.weight$)": "seems to be a Stable Diffusion model or its VAE",
    r"(^|\.)encoder\.down\.0\.block\.0\.": "is a VAE of Stable Diffusion or Flux, which Wan has no use for",
    r"(^|\.)mid_block\.attentions\.0\.to_q\.": "is a VAE of Stable Diffusion or Flux, which Wan has no use for",
    r"(^|\.)(patchify_proj|adaln_single)\.": "seems to be an LTX-Video model, which is not Wan's",
    r"(^|\.)transformer_blocks\.0\.": "seems to be an image or video model, but not one of Wan's",
    r"(^|\.)(text_model\.encoder|transformer\.resblocks)\.": "is a CLIP text encoder, and Wan's is UMT5-XXL",
    r"(^|\.)model\.layers\.0\.": "is a language model, and Wan's text encoder is UMT5-XXL",
}

# Models built on Wan's transformer whose additional tensors would have to be left out.
_RELATIVES: Mapping[str, str] = {
    r"(casual_audio_encoder|audio_injector|(multitalk_)?audio_proj|audio_model)\.": "Wan for sound (S2V, MultiTalk)",
    r"(face_adapter|motion_encoder|pose_patch_embedding)\.": "Wan Animate",
    r"control_adapter\.": "Wan Fun with camera control",
    r"ref_conv\.": "Wan Fun Control",
    r"blocks\.0\.(cam_encoder|projector|audio_cross_attn)\.": "a model of Wan with more in its blocks",
    r"fps_(embedding|projection)\.": "SkyReels V2 with diffusion forcing",
    r"(motion_controller|mvs_attn|ip_adapter)\.": "Wan with an adapter of its own",
}

_T5_BIAS = re.compile(
    r"((?:.*\.)?encoder\.block\.)0(\.layer\.0\.SelfAttention\.relative_attention_bias\.weight)"
    r"|((?:.*\.)?enc\.blk\.)0(\.attn_rel_b\.weight)"
)


def what_it_seems(names: Iterable[str]) -> str:
    """The end of a sentence about a file in which no network of Wan's was found."""
    listed = list(names)
    for sign, said in _SEEMS.items():
        if any(re.search(sign, name) for name in listed):
            return (
                f"{said}; give a transformer, VAE, text encoder or image encoder of Wan" if "--" not in said else said
            )
    if not listed:
        return "holds no tensors; download it again"
    some = ", ".join(f"'{name[:80]}'" for name in listed[:3])
    return f"holds no network of Wan's (it has {some} ...); give a file of Wan 2.1 or 2.2"


def refuse_relatives(names: Iterable[str], *, where: str) -> None:
    """Raise CheckpointError for a model that only looks like Wan's: left-out tensors would change what it makes."""
    listed = set(names)
    for sign, said in _RELATIVES.items():
        found = next((name for name in sorted(listed) if re.search(rf"(^|\.){sign}", name)), None)
        if found is not None and "lora" not in found:
            raise CheckpointError(
                f"{where} holds '{found}', a part of {said}, which this version does not compute; "
                "give a model of Wan 2.1 or 2.2 itself"
            )
    for name in listed:
        if (match := _T5_BIAS.fullmatch(name)) and _is_shared(match, listed):
            raise CheckpointError(
                f"{where} holds a T5 text encoder, as of Flux and Stable Diffusion 3: only its first layer knows "
                "positions; Wan's is UMT5-XXL (umt5_xxl_fp16.safetensors)"
            )


def _is_shared(match: re.Match[str], names: set[str]) -> bool:
    """Whether the second layer is there and has no bias of its own, as in T5."""
    begin, end = (match[1], match[2]) if match[1] else (match[3], match[4])
    has_second = any(name.startswith(f"{begin}1.") for name in names)
    return has_second and f"{begin}1{end}" not in names
