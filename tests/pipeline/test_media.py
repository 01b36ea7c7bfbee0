"""Written files are decoded again with PyAV and Pillow; interruptions are real signals in real processes."""

import errno
import hashlib
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from frameloom.errors import InputError, InternalError, OutputError
from frameloom.pipeline.media import Video, check_output, contact_sheet, open_writer, read_frames

FILES = ["out.mp4", "out.webm", "out.gif", "out", "frame-%04d.png"]
SATURATED = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (0, 255, 255),
    (255, 0, 255),
    (200, 30, 90),
]


def moving_disk(frames=9, height=48, width=64):
    y, x = np.mgrid[0:height, 0:width]
    video = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        centre = width * (0.2 + 0.6 * t / max(frames - 1, 1))
        glow = np.exp(-((x - centre) ** 2 + (y - height / 2) ** 2) / (height / 3) ** 2)
        video[t] = np.stack([60 + 120 * glow, 80 + 90 * y / height, 160 - 100 * glow], axis=-1)
    return video


def psnr_db(a, b):
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def digest(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run_python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# -------------------- Video


def test_video_tells_its_size_and_length():
    video = Video(frames=moving_disk(9, 48, 64), fps=16, metadata={"seed": 7})
    assert (video.num_frames, video.height, video.width) == (9, 48, 64)
    assert video.duration_s == 9 / 16
    assert video.metadata == {"seed": 7}


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), 16, "dtype float32"),
        (np.zeros((2, 8, 8, 4), np.uint8), 16, r"shape \(2, 8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.uint8), 16, r"shape \(8, 8, 3\) are no video"),
        (np.zeros((0, 8, 8, 3), np.uint8), 16, "T >= 1"),
        ([[1]], 16, "type list"),
        (np.zeros((1, 8, 8, 3), np.uint8), 0, "0 frames per second"),
        (np.zeros((1, 8, 8, 3), np.uint8), float("nan"), "nan frames per second"),
    ],
)
def test_video_refuses_what_is_no_video(frames, fps, message):
    with pytest.raises(OutputError, match=message):
        Video(frames=frames, fps=fps)


# -------------------- formats


@pytest.mark.parametrize(("name", "codec"), [("out.mp4", "h264"), ("out.webm", "vp9")])
@pytest.mark.parametrize("fps", [16, 2.5, 23.976, Fraction(30000, 1001)])
def test_video_file_holds_what_was_asked(tmp_path, name, codec, fps):
    frames = moving_disk()
    path = Video(frames=frames, fps=fps).save(tmp_path / name)
    assert path == tmp_path / name
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == (codec, "yuv420p", 64, 48)
        assert float(stream.average_rate) == pytest.approx(float(fps), rel=1e-3)
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1)  # BT.709 three times, limited range
        assert container.duration / 1e6 == pytest.approx(9 / float(fps), abs=2e-3)
    decoded, rate = read_frames(path)
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8
    assert rate == pytest.approx(float(fps), rel=1e-3)
    assert psnr_db(decoded, frames) > 42
    assert np.abs((decoded.astype(int) - frames).mean(axis=(0, 1, 2))).max() < 0.5


def test_mp4_starts_with_its_index_and_names_no_encoder(tmp_path):
    data = Video(frames=moving_disk(), fps=16).save(tmp_path / "out.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert b"x264" not in data
    assert b"Lavf" not in data


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
@pytest.mark.parametrize("colour", SATURATED)
def test_saturated_colours_come_back(tmp_path, name, colour):
    frames = np.full((2, 32, 32, 3), colour, np.uint8)
    decoded, _ = read_frames(Video(frames=frames, fps=16).save(tmp_path / name))
    assert np.abs(decoded.astype(int) - frames).max() <= 6


def test_quality_is_a_dial(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    for suffix in ("mp4", "webm"):
        sizes, errors = [], []
        for quality in (0, 40, 70, 100):
            path = Video(frames=frames, fps=16).save(tmp_path / f"{quality}.{suffix}", quality=quality)
            sizes.append(path.stat().st_size)
            errors.append(psnr_db(read_frames(path)[0], frames))
        assert sizes == sorted(sizes)
        assert errors == sorted(errors)
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.profile in ("High", "Profile 0")


@pytest.mark.parametrize("quality", [-1, 101, 7.5, "best"])
def test_quality_out_of_range(tmp_path, quality):
    with pytest.raises(OutputError, match=r"0 .* to 100"):
        open_writer(tmp_path / "out.mp4", width=16, height=16, fps=16, quality=quality)


@pytest.mark.parametrize(("width", "height"), [(17, 16), (16, 15), (33, 21), (1, 1)])
@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
def test_odd_sizes_repeat_the_edge_and_say_so(tmp_path, caplog, name, width, height):
    frames = np.full((3, height, width, 3), (90, 120, 60), np.uint8)
    with caplog.at_level(logging.INFO, "frameloom"):
        decoded, _ = read_frames(Video(frames=frames, fps=16).save(tmp_path / name))
    assert decoded.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(decoded.astype(int) - (90, 120, 60)).max() <= 4
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{width}x{height}" in line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (1, 48, 64), (5, 16, 16)])
def test_short_and_tiny_videos(tmp_path, name, frames, height, width):
    video = moving_disk(frames, height, width)
    Video(frames=video, fps=16).save(tmp_path / name)
    decoded, _ = read_frames(tmp_path / (name if "%" not in name else "frame-0000.png"))
    assert decoded.shape == (1 if "%" in name else frames, height, width, 3)
    assert psnr_db(decoded, video[: len(decoded)]) > 30


@pytest.mark.parametrize("size", [(47, 63), (260, 258)])
def test_gif_loops_for_ever_and_keeps_time(tmp_path, size):
    frames = moving_disk(8, *size)
    path = Video(frames=frames, fps=16).save(tmp_path / "out.gif")
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        assert (image.n_frames, image.size) == (8, size[::-1])
    decoded, rate = read_frames(path)
    assert rate == pytest.approx(16, rel=0.03)
    assert psnr_db(decoded, frames) > 33


def test_gif_keeps_frames_that_are_alike(tmp_path):
    path = Video(frames=np.repeat(moving_disk(1), 5, axis=0), fps=10).save(tmp_path / "out.gif")
    assert read_frames(path)[0].shape[0] == 5


def test_gif_cannot_be_faster_than_browsers_show(tmp_path):
    with pytest.raises(OutputError, match=r"60 frames per second.*to 50"):
        Video(frames=moving_disk(), fps=60).save(tmp_path / "out.gif")


@pytest.mark.parametrize(("name", "first"), [("out", "out/0000.png"), ("out.v2/", "out.v2/0000.png")])
def test_folder_of_frames_is_lossless(tmp_path, name, first):
    frames = moving_disk(12)
    Video(frames=frames, fps=16).save(f"{tmp_path}/{name}")
    assert len(everything_in(tmp_path)) == 1 + 12
    assert first in everything_in(tmp_path)
    decoded, rate = read_frames(tmp_path / name)
    assert rate is None
    np.testing.assert_array_equal(decoded, frames)


def test_existing_empty_folder_is_filled_in_place(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    inode = folder.stat().st_ino
    Video(frames=moving_disk(3), fps=16).save(folder)
    assert folder.stat().st_ino == inode
    assert everything_in(folder) == ["0000.png", "0001.png", "0002.png"]


def test_pattern_lands_beside_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    Video(frames=moving_disk(2), fps=16).save(tmp_path / "shot-%d.png")
    assert everything_in(tmp_path) == ["notes.txt", "shot-0.png", "shot-1.png"]


def test_frames_come_in_pieces(tmp_path):
    frames = moving_disk(9)
    with open_writer(tmp_path / "pieces.mp4", width=64, height=48, fps=16) as writer:
        writer.write(frames[:0])
        writer.write(frames[0])
        writer.write(frames[1:5])
        writer.write(frames[:, :, ::-1][5:, :, ::-1])  # a view with other strides
    assert writer.num_frames == 9
    Video(frames=frames, fps=16).save(tmp_path / "whole.mp4")
    assert digest(tmp_path / "pieces.mp4") == digest(tmp_path / "whole.mp4")


def test_same_frames_give_same_bytes_in_any_process(tmp_path):
    code = """
        import sys, numpy as np
        from frameloom.pipeline.media import Video
        for height, width in ((48, 64), (64, 80), (144, 192), (259, 257)):
            t, y, x = np.mgrid[0:9, 0:height, 0:width]
            frames = np.stack([(x + 9 * t) % 256, (y * 2) % 256, (x * y + t) % 256], -1).astype(np.uint8)
            for name in sys.argv[2:]:
                Video(frames=frames, fps=16).save(f"{sys.argv[1]}/{height}-{name}")
    """
    names = ["out.mp4", "out.webm", "out.gif", "out"]
    seen = []
    for threads, fill in (("1", "0"), ("4", "85"), ("2", "254")):
        folder = tmp_path / threads
        folder.mkdir()
        environment = {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "TZ": f"Etc/GMT+{threads}"}
        # glibc fills fresh memory with this byte: an encoder that reads what it never wrote shows it.
        done = run_python(code, folder, *names, MALLOC_PERTURB_=fill, **environment)
        assert done.returncode == 0, done.stderr
        seen.append({path.name: digest(path) for path in folder.iterdir()})
    assert len(seen[0]) == 4 * len(names)
    assert seen[0] == seen[1] == seen[2]


# -------------------- the door


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.mp3", r"ends in \.mp3.*\.mp4, \.webm or \.gif.*did you mean \.mp4\?"),
        ("out.webp", r"did you mean \.webm\?"),
        ("out.xyz", r"ends in \.xyz, which is no known format"),
        ("out.png", r"one picture for all frames.*%04d\.png"),
        ("a%db%d.png", "one picture for all frames"),
        ("50%-%04d.png", "one picture for all frames"),
        ("missing/out.mp4", "missing is no existing folder; create it first"),
        ("missing/out", "missing is no existing folder; create it first"),
        ("missing/%04d.png", "missing is no existing folder; create it first"),
        ("folder.mp4", "is a folder where a file is expected"),
        ("full", "already has 1 files such as old.txt"),
        ("old-%04d.png", r"already has 1 files such as old-0007\.png"),
        ("file/", "is a file where a folder is expected"),
        ("file/out.mp4", "file is no existing folder"),
        ("pipe.mp4", "is a device or a pipe"),
        ("a" * 300 + ".mp4", "File name too long"),
        ("nul\0.mp4", "is no path"),
    ],
)
def test_door_refuses_and_writes_nothing(tmp_path, name, message):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.txt").touch()
    (tmp_path / "old-0007.png").touch()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    before = everything_in(tmp_path)
    with pytest.raises(OutputError, match=message) as caught:
        check_output(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)
    assert everything_in(tmp_path) == before


def test_door_refuses_an_empty_path():
    with pytest.raises(OutputError, match="is no path"):
        check_output("")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.mp4", "mp4"),
        ("A.MP4", "mp4"),
        ("a.webm", "webm"),
        ("a.gif", "gif"),
        ("frames", "folder"),
        ("v1.2/", "folder"),
        ("there.d", "folder"),
        ("f%03d.png", "pattern"),
        (".mp4", "mp4"),
    ],
)
def test_door_lets_known_outputs_pass_without_writing(tmp_path, name, kind):
    (tmp_path / "there.d").mkdir()
    target = check_output(f"{tmp_path}/{name}")
    assert (target.kind, check_output(target)) == (kind, target)
    assert os.fspath(target) == str(tmp_path / name)
    assert everything_in(tmp_path) == ["there.d"]


def test_door_refuses_a_folder_one_may_not_write(tmp_path):
    code = """
        import os, sys
        from frameloom.errors import OutputError
        from frameloom.pipeline.media import check_output
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            check_output(sys.argv[1])
        except OutputError as error:
            print(error)
    """
    shut = tmp_path / "shut"
    shut.mkdir()
    for parent in (tmp_path, *list(tmp_path.parents)[:-2]):  # the other user has to be able to get here
        parent.chmod(parent.stat().st_mode | 0o111)
    shut.chmod(0o555)
    assert "shut is not writable" in run_python(code, shut / "out.mp4").stdout
    assert "shut is not writable" in run_python(code, shut).stdout


def test_link_keeps_pointing_at_its_file(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.mp4").symlink_to("real/out.mp4")
    Video(frames=moving_disk(2), fps=16).save(tmp_path / "link.mp4")
    assert (tmp_path / "link.mp4").is_symlink()
    assert everything_in(tmp_path) == ["link.mp4", "real", "real/out.mp4"]


# -------------------- whole or not at all


@pytest.mark.parametrize("name", FILES)
def test_failure_leaves_nothing_and_keeps_the_old_file(tmp_path, name):
    if "." in name and "%" not in name:
        (tmp_path / name).write_bytes(b"old")
    before = everything_in(tmp_path)

    def write_half():
        with open_writer(tmp_path / name, width=64, height=48, fps=16) as writer:
            writer.write(moving_disk(9))
            assert len(everything_in(tmp_path)) > len(before)
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert everything_in(tmp_path) == before
    assert not before or (tmp_path / name).read_bytes() == b"old"


def test_closing_without_frames_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="would be empty"):
        open_writer(tmp_path / "out.mp4", width=16, height=16, fps=16).close()
    assert everything_in(tmp_path) == []


def test_writer_refuses_other_sizes_and_late_frames(tmp_path):
    writer = open_writer(tmp_path / "out.mp4", width=64, height=48, fps=16)
    with pytest.raises(OutputError, match="a frame is 48x64, the video 64x48"):
        writer.write(moving_disk(1, 64, 48))
    writer.write(moving_disk(1))
    writer.close()
    writer.close()
    with pytest.raises(InternalError, match="after it was closed"):
        writer.write(moving_disk(1))
    assert everything_in(tmp_path) == ["out.mp4"]


def test_files_that_come_meanwhile_are_never_mixed(tmp_path):
    writer = open_writer(tmp_path / "out", width=64, height=48, fps=16)
    writer.write(moving_disk(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0000.png").write_bytes(b"theirs")
    with pytest.raises(OutputError, match="never mixed"):
        writer.close()
    assert everything_in(tmp_path) == ["out", "out/0000.png"]
    assert (tmp_path / "out" / "0000.png").read_bytes() == b"theirs"


@pytest.mark.parametrize("moves", [0, 2])
def test_failing_moves_are_undone_and_frame_0_comes_last(tmp_path, monkeypatch, moves):
    move, moved = os.rename, []

    def fail_later(source, target):
        if len(moved) == moves:
            assert not (tmp_path / "0.png").exists()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        moved.append(target.name)
        move(source, target)

    monkeypatch.setattr(os, "rename", fail_later)
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        Video(frames=moving_disk(4), fps=16).save(tmp_path / "%d.png")
    assert moved == ["3.png", "2.png"][:moves]
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("name", FILES)
def test_full_disk_is_said_and_leaves_nothing(tmp_path, name):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OutputError, match=os.strerror(errno.EFBIG)):
            Video(frames=noise, fps=16).save(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything_in(tmp_path) == []


WRITE_FOR_EVER = """
    import signal, sys, numpy as np
    from frameloom.pipeline.media import open_writer
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: a background job ignores it
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with open_writer(sys.argv[1], width=64, height=64, fps=16) as writer:
        while True:
            writer.write(frame)
            if writer.num_frames == 20:
                print("running", flush=True)
"""


def interrupt(target, number):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITE_FOR_EVER), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if process.stdout.readline() != "running\n":
        raise AssertionError(f"exit code {process.wait()}: {process.stderr.read()}")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return errors


@pytest.mark.parametrize("name", FILES)
def test_ctrl_c_leaves_nothing(tmp_path, name):
    assert "KeyboardInterrupt" in interrupt(tmp_path / name, signal.SIGINT)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("name", FILES)
def test_kill_leaves_only_a_hidden_partial(tmp_path, name):
    interrupt(tmp_path / name, signal.SIGKILL)
    (left,) = list(tmp_path.iterdir())
    assert left.name.startswith(f".{name}.partial-")
    Video(frames=moving_disk(2), fps=16).save(tmp_path / name)  # the leftover is in nobody's way


# -------------------- reading


def test_pictures_are_one_frame_without_rate(tmp_path):
    pixels = moving_disk(1)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(tmp_path / "alpha.png")
    for name in ("a.png", "alpha.png"):
        frames, rate = read_frames(tmp_path / name)
        assert rate is None
        np.testing.assert_array_equal(frames, pixels[None])


def test_camera_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    pixels = moving_disk(1)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_frames(tmp_path / "a.png")[0][0], np.rot90(pixels, -1))


def test_reader_refuses_what_it_cannot_read_whole(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    first, second = (Image.fromarray(frame) for frame in moving_disk(2))
    first.save(tmp_path / "two.webp", save_all=True, append_images=[second])
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for number in (1, 2):
        Image.new("RGB", (8 * number, 8)).save(tmp_path / "mixed" / f"{number}.png")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "nothing.mp4").touch()
    messages = {
        "deep.png": "more than 8 bits",
        "two.webp": "is an animation",
        "empty": "no numbered frames",
        "mixed": "different sizes",
        "text.mp4": "cannot be read as a video or a picture",
        "text.png": "cannot be read as a video or a picture",
        "nothing.mp4": "cannot be read as a video or a picture",
        "absent.mp4": "does not exist",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            read_frames(tmp_path / name)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out.png"])
def test_reader_never_takes_a_cut_file_for_a_whole_one(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    path = tmp_path / name
    if name.endswith("png"):
        Image.fromarray(noise[0]).save(path)
    else:
        Video(frames=noise, fps=16).save(path)
    data = path.read_bytes()
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError):
            read_frames(path)


def packet_ends(path):
    with av.open(str(path)) as container:
        return sorted(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif"])
def test_reader_notices_a_cut_between_two_frames(tmp_path, name):
    path = Video(frames=moving_disk(6), fps=16).save(tmp_path / name)
    data, ends = path.read_bytes(), packet_ends(path)
    for end in ends[:-1]:
        path.write_bytes(data[:end])
        with pytest.raises(InputError):
            read_frames(path)


def test_reader_notices_a_cut_that_the_decoder_conceals(tmp_path):
    path = tmp_path / "out.mp4"
    with av.open(str(path), "w", container_options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, frame in enumerate(moving_disk(4)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 16)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert read_frames(path)[0].shape == (4, 48, 64, 3)
    path.write_bytes(path.read_bytes()[: packet_ends(path)[-1] - 2])
    with pytest.raises(InputError, match="is cut off"):
        read_frames(path)


# -------------------- contact sheet


def test_contact_sheet_shows_first_and_last_frame_of_each_video():
    shades = np.arange(10, dtype=np.uint8)[:, None, None, None] * 20
    video = Video(frames=np.broadcast_to(shades, (10, 16, 16, 3)).copy(), fps=16)
    sheet = contact_sheet([video, video], ["first", "second"], frames_per_video=4)
    row = np.asarray(sheet)[-60, :, 0]
    for shade in (0, 60, 120, 180):
        assert np.count_nonzero(row == shade) == 192  # 16 pixels by a whole factor of 12
    assert np.count_nonzero(np.asarray(sheet)[:, 60, 0] == 0) == 2 * 192


def test_contact_sheet_caption_is_drawn_and_cut_to_its_width():
    video = Video(frames=moving_disk(1), fps=16)
    short = contact_sheet([video], ["a"])
    long = contact_sheet([video], ["word " * 100])
    unbroken = contact_sheet([video], ["w" * 500])
    assert short.size[0] == long.size[0] == unbroken.size[0]
    assert long.size[1] - short.size[1] == 2 * 25
    dotted = [np.asarray(contact_sheet([video], ["w" * count + " ..."])) for count in range(1, 20)]
    assert sum(np.array_equal(image, unbroken) for image in dotted) == 1


def test_contact_sheet_keeps_the_pixels_of_small_frames():
    frame = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    sheet = np.asarray(contact_sheet([Video(frames=frame, fps=16)], ["noise"]))
    blocks = sheet[-36 - 192 : -36, 36 : 36 + 192].reshape(16, 12, 16, 12, 3)
    assert (blocks == frame[0][:, None, :, None]).all()


def test_contact_sheet_columns():
    videos = [Video(frames=moving_disk(count), fps=16) for count in (1, 3, 9)]
    one, three = (contact_sheet(videos, ["a", "b", "c"], columns=columns) for columns in (1, 3))
    assert three.width > 2.5 * one.width
    assert one.height > 2.5 * three.height


@pytest.mark.parametrize(("videos", "captions", "columns"), [(0, 0, 1), (1, 2, 1), (1, 1, 0)])
def test_contact_sheet_refuses_nonsense(videos, captions, columns):
    with pytest.raises(OutputError, match="make no sheet"):
        contact_sheet([Video(frames=moving_disk(1), fps=16)] * videos, ["a"] * captions, columns=columns)


def test_media_needs_no_torch():
    done = run_python("import sys, frameloom.pipeline.media; print('torch' in sys.modules)")
    assert done.stdout == "False\n"
