"""Requests with pictures against Diffusers' pipelines on the same checkpoint folder: latents, then frames."""

import numpy as np
import pytest
import torch
from checkpoints import FROM_IMAGE
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVideoToVideoPipeline
from PIL import Image

import frameloom
from frameloom.ops.registry import relative_error
from frameloom.pipeline.images import fitted, video_of

PROMPT = "a red circle moving left"
OPTIONS = {"guidance_scale": 4.0, "negative_prompt": "a blue square"}
SIZES = [(64, 32, 5), (48, 64, 9), (32, 32, 1)]  # width, height, frames
KINDS = (*FROM_IMAGE, "per-token timesteps")
GROWN = 1e-4  # roundings of some 1e-6 per call, after guidance and the steps of a random network


def picture(seed: int, width: int = 50, height: int = 38) -> Image.Image:
    """A smooth picture with all levels in it."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def given(kind: str, seed: int = 0) -> dict[str, Image.Image]:
    """What a checkpoint of a kind needs."""
    images = {"image": picture(seed)}
    return images | {"last_image": picture(seed + 10, 30, 45)} if kind == "first and last image" else images


def reference(folder, *, steps=4, seed=3, output_type="latent", **options):
    if "WanImageToVideoPipeline" in (folder / "model_index.json").read_text():
        pipeline = WanImageToVideoPipeline.from_pretrained(str(folder), dtype=torch.float32)
    else:  # TI2V-5B is published as a WanPipeline, and made to start from an image like this
        whole = WanPipeline.from_pretrained(str(folder), dtype=torch.float32)
        pipeline = WanImageToVideoPipeline(
            **whole.components, image_encoder=None, image_processor=None, expand_timesteps=True
        )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    asked = {"prompt": PROMPT, "generator": generator, "num_inference_steps": steps, "output_type": output_type}
    return pipeline(**OPTIONS | asked | options).frames


def sizes_of(kind: str) -> list[dict[str, int]]:
    sizes = SIZES if kind != "first and last image" else SIZES[:2]  # one frame cannot be first and last
    if kind == "per-token timesteps":
        sizes = [(64, 32, 5), (96, 64, 9), (32, 64, 1)]  # multiples of 32
    return [dict(zip(("width", "height", "num_frames"), size, strict=True)) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_equal_diffusers_at_several_sizes(kind, engine_of, checkpoint_of):
    for number, size in enumerate(sizes_of(kind)):
        images = given(kind, number)
        theirs = reference(checkpoint_of(kind), **images, **size)
        exact, fast = (
            engine_of(kind, exactness).generate(PROMPT, output="latents", seed=3, steps=4, **OPTIONS, **images, **size)
            for exactness in ("bitwise", "rounding")
        )
        if kind == "per-token timesteps":  # its VAE averages in an order of our own
            assert relative_error(exact, theirs) <= 1e-5, size
        else:
            assert torch.equal(exact, theirs), size
        assert relative_error(fast, theirs) <= GROWN, size


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_within_one_level_of_diffusers(kind, engine_of, checkpoint_of):
    size, images = sizes_of(kind)[1], given(kind, 7)
    video = engine_of(kind).generate(PROMPT, seed=3, steps=4, **OPTIONS, **images, **size)
    theirs = reference(checkpoint_of(kind), output_type="np", **images, **size)[0]
    assert np.abs(video.frames.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1
    assert video.frames.std() > 5  # a flat picture would agree with anything


def test_a_pair_of_experts_takes_a_last_image_and_the_other_scale(engine_of, checkpoint_of):
    asked = {"image": picture(1), "last_image": picture(2), "guidance_scale_2": 2.0, **sizes_of("image")[1]}
    theirs = reference(checkpoint_of("image, two experts"), **asked)
    ours = engine_of("image, two experts", "bitwise").generate(
        PROMPT, output="latents", seed=3, steps=4, **OPTIONS, **asked
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_prompts_shares_the_images(kind, engine_of, checkpoint_of):
    size, images = sizes_of(kind)[0], given(kind, 5)
    asked = {"prompt": [PROMPT, "the star spins"], "negative_prompt": ["blue", "a cross"], **images, **size}
    theirs = reference(checkpoint_of(kind), **asked)
    prompts = asked.pop("prompt")
    ours = engine_of(kind).generate(prompts, output="latents", seed=3, steps=4, **OPTIONS | asked)
    assert relative_error(ours, theirs) <= GROWN


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_a_step_makes_the_same_video(kind, checkpoint_of):
    size, images = sizes_of(kind)[1], given(kind)
    options = {"output": "latents", "steps": 3, **OPTIONS, **images, **size}
    ways = {
        "plainly": ["dit.prompt_once=off", "dit.distinct_timesteps=off", "dit.collapsed_padding=off"],
        "together": ["dit.guidance_batched=on"],
        "in turn": ["dit.guidance_batched=off"],
    }
    made = {}
    for way, rewrites in ways.items():
        with frameloom.load(checkpoint_of(kind), device="cpu", dtype="float32", rewrites=rewrites) as engine:
            made[way] = engine.generate(PROMPT, **options)
    for latents in made.values():
        assert relative_error(latents, made["plainly"]) <= GROWN


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_changes_the_video(kind, engine_of):
    size, images = sizes_of(kind)[0], given(kind)
    options = {"output": "latents", "steps": 2, **OPTIONS, **size}
    base = engine_of(kind).generate(PROMPT, **images, **options)
    for name in images:
        changed = engine_of(kind).generate(PROMPT, **{**images, name: picture(77)}, **options)
        assert relative_error(changed, base) > 1e-3, name


def test_clip_matters_beside_the_latents(engine_of, monkeypatch):
    engine, size = engine_of("image"), sizes_of("image")[0]
    options = {"image": picture(0), "output": "latents", "steps": 2, **OPTIONS, **size}
    base = engine.generate(PROMPT, **options)
    encoder = engine._pipeline.image_encoder
    other = encoder.encode_images([picture(9)])
    monkeypatch.setattr(type(encoder), "encode_images", lambda *_: other)
    assert relative_error(engine.generate(PROMPT, **options), base) > 1e-4


def test_the_first_frame_stays_what_was_given(engine_of):
    engine, size = engine_of("per-token timesteps"), sizes_of("per-token timesteps")[0]
    image = picture(3, size["width"], size["height"])
    latents = engine.generate(PROMPT, image=image, output="latents", steps=2, **OPTIONS, **size)
    assert torch.equal(latents[:, :, :1], engine.encode(np.asarray(image)[None]))


def test_bfloat16_stays_near_float32(engine_of, checkpoint_of):
    kind = "first and last image"
    options = {"output": "latents", "steps": 2, **OPTIONS, **given(kind), **sizes_of(kind)[0]}
    exact = engine_of(kind).generate(PROMPT, **options)
    with frameloom.load(checkpoint_of(kind), device="cpu", dtype="bfloat16") as engine:
        assert engine._pipeline.image_encoder.encode_images([picture(0)]).dtype == torch.bfloat16
        assert 0 < relative_error(engine.generate(PROMPT, **options), exact) < 0.1


VIDEO = np.stack([np.asarray(picture(seed, 70, 40)) for seed in range(9)])


@pytest.mark.parametrize(("kind", "strength"), [("one expert", s) for s in (0.2, 0.5, 0.8, 1.0)])
def test_a_video_is_redone_as_diffusers_does_it(kind, strength, engine_of, checkpoint_of):
    pipeline = WanVideoToVideoPipeline.from_pretrained(str(checkpoint_of(kind)), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        video=[Image.fromarray(frame) for frame in VIDEO], prompt=PROMPT, height=32, width=64, strength=strength,
        num_inference_steps=6, generator=torch.Generator("cpu").manual_seed(3), output_type="latent", **OPTIONS,
    ).frames  # fmt: skip
    asked = {"video": VIDEO, "strength": strength, "width": 64, "height": 32, "steps": 6, "seed": 3, **OPTIONS}
    assert torch.equal(engine_of(kind, "bitwise").generate(PROMPT, output="latents", **asked), theirs)
    assert relative_error(engine_of(kind).generate(PROMPT, output="latents", **asked), theirs) <= GROWN


@pytest.mark.parametrize("kind", ["two experts", "per-token timesteps", "image"])
def test_other_checkpoints_start_from_a_video_too(kind, engine_of):
    engine = engine_of(kind)
    images = given(kind) if kind == "image" else {}
    options = {"video": VIDEO, "width": 64, "height": 32, "steps": 10, "guidance_scale": 1.0, **images}
    source = engine.encode(fitted(video_of(VIDEO, 9), width=64, height=32, keeps_aspect=False))
    apart = [
        relative_error(engine.generate(PROMPT, strength=strength, output="latents", **options), source)
        for strength in (0.1, 1.0)
    ]
    assert apart[0] < apart[1]
