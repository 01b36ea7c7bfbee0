"""What an engine is asked: requests completed, latents and frames checked, all before anything is computed."""

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frameloom.errors import RequestError
from frameloom.models.defaults import Defaults
from frameloom.models.vae_state import Frames
from frameloom.pipeline.images import image_of, video_of
from frameloom.pipeline.wan import WanPipeline
from frameloom.request import check_request, resolve
from frameloom.settings import LOGGER_NAME
from frameloom.types import PICTURES, GenerateOptions, GenerateRequest, Pictures, ResolvedRequest, VideoInput

log = logging.getLogger(LOGGER_NAME)

Prompts = list[str] | tuple[str, ...]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def request_of(prompt: str | Prompts, options: Mapping[str, Any]) -> GenerateRequest:
    """A request of GenerateOptions by name. Raises RequestError."""
    unknown = [name for name in options if name not in GenerateOptions.__annotations__]
    if unknown:
        near = difflib.get_close_matches(unknown[0], GenerateOptions.__annotations__, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(GenerateOptions.__annotations__)}"
        raise RequestError(f"option '{unknown[0]}' is unknown; {hint}")
    asked = GenerateRequest(prompt=prompt, **options)
    check_request(asked)
    return asked


def complete(
    asked: GenerateRequest, pipeline: WanPipeline, *, name: str, defaults: Defaults, in_windows: bool
) -> ResolvedRequest:
    """The request with its pictures read and filled in with what this model takes for granted. Raises RequestError.

    `name`: of the model. `in_windows`: a video that is too long is denoised in windows where the request is silent.
    """
    pipeline.takes.check(asked, name)
    read = _with_pictures(asked, 1 + (asked.num_frames or defaults.num_frames))  # one more tells if there are others
    if asked.windows is None and in_windows:
        read = dataclasses.replace(read, windows=True)
    request = resolve(read, defaults, pipeline.size_rules)
    _tell_of_rest(read, request.num_frames)
    _tell_of_length(request, defaults)
    if asked.guidance_scale_2 is not None and len(pipeline.experts) == 1:
        raise RequestError(
            f"guidance scale 2 is of the second expert, and '{name}' has one; leave guidance_scale_2 out"
        )
    pipeline.check_size(request)
    pipeline.check_control(request)
    return request


def _with_pictures(request: GenerateRequest, max_frames: int) -> GenerateRequest:
    """The request, its pictures read."""
    read: dict[str, Any] = {
        name: image_of(given, name.replace("_", " "))
        for name in ("image", "last_image")
        if (given := getattr(request, name)) is not None
    }
    read |= {
        name: _video(given, name.replace("_", " "), max_frames)
        for name in ("video", "control_video", "mask")
        if (given := getattr(request, name)) is not None
    }
    if request.references is not None:
        read["references"] = [image_of(given, "reference image") for given in request.references]
    return dataclasses.replace(request, **read)


def _video(source: VideoInput, what: str, num_frames: int) -> Pictures:
    pictures = video_of(source, num_frames)
    return dataclasses.replace(pictures, name=f"the {what}") if isinstance(source, np.ndarray) else pictures


def _tell_of_rest(read: GenerateRequest, num_frames: int) -> None:
    """Of videos that are longer than what is made of them."""
    for video in (read.video, read.control_video):
        if isinstance(video, Pictures) and len(video.frames) > num_frames:
            log.info("%s: only its first %d frames are used", video.name, num_frames)


def _tell_of_length(request: ResolvedRequest, defaults: Defaults) -> None:
    """Of videos that the denoiser sees whole though it was trained on shorter ones."""
    if request.window_frames is None and request.num_frames > defaults.num_frames:
        log.warning(
            "%d frames are more than the %d that this model was trained on; --windows denoises them in windows",
            request.num_frames, defaults.num_frames,
        )  # fmt: skip


def told_of(request: ResolvedRequest, index: int) -> dict[str, Any]:
    """What is said of a request beside its video, the one of this index."""
    named = {name: getattr(request, name) for name in PICTURES}
    told: dict[str, Any] = {
        "prompt": request.prompts[index],
        "negative_prompt": request.negative_prompts[index],
        "width": request.width,
        "height": request.height,
        "num_frames": request.num_frames,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "guidance_scale_2": request.guidance_scale_2,
        "seed": request.seed_of(index),
        "fps": request.fps,
        **{name: pictures.name for name, pictures in named.items() if pictures is not None},
    }
    if request.references:
        told["references"] = [picture.name for picture in request.references]
    if request.strength is not None:
        told["strength"] = request.strength
    if request.control_strength != 1:
        told["control_strength"] = request.control_strength
    if request.window_frames is not None:
        told |= {"window_frames": request.window_frames, "window_overlap": request.window_overlap}
    return told


def check_latents(latents: Tensor, channels: int) -> None:
    """Raise RequestError unless these are latents (B, `channels`, T', H', W') that can be decoded."""
    if not isinstance(latents, Tensor) or latents.dtype not in _FLOATS:
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise RequestError(f"latents of type {kind} cannot be decoded; give (1, {channels}, T, H, W) of floats")
    if latents.is_meta or latents.layout is not torch.strided:
        what = "no memory" if latents.is_meta else f"layout {latents.layout}"
        raise RequestError(f"latents of {what} cannot be decoded; give an ordinary tensor")
    if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
        shape = tuple(latents.shape)
        raise RequestError(f"latents of shape {shape} cannot be decoded; give (1, {channels}, T, H, W)")
    if not torch.isfinite(latents[:, :, 0]).all():
        raise RequestError(
            "the latents of the first frame hold values that are no finite numbers, and every frame depends on "
            "them; check where they come from"
        )


def frames_of(given: Frames) -> Frames:
    """Frames as an array uint8 (T, H, W, 3). Raises RequestError for what is none."""
    try:
        array = np.asarray(given)
    except ValueError:  # lists of unequal lengths
        raise RequestError("these frames are no array; give numpy uint8 (T, H, W, 3)") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise RequestError(f"frames {array.dtype} of shape {array.shape} cannot be encoded; give uint8 (T, H, W, 3)")
    return array
