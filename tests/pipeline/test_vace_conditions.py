"""What VACE is controlled by against Diffusers' WanVACEPipeline: every intermediate, then whole videos."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import TEXT_DIM, VAE_21
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
from PIL import Image

from frameloom.errors import RequestError
from frameloom.models.dit_fast import LoopChoices
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.vace import make_dit
from frameloom.models.vae_state import Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.pipeline import stages
from frameloom.pipeline.vace import VaceInputs, fold_mask, on_canvas, prepare_control, video_and_mask
from frameloom.sampling.guidance import ExpertSwitch
from frameloom.sampling.unipc import make_sampler
from frameloom.types import Pictures

CPU = torch.device("cpu")
SIZE = (5, 32, 48)  # frames, rows, columns
CHANNELS = 2 * VAE_21["z_dim"] + 64
FAST = LoopChoices(prompt_once=True, shared_branches=True)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    z_dim = VAE_21["z_dim"]
    statistics = {"latents_mean": [0.05 * i for i in range(z_dim)], "latents_std": [1 + 0.1 * i for i in range(z_dim)]}
    made = WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(**VAE_21, **statistics).eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer(),
        transformer_2=transformer(),
        boundary_ratio=0.875,
    )
    made.set_progress_bar_config(disable=True)
    return made


def transformer():
    model = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=VAE_21["z_dim"],
        out_channels=VAE_21["z_dim"],
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        vace_layers=[0, 2],
        vace_in_channels=CHANNELS,
    ).eval()
    with torch.no_grad():  # as initialised, the text and the control hardly move the outcome
        for name, parameter in model.named_parameters():
            if "text_embedder" in name or "attn2" in name or "vace" in name:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def vae(pipeline):
    ours = WanVAE(VaeSpec.from_config(pipeline.vae.config))
    ours.load_state_dict(pipeline.vae.state_dict(), strict=True)
    return ours.eval()


@pytest.fixture(scope="module")
def experts(pipeline):
    made = []
    for model in (pipeline.transformer, pipeline.transformer_2):
        config = {name: value for name, value in model.config.items() if value is not None}
        made.append(make_dit(TransformerSpec.from_config(config)))
        made[-1].load_state_dict(model.state_dict(), strict=True)
    return [expert.eval() for expert in made]


def video_of(size=SIZE, seed=0):
    frames, height, width = size
    rng = np.random.default_rng(seed)
    smooth = np.add.outer(np.arange(height), np.arange(width)) * 3 + rng.integers(0, 60, (frames, 1, 1))
    return Pictures(name="the control video", frames=np.repeat(smooth[..., None] % 256, 3, 3).astype(np.uint8))


def mask_of(size=SIZE, *, soft=False):
    mask = np.zeros(size, np.uint8)
    mask[:, size[1] // 4 :, size[2] // 3 :] = 255
    mask[size[0] // 2 :, :9] = 130 if soft else 255
    mask[:, 20:22] = 90 if soft else 0
    return Pictures(name="the mask", frames=np.repeat(mask[..., None], 3, 3))


def image_of(height, width, seed):
    rng = np.random.default_rng(seed)
    return Pictures(name="an image", frames=rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8))


IMAGES = (image_of(40, 30, 1), image_of(21, 100, 2))


def to_pil(pictures, mode="RGB"):
    return [Image.fromarray(frame).convert(mode) for frame in pictures.frames]


def inputs_of(kind, size=SIZE, **changes):
    video = None if "video" not in kind else video_of(size)
    mask = None if "mask" not in kind else mask_of(size, soft="soft" in kind)
    return VaceInputs(video=video, mask=mask, references=IMAGES[: int(kind[0])], **changes)


def for_reference(inputs):
    """The arguments of WanVACEPipeline."""
    images = [to_pil(image)[0] for image in inputs.references]
    return {
        "video": None if inputs.video is None else to_pil(inputs.video),
        "mask": None if inputs.mask is None else to_pil(inputs.mask, "L"),
        "reference_images": images or None,
    }


def encoder(vae):
    return lambda levels_THWC: stages.encode(vae, levels_THWC, iter([Passage(buffers=False)]))


def prepared(inputs, experts, vae, size=SIZE, **options):
    return prepare_control(inputs, size, spec=experts[0].spec, vae=vae.spec, encode=encoder(vae), **options)


def preprocessed(pipeline, inputs, size=SIZE):
    frames, height, width = size
    given = for_reference(inputs).values()
    return pipeline.preprocess_conditions(*given, 1, height, width, frames, torch.float32, CPU)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


KINDS = ("0 nothing", "0 video", "0 video, mask", "1 video, soft mask", "2 video, mask", "2 images", "1 image")


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_equal_the_references(kind, pipeline):
    inputs = inputs_of(kind)
    video, mask, (images,) = preprocessed(pipeline, inputs)
    levels_THWC, mask_THW = video_and_mask(inputs, SIZE)
    assert torch.equal(2 * (levels_THWC.float() / 255) - 1, video[0].permute(1, 2, 3, 0))
    assert torch.equal(mask_THW >= 128, mask[0, 0] > 0.5)
    assert len(images) == len(inputs.references)
    for ours, theirs in zip(inputs.references, images, strict=True):
        canvas = on_canvas(ours, *SIZE[1:])[0].permute(2, 0, 1)
        assert (2 * canvas / 255 - 1 - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_control_equals_the_references(kind, pipeline, experts, vae):
    inputs = inputs_of(kind)
    video, mask, images = preprocessed(pipeline, inputs)
    latents = pipeline.prepare_video_latents(video, mask, images, None, CPU)
    folded = pipeline.prepare_masks(mask, images)
    conditions = prepared(inputs, experts, vae)
    ours = conditions.control.x_BCTHW
    assert ours.shape == (1, CHANNELS, 2 + len(inputs.references), 4, 6)
    assert conditions.num_references == len(inputs.references)
    assert relative(ours[:, : latents.shape[1]], latents) <= 1e-5
    assert torch.equal(ours[:, latents.shape[1] :], folded)


@pytest.mark.parametrize("size", [(1, 16, 16), (9, 48, 16), (13, 16, 32)])
def test_a_mask_is_folded_as_the_reference_does(size, pipeline):
    mask = mask_of(size, soft=True)
    _, theirs, images = preprocessed(pipeline, VaceInputs(video=video_of(size), mask=mask), size)
    ours = fold_mask(torch.from_numpy(mask.frames)[..., 0], time=4, space=8)
    assert torch.equal(ours, pipeline.prepare_masks(theirs, images))


def test_pictures_of_another_size_are_fitted_as_the_reference_does(pipeline):
    inputs = inputs_of("0 video, soft mask", (5, 64, 96))
    video, mask, images = preprocessed(pipeline, inputs)
    levels_THWC, mask_THW = video_and_mask(inputs, SIZE)
    assert torch.equal(2 * (levels_THWC.float() / 255) - 1, video[0].permute(1, 2, 3, 0))
    assert torch.equal(fold_mask(mask_THW, time=4, space=8), pipeline.prepare_masks(mask, images))


def test_a_longer_control_video_is_cut_off(experts, vae):
    long, short = inputs_of("1 video, mask", (9, 32, 48)), inputs_of("1 video, mask", (9, 32, 48))
    cut = {name: Pictures(name=name, frames=getattr(short, name).frames[:5].copy()) for name in ("video", "mask")}
    ours = prepared(long, experts, vae).control.x_BCTHW
    assert torch.equal(ours, prepared(replace(short, **cut), experts, vae).control.x_BCTHW)


TEXT, NEGATIVE = torch.randn(2, 1, 24, TEXT_DIM, generator=torch.Generator().manual_seed(5))


def reference_video(pipeline, inputs, size, *, strengths=1.0, guidance=4.0, steps=4):
    frames, height, width = size
    return pipeline(
        **for_reference(inputs),
        prompt_embeds=TEXT,
        negative_prompt_embeds=NEGATIVE,
        num_frames=frames,
        height=height,
        width=width,
        guidance_scale=guidance,
        num_inference_steps=steps,
        conditioning_scale=strengths,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).frames[0]


def our_video(pipeline, inputs, size, experts, vae, *, loop=FAST, guidance=4.0, steps=4, make=stages.Predictor):
    frames, height, width = size
    conditions = prepared(inputs, experts, vae, size)
    sampler = make_sampler({**pipeline.scheduler.config, "_class_name": "UniPCMultistepScheduler"}, steps)
    switch = ExpertSwitch(
        boundary_ratio=pipeline.config.boundary_ratio,
        guidance_scale=guidance,
        guidance_scale_2=guidance,
        num_train_timesteps=sampler.schedule.num_train_timesteps,
    )
    shape = conditions.lengthened((1, VAE_21["z_dim"], 1 + (frames - 1) // 4, height // 8, width // 8))
    latents = stages.denoise(
        experts,
        lambda: stages.initial_noise(shape, 3, CPU),
        stages.Prompts(
            text_BSE=TEXT,
            negative_BSE=NEGATIVE if guidance > 1 else None,
            make_predictor=conditions.predictor(make),
        ),
        sampler=sampler,
        switch=switch,
        per_token=False,
        on_step=lambda step: None,
        choices=loop,
    )
    chunks = stages.decode(vae, conditions.cut(latents), iter([Passage(buffers=False)]), lambda done: None)
    return np.concatenate(list(chunks), axis=1)[0]


def same_frames(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.std() > 5  # a flat picture would agree with anything
    return np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_videos_equal_the_references(kind, pipeline, experts, vae):
    inputs = inputs_of(kind)
    assert same_frames(our_video(pipeline, inputs, SIZE, experts, vae), reference_video(pipeline, inputs, SIZE))


@pytest.mark.parametrize("size", [(1, 32, 32), (9, 16, 64), (5, 48, 32)])
def test_videos_of_other_sizes_equal_the_references(size, pipeline, experts, vae):
    inputs = inputs_of("1 video, soft mask", size)
    assert same_frames(our_video(pipeline, inputs, size, experts, vae), reference_video(pipeline, inputs, size))


WAYS = {
    "plainly": LoopChoices(),
    "one branch after the other": LoopChoices(prompt_once=True),
    "batched": LoopChoices(prompt_once=True, guidance_batched=True),
}


@pytest.mark.parametrize("strengths", [0.5, [1.5, 0.25]], ids=str)
@pytest.mark.parametrize("loop", WAYS.values(), ids=WAYS.keys())
def test_strengths_count_as_in_the_reference_in_every_way(strengths, loop, pipeline, experts, vae):
    inputs = inputs_of("1 video, mask", strengths=strengths)
    theirs = reference_video(pipeline, inputs, SIZE, strengths=strengths, steps=3)
    assert same_frames(our_video(pipeline, inputs, SIZE, experts, vae, loop=loop, steps=3), theirs)


def test_every_input_changes_the_video(pipeline, experts, vae):
    def video(inputs):
        return our_video(pipeline, inputs, SIZE, experts, vae, steps=2).astype(int)

    base = inputs_of("2 video, mask")
    expected = video(base)
    others = (
        replace(base, video=video_of(seed=4)),
        replace(base, mask=mask_of(soft=True)),
        replace(base, mask=None),
        replace(base, references=IMAGES[::-1]),
        replace(base, strengths=0.2),
    )
    for other in others:
        assert np.abs(video(other) - expected).max() > 3


def test_without_guidance_the_control_is_shown_too(pipeline, experts, vae):
    inputs = inputs_of("1 video, mask")
    theirs = reference_video(pipeline, inputs, SIZE, guidance=1.0, steps=3)
    assert same_frames(our_video(pipeline, inputs, SIZE, experts, vae, guidance=1.0, steps=3), theirs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (VaceInputs(mask=mask_of()), "the mask is a mask of nothing; give the control video, too"),
        (VaceInputs(video=video_of((4, 32, 48))), "the control video has 4 frames, 5 were asked for"),
        (
            VaceInputs(video=video_of(), mask=mask_of((6, 32, 48))),
            "the mask is 6 frames of 48x32, the control video 5 frames of 48x32; give both in one size",
        ),
        (VaceInputs(video=video_of(), mask=mask_of((5, 32, 64))), "the mask is 5 frames of 64x32"),
        (VaceInputs(strengths=[1.0]), "1 control strengths do not fit 2 VACE layers; give 1 or 2"),
        (VaceInputs(references=(image_of(40, 7, 1),)), "an image is 7x40, too small for a reference image"),
    ],
    ids=["mask alone", "too short", "frames", "size", "strengths", "tiny image"],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message, experts, vae):
    with pytest.raises(RequestError, match=message):
        prepared(inputs, experts, vae)


def test_the_vae_of_another_checkpoint_is_refused(experts, vae):
    spec = replace(experts[0].spec, vace_in_channels=96)
    with pytest.raises(RequestError, match="makes a control of 72 channels, the transformer takes 96"):
        prepare_control(VaceInputs(), SIZE, spec=spec, vae=vae.spec, encode=encoder(vae))
