"""Random pipelines of other models of videos: with Wan's VAE, or a transformer of which a part is taken over."""

from dataclasses import replace
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from frameloom.integrations.diffusers.samples.parts import (
    TEXT_DIM,
    Lenient,
    flow_scheduler,
    picture,
    qwen_text,
    tokenizer,
    umt5,
    video,
    wan_vae,
)
from frameloom.integrations.diffusers.samples.sample import Sample, Scale, of_diffusers
from frameloom.integrations.diffusers.samples.wan import dit, text

_QWEN_DIM = 16


def _t5_and_vae(scale: Scale) -> dict[str, Any]:
    return {"vae": wan_vae(scale), "text_encoder": umt5(), "tokenizer": tokenizer()}


def _cosmos(*, channels: int, text_dim: int, **more: Any) -> Any:
    return of_diffusers(
        "CosmosTransformer3DModel", in_channels=channels, out_channels=16, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, mlp_ratio=2, text_embed_dim=text_dim, adaln_lora_dim=4, max_size=(8, 64, 64),
        patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False,
        extra_pos_embed_type="learnable", **more,
    )  # fmt: skip


def _cosmos2(channels: int, scale: Scale) -> dict[str, Any]:
    scheduler = flow_scheduler(use_karras_sigmas=True)
    transformer = _cosmos(channels=channels, text_dim=TEXT_DIM)
    return _t5_and_vae(scale) | {"transformer": transformer, "scheduler": scheduler, "safety_checker": Lenient()}


def _cosmos25(scale: Scale, **more: Any) -> dict[str, Any]:
    return {
        "vae": wan_vae(scale), "text_encoder": qwen_text(layers=2), "tokenizer": tokenizer(),
        "safety_checker": Lenient(), "scheduler": _unipc(),
        "transformer": _cosmos(channels=17, text_dim=2 * _QWEN_DIM, **more),
    }  # fmt: skip


def _cosmos25_transfer(scale: Scale) -> dict[str, Any]:
    context = {"img_context_dim_in": 32, "img_context_dim_out": 32}
    controlnet = of_diffusers(
        "CosmosControlNetModel", n_controlnet_blocks=2, in_channels=18, latent_channels=18, model_channels=32,
        num_attention_heads=2, attention_head_dim=16, mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4,
        patch_size=(1, 2, 2), max_size=(8, 64, 64), rope_scale=(2.0, 1.0, 1.0), extra_pos_embed_type="learnable",
        use_crossattn_projection=False, **context,
    )  # fmt: skip
    parts = _cosmos25(scale, controlnet_block_every_n=1, img_context_num_tokens=4, **context)
    return parts | {"controlnet": controlnet}


def _unipc() -> Any:
    return of_diffusers("UniPCMultistepScheduler")


def _cosmos3(scale: Scale) -> dict[str, Any]:
    words = tokenizer()
    transformer = of_diffusers(
        "Cosmos3OmniTransformer", head_dim=12, hidden_act="relu2", hidden_size=24, intermediate_size=24,
        latent_channel=16, latent_patch_size=2, num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1,
        patch_latent_dim=64, qk_norm_for_text=False, rms_norm_eps=1e-5, rope_axes_dim=[2, 2, 2], vocab_size=len(words),
    )  # fmt: skip
    return {
        "transformer": transformer, "text_tokenizer": words, "vae": wan_vae(scale), "scheduler": _unipc(),
        "sound_tokenizer": None, "safety_checker": Lenient(), "enable_safety_checker": False,
    }  # fmt: skip


def _ask_cosmos3(scale: Scale) -> dict[str, Any]:
    asked = text(scale) | {"guidance_scale": 3.0, "use_system_prompt": False, "output_type": "np"}
    del asked["max_sequence_length"]
    return asked | {"add_resolution_template": False, "add_duration_template": False}


def _sana(scheduler: Any) -> Any:
    def parts(scale: Scale) -> dict[str, Any]:
        gemma = Gemma2Config(
            head_dim=16, hidden_size=8, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1,
            num_key_value_heads=2, vocab_size=len(tokenizer()), attn_implementation="eager",
        )  # fmt: skip
        transformer = of_diffusers(
            "SanaVideoTransformer3DModel", in_channels=16, out_channels=16, num_attention_heads=2,
            attention_head_dim=12, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12,
            cross_attention_dim=24, caption_channels=8, sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
            qk_norm="rms_norm_across_heads", norm_elementwise_affine=False, norm_eps=1e-6,
        )  # fmt: skip
        return {
            "vae": wan_vae(scale), "text_encoder": Gemma2Model(gemma), "tokenizer": tokenizer(),
            "transformer": transformer, "scheduler": scheduler(),
        }  # fmt: skip

    return parts


def _ask_sana(scale: Scale) -> dict[str, Any]:
    asked = text(scale)
    frames = asked.pop("num_frames")
    return asked | {"frames": frames, "complex_human_instruction": [], "use_resolution_binning": False}


def _helios(*, stages: int) -> Any:
    def parts(scale: Scale) -> dict[str, Any]:
        ends = [i / stages for i in range(stages + 1)]
        transformer = dit(
            "HeliosTransformer3DModel", rope_dim=(4, 6, 6), has_multi_term_memory_patch=True,
            guidance_cross_attn=True, zero_history_timestep=True, is_amplify_history=False,
        )  # fmt: skip
        scheduler = (
            of_diffusers(  # with a gamma of 1/3, as by default, the noise of a block has no Cholesky factor on a CPU
                "HeliosScheduler", stage_range=ends, stages=stages, gamma=0.25, use_dynamic_shifting=True
            )
        )
        return _t5_and_vae(scale) | {"transformer": transformer, "scheduler": scheduler}

    return parts


def _pyramid(scale: Scale) -> dict[str, Any]:
    """It begins at a quarter of the size, of which a patch of memory takes four cells each way."""
    large = replace(scale, height=max(scale.height, 128), width=max(scale.width, 128))
    asked = text(large) | {"pyramid_num_inference_steps_list": [scale.steps] * 3, "num_latent_frames_per_chunk": 3}
    del asked["num_inference_steps"]
    return asked


def _anyflow(name: str, **config: Any) -> Any:
    def parts(scale: Scale) -> dict[str, Any]:
        transformer = dit(name, gate_value=0.25, deltatime_type="r", **config)
        scheduler = of_diffusers("FlowMapEulerDiscreteScheduler", num_train_timesteps=1000, shift=5.0)
        return _t5_and_vae(scale) | {"transformer": transformer, "scheduler": scheduler}

    return parts


def _motif(*, sees: bool) -> Any:
    def parts(scale: Scale) -> dict[str, Any]:
        transformers = __import__("transformers")
        words = {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
            "vocab_size": len(tokenizer()) + 8, "max_position_embeddings": 128, "head_dim": 16,
            "num_key_value_heads": 2, "dropout_rate": 0.0,
        }  # fmt: skip
        vision = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.T5Gemma2EncoderConfig(
            text_config=transformers.T5Gemma2TextConfig(**words),
            vision_config=SiglipVisionConfig(**vision, image_size=16, patch_size=4),
        )
        transformer = of_diffusers(
            "MotifVideoTransformer3DModel", in_channels=33, out_channels=16, num_attention_heads=2,
            attention_head_dim=12, num_layers=1, num_single_layers=1, patch_size=1, patch_size_t=1, qk_norm="rms_norm",
            text_embed_dim=32, rope_axes_dim=(4, 4, 4), **({"image_embed_dim": 4} if sees else {}),
        )  # fmt: skip
        eyes = SiglipImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 16, "width": 16})
        return {
            "vae": wan_vae(scale), "text_encoder": transformers.T5Gemma2Encoder(config), "tokenizer": tokenizer(),
            "transformer": transformer, "scheduler": flow_scheduler(shift=7.0),
            "feature_extractor": eyes if sees else None, "guider": of_diffusers("AdaptiveProjectedGuidance"),
        }  # fmt: skip

    return parts


def _ltx2(scale: Scale) -> dict[str, Any]:
    words = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(tokenizer()) + 8}  # fmt: skip
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    gemma = Gemma3Config(text_config=words, vision_config=eyes, mm_tokens_per_image=4)
    return {
        "text_encoder": Gemma3ForConditionalGeneration(gemma), "tokenizer": tokenizer(), "scheduler": flow_scheduler(),
        **_ltx2_networks(),
    }  # fmt: skip


def _ltx2_networks() -> dict[str, Any]:
    split = {"rope_double_precision": False, "rope_type": "split"}
    transformer = of_diffusers(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, patch_size=1, patch_size_t=1,
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2,
        qk_norm="rms_norm_across_heads", caption_channels=16, **split,
    )  # fmt: skip
    shape = {"num_attention_heads": 4, "attention_head_dim": 4, "num_layers": 1, "num_learnable_registers": None}
    connector = {f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in shape.items()}
    connectors = of_diffusers(
        "pipelines.ltx2.LTX2TextConnectors", caption_channels=16, text_proj_in_factor=3, connector_rope_base_seq_len=32,
        rope_theta=1e4, causal_temporal_positioning=False, **connector, **split,
    )  # fmt: skip
    return {"transformer": transformer, "connectors": connectors, **_ltx2_decoders()}


def _ltx2_decoders() -> dict[str, Any]:
    vae = of_diffusers(
        "AutoencoderKLLTX2Video", latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False), downsample_type=("spatial",),
        upsample_residual=(False,), upsample_factor=(1,), timestep_conditioning=False, patch_size=1, patch_size_t=1,
        encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio = of_diffusers(
        "AutoencoderKLLTX2Audio", base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, in_channels=2,
        attn_resolutions=None, resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height",
        mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8,
    )  # fmt: skip
    vocoder = of_diffusers(
        "pipelines.ltx2.LTX2Vocoder", in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    return {"vae": vae, "audio_vae": audio, "vocoder": vocoder}


def _ask_ltx2(scale: Scale) -> dict[str, Any]:
    return text(scale) | {"frame_rate": 25.0, "guidance_scale": 3.0}


def _controls(scale: Scale) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(2)
    return [torch.randn(3, scale.height, scale.width, generator=noise) for _ in range(scale.frames)]


def _still(scale: Scale) -> dict[str, Any]:
    asked = text(scale)
    del asked["num_frames"]
    return asked


def _seen(ask: Any) -> Any:
    return lambda scale: ask(scale) | {"image": picture(scale)}


SAMPLES = (
    Sample(pipeline="Cosmos2TextToImagePipeline", parts=lambda scale: _cosmos2(16, scale), ask=_still),
    Sample(pipeline="Cosmos2VideoToWorldPipeline", parts=lambda scale: _cosmos2(17, scale), ask=_seen(text)),
    Sample(pipeline="Cosmos2_5_PredictBasePipeline", kind="text", parts=_cosmos25, ask=text),
    Sample(
        pipeline="Cosmos2_5_PredictBasePipeline",
        kind="video",
        parts=_cosmos25,
        ask=lambda scale: text(scale) | {"video": video(scale)},
    ),
    Sample(
        pipeline="Cosmos2_5_TransferPipeline",
        needs="torchvision",
        parts=_cosmos25_transfer,
        ask=lambda scale: text(scale) | {"controls": _controls(scale), "num_frames_per_chunk": 16},
    ),
    Sample(pipeline="Cosmos3OmniPipeline", kind="text", parts=_cosmos3, ask=_ask_cosmos3),
    Sample(pipeline="Cosmos3OmniPipeline", kind="image", parts=_cosmos3, ask=_seen(_ask_cosmos3)),
    Sample(
        pipeline="SanaVideoPipeline", parts=_sana(lambda: of_diffusers("DPMSolverMultistepScheduler")), ask=_ask_sana
    ),
    Sample(pipeline="SanaImageToVideoPipeline", parts=_sana(flow_scheduler), ask=_seen(_ask_sana)),
    Sample(
        pipeline="HeliosPipeline",
        parts=_helios(stages=1),
        ask=lambda scale: text(scale) | {"num_latent_frames_per_chunk": 3},
    ),
    Sample(pipeline="HeliosPyramidPipeline", parts=_helios(stages=3), ask=_pyramid),
    Sample(pipeline="AnyFlowPipeline", parts=_anyflow("AnyFlowTransformer3DModel"), ask=text),
    Sample(
        pipeline="AnyFlowFARPipeline",
        parts=_anyflow(
            "AnyFlowFARTransformer3DModel",
            compressed_patch_size=(1, 4, 4),
            full_chunk_limit=3,
            chunk_partition=(1, 1, 1),
        ),
        ask=text,
    ),
    Sample(pipeline="MotifVideoPipeline", parts=_motif(sees=False), ask=text),
    Sample(pipeline="MotifVideoImage2VideoPipeline", parts=_motif(sees=True), ask=_seen(text)),
    Sample(pipeline="LTX2Pipeline", parts=_ltx2, ask=_ask_ltx2),
    Sample(
        pipeline="LTX2ImageToVideoPipeline", parts=_ltx2, ask=lambda scale: _seen(_ask_ltx2)(scale) | {"image_crf": 0}
    ),
)
