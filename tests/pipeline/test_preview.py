"""What a video is becoming is shown while it is denoised, in one file that is always whole."""

import shutil

import numpy as np
import pytest
import torch
from checkpoints import VAE_21, _transformer, build_pipeline
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image

import frameloom
from frameloom.errors import OutputError, RequestError
from frameloom.models.spec import VaeSpec
from frameloom.pipeline import preview
from frameloom.pipeline.keep import FORGETS
from frameloom.pipeline.latent_colours import colours_of
from frameloom.pipeline.preview import Preview
from frameloom.sampling.flow import Euler, euler_schedule
from frameloom.shapes import fit_colours

SIZE = {"num_frames": 9, "steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def engine():
    with frameloom.load() as opened:
        yield opened


def test_the_colours_of_the_built_in_model_name_most_shapes_of_clips_they_were_not_fitted_to(engine):
    known = colours_of(engine._open.vae.spec)
    clips = fit_colours.drawn(engine, 8, seed=5)
    assert fit_colours.named_rightly(clips, torch.tensor(known.rows)) >= 0.6  # of eight names
    wrong = torch.tensor(known.rows).flip(1)  # blue for red
    assert fit_colours.named_rightly(clips, wrong) < 0.6


def test_every_step_is_a_row_and_the_file_is_whole_whenever_it_is_looked_at(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "_LEAST_S", 0.0)
    monkeypatch.setattr(preview, "_COST", 0)
    heights = []

    def look(progress):
        if progress.stage == "denoise" and progress.step > 0:
            with Image.open(tmp_path / "p.png") as sheet:
                sheet.load()
                heights.append(sheet.height)

    plain = engine.generate_to(tmp_path / "a.mp4", "a red star moving right", **SIZE)
    engine.generate_to(tmp_path / "b.mp4", "a red star moving right", preview=tmp_path / "p.png", progress=look, **SIZE)
    assert len(heights) == plain["steps"]
    assert len(set(np.diff(heights))) == 1
    assert heights[1] > heights[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "p.png"]
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_an_apng_moves_and_shows_the_latest_estimate_alone(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "_LEAST_S", 0.0)
    monkeypatch.setattr(preview, "_COST", 0)
    seen = []

    def look(progress):
        if progress.stage == "denoise" and progress.step > 0:
            with Image.open(tmp_path / "p.apng") as moving:
                seen.append((moving.size, moving.n_frames))

    engine.generate_to(tmp_path / "a.mp4", "a red star moving right", **SIZE)
    engine.generate_to(
        tmp_path / "b.mp4", "a red star moving right", preview=tmp_path / "p.apng", progress=look, **SIZE
    )
    assert seen == [((16, 16), 2)] * 4  # of three latent frames the first one has other colours
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_rows_are_seldom_and_the_last_step_is_always_shown(engine, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(preview, "_LEAST_S", 3600.0)
    monkeypatch.setattr(Preview, "draw", lambda self, latents, caption: drawn.append((latents.shape, caption)))
    engine.generate_to(tmp_path / "a.mp4", "a red star", preview=tmp_path / "p.png", **SIZE)
    assert drawn == [((1, 8, 3, 16, 16), "step 4 of 4")]


def test_the_estimate_of_a_sampler_without_history_lies_on_its_line(tmp_path, monkeypatch):
    """Under a constant velocity every step tells the end exactly."""
    monkeypatch.setattr(preview, "_LEAST_S", 0.0)
    monkeypatch.setattr(preview, "_COST", 0)
    seen = []
    monkeypatch.setattr(Preview, "draw", lambda self, latents, caption: seen.append(latents))
    sampler = Euler(euler_schedule(5, shift=3.0))
    keeper = Preview(tmp_path / "p.png", VaeSpec()).beside(FORGETS, sampler.schedule, lambda x: x)
    noise, clean = torch.randn(2, 1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    state, x = sampler.start(), clean + sampler.schedule.sigmas[0].double() * (noise - clean)
    for _ in range(5):
        x, state = sampler.step(noise - clean, x, state)
        keeper.walk(x, state)
    assert len(seen) == 5
    for estimate in seen[1:]:
        torch.testing.assert_close(estimate, clean, rtol=1e-4, atol=1e-4)


def test_a_preview_that_cannot_be_written_ends_and_not_the_run(tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    drawing = Preview(folder / "p.png", VaeSpec())
    latents = torch.zeros(1, 16, 2, 4, 4)
    drawing.draw(latents, "one")
    (folder / "p.png").unlink()
    folder.rmdir()
    drawing.draw(latents, "two")
    drawing.draw(latents, "three")
    assert caplog.text.count("cannot be written") == 1


def test_numbers_that_are_none_are_drawn_as_some_colour():
    frames = colours_of(VaeSpec()).frames(torch.full((16, 1, 2, 2), torch.nan))
    assert frames.shape == (1, 2, 2, 3)


def test_wan_vaes_are_known_by_their_statistics_and_others_are_refused(tmp_path):
    means = (-0.2289, -0.0052, -0.1323) + (0.0,) * 45
    wan22 = VaeSpec(z_dim=48, latents_mean=means, latents_std=(1.0,) * 48)
    assert [len(colours_of(spec).rows) for spec in (VaeSpec(), wan22)] == [17, 49]
    assert colours_of(VaeSpec(latents_mean=(0.5,) * 16)) is None
    with pytest.raises(RequestError, match="leave the preview out"):
        Preview(tmp_path / "p.png", VaeSpec(latents_mean=(0.5,) * 16))


@pytest.mark.parametrize(
    ("output", "name", "says"),
    [
        ("a.mp4", "p.jpg", "ending in .png"),
        ("a.mp4", "sheet", "ending in .png"),
        ("a.mp4", "missing/p.png", "in a folder that is there"),
        ("a.mp4", "", "ending in .png"),
        ("a.mp4", f"{'long' * 99}.png", "choose another path"),
        ("a.mp4", "nul\0.png", "choose another path"),
        ("a.mp4", "/proc/p.png", "because /proc is not writable"),
        ("./", "p.png", "among the frames"),
        ("%04d.png", "0001.png", "among the frames"),
    ],
)
def test_impossible_places_are_refused_before_anything_is_computed(output, name, says, engine, tmp_path, run):
    """By the library, and by the command before a model is looked for."""
    with pytest.raises(OutputError, match=rf"^the preview '.*' cannot be written.*{says}") as error:
        engine.generate_to(f"{tmp_path}/{output}", "a red star", preview=tmp_path / name, **SIZE)
    code, _, err = run(
        "generate", "a cat", "--model", "/nowhere", "-o", f"{tmp_path}/{output}", "--preview", tmp_path / name
    )
    assert code == 2
    assert str(error.value)[:40] in err.replace("\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_preview_may_lie_beside_a_pattern_of_frames(engine, tmp_path):
    engine.generate_to(tmp_path / "%04d.png", "a red star", preview=tmp_path / "sheet.png", **SIZE)
    assert len(list(tmp_path.iterdir())) == SIZE["num_frames"] + 1


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    """A checkpoint such as that of Wan 2.2 A14B: two experts, and the VAE of 2.1, whose colours are known."""
    pipeline = build_pipeline("two experts")
    vae = AutoencoderKLWan(**VAE_21 | {"z_dim": 16}).eval()
    experts = {name: _transformer(16, "two experts") for name in ("transformer", "transformer_2")}
    pipeline = WanPipeline(**pipeline.components | experts | {"vae": vae, "boundary_ratio": 0.875})
    folder = tmp_path_factory.mktemp("two-experts") / "model"
    pipeline.save_pretrained(str(folder))
    return folder


def test_both_experts_are_shown_whole_and_in_windows(two_experts, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "_LEAST_S", 0.0)
    monkeypatch.setattr(preview, "_COST", 0)
    shown, draw = [], Preview.draw

    def spy(self, latents_BCTHW, caption):
        shown.append((tuple(latents_BCTHW.shape), caption))
        draw(self, latents_BCTHW, caption)

    monkeypatch.setattr(Preview, "draw", spy)
    options = {"width": 32, "height": 32, "num_frames": 25, "steps": 3, "seed": 3}
    with frameloom.load(two_experts, residence="transformer=moved") as engine:
        for windows in ({}, {"window_frames": 13, "window_overlap": 4}):
            engine.generate_to(tmp_path / "a.mp4", "a cat", preview=tmp_path / "p.png", **options, **windows)
            engine.generate_to(tmp_path / "b.mp4", "a cat", **options, **windows)
            assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert shown == 2 * [((1, 16, 7, 4, 4), f"step {step} of 3") for step in (1, 2, 3)]
    with Image.open(tmp_path / "p.png") as sheet:
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 16


def test_a_folder_that_disappears_ends_the_preview_and_the_video_is_the_same(engine, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(preview, "_LEAST_S", 0.0)
    monkeypatch.setattr(preview, "_COST", 0)
    folder = tmp_path / "folder"
    folder.mkdir()

    def remove(progress):
        if (progress.stage, progress.step) == ("denoise", 2):
            shutil.rmtree(folder)

    options = {"preview": folder / "p.png", "progress": remove, **SIZE}
    engine.generate_to(tmp_path / "a.mp4", "a red star", **options)
    engine.generate_to(tmp_path / "b.mp4", "a red star", **SIZE)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    (said,) = [text for text in caplog.messages if "preview" in text]
    assert (
        said == f"the preview {folder / 'p.png'} cannot be written (No such file or directory); the run goes on without"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_run_is_gone_on_with_where_its_preview_can_no_longer_be_drawn(engine, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FRAMELOOM_JOBS", str(tmp_path / "jobs"))
    folder = tmp_path / "folder"
    folder.mkdir()

    def end(progress):
        if (progress.stage, progress.step) == ("denoise", 2):
            shutil.rmtree(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate_to(tmp_path / "a.mp4", "a red star", preview=folder / "p.png", job=True, progress=end, **SIZE)
    frameloom.resume()
    assert (tmp_path / "a.mp4").exists()
    assert caplog.text.count("the run goes on without") == 1


def test_a_resumed_run_goes_on_with_its_preview(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FRAMELOOM_JOBS", str(tmp_path / "jobs"))

    def end(progress):
        if (progress.stage, progress.step) == ("denoise", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate_to(tmp_path / "a.mp4", "a red star", preview=tmp_path / "p.png", job=True, progress=end, **SIZE)
    (tmp_path / "p.png").unlink(missing_ok=True)
    frameloom.resume()
    assert (tmp_path / "p.png").exists()
