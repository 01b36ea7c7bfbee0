"""Several prompts with a seed each: as each alone, but for rounding; and each into a file of its own."""

import numpy as np
import pytest
import torch

import frameloom
from frameloom.errors import OutputError, RequestError
from frameloom.pipeline.reader import each_frame

SIZE = {"width": 64, "height": 32, "num_frames": 5}
PROMPTS = ["a red circle moving left", "a blue star"]
SEEDS = [1, 2**40]
TOLERANCE = 1e-4  # relative, as where rewrites are compared with the reference: guidance makes roundings larger
BUILT_IN = {"width": 64, "height": 32, "num_frames": 9, "steps": 3}


def relative_error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def built_in():
    with frameloom.load(device="cpu", compilation="off") as engine:
        yield engine


@pytest.mark.parametrize("kind", ["one expert", "two experts", "per-token timesteps", "built-in"])
def test_a_batch_with_seeds_equals_the_runs_alone(kind, engine_of, built_in):
    engine = built_in if kind == "built-in" else engine_of(kind)
    options = {"guidance_scale": 4.0, "steps": 3, **SIZE}
    negatives = ["blue", "a video of one square"]
    both = engine.generate(PROMPTS, negative_prompt=negatives, seed=SEEDS, output="latents", **options)
    for index, prompt in enumerate(PROMPTS):
        alone = engine.generate(
            prompt, negative_prompt=negatives[index], seed=SEEDS[index], output="latents", **options
        )
        assert relative_error(both[index : index + 1], alone) <= TOLERANCE
    swapped = engine.generate(PROMPTS, negative_prompt=negatives, seed=SEEDS[::-1], output="latents", **options)
    assert relative_error(swapped, both) > 0.1


def test_one_seed_in_a_list_has_the_bits_of_the_seed(engine_of):
    engine = engine_of("one expert")
    for prompt in (PROMPTS[0], PROMPTS[:1]):
        listed = engine.generate(prompt, seed=[5], output="latents", steps=2, **SIZE)
        assert torch.equal(listed, engine.generate(PROMPTS[0], seed=5, output="latents", steps=2, **SIZE))


def test_videos_tell_their_own_seeds(engine_of):
    videos = engine_of("one expert").generate(PROMPTS, seed=SEEDS, steps=1, **SIZE)
    assert [video.metadata["seed"] for video in videos] == SEEDS


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ([1], "1 seeds for 2 prompts"),
        ([1, -1], "seed -1"),
        ([1, None], "'None'"),
        ([1, 2.5], "seed 2.5"),
        ([], "0 seeds"),
    ],
)
def test_seeds_that_do_not_fit_are_refused(engine_of, seed, message):
    with pytest.raises(RequestError, match=message):
        engine_of("one expert").generate(PROMPTS, seed=seed, steps=1, **SIZE)


def test_each_video_of_a_batch_becomes_a_file_as_alone(built_in, tmp_path):
    seen = []
    videos = built_in.denoise(PROMPTS, seed=SEEDS, progress=seen.append, **BUILT_IN)
    assert [news.step for news in seen if news.stage == "denoise"] == [0, 1, 2, 3]
    for index, (prompt, video) in enumerate(zip(PROMPTS, videos, strict=True)):
        path = tmp_path / f"{index}.mp4"
        decoded = []
        made = built_in.write_to(path, video, quality=70, progress=decoded.append)
        assert {news.stage for news in decoded} == {"decode"}
        assert (made["prompt"], made["seed"], made["together"], made["output"]) == (prompt, SEEDS[index], 2, str(path))
        assert len(list(each_frame(path))) == 9
        alone = built_in.generate(prompt, seed=SEEDS[index], **BUILT_IN)
        mine = built_in.decode(video.latents)
        assert np.abs(mine.astype(int) - alone.frames.astype(int)).max() <= 1


def test_a_batch_of_one_has_the_bytes_of_the_run_alone(built_in, tmp_path):
    (video,) = built_in.denoise(PROMPTS[:1], seed=SEEDS[:1], **BUILT_IN)
    made = built_in.write_to(tmp_path / "a.mp4", video, quality=70)
    alone = built_in.generate_to(tmp_path / "b.mp4", PROMPTS[0], seed=SEEDS[0], quality=70, **BUILT_IN)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert made.keys() == alone.keys()


def test_a_callback_that_raises_leaves_no_file_and_the_others_whole(built_in, tmp_path):
    first, second = built_in.denoise(PROMPTS, seed=SEEDS, **BUILT_IN)

    def stop(news):
        if news.step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built_in.write_to(tmp_path / "a.mp4", first, progress=stop)
    with pytest.raises(OutputError):
        built_in.write_to(tmp_path / "nowhere" / "a.mp4", first)
    assert not list(tmp_path.iterdir())
    built_in.write_to(tmp_path / "b.mp4", second)
    assert [path.name for path in tmp_path.iterdir()] == ["b.mp4"]


def test_a_batch_is_a_list(built_in):
    with pytest.raises(RequestError, match="list of prompts"):
        built_in.denoise("a red circle")
