"""What a request with pictures becomes: sizes, refusals, masks, timesteps, and the noise a video is given."""

import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints import VAE_21, VAE_22
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import frameloom
from frameloom.errors import CheckpointError, RequestError
from frameloom.models.defaults import Defaults
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.wan_dit import FrameTimes
from frameloom.pipeline.conditions import Condition, beside, noised, pictures_taken
from frameloom.request import resolve
from frameloom.sampling.unipc import make_sampler
from frameloom.types import GenerateRequest, Pictures, SizeRules

RULES = SizeRules(width_multiple=16, height_multiple=16, temporal=4, reason="VAE 8 x patch 2")
VAE = VaeSpec()


def shown(width, height, frames=1, fps=None):
    return Pictures(name="a.png", frames=np.zeros((frames, height, width, 3), np.uint8), fps=fps)


def resolved(defaults=None, **options):
    return resolve(GenerateRequest(prompt="a cat", **options), defaults or Defaults(), RULES)


# --- the request ---


@pytest.mark.parametrize(
    ("picture", "asked", "size"),
    [
        ((832, 480), {}, (832, 480)),
        ((480, 832), {}, (480, 832)),
        ((4000, 3000), {}, (720, 544)),  # sqrt(832 x 480 x 4/3) = 729.7, down to a multiple of 16
        ((100, 100), {}, (624, 624)),
        ((100, 50), {"width": 320}, (320, 160)),
        ((100, 50), {"height": 320}, (640, 320)),
        ((100, 50), {"width": 320, "height": 320}, (320, 320)),
        ((160, 10), {"width": 32}, (32, 16)),
    ],
)
def test_pictures_decide_the_shape_that_is_left_open(picture, asked, size):
    for given_as in ({"image": shown(*picture)}, {"video": shown(*picture, frames=9)}):
        request = resolved(**given_as, **asked)
        assert (request.width, request.height) == size
        assert request.keeps_aspect == (len(asked) < 2)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000))
def test_the_shape_of_a_picture_is_kept_within_the_area(width, height):
    if max(width, height) > 16 * min(width, height):
        return
    request = resolved(image=shown(width, height))
    assert request.width % 16 == request.height % 16 == 0
    assert request.width * request.height <= 832 * 480 * 1.01
    assert request.width / request.height == pytest.approx(width / height, rel=0.15)


def test_a_video_brings_its_frames_and_its_rate():
    request = resolved(video=shown(64, 32, frames=30, fps=24.0))
    assert (request.num_frames, request.fps, request.strength, request.steps) == (29, 24.0, 0.8, 50)
    assert request.skipped_steps == 10
    assert resolved(video=shown(64, 32, frames=500)).num_frames == 81
    assert resolved(video=shown(64, 32, frames=500), fps=8, num_frames=9).fps == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"last_image": shown(8, 8)}, "a last image was given, and no image; give the first frame, too"),
        ({"strength": 0.5}, "a strength was given, and no video"),
        ({"video": shown(8, 8, 9), "strength": 1.5}, "strength 1.5 is not possible; use a number from 0 up to 1"),
        ({"video": shown(8, 8, 9), "strength": 0.01}, "strength 0.01 leaves none of 50 steps; use 0.02 or more"),
        ({"video": shown(8, 8, 9), "num_frames": 13}, "a.png has 9 frames, 13 were asked for; ask for fewer"),
        ({"image": shown(8, 8), "last_image": shown(8, 8), "num_frames": 1}, "one frame cannot be the first and the"),
        ({"image": shown(8, 8), "width": 20}, "width 20 is not a multiple of 16"),
    ],
)
def test_pictures_that_do_not_go_together_are_one_sentence(options, words):
    with pytest.raises(RequestError, match=words):
        resolved(**options)


def test_the_least_strength_that_is_advised_is_enough():
    for steps in range(1, 60):
        with pytest.raises(RequestError, match="leaves none") as caught:
            resolved(video=shown(8, 8, 9), strength=0.0, steps=steps)
        advised = float(str(caught.value).split(" use ")[1].split()[0])
        assert resolved(video=shown(8, 8, 9), strength=advised, steps=steps).skipped_steps == steps - 1


# --- checkpoints ---


@pytest.mark.parametrize(
    ("spec", "per_token", "needed", "possible"),
    [
        ({}, False, (), ()),
        ({"in_channels": 36, "image_dim": 1280}, False, ("image",), ("image",)),
        ({"in_channels": 36}, False, ("image",), ("image", "last_image")),
        ({"in_channels": 36, "image_dim": 1280, "pos_embed_seq_len": 514}, False, *[("image", "last_image")] * 2),
        ({"in_channels": 16}, True, (), ("image",)),
    ],
)
def test_channels_tell_what_a_checkpoint_starts_from(spec, per_token, needed, possible):
    takes = pictures_taken(TransformerSpec(**spec), VAE, expand_timesteps=per_token)
    assert (takes.needed, takes.possible) == (needed, possible)


@pytest.mark.parametrize(
    ("kind", "given_pictures", "words"),
    [
        ("one expert", ("image",), "cannot take an image, it starts from the prompt alone"),
        ("image", (), "starts from an image; give an image"),
        ("image", ("image", "last_image"), "cannot take a last image, it starts from an image; leave it out"),
        ("image, two experts", (), "starts from an image; give an image"),
        ("first and last image", ("image",), "starts from an image and a last image; give a last image"),
        ("per-token timesteps", ("image", "last_image"), "cannot take a last image, it starts from an image"),
    ],
)
def test_pictures_that_a_checkpoint_cannot_take_are_one_sentence(checkpoint_of, kind, given_pictures, words):
    with (
        frameloom.load(checkpoint_of(kind), device="cpu") as engine,
        pytest.raises(RequestError, match=words),
    ):
        engine.resolve("a cat", **{name: shown(64, 32) for name in given_pictures})


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("transformer/config.json", {"in_channels": 9}, "transformer in_channels is 9, vae z_dim 4"),
        ("transformer/config.json", {"image_dim": 24}, "transformer image_dim is 24, image_encoder width 20"),
        (
            "transformer/config.json",
            {"pos_embed_seq_len": 514},
            "pos_embed_seq_len is 514, the tokens of two images 10",
        ),
        ("image_processor/preprocessor_config.json", {"crop_size": {"height": 14, "width": 14}}, "makes pictures of"),
        ("image_processor/preprocessor_config.json", {"size": {"shortest_edge": 10**9}}, "makes pictures of"),
    ],
)
def test_parts_for_images_that_do_not_fit_are_refused(checkpoint_of, tmp_path, file, values, words):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_of("first and last image"), folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(CheckpointError, match=words):
        frameloom.load(folder, device="cpu")


# --- what the transformer gets ---


@pytest.mark.parametrize("has_last", [False, True])
@pytest.mark.parametrize("vae", [VAE_21, VAE_22])
def test_the_mask_marks_given_frames_as_the_reference_does(has_last, vae):
    latents = torch.randn(1, vae["z_dim"], 3, 4, 5)
    flags = torch.ones(1, 1, 9, 4, 5)  # one for each frame
    flags[:, :, 1 : 8 if has_last else 9] = 0
    flags = torch.cat((flags[:, :, :1].repeat_interleave(4, dim=2), flags[:, :, 1:]), dim=2)
    wanted = flags.view(1, 3, 4, 4, 5).transpose(1, 2)
    assert torch.equal(beside(latents, 4, has_last=has_last), torch.cat((wanted, latents), dim=1))


@pytest.mark.parametrize("patch", [1, 2])
def test_given_frames_have_timestep_zero_and_stay(patch):
    condition = Condition(first_BCTHW=torch.ones(1, 4, 1, 4, 4))
    latents = torch.randn(2, 4, 4, 4, 4)
    times = condition.frame_times(torch.tensor(500), latents.shape, patch=patch)
    assert isinstance(times, FrameTimes)
    of_frames = times.values_BM[:, times.index_F]
    assert of_frames.tolist() == [[0] + [500] * (4 // patch - 1)] * 2
    of_tokens = condition.token_times(torch.tensor(500), latents.shape, patch=(patch, 2, 2))
    assert torch.equal(of_tokens, of_frames.repeat_interleave(4, dim=1).float())
    kept = condition.kept(latents)
    assert torch.equal(kept[:, :, :1], torch.ones(2, 4, 1, 4, 4))
    assert torch.equal(kept[:, :, 1:], latents[:, :, 1:])


def test_without_pictures_nothing_is_changed():
    latents = torch.randn(2, 4, 3, 4, 4)
    assert Condition().shown(latents) is latents
    assert Condition().frame_times(torch.tensor(7), latents.shape, patch=1).tolist() == [7, 7]


@pytest.mark.parametrize("skipped", [0, 3, 8])
@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_run_that_begins_later_is_the_reference_s(scheduler, skipped):
    settings_of = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    options = settings_of if scheduler is UniPCMultistepScheduler else {"shift": 5.0}
    reference = scheduler(**options)
    reference.set_timesteps(9)
    sampler = make_sampler(dict(reference.config) | {"_class_name": scheduler.__name__}, 9, skipped=skipped)
    times = reference.timesteps[skipped:]
    assert torch.equal(sampler.schedule.timesteps, times)
    video, noise = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 4, 3, 4, 4)
    if scheduler is UniPCMultistepScheduler:
        theirs = reference.add_noise(video, noise, times[:1])
    else:
        theirs = reference.scale_noise(video, times[:1], noise)
    ours = noised(video, noise, sampler.schedule)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    state = sampler.start()
    for index, time in enumerate(times):
        velocity = torch.randn(video.shape, generator=torch.Generator().manual_seed(index))
        theirs = reference.step(velocity, time, theirs, return_dict=False)[0]
        ours, state = sampler.step(velocity, ours, state)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


# --- the command ---


def test_the_command_takes_pictures_and_says_so(run, checkpoint_of, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    frameloom.Video(frames=frames, fps=8).save(tmp_path / "video.mp4")
    frameloom.Video(frames=frames[:1], fps=8).save(tmp_path / "%04d.png")
    image, common = tmp_path / "0000.png", ["--steps", 2, "--json", "-o", tmp_path / "a.mp4"]
    code, out, _ = run(
        "generate", "a cat", "--model", checkpoint_of("first and last image"), "--image", image, "--last-image", image,
        "--width", 32, "--frames", 5, *common,
    )  # fmt: skip
    record = json.loads(out)
    assert (code, record["image"], record["last_image"]) == (0, str(image), str(image))
    assert (record["width"], record["height"]) == (32, 32)
    assert "image" in record["seconds"]
    code, out, _ = run(
        "generate",
        "a cat",
        "--video",
        tmp_path / "video.mp4",
        "--strength",
        0.5,
        "--width",
        32,
        "--height",
        32,
        *common,
    )
    record = json.loads(out)
    assert (code, record["video"], record["strength"]) == (0, str(tmp_path / "video.mp4"), 0.5)
    assert (record["num_frames"], record["fps"], len(record["step_seconds"])) == (5, 8.0, 1)
    code, _, err = run("generate", "a cat", "--image", tmp_path / "nowhere.png")
    assert (code, err.strip()) == (2, f"frameloom: {tmp_path / 'nowhere.png'} does not exist; give an image")
