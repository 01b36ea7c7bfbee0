"""Random pipelines of Wan, and of the models that are built like it."""

from collections.abc import Callable
from typing import Any

import torch

from frameloom.integrations.diffusers.samples.parts import (
    IMAGE_DIM,
    TEXT_DIM,
    clip,
    flow_scheduler,
    picture,
    tokenizer,
    umt5,
    unipc,
    video,
    wan_22_vae,
    wan_vae,
)
from frameloom.integrations.diffusers.samples.sample import Parts, Sample, Scale, of_diffusers

_PROMPTS = {"prompt": "a red circle", "negative_prompt": "blurry", "max_sequence_length": 32, "output_type": "pt"}


def dit(name: str = "WanTransformer3DModel", *, channels: int = 16, out: int = 16, **config: Any) -> Any:
    """A small transformer of a class, to which a prompt and a picture matter more than as initialised."""
    network = of_diffusers(
        name, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=channels,
        out_channels=out, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=48, **{"num_layers": 2} | config,
    )  # fmt: skip
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if any(part in key for part in ("text_embedder", "attn2", "image_embedder", "vace")):
                parameter.mul_(3)
    return network


def _t2v(transformer: Callable[[], Any], *, scheduler: Callable[[], Any] = unipc, **more: Any) -> Parts:
    """Parts of a pipeline with Wan 2.1's VAE."""

    def parts(scale: Scale) -> dict[str, Any]:
        made = {name: part() if callable(part) else part for name, part in more.items()}
        return {
            "vae": wan_vae(scale), "text_encoder": umt5(), "tokenizer": tokenizer(), "scheduler": scheduler(),
            "transformer": transformer(), **made,
        }  # fmt: skip

    return parts


def _i2v(transformer: Callable[[], Any], **more: Any) -> Parts:
    """The same, with CLIP."""
    plain = _t2v(transformer, **more)
    return lambda scale: plain(scale) | clip()


def _ti2v(scale: Scale) -> dict[str, Any]:
    """Wan 2.2 TI2V-5B: another VAE, and a timestep for each token."""
    return {
        "vae": wan_22_vae(scale), "text_encoder": umt5(), "tokenizer": tokenizer(), "scheduler": unipc(),
        "transformer": dit(channels=48, out=48), "transformer_2": None, "expand_timesteps": True,
    }  # fmt: skip


def text(scale: Scale) -> dict[str, Any]:
    """A prompt."""
    size = {"height": scale.height, "width": scale.width, "num_frames": scale.frames}
    return {**_PROMPTS, **size, "num_inference_steps": scale.steps}


def _image(scale: Scale) -> dict[str, Any]:
    return text(scale) | {"image": picture(scale)}


def _first_and_last(scale: Scale) -> dict[str, Any]:
    return _image(scale) | {"last_image": picture(scale, seed=5)}


def _video(scale: Scale) -> dict[str, Any]:
    asked = text(scale) | {"video": video(scale)}
    del asked["num_frames"]
    return asked | {"num_inference_steps": 2 * scale.steps, "strength": 0.5}


def _edit(scale: Scale) -> dict[str, Any]:
    return text(scale) | {"video": video(scale)}


def _vace(scale: Scale) -> dict[str, Any]:
    return _edit(scale) | {"mask": [picture(scale, seed=3).convert("L")] * scale.frames}


def _animate(scale: Scale) -> dict[str, Any]:
    asked = _image(scale) | {"pose_video": video(scale), "face_video": [_face(p) for p in video(scale)]}
    del asked["num_frames"]
    return asked | {"segment_frame_length": scale.frames, "prev_segment_conditioning_frames": 1, "guidance_scale": 1.0}


def _face(image: Any) -> Any:
    return image.resize((16, 16))


def _forcing(scale: Scale) -> dict[str, Any]:
    return text(scale) | {"base_num_frames": scale.frames, "ar_step": 0}


def _forcing_video(scale: Scale) -> dict[str, Any]:
    history = {"overlap_history": 5, "base_num_frames": scale.frames, "num_frames": 2 * scale.frames - 1}
    return text(scale) | {"video": video(scale)[:5], **history}


def _with_clip(**config: Any) -> Callable[[], Any]:
    """A transformer that reads a mask and a picture's latents beside the noise, and CLIP's features."""
    return lambda: dit(channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=32, **config)


def _animated() -> Any:
    return dit(
        "WanAnimateTransformer3DModel", channels=36, latent_channels=16, image_dim=IMAGE_DIM, added_kv_proj_dim=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip


def _vace_dit() -> Any:
    return dit("WanVACETransformer3DModel", num_layers=3, vace_layers=[0, 2], vace_in_channels=96)


def _skyreels(**config: Any) -> Callable[[], Any]:
    return lambda: dit("SkyReelsV2Transformer3DModel", **config)


def _chrono() -> Any:
    return dit("ChronoEditTransformer3DModel", channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=32)


_ONE: dict[str, Any] = {"transformer_2": None}
_TWO: dict[str, Any] = {"transformer_2": dit, "boundary_ratio": 0.5}
_FLF = _with_clip(pos_embed_seq_len=2 * 5)

SAMPLES = (
    Sample(pipeline="WanPipeline", kind="2.1", parts=_t2v(dit, **_ONE), ask=text),
    Sample(pipeline="WanPipeline", kind="2.2, two experts", parts=_t2v(dit, **_TWO), ask=text),
    Sample(pipeline="WanPipeline", kind="2.2 TI2V", parts=_ti2v, ask=text),
    Sample(pipeline="WanImageToVideoPipeline", kind="2.1", parts=_i2v(_with_clip(), **_ONE), ask=_image),
    Sample(pipeline="WanImageToVideoPipeline", kind="first and last", parts=_i2v(_FLF, **_ONE), ask=_first_and_last),
    Sample(
        pipeline="WanImageToVideoPipeline",
        kind="2.2, two experts",
        parts=_t2v(
            lambda: dit(channels=36),
            transformer_2=lambda: dit(channels=36),
            boundary_ratio=0.5,
            image_encoder=None,
            image_processor=None,
        ),
        ask=_image,
    ),
    Sample(
        pipeline="WanImageToVideoPipeline",
        kind="2.2 TI2V",
        parts=lambda scale: _ti2v(scale) | {"image_encoder": None, "image_processor": None},
        ask=_image,
    ),
    Sample(pipeline="WanVideoToVideoPipeline", parts=_t2v(dit), ask=_video),
    Sample(pipeline="WanVACEPipeline", parts=_t2v(_vace_dit, **_ONE), ask=_vace),
    Sample(pipeline="WanAnimatePipeline", parts=_i2v(_animated), ask=_animate),
    Sample(pipeline="SkyReelsV2Pipeline", parts=_t2v(_skyreels()), ask=text),
    Sample(
        pipeline="SkyReelsV2ImageToVideoPipeline",
        parts=_i2v(_skyreels(channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=32)),
        ask=_image,
    ),
    Sample(pipeline="SkyReelsV2DiffusionForcingPipeline", parts=_t2v(_skyreels()), ask=_forcing),
    Sample(
        pipeline="SkyReelsV2DiffusionForcingImageToVideoPipeline",
        parts=_t2v(_skyreels()),
        ask=lambda scale: _forcing(scale) | {"image": picture(scale)},
    ),
    Sample(pipeline="SkyReelsV2DiffusionForcingVideoToVideoPipeline", parts=_t2v(_skyreels()), ask=_forcing_video),
    Sample(
        pipeline="LucyEditPipeline",
        parts=lambda scale: _ti2v(scale) | {"transformer": dit(channels=96, out=48)},
        ask=_edit,
    ),
    Sample(pipeline="ChronoEditPipeline", parts=_i2v(_chrono, scheduler=flow_scheduler), ask=_image),
)
