"""Random pipelines of pictures that Wan's VAE decodes, as Qwen-Image's."""

from collections.abc import Callable
from typing import Any

from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from frameloom.integrations.diffusers.samples.parts import (
    Seeing,
    flow_scheduler,
    picture,
    qwen_text,
    qwen_vae,
    tokenizer,
    wan_22_vae,
    wan_vae,
)
from frameloom.integrations.diffusers.samples.sample import Sample, Scale, of_diffusers

_QWEN = {"patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 3, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)}  # fmt: skip
_INSTRUCTION = '{"text": "a red circle", "edit_instruction": "make it blue"}'


def _qwen(*, channels: int = 3, sees: bool = False, **more: Callable[[], Any]) -> Any:
    """Parts of Qwen-Image, and what else one of its pipelines has."""

    def parts(scale: Scale) -> dict[str, Any]:
        layered = {"use_layer3d_rope": True, "use_additional_t_cond": True} if channels == 4 else {}
        made = {
            "transformer": of_diffusers("QwenImageTransformer2DModel", **_QWEN, **layered),
            "vae": qwen_vae(scale, channels=channels), "scheduler": flow_scheduler(), "text_encoder": qwen_text(),
            "tokenizer": tokenizer(), **{name: part() for name, part in more.items()},
        }  # fmt: skip
        return made | ({"processor": Seeing()} if sees else {})

    return parts


def _controlnet(*, masked: bool = False) -> Any:
    more = {"extra_condition_channels": 4} if masked else {}
    return of_diffusers("QwenImageControlNetModel", **_QWEN, **more)


def _ask(scale: Scale, **more: Any) -> dict[str, Any]:
    asked = {
        "prompt": "a red circle", "negative_prompt": "blurry", "num_inference_steps": scale.steps,
        "true_cfg_scale": 3.0, "height": scale.height, "width": scale.width, "output_type": "pt",
        "max_sequence_length": 64,
    }  # fmt: skip
    return asked | more


def _with(*names: str, **more: Any) -> Any:
    """A request with pictures under these names."""
    return lambda scale: _ask(scale, **{name: picture(scale, seed=i) for i, name in enumerate(names)}, **more)


def _inpaint(scale: Scale) -> dict[str, Any]:
    return _ask(scale, image=picture(scale), strength=0.9, mask_image=_mask(scale))


def _mask(scale: Scale) -> Any:
    return picture(scale, seed=3).convert("L")


def _layered(scale: Scale) -> dict[str, Any]:
    asked = _ask(scale, image=picture(scale).convert("RGBA"), layers=2, resolution=640)
    return {name: value for name, value in asked.items() if name not in ("height", "width")}


def _guided(scale: Scale, **more: Any) -> dict[str, Any]:
    """A request to a pipeline whose guidance is the usual one."""
    asked = _ask(scale, guidance_scale=3.0, **more)
    del asked["true_cfg_scale"]
    return asked


def _fibo(*, edits: bool) -> Any:
    def parts(scale: Scale) -> dict[str, Any]:
        smol = SmolLM3Config(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=len(tokenizer()), pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        transformer = of_diffusers(
            "BriaFiboTransformer2DModel", patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=64, text_encoder_dim=32,
            pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
        )  # fmt: skip
        return {
            "vae": wan_22_vae(scale, z_dim=16), "text_encoder": SmolLM3ForCausalLM(smol), "tokenizer": tokenizer(),
            "transformer": transformer, "scheduler": flow_scheduler(),
        }  # fmt: skip

    return parts


def _ask_fibo(scale: Scale) -> dict[str, Any]:
    return _guided(scale, output_type="np", max_sequence_length=128)


def _qwen3(*, layers: int = 2, **config: Any) -> Qwen3VLConfig:
    words = tokenizer()
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(words),
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
              "patch_size": 14, "deepstack_visual_indexes": [0]}  # fmt: skip
    marks = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in marks.items()}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **ids, **config)


def _joy(name: str) -> Any:
    def parts(scale: Scale) -> dict[str, Any]:
        transformer = of_diffusers(
            name, patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=16,
            num_layers=1, rope_dim_list=[4, 6, 6], theta=256,
        )  # fmt: skip
        return {
            "vae": wan_vae(scale), "text_encoder": Qwen3VLForConditionalGeneration(_qwen3()), "tokenizer": tokenizer(),
            "processor": Seeing(), "transformer": transformer, "scheduler": flow_scheduler(),
        }  # fmt: skip

    return parts


def _krea(scale: Scale) -> dict[str, Any]:
    transformer = of_diffusers(
        "Krea2Transformer2DModel", in_channels=64, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
    )  # fmt: skip
    return {
        "vae": qwen_vae(scale), "text_encoder": Qwen3VLModel(_qwen3()), "tokenizer": tokenizer(),
        "transformer": transformer, "scheduler": flow_scheduler(use_dynamic_shifting=True),
        "text_encoder_select_layers": (0, 1, 2),
    }  # fmt: skip


def _nucleus(scale: Scale) -> dict[str, Any]:
    transformer = of_diffusers(
        "NucleusMoEImageTransformer2DModel", patch_size=2, in_channels=64, out_channels=16, num_layers=2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        moe_enabled=False, capacity_factors=[8.0, 8.0],
    )  # fmt: skip
    return {
        "vae": qwen_vae(scale), "text_encoder": Qwen3VLForConditionalGeneration(_qwen3(layers=8)),
        "processor": Seeing(), "transformer": transformer, "scheduler": flow_scheduler(),
    }  # fmt: skip


SAMPLES = (
    Sample(pipeline="QwenImagePipeline", parts=_qwen(), ask=_ask),
    Sample(pipeline="QwenImageImg2ImgPipeline", parts=_qwen(), ask=_with("image", strength=0.9)),
    Sample(pipeline="QwenImageInpaintPipeline", parts=_qwen(), ask=_inpaint),
    Sample(pipeline="QwenImageEditPipeline", parts=_qwen(sees=True), ask=_with("image")),
    Sample(
        pipeline="QwenImageEditPlusPipeline",
        parts=_qwen(sees=True),
        ask=lambda scale: _ask(scale, image=[picture(scale), picture(scale, seed=1)]),
    ),
    Sample(pipeline="QwenImageEditInpaintPipeline", parts=_qwen(sees=True), ask=_inpaint),
    Sample(pipeline="QwenImageControlNetPipeline", parts=_qwen(controlnet=_controlnet), ask=_with("control_image")),
    Sample(
        pipeline="QwenImageControlNetInpaintPipeline",
        parts=_qwen(controlnet=lambda: _controlnet(masked=True)),
        ask=lambda scale: _with("control_image")(scale) | {"control_mask": _mask(scale)},
    ),
    Sample(pipeline="QwenImageLayeredPipeline", parts=_qwen(channels=4, sees=True), ask=_layered),
    Sample(pipeline="BriaFiboPipeline", parts=_fibo(edits=False), ask=_ask_fibo),
    Sample(
        pipeline="BriaFiboEditPipeline",
        parts=_fibo(edits=True),
        ask=lambda scale: _ask_fibo(scale) | {"prompt": _INSTRUCTION, "image": picture(scale), "_auto_resize": False},
    ),
    Sample(
        pipeline="JoyImageEditPipeline",
        parts=_joy("JoyImageEditTransformer3DModel"),
        ask=lambda scale: _guided(scale, image=picture(scale)),
    ),
    Sample(
        pipeline="JoyImageEditPlusPipeline",
        parts=_joy("JoyImageEditPlusTransformer3DModel"),
        ask=lambda scale: _guided(scale, images=[picture(scale), picture(scale, seed=1)]),
    ),
    Sample(pipeline="Krea2Pipeline", parts=_krea, ask=_guided),
    Sample(pipeline="NucleusMoEImagePipeline", parts=_nucleus, ask=lambda scale: _guided(scale, return_index=-1)),
)
