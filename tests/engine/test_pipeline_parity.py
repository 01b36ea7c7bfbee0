"""Whole requests against Diffusers' WanPipeline on the same checkpoint folder: latents, then frames."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

KINDS = ("one expert", "two experts", "per-token timesteps")
SIZE = {"width": 64, "height": 32, "num_frames": 5}


def reference(folder, prompt, *, output_type="np", seed=3, **options):
    pipeline = WanPipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    steps = options.pop("steps", 6)
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(
        prompt=prompt, generator=generator, num_inference_steps=steps, output_type=output_type, **options
    ).frames


def relative_error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_latents_equal_diffusers(kind, engine_of, checkpoint_of):
    options = {"guidance_scale": 5.0, "negative_prompt": "a blue square", "steps": 6, **SIZE}
    prompt = "a red circle moving left"
    ours = engine_of(kind, "bitwise").generate(prompt, output="latents", seed=3, **options)
    theirs = reference(checkpoint_of(kind), prompt, output_type="latent", **options)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    # Roundings of some 1e-6 per call; guidance and six steps of a random network make them larger.
    assert relative_error(engine_of(kind).generate(prompt, output="latents", seed=3, **options), theirs) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_within_one_level_of_diffusers(kind, engine_of, checkpoint_of):
    video = engine_of(kind).generate("a star &amp; a cross", steps=4, seed=9, guidance_scale=3.0, **SIZE)
    theirs = reference(checkpoint_of(kind), "a star &amp; a cross", steps=4, seed=9, guidance_scale=3.0, **SIZE)[0]
    assert video.frames.shape == theirs.shape == (5, 32, 64, 3)
    difference = np.abs(video.frames.astype(int) - np.round(theirs * 255).astype(int))
    assert difference.max() <= 1
    assert video.frames.std() > 5  # a flat picture would agree with anything


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_prompts_equals_diffusers(kind, engine_of, checkpoint_of):
    prompts, negatives = ["a red circle", "the green star spins"], ["blue", "a video of one square"]
    options = {"guidance_scale": 4.0, **SIZE}
    engine = engine_of(kind, "bitwise")
    ours = engine.generate(prompts, negative_prompt=negatives, output="latents", steps=3, seed=3, **options)
    theirs = reference(
        checkpoint_of(kind), prompts, output_type="latent", steps=3, negative_prompt=negatives, **options
    )
    assert ours.shape[0] == 2
    assert torch.equal(ours, theirs)


def test_a_batch_returns_one_video_per_prompt(engine_of):
    videos = engine_of("one expert").generate(["a red circle", "a blue star"], steps=2, **SIZE)
    assert [video.metadata["prompt"] for video in videos] == ["a red circle", "a blue star"]
    assert not np.array_equal(videos[0].frames, videos[1].frames)


def test_each_expert_has_its_own_guidance_scale(engine_of, checkpoint_of):
    options = {"guidance_scale": 4.0, "guidance_scale_2": 2.0, **SIZE}
    ours = engine_of("two experts").generate("a cross", output="latents", seed=3, steps=6, **options)
    theirs = reference(checkpoint_of("two experts"), "a cross", output_type="latent", steps=6, **options)
    same = engine_of("two experts").generate(
        "a cross", output="latents", seed=3, steps=6, **(options | {"guidance_scale_2": 4.0})
    )
    assert relative_error(ours, theirs) <= 1e-5
    assert relative_error(same, theirs) > 1e-3


def test_without_guidance_the_negative_prompt_is_not_looked_at(engine_of, checkpoint_of):
    options = {"guidance_scale": 1.0, **SIZE}
    ours = engine_of("one expert").generate(
        "a cross", negative_prompt="x", output="latents", seed=3, steps=3, **options
    )
    assert relative_error(ours, reference(checkpoint_of(), "a cross", output_type="latent", steps=3, **options)) <= 1e-5


def test_prompt_seed_and_negative_prompt_each_change_the_video(engine_of):
    engine = engine_of("one expert")
    options = {"steps": 3, "guidance_scale": 5.0, "output": "latents", **SIZE}
    base = engine.generate("a red circle", seed=1, **options)
    assert torch.equal(base, engine.generate("a red circle", seed=1, **options))
    assert relative_error(engine.generate("the cross spins", seed=1, **options), base) > 1e-3
    assert relative_error(engine.generate("a red circle", seed=2, **options), base) > 1e-1
    assert relative_error(engine.generate("a red circle", seed=1, negative_prompt="blue", **options), base) > 1e-3


def test_latents_decode_to_the_same_frames_and_encode_inverts_shapes(engine_of):
    engine = engine_of("one expert")
    latents = engine.generate("a red circle", seed=1, steps=2, output="latents", **SIZE)
    video = engine.generate("a red circle", seed=1, steps=2, **SIZE)
    assert np.array_equal(engine.decode(latents), video.frames)
    encoded = engine.encode(video.frames)
    assert encoded.shape == latents.shape
    assert encoded.dtype == torch.float32


def test_encode_is_the_normalised_mode_of_the_reference(engine_of, checkpoint_of):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    pipeline = WanPipeline.from_pretrained(str(checkpoint_of()), dtype=torch.float32)
    x = pipeline.video_processor.preprocess_video(torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255)
    with torch.no_grad():
        mode = pipeline.vae.encode(x).latent_dist.mode()
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    assert relative_error(engine_of("one expert").encode(frames), (mode - mean) / std) <= 1e-5
