"""Pictures and videos from strangers: known by their bytes, judged before they are decoded, looked at with limits."""

import asyncio
import io
import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from frameloom.serve.api.errors import ApiError
from frameloom.serve.api.inputs import Examiner, bytes_of_data_url, sniff
from frameloom.serve.config import Limits

LIMITS = Limits(image_pixels=1_000_000, video_frames=12)


def image(data, **limits):
    given = asyncio.run(Examiner(LIMITS).image(data, "input_reference", "image"))
    return given.shape, Image.open(io.BytesIO(given.data))


def video(data):
    return asyncio.run(Examiner(LIMITS).video(data, "video", "video")).shape


def refusal(read, data):
    with pytest.raises(ApiError) as caught:
        read(data)
    assert caught.value.status == 400
    assert caught.value.param in ("input_reference", "video")
    assert "/tmp" not in caught.value.message
    assert "BytesIO" not in caught.value.message
    return caught.value.message


def encoded(picture, kind, **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def gradient(width=48, height=32, mode="RGB"):
    across = np.linspace(0, 255, width, dtype=np.uint8)[None].repeat(height, 0)
    down = np.linspace(0, 255, height, dtype=np.uint8)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([across, down, 255 - across], -1)).convert(mode)


def png_header(width, height, *chunks):
    """A PNG of a size that it does not hold."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*one) for one in chunks) + chunk(b"IEND", b"")


def clip(frames=5, kind="mp4", width=48, height=32):
    out = io.BytesIO()
    codec = {"mp4": "libx264", "mov": "libx264", "webm": "libvpx-vp9", "gif": "gif", "matroska": "libx264"}[kind]
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb8" if kind == "gif" else "yuv420p"
        for index in range(frames):
            shade = np.full((height, width, 3), 20 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "PNG", {}), ("RGB", "JPEG", {"quality": 95}), ("RGB", "WEBP", {"lossless": True}),
        ("CMYK", "JPEG", {"quality": 95}), ("P", "PNG", {}),
        ("LA", "PNG", {}), ("RGBA", "WEBP", {"lossless": True}), ("1", "PNG", {}),
    ],
)  # fmt: skip
def test_pictures_of_all_kinds_are_kept_as_upright_rgb(mode, kind, options):
    given = gradient(mode=mode)
    shape, kept = image(encoded(given, kind, **options))
    assert (shape.width, shape.height, shape.num_frames, shape.name) == (48, 32, 1, "image.png")
    assert (kept.format, kept.mode, kept.size) == ("PNG", "RGB", (48, 32))
    apart = np.abs(np.asarray(kept, int) - np.asarray(given.convert("RGB"), int)).mean()
    assert apart < (8 if kind == "JPEG" else 0.01)


def test_sixteen_bits_animations_and_rotations():
    deep = Image.fromarray(np.asarray(gradient().convert("L")).astype(np.uint16) * 257)
    shape, kept = image(encoded(deep, "PNG"))
    assert np.array_equal(np.asarray(kept)[..., 0], np.asarray(gradient().convert("L")))
    frames = [gradient(), gradient().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    shape, kept = image(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert np.array_equal(np.asarray(kept), np.asarray(frames[0]))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    shape, kept = image(encoded(gradient(), "PNG", exif=exif))
    assert (shape.width, shape.height) == (32, 48)
    assert np.array_equal(np.asarray(kept), np.rot90(np.asarray(gradient()), -1))


@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (10_000, 9_000), (1_001, 1_000)])
def test_too_many_pixels_are_refused_by_the_header_alone(size):
    assert "more than 1,000,000 pixels" in refusal(image, png_header(*size))


def test_a_bomb_in_a_text_chunk_and_damaged_files_are_refused():
    bomb = b"key\0\0" + zlib.compress(b"x" * 200_000_000)
    assert "input_reference" in refusal(image, png_header(8, 8, (b"zTXt", bomb)))
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a red circle", zip=True)
    assert image(encoded(gradient(), "PNG", pnginfo=text))[0].width == 48
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encoded(gradient(200, 200), kind)
        for share in (0.02, 0.5, 0.95):
            refusal(image, whole[: int(len(whole) * share)])


def test_other_files_are_refused_by_what_they_are():
    assert "empty" in refusal(image, b"")
    assert "no known kind" in refusal(image, b"%!PS-Adobe-3.0 EPSF-3.0\n")
    assert "no known kind" in refusal(image, b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert "a GIF video" in refusal(image, encoded(gradient(), "GIF"))
    assert "a PNG image" in refusal(video, encoded(gradient(), "PNG"))
    assert "no known kind" in refusal(video, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    assert "no known kind" in refusal(video, b"ffconcat version 1.0\nfile /etc/passwd\n")
    assert sniff(b"\0\0\0\x20ftypavif") is None
    assert "longer than 16 times" in refusal(image, encoded(Image.new("RGB", (400, 4)), "PNG"))


@pytest.mark.parametrize("kind", ["mp4", "mov", "webm", "gif", "matroska"])
def test_videos_are_watched_from_the_first_to_the_last_frame(kind):
    shape = video(clip(kind=kind))
    assert (shape.width, shape.height, shape.num_frames) == (48, 32, 5)
    assert shape.fps == pytest.approx(8, rel=0.05)
    assert shape.name == {"mov": "video.mp4", "matroska": "video.webm"}.get(kind, f"video.{kind}")
    whole = clip(kind=kind, frames=8)
    refusal(video, whole[: len(whole) * 2 // 3])


def test_videos_with_too_many_frames_or_pixels_are_refused():
    assert "more than 12 frames" in refusal(video, clip(13))
    assert "more than 1,000,000 pixels" in refusal(video, clip(2, width=1600, height=800))
    refusal(video, b"\0\0\0\x20ftypisom" + b"\0" * 1000)
    refusal(video, b"\x1aE\xdf\xa3" + b"\0" * 1000)


def test_what_makes_the_reader_run_out_of_its_limits_costs_one_sentence(monkeypatch):
    monkeypatch.setattr("frameloom.serve.api.inputs.CPU_S", 0)
    assert "within the limits" in refusal(image, encoded(gradient(), "PNG"))
    monkeypatch.undo()
    monkeypatch.setattr("frameloom.serve.api.inputs._WALL_S", 0.001)
    assert "within the limits" in refusal(image, encoded(gradient(), "PNG"))


def test_data_urls():
    assert bytes_of_data_url("data:image/png;base64,aGVsbG8=", "input_reference") == b"hello"
    assert bytes_of_data_url("DATA:Image/PNG;BASE64,aGVsbG8=", "input_reference") == b"hello"
    assert bytes_of_data_url("data:;base64,aGVsbG8=", "input_reference") == b"hello"
    for odd in ("data:image/png,hello", "data:image/png;base64,a b", "data:image/png;base64,é", "data:" + ";" * 10_000):
        refusal(lambda url: bytes_of_data_url(url, "input_reference"), odd)
