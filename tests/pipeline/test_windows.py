"""Long videos are denoised in windows: each as if it were a video, blended where they overlap."""

import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import frameloom
from frameloom.engine import job, journal
from frameloom.errors import RequestError
from frameloom.models.dit_rewrites import small_network
from frameloom.models.wan_dit import FrameTimes
from frameloom.ops.registry import Sizes
from frameloom.pipeline import stages
from frameloom.pipeline.windows import Windows
from frameloom.sampling.windows import windows_over

SIZE = {"width": 64, "height": 32, "num_frames": 25, "steps": 2, "seed": 5}
WINDOWS = {"window_frames": 13, "window_overlap": 4}
PROMPT = "a red circle moving left"


def picture(kind):
    """What a kind of checkpoint starts from, in 25 frames."""
    image = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
    video = np.stack([np.asarray(image.rotate(9 * turn)) for turn in range(25)])
    if kind.startswith("vace"):
        return {"control_video": video, "mask": video, "references": [image]}
    images = {"image": image, "last_image": image.rotate(90)}
    taken = {"first and last image": 2, "one expert": 0, "two experts": 0}.get(kind, 1)
    return dict(list(images.items())[:taken])


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(2, 30), st.data())
def test_windows_cover_every_frame_with_shares_that_sum_to_one(num_frames, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    windows = windows_over(num_frames, length, overlap)
    total = np.zeros(num_frames)
    for window in windows:
        assert window.stop - window.start == min(length, num_frames)
        assert min(window.shares) > 0
        total[window.start : window.stop] += window.shares
    np.testing.assert_allclose(total, 1)
    for before, after in itertools.pairwise(windows):
        assert before.start < after.start <= before.stop - overlap
    assert (windows[0].start, windows[-1].stop) == (0, num_frames)


def test_there_are_as_few_windows_as_the_overlap_allows():
    assert len(windows_over(20, 20, 4)) == 1
    assert len(windows_over(36, 20, 4)) == 2
    assert len(windows_over(37, 20, 4)) == 3


@pytest.mark.parametrize("per_frame", ["one time", "frame times", "token times"])
@torch.inference_mode()
def test_a_velocity_is_the_blend_of_what_each_window_says_by_itself(per_frame):
    dit, x, times, prompts = small_network(Sizes(frames=3), torch.float32, torch.device("cpu"))
    x = torch.cat((x, x.flip(2)), dim=2)  # 8 latent frames
    each = windows_over(7, 3, 1)
    index = torch.arange(8) > 0
    tokens = x.shape[3] * x.shape[4] // dit.spec.patch_volume
    values = torch.stack((torch.zeros(()), times[0]))

    def time_of(frames):
        """For latent frames, by their numbers."""
        if per_frame == "one time":
            return times[:1]
        if per_frame == "frame times":
            return FrameTimes(values[None], index[frames].long())
        return values[index[frames].long()].repeat_interleave(tokens)[None]

    wanted = torch.zeros_like(x)
    for number, window in enumerate(each):
        frames = [0, *range(1 + window.start, 1 + window.stop)]
        found = dit(x[:, :, frames], time_of(frames), prompts[0])
        wanted[:, :, frames[1:]] += found[:, :, 1:] * torch.tensor(window.shares)[:, None, None]
        if number == 0:
            wanted[:, :, 0] = found[:, :, 0]
    predict = Windows(each=each).predictor(stages.Predictor)([prompts[0]], stages.PLAINLY)
    (velocity,) = predict(dit, x, time_of(list(range(8))))
    torch.testing.assert_close(velocity, wanted, rtol=1e-5, atol=1e-5)


def test_one_window_is_the_plain_path_and_has_its_bits(checkpoint_of):
    assert Windows(each=windows_over(5, 5, 1)).predictor(stages.Predictor) is stages.Predictor
    with frameloom.load(checkpoint_of()) as engine:
        plain = engine.generate(PROMPT, output="latents", **SIZE)
        inside = engine.generate(PROMPT, output="latents", window_frames=25, **SIZE)
        assert torch.equal(plain, inside)
        cut = engine.generate(PROMPT, output="latents", **WINDOWS, **SIZE)
        assert not torch.equal(plain, cut)


@pytest.mark.parametrize(
    "kind", ["two experts", "image", "image, two experts", "first and last image", "per-token timesteps", "vace"]
)
def test_every_kind_of_request_is_denoised_in_windows_and_gone_on_with(kind, checkpoint_of, tmp_path, monkeypatch):
    monkeypatch.setenv("FRAMELOOM_JOBS", str(tmp_path / "jobs"))
    monkeypatch.setattr(journal, "_COST", 0)

    def end(progress):
        if (progress.stage, progress.step) == ("denoise", 1):
            raise KeyboardInterrupt

    options = {**SIZE, **WINDOWS, **picture(kind)}
    with frameloom.load(checkpoint_of(kind)) as engine:
        made = engine.generate_to(tmp_path / "whole.mp4", PROMPT, **options)
        assert (made["window_frames"], made["window_overlap"]) == (13, 4)
        with pytest.raises(KeyboardInterrupt):
            engine.generate_to(tmp_path / "resumed.mp4", PROMPT, job=True, progress=end, **options)
        engine.finish(job.find(None))
    assert (tmp_path / "resumed.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_windows_go_together_with_every_rewrite_of_the_loop(checkpoint_of):
    found = []
    for exactness in ("bitwise", "rounding"):
        with frameloom.load(checkpoint_of("vace"), exactness=exactness) as engine:
            found.append(engine.generate(PROMPT, output="latents", **SIZE, **WINDOWS, **picture("vace")))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_no_video_is_cut_into_windows_unasked(checkpoint_of, caplog):
    options = {**SIZE, "num_frames": 85}
    with frameloom.load(checkpoint_of()) as engine:
        assert engine.resolve(PROMPT, **options).window_frames is None
        assert "85 frames are more than the 81" in caplog.text
        assert engine.resolve(PROMPT, windows=True, **options).window_frames == 81
        assert engine.resolve(PROMPT, windows=True, **options).window_overlap == 16
        assert engine.resolve(PROMPT, windows=True, **SIZE).window_frames is None
    with frameloom.load(checkpoint_of(), exactness="lossy") as engine:
        assert engine.resolve(PROMPT, **options).window_frames == 81
        assert engine.resolve(PROMPT, windows=False, **options).window_frames is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_frames": 5001}, "or denoise it in windows"),
        ({"window_frames": 14}, "14 frames in a window are not possible.*use 13 or 17"),
        ({"window_frames": 13, "window_overlap": 5}, "cannot share 5.*use 4"),
        ({"window_frames": 13, "window_overlap": 12}, "cannot share 12.*use 8"),
        ({"window_frames": 1}, "cannot share any; use 9"),
        ({"window_overlap": 0}, "window overlap 0"),
        ({"windows": False, "window_frames": 13}, "leave one of them out"),
    ],
)
def test_impossible_windows_are_refused_with_what_is_possible(options, says, checkpoint_of, caplog):
    caplog.set_level(logging.ERROR)
    with frameloom.load(checkpoint_of()) as engine, pytest.raises(RequestError, match=says):
        engine.resolve(PROMPT, **SIZE | options)


def test_more_frames_than_there_are_positions_are_possible_in_windows(checkpoint_of):
    with frameloom.load(checkpoint_of()) as engine:
        assert engine.resolve(PROMPT, windows=True, **SIZE | {"num_frames": 5001}).num_frames == 5001
