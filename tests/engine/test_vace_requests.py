"""Requests under a control against Diffusers' WanVACEPipeline on the same checkpoint folder; and what is refused."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanVACEPipeline
from PIL import Image

import frameloom
from frameloom.errors import CheckpointError, InputError, RequestError
from frameloom.ops.registry import relative_error
from frameloom.pipeline.reader import read_frames

PROMPT = "a red circle moving left"
OPTIONS = {"guidance_scale": 4.0, "negative_prompt": "a blue square"}
SMALL = {"width": 48, "height": 32, "num_frames": 5}
LARGE = {"width": 64, "height": 48, "num_frames": 9}
GROWN = 1e-4  # roundings of some 1e-6 per call, after guidance and the steps of a random network
CASES = {
    "text alone": (SMALL, ()),
    "video": (SMALL, ("control_video",)),
    "video, mask": (LARGE, ("control_video", "mask")),
    "reference": (LARGE, ("references",)),
    "all": (SMALL, ("control_video", "mask", "references")),
}


def video_of(size, seed=0):
    """A smooth control video with all levels in it."""
    frames, height, width = size["num_frames"], size["height"], size["width"]
    smooth = np.add.outer(np.arange(height), np.arange(width)) * 3
    moved = smooth + np.random.default_rng(seed).integers(0, 60, (frames, 1, 1))
    return np.repeat(moved[..., None] % 256, 3, axis=3).astype(np.uint8)


def mask_of(size):
    frames, height, width = size["num_frames"], size["height"], size["width"]
    mask = np.zeros((frames, height, width, 3), np.uint8)
    mask[:, height // 4 :, width // 3 :] = 255
    mask[frames // 2 :, :9] = 130
    return mask


def image_of(height, width, seed):
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


def given(case):
    """What our request, and what the reference's, is told of a case."""
    size, names = CASES[case]
    every = {"control_video": video_of(size), "mask": mask_of(size), "references": [image_of(40, 27, seed=1)]}
    return {name: every[name] for name in names} | size


def reference(folder, given, *, steps=4, output_type="np", **options):
    pipeline = WanVACEPipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    names = {"control_video": "video", "references": "reference_images", "control_strength": "conditioning_scale"}
    asked = {names.get(name, name): value for name, value in given.items()}
    for name in asked.keys() & {"video", "mask", "reference_images"}:
        mode = "L" if name == "mask" else "RGB"
        asked[name] = [Image.fromarray(frame).convert(mode) for frame in asked[name]]
    generator = torch.Generator("cpu").manual_seed(3)
    asked |= {"prompt": PROMPT, "generator": generator, "num_inference_steps": steps, "output_type": output_type}
    return pipeline(**OPTIONS | asked | options).frames[0]


def ours(engine, given, *, steps=4, **options):
    return engine.generate(PROMPT, **OPTIONS | {"seed": 3, "steps": steps} | given | options)


@pytest.fixture(scope="module")
def engine(checkpoint_of):
    with frameloom.load(checkpoint_of("vace"), device="cpu", dtype="float32") as opened:
        yield opened


def same_frames(frames, theirs):
    assert frames.std() > 5  # a flat picture would agree with anything
    return np.abs(frames.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


@pytest.mark.parametrize("case", CASES)
def test_frames_are_within_one_level_of_diffusers(case, engine, checkpoint_of):
    asked = given(case)
    assert same_frames(ours(engine, asked).frames, reference(checkpoint_of("vace"), asked))


@pytest.mark.parametrize("exactness", ["bitwise", "rounding"])
@pytest.mark.parametrize("strength", [0.5, [1.5, 0.25]], ids=str)
def test_strengths_and_a_pair_of_experts_equal_diffusers(exactness, strength, checkpoint_of):
    folder, asked = checkpoint_of("vace, two experts"), given("all") | {"control_strength": strength}
    with frameloom.load(folder, device="cpu", dtype="float32", exactness=exactness) as engine:
        frames = ours(engine, asked, guidance_scale_2=2.0).frames
    assert same_frames(frames, reference(folder, asked, guidance_scale_2=2.0))


@pytest.mark.parametrize("case", ["text alone", "video, mask"])
def test_bitwise_latents_are_those_of_diffusers(case, checkpoint_of):
    asked, folder = given(case), checkpoint_of("vace")
    with frameloom.load(folder, device="cpu", dtype="float32", exactness="bitwise") as engine:
        latents = ours(engine, asked, output="latents")
    assert torch.equal(latents[0], reference(folder, asked, output_type="latent"))


def test_a_batch_of_prompts_shares_the_control(engine):
    asked = {**given("all"), "output": "latents", "steps": 2, "seed": 3}
    prompts = [PROMPT, "the star spins"]
    both = engine.generate(prompts, **asked)
    for index, prompt in enumerate(prompts):  # they start from other noise than one prompt alone
        assert both[index].shape == engine.generate(prompt, **asked)[0].shape
    assert relative_error(both[:1], both[1:]) > 1e-3


def test_bfloat16_stays_near_float32(engine, checkpoint_of):
    asked = given("all")
    exact = ours(engine, asked, output="latents", steps=2)
    with frameloom.load(checkpoint_of("vace"), device="cpu", dtype="bfloat16") as narrow:
        assert 0 < relative_error(ours(narrow, asked, output="latents", steps=2), exact) < 0.1


def test_every_part_changes_the_video(engine):
    base = given("all")
    expected = ours(engine, base, output="latents", steps=2)
    changes = (
        {"control_video": video_of(SMALL, seed=4)},
        {"mask": 255 - base["mask"]},
        {"references": [image_of(40, 27, seed=9)]},
        {"references": base["references"] * 2},
        {"control_strength": 0.2},
    )
    for change in changes:
        assert relative_error(ours(engine, base | change, output="latents", steps=2), expected) > 1e-3, change.keys()


def test_pictures_decide_the_shape_and_the_number_of_frames(engine, caplog):
    control = video_of({"width": 90, "height": 60, "num_frames": 11})
    with caplog.at_level(logging.INFO, logger="frameloom"):
        request = engine.resolve(PROMPT, control_video=control, mask=control, height=32)
    assert (request.width, request.height, request.num_frames) == (48, 32, 9)
    assert len(request.control_video.frames) == len(request.mask.frames) == 9
    assert "the control video: only its first 9 frames are used" in caplog.text


def test_the_record_tells_what_was_given(engine):
    told = ours(engine, given("all") | {"control_strength": [1.5, 0.25]}, steps=1).metadata
    assert (told["control_video"], told["mask"]) == ("the control video", "the mask")
    assert (told["references"], told["control_strength"]) == (["the reference image"], (1.5, 0.25))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": mask_of(SMALL)}, "a mask was given, and no control video"),
        ({"control_video": video_of(SMALL), "num_frames": 9}, "control video has 5 frames, 9 were asked for"),
        ({"control_video": video_of(SMALL), "mask": mask_of(LARGE)}, "the mask is 5 frames of 64x48, the control vi"),
        ({"control_video": video_of(LARGE), "mask": mask_of(SMALL)}, "the mask is 5 frames of 48x32, the control vi"),
        ({"control_strength": [1.0]}, "1 control strengths do not fit 2 VACE layers; give 1 or 2"),
        ({"control_strength": [1.0, None]}, "control strength 'None' is not possible; use a number from 0 up to 20"),
        ({"control_strength": float("nan")}, "control strength nan is not possible"),
        ({"references": "image.png"}, "the reference images are str; give a list of images"),
        ({"references": [None]}, "the reference image is NoneType"),
        ({"references": [image_of(40, 7, seed=1)]}, "the reference image is 7x40, too small"),
        ({"references": [image_of(8, 8, seed=1)] * 65}, "65 reference images are too many; give up to 64"),
        ({"references": [image_of(8, 8, seed=1)] * 64, "num_frames": 4001}, "past the last position.*use 3837 or less"),
        ({"video": video_of(SMALL)}, "follows a video, and does not start from one; give it as control video"),
        ({"image": image_of(32, 48, seed=1)}, "cannot take an image, it starts from a control video, a mask,"),
    ],
)
def test_a_request_that_does_not_fit_is_one_sentence(options, words, engine):
    with pytest.raises(RequestError, match=words):
        engine.resolve(PROMPT, **{"width": 48, "height": 32} | options)


@pytest.mark.parametrize("name", ["control_video", "references", "control_strength"])
def test_a_checkpoint_without_vace_refuses_a_control(name, checkpoint_of):
    given = {"control_video": video_of(SMALL), "references": [image_of(8, 8, 0)], "control_strength": 0.5}
    with frameloom.load(checkpoint_of(), device="cpu") as plain, pytest.raises(RequestError, match="cannot take"):
        plain.resolve(PROMPT, **{name: given[name]}, **SMALL)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("transformer", {"vace_in_channels": 96}, "transformer vace_in_channels is 96, a control 72"),
        ("transformer", {"in_channels": 12}, "transformer in_channels is 12, vae z_dim 4"),
        ("transformer_2", {"vace_layers": [0]}, "transformer_2 VACE layers is 1, transformer VACE layers 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(file, values, words, checkpoint_of, tmp_path):
    folder = shutil.copytree(checkpoint_of("vace, two experts"), tmp_path / "model")
    config = folder / file / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    with pytest.raises(CheckpointError, match=words):
        frameloom.load(folder, device="cpu")


def test_a_control_video_that_is_not_there_is_told(engine, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        engine.resolve(PROMPT, control_video=tmp_path / "none.mp4")


def test_the_command_follows_a_control(run, checkpoint_of, engine, tmp_path):
    asked = given("all")
    for name in ("control_video", "mask"):
        frameloom.Video(frames=asked[name], fps=16).save(tmp_path / name)  # a folder of PNG files
    Image.fromarray(asked["references"][0]).save(tmp_path / "reference.png")
    code, out, err = run(
        "generate", PROMPT, "--model", checkpoint_of("vace"), "-o", tmp_path / "out", "--device", "cpu", "--json",
        "--control-video", tmp_path / "control_video", "--mask", tmp_path / "mask", "--seed", 3, "--steps", 2,
        "--reference", tmp_path / "reference.png", "--control-strength", 1.5, "--control-strength", 0.25,
        "--width", 48, "--height", 32, "--frames", 5, "--guidance", 4, "--negative-prompt", "a blue square",
        "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["control_strength"] == [1.5, 0.25]
    frames = ours(engine, asked, steps=2, control_strength=[1.5, 0.25]).frames
    assert np.array_equal(read_frames(tmp_path / "out")[0], frames)
