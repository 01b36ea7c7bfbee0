"""A preview while denoising: the estimated video in one PNG file, drawn anew now and then.

A .png is a contact sheet, which gets a row with every drawing. An .apng moves: the latest estimate, a pixel for each
latent cell.

The estimate is what the sampler believes the clean latents to be after a step; its colours are a linear map of it.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from frameloom.errors import RequestError
from frameloom.models.spec import VaeSpec
from frameloom.pipeline.keep import Keeper, Tensors
from frameloom.pipeline.latent_colours import LatentColours, colours_of
from frameloom.pipeline.media import Video, contact_sheet
from frameloom.pipeline.target import OutputTarget, check_sheet
from frameloom.sampling.flow import FlowSchedule, SamplerState
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)

Cut = Callable[[Tensor], Tensor]
"""Latents as the network has them (B, C, T, H, W) to those of the video."""
Picture = NDArray[np.uint8]
"""(H, W, 3)."""

_COST: Final = 150  # a row is drawn when so many times what the last one took have passed: under 1 % of the run
_LEAST_S: Final = 1.0
_COLUMNS: Final = 6
_MOVING: Final = ".apng"
_MOVING_FRAMES: Final = 24  # at most
_FRAME_MS: Final = 250  # four frames of a video of 16 per second, which are one of the latents
_ESTIMATE: Final = "x0_0"  # in the history of UniPC: its newest estimate


def check_preview(path: str | os.PathLike[str], vae: VaeSpec, *, target: OutputTarget) -> Path:
    """As `target.check_sheet`; and raises RequestError for a VAE whose colours are not known."""
    _colours(vae)
    return check_sheet(path, target)


class Preview:
    """Draws the first video of a batch; a drawing that fails ends the preview and not the run."""

    def __init__(self, path: Path, vae: VaeSpec) -> None:
        """Raises RequestError for a VAE whose colours are not known."""
        self._path, self._colours = path, _colours(vae)
        self._rows: list[Video] = []
        self._captions: list[str] = []
        self._is_broken = False

    def draw(self, latents_BCTHW: Tensor, caption: str) -> None:
        """Add a row of a few frames, or draw all that moves anew, and put the whole file in its place."""
        if self._is_broken:
            return
        if self._path.suffix.lower() == _MOVING:
            self._put(_pictures(latents_BCTHW[0], self._colours, _MOVING_FRAMES))
            return
        row = np.stack(_pictures(latents_BCTHW[0], self._colours, _COLUMNS))
        self._rows.append(Video(frames=row, fps=1))
        self._captions.append(caption)
        self._put([np.asarray(contact_sheet(self._rows, self._captions, frames_per_video=_COLUMNS))])

    def _put(self, pictures: Sequence[Picture]) -> None:
        first, *others = map(Image.fromarray, pictures)
        moves = {"save_all": True, "append_images": others, "duration": _FRAME_MS, "loop": 0} if others else {}
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        try:
            first.save(partial, format="PNG", compress_level=1, **moves)
            os.replace(partial, self._path)
        except OSError as error:
            self._is_broken = True
            log.warning("the preview %s cannot be written (%s); the run goes on without", self._path, error.strerror)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def beside(self, keeper: Keeper, schedule: FlowSchedule, cut: Cut) -> Keeper:
        """A keeper that does what `keeper` does and draws; `cut`: what is shown of the latents of a step."""
        return _Drawing(self, keeper, schedule, cut)


class _Drawing:
    """Passes all on, and draws a step so seldom that it does not count. The last one is always drawn."""

    def __init__(self, preview: Preview, keeper: Keeper, schedule: FlowSchedule, cut: Cut) -> None:
        self._preview, self._keeper, self._schedule, self._cut = preview, keeper, schedule, cut
        self._before: tuple[int, Tensor] | None = None
        self._last_s, self._cost_s = time.monotonic(), 0.0

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        return self._keeper.once(name, make)

    def choice(self, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        return self._keeper.choice(name, make)

    def walked(self) -> tuple[Tensor, SamplerState] | None:
        return self._keeper.walked()

    def walk(self, latents_BCTHW: Tensor, state: SamplerState) -> None:
        self._keeper.walk(latents_BCTHW, state)
        begun, total = time.monotonic(), self._schedule.num_steps
        if state.step == total or begun - self._last_s >= max(_LEAST_S, _COST * self._cost_s):
            self._preview.draw(self._cut(self._estimate(latents_BCTHW, state)), f"step {state.step} of {total}")
            self._last_s = time.monotonic()
            self._cost_s = self._last_s - begun
        self._before = state.step, latents_BCTHW

    def _estimate(self, latents_BCTHW: Tensor, state: SamplerState) -> Tensor:
        """The clean latents as the sampler has them, or as the last two latents lie on a straight line to them."""
        if state.step == self._schedule.num_steps:
            return latents_BCTHW
        if _ESTIMATE in state.history:
            return state.history[_ESTIMATE]
        if self._before is None or self._before[0] + 1 != state.step:
            return latents_BCTHW
        then, now = (float(self._schedule.sigmas[step]) for step in (state.step - 1, state.step))
        return latents_BCTHW - now / (now - then) * (latents_BCTHW - self._before[1])


def _pictures(z_CTHW: Tensor, colours: LatentColours, most: int) -> list[Picture]:
    """A few frames, evenly spaced. The first one is one picture to the VAE and of other colours; it is left out."""
    count = z_CTHW.shape[1]
    picks = np.unique(np.linspace(min(1, count - 1), count - 1, most).round().astype(int))
    return list(colours.frames(z_CTHW[:, picks.tolist()]).numpy())


def _colours(vae: VaeSpec) -> LatentColours:
    found = colours_of(vae)
    if found is None:
        raise RequestError(f"what the {vae.z_dim} channels of this VAE look like is not known; leave the preview out")
    return found
