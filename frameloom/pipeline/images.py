"""Pictures that a request brings: read without trust, turned upright, made RGB, and fitted to the size of the video."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from frameloom.errors import InputError, RequestError
from frameloom.pipeline.reader import MAX_PIXELS, read_frames, too_large
from frameloom.pipeline.sinks import Frames
from frameloom.settings import LOGGER_NAME
from frameloom.types import ImageInput, Pictures, VideoInput

log = logging.getLogger(LOGGER_NAME)

MAX_ASPECT: Final = 16  # longer ones would be resized to strips without sense, or without end
# No others are opened: some of Pillow's readers start programs (EPS), and few are as well tested as these.
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def image_of(source: ImageInput, what: str = "image") -> Pictures:
    """An image as one frame: from a path, a Pillow image, or uint8 RGB (H, W, 3). `what`: its name in errors.

    Of an animation the first frame is taken, and transparency is dropped as the reference does; the log says so.
    16 bits of grey become 8. Raises InputError for a file that cannot be read, RequestError for what is no picture.
    """
    if isinstance(source, Pictures):
        return _one(source, what)
    if isinstance(source, np.ndarray):
        _check_array(source, what, shape="(H, W, 3)", ndim=3)
        return _one(Pictures(name=f"the {what}", frames=source[None]), what)
    if isinstance(source, Image.Image):
        name = f"the {what}"
        with _one_sentence(name):
            return Pictures(name=name, frames=_pixels(source, name)[None])
    if not isinstance(source, str | os.PathLike):
        raise RequestError(f"the {what} is {type(source).__name__}; give a path, a Pillow image or uint8 (H, W, 3)")
    name = os.path.expanduser(os.fspath(source))
    if os.path.exists(name) and not os.path.isfile(name):  # a pipe could be waited for without end
        raise InputError(f"{name} is no file; give a {', '.join(_FORMATS)} file")
    with _one_sentence(name), Image.open(name, formats=_FORMATS) as image:
        return Pictures(name=name, frames=_pixels(image, name)[None])


def video_of(source: VideoInput, num_frames: int) -> Pictures:
    """The first `num_frames` frames of a video, fewer where it has fewer: from a path or uint8 RGB (T, H, W, 3).

    Raises InputError for a file that cannot be read, RequestError for what is no video.
    """
    if isinstance(source, str | os.PathLike):
        frames, fps = read_frames(source, num_frames)
        source = Pictures(name=os.fspath(source), frames=frames, fps=fps)
    elif not isinstance(source, Pictures):
        _check_array(source, "video", shape="(T, H, W, 3)", ndim=4)
        source = Pictures(name="the video", frames=source)
    _check_size(source.width, source.height, source.name)
    return Pictures(name=source.name, frames=source.frames[:num_frames], fps=source.fps)


def fitted(pictures: Pictures, *, width: int, height: int, keeps_aspect: bool) -> Frames:
    """uint8 (T, height, width, 3): resized by Lanczos, as the reference does.

    `keeps_aspect`: only the middle that has the shape of the result, as the original code of Wan 2.2 cuts it.
    """
    frames = (Image.fromarray(frame) for frame in pictures.frames)
    return np.stack([np.asarray(_fit(frame, width, height, keeps_aspect=keeps_aspect)) for frame in frames])


def _fit(image: Image.Image, width: int, height: int, *, keeps_aspect: bool) -> Image.Image:
    if not keeps_aspect:
        return image.resize((width, height), Image.Resampling.LANCZOS)
    scale = max(width / image.width, height / image.height)
    wide, high = min(image.width, width / scale), min(image.height, height / scale)
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    return image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + wide, top + high))


def _pixels(image: Image.Image, name: str) -> Frames:
    """Upright RGB of the first frame. The size is judged before anything is decoded."""
    _check_size(*image.size, name)
    if (count := getattr(image, "n_frames", 1)) > 1:
        log.info("%s: the first of %d frames is used", name, count)
        image.seek(0)
    if image.has_transparency_data:
        log.info("%s: its transparency is dropped", name)
    image = _rgb(ImageOps.exif_transpose(image), name)
    return np.array(image)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise InputError(f"{name} has 32 bits per channel, whose range nobody knows; convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("P", "RGBa"):  # Pillow goes no other way from these
        image = image.convert("RGBA")
    return image.convert("RGB")


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Whatever goes wrong while a picture is decoded, told in one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in files; those that matter are errors
            yield
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise too_large(name) from None
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; give an image") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is no image of a known kind; give a {', '.join(_FORMATS)} file") from None
    except Exception as error:  # a decoder of foreign bytes may fail in any way
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} cannot be read as an image ({reason}); give another file") from error


def _one(pictures: Pictures, what: str) -> Pictures:
    if len(pictures.frames) != 1:
        raise RequestError(f"the {what} has {len(pictures.frames)} frames; give one picture")
    _check_size(pictures.width, pictures.height, pictures.name)
    return pictures


def _check_array(source: Any, what: str, *, shape: str, ndim: int) -> None:
    if not isinstance(source, np.ndarray):
        raise RequestError(f"the {what} is {type(source).__name__}; give a path or uint8 {shape}")
    if source.dtype != np.uint8 or source.ndim != ndim or source.shape[-1] != 3 or 0 in source.shape:
        raise RequestError(f"the {what} is {source.dtype} of shape {source.shape}; give uint8 {shape}")


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise too_large(name)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{name} is {width}x{height}, longer than {MAX_ASPECT} times its width; cut it to a picture")
