"""Pictures of every kind that people have, and of kinds that nobody should have."""

import contextlib
import io
import logging
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from frameloom.errors import InputError, RequestError
from frameloom.pipeline.images import fitted, image_of, video_of
from frameloom.pipeline.media import Video, read_frames
from frameloom.pipeline.reader import MAX_PIXELS
from frameloom.types import Pictures


def rgb(width=40, height=24, seed=0):
    rough = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def saved(folder, image, name, **options):
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "no_extension"])
def test_the_kind_is_told_by_content(tmp_path, name):
    kind = "PNG" if "." not in name else None
    path = saved(tmp_path, rgb(), name, format=kind, **({"lossless": True} if name.endswith("webp") else {}))
    found = image_of(path)
    assert np.array_equal(found.frames[0], np.asarray(rgb()))
    assert found.name == str(path)


def test_paths_pillow_images_and_arrays_are_the_same_picture(tmp_path):
    frames = [image_of(given).frames for given in (saved(tmp_path, rgb(), "a.png"), rgb(), np.asarray(rgb()))]
    assert all(np.array_equal(frames[0], other) for other in frames)
    once = image_of(rgb())
    assert image_of(once) is once


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_camera_held_in_any_way_is_turned_upright(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    found = image_of(saved(tmp_path, rgb(), "a.png", exif=exif)).frames[0]
    assert found.shape == ((24, 40, 3) if turn < 5 else (40, 24, 3))
    undone = {1: lambda x: x, 3: lambda x: x[::-1, ::-1], 6: lambda x: np.rot90(x, 1), 8: lambda x: np.rot90(x, -1)}
    if turn in undone:
        assert np.array_equal(undone[turn](found), np.asarray(rgb()))


def test_other_modes_become_rgb(tmp_path):
    for mode in ("L", "1", "LA", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV"):
        image = rgb().convert(mode)
        assert image_of(image).frames.shape == (1, 24, 40, 3), mode
    assert np.array_equal(image_of(rgb().convert("CMYK")).frames[0], np.asarray(rgb()))
    assert np.array_equal(image_of(saved(tmp_path, rgb().convert("P"), "p.gif")).frames[0].shape, (24, 40, 3))


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    found = image_of(saved(tmp_path, Image.fromarray(levels), "a.png")).frames[0]
    assert np.array_equal(found[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bits_are_refused(tmp_path, mode):
    path = saved(tmp_path, rgb().convert("L").convert(mode), "a.tiff")
    with pytest.raises(InputError, match="32 bits per channel"):
        image_of(path)


def test_what_is_left_out_is_said_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, "frameloom")
    moving = saved(tmp_path, rgb(), "a.gif", save_all=True, append_images=[rgb(seed=1), rgb(seed=2)])
    image_of(moving)
    assert "the first of 3 frames is used" in caplog.text
    see_through = rgb().convert("RGBA")
    see_through.putalpha(7)
    assert np.array_equal(image_of(saved(tmp_path, see_through, "b.png")).frames[0], np.asarray(rgb()))
    palette = saved(tmp_path, see_through.quantize(), "c.png")
    assert image_of(palette).frames.shape == (1, 24, 40, 3)
    assert caplog.text.count("its transparency is dropped") == 2


def bomb(width, height):
    """A PNG of which nobody has written the pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_000, 9_000), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(*size))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match=r"more than 80,000,000 pixels; make it smaller|cannot be read"):
        image_of(path)


def test_a_strip_is_refused():
    with pytest.raises(InputError, match="is 340x20, longer than 16 times its width"):
        image_of(rgb(340, 20))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("nowhere.png", InputError, "nowhere.png does not exist"),
        (".", InputError, "is no file; give a"),
        (5, RequestError, "the image is int; give a path, a Pillow image or uint8"),
        (np.zeros((4, 4, 4), np.uint8), RequestError, r"uint8 of shape \(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), RequestError, "the image is float32"),
        (np.zeros((0, 4, 3), np.uint8), RequestError, r"of shape \(0, 4, 3\)"),
        (Pictures(name="a.mp4", frames=np.zeros((2, 4, 4, 3), np.uint8)), RequestError, "has 2 frames; give one"),
    ],
)
def test_what_is_no_picture_is_one_sentence(given, error, words):
    with pytest.raises(error, match=words):
        image_of(given)


@pytest.mark.parametrize("head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF", b"", b"<svg/>"])
def test_files_of_other_kinds_are_not_opened(tmp_path, head):
    (tmp_path / "a.png").write_bytes(head)
    with pytest.raises(InputError, match="is no image of a known kind; give a PNG, JPEG, WEBP, GIF, BMP, TIFF file"):
        image_of(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp"])
def test_a_file_that_is_cut_off_is_one_sentence(tmp_path, kind):
    path = saved(tmp_path, rgb(64, 64), f"a.{kind}")
    data = path.read_bytes()
    for part in (len(data) // 2, len(data) - len(data) // 5):
        path.write_bytes(data[:part])
        with pytest.raises(InputError, match=r"cannot be read as an image|no image of a known kind"):
            image_of(path)


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12))
def test_damaged_files_are_read_or_refused(tmp_path_factory, kind, seed, count):
    """Whatever bytes are changed: pixels of a bounded size, or one sentence."""
    buffer = io.BytesIO()
    rgb(16, 12).save(buffer, kind)
    data, numbers = bytearray(buffer.getvalue()), np.random.default_rng(seed)
    for _ in range(count):
        data[numbers.integers(len(data))] = numbers.integers(256)
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        assert image_of(path).frames.size <= 3 * MAX_PIXELS


@pytest.mark.parametrize("size", [(64, 32), (20, 48), (40, 24), (17, 90)])
def test_an_asked_size_is_resized_to_as_the_reference_does(size):
    width, height = size
    found = fitted(image_of(rgb()), width=width, height=height, keeps_aspect=False)
    wanted = VideoProcessor(vae_scale_factor=1).preprocess(rgb(), height=height, width=width)[0]
    levels = 2.0 * (torch.from_numpy(found[0]).permute(2, 0, 1).float() / 255.0) - 1.0
    assert torch.equal(levels, wanted)


def test_keeping_the_aspect_cuts_the_middle_out():
    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, 20:60] = 200
    found = fitted(image_of(halves), width=20, height=20, keeps_aspect=True)
    assert found.shape == (1, 20, 20, 3)
    assert found.min() > 180  # the filter sees a little of what lies outside
    squeezed = fitted(image_of(halves), width=20, height=20, keeps_aspect=False)
    assert squeezed[0, :, 0].max() == 0
    same = fitted(image_of(rgb()), width=40, height=24, keeps_aspect=True)
    assert np.array_equal(same[0], np.asarray(rgb()))


@pytest.mark.parametrize("read", [image_of, lambda path: video_of(path, 5), read_frames])
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"is no file; give a"):
        read(tmp_path / "a.png")


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path, rgb(), "a.png")
    assert np.array_equal(image_of("~/a.png").frames[0], np.asarray(rgb()))
    assert np.array_equal(read_frames("~/a.png")[0][0], np.asarray(rgb()))
    Video(frames=image_of("~/a.png").frames, fps=12).save("~/b.gif")
    assert (tmp_path / "b.gif").exists()


def test_a_video_with_frames_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    frames = np.zeros((2, 24, 40, 3), np.uint8)
    monkeypatch.setattr("frameloom.pipeline.reader.MAX_PIXELS", 24 * 40 - 1)
    for name in ("a.gif", "a.mp4", "a.png"):
        path = tmp_path / name
        saved(tmp_path, rgb(), name) if name == "a.png" else Video(frames=frames, fps=10).save(path)
        with pytest.raises(InputError, match=r"more than 959 pixels; make it smaller"):
            video_of(path, 2)


def test_a_video_is_its_first_frames_and_its_rate(tmp_path):
    frames = np.stack([np.asarray(rgb(seed=seed)) for seed in range(6)])
    Video(frames=frames, fps=12).save(tmp_path / "a.mp4")
    found = video_of(tmp_path / "a.mp4", 5)
    assert (found.frames.shape, found.fps, found.name) == ((5, 24, 40, 3), 12.0, str(tmp_path / "a.mp4"))
    assert np.array_equal(found.frames, read_frames(tmp_path / "a.mp4")[0][:5])
    assert len(video_of(tmp_path / "a.mp4", 9).frames) == 6
    given = video_of(frames, 4)
    assert (len(given.frames), given.fps) == (4, None)
    with pytest.raises(RequestError, match=r"the video is uint8 of shape \(24, 40, 3\); give uint8 \(T, H, W, 3\)"):
        video_of(frames[0], 5)
    with pytest.raises(RequestError, match="the video is list"):
        video_of([rgb()], 5)


def test_equal_pictures_look_equal_and_others_do_not():
    assert repr(image_of(rgb())) == repr(image_of(np.asarray(rgb())))
    assert repr(image_of(rgb())) != repr(image_of(rgb(seed=1)))
