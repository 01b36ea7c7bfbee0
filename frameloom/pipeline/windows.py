"""Denoises a video that is longer than the network was trained on: window by window in every step, and blended.

Shapes: B samples, C channels, T latent frames, H height, W width, L tokens. Like denoising several views of one
picture at once (MultiDiffusion, arXiv:2302.08113), along time: each window has positions of its own, from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from frameloom.models.dit_fast import LoopChoices
from frameloom.models.dit_rewrites import plainly, small_network
from frameloom.models.wan_dit import FrameTimes, Prompt, WanDiT
from frameloom.ops.registry import Rewrite
from frameloom.pipeline.stages import MakePredictor, Predict
from frameloom.sampling.windows import Window, windows_over


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Windows over all latent frames but the first `always`, which every window sees before its own.

    Those are reference images, and the first frame of the video: to the network a video begins with a latent frame that
    is one picture, where all others are several. What becomes of them the first window says.
    """

    each: tuple[Window, ...]
    always: int = 1

    @property
    def longest(self) -> int:
        """Latent frames that the network sees at a time."""
        return self.always + max(window.stop - window.start for window in self.each)

    def predictor(self, make: MakePredictor) -> MakePredictor:
        """Who predicts as those that `make` makes, but window by window; `make` itself where there is one window."""
        if len(self.each) == 1:
            return make

        def made(texts: Sequence[Tensor], choices: LoopChoices, image_BNE: Tensor | None = None, /) -> Predict:
            predict = make(texts, choices, image_BNE)
            views: dict[WanDiT, _Windowed] = {}

            def in_windows(expert: WanDiT, x_BCTHW: Tensor, timestep: Tensor | FrameTimes, /) -> list[Tensor]:
                view = views.setdefault(expert, _Windowed(expert, self))
                return predict(cast(WanDiT, view), x_BCTHW, timestep)

            return in_windows

        return made

    def cut(self, x: Tensor, window: Window, *, dim: int) -> Tensor:
        """What a window sees of something that has its frames along `dim`."""
        seen = x.narrow(dim, self.always + window.start, window.stop - window.start)
        return torch.cat((x.narrow(dim, 0, self.always), seen), dim)

    def add(self, whole_BCTHW: Tensor, seen_BCTHW: Tensor, window: Window) -> None:
        """Add what was found in a window to the blend of all of them, in place."""
        if window is self.each[0]:
            whole_BCTHW[:, :, : self.always] = seen_BCTHW[:, :, : self.always]
        shares_T11 = whole_BCTHW.new_tensor(window.shares)[:, None, None]
        own_BCTHW = seen_BCTHW[:, :, self.always :].to(whole_BCTHW.dtype)
        whole_BCTHW[:, :, self.always + window.start : self.always + window.stop] += own_BCTHW * shares_T11


class _Windowed:
    """A network that sees its latents by windows: what a predictor asks of a WanDiT, and no more."""

    def __init__(self, dit: WanDiT, windows: Windows) -> None:
        self._dit, self._windows = dit, windows

    def __call__(
        self, x_BCTHW: Tensor, timestep: Tensor | FrameTimes, text_BSE: Tensor, image_BNE: Tensor | None = None
    ) -> Tensor:
        (velocity_BCTHW,) = self.velocities(x_BCTHW, timestep, [self.read_prompt(text_BSE, image_BNE)])
        return velocity_BCTHW

    def read_prompt(self, text_BSE: Tensor, image_BNE: Tensor | None = None) -> Prompt:
        return self._dit.read_prompt(text_BSE, image_BNE)

    def velocities(self, x_BCTHW: Tensor, timestep: Tensor | FrameTimes, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Blended in float32; in memory lie the blends and the velocities of one window."""
        blends: list[Tensor] = []
        for window in self._windows.each:
            found = self._dit.velocities(
                self._windows.cut(x_BCTHW, window, dim=2),
                self._times(timestep, window, x_BCTHW.shape[2]),
                self._prompts(prompts, window),
            )
            if not blends:
                dtype = found[0].dtype
                blends = [v.new_zeros(*v.shape[:2], *x_BCTHW.shape[2:], dtype=torch.float32) for v in found]
            for blend_BCTHW, velocity_BCTHW in zip(blends, found, strict=True):
                self._windows.add(blend_BCTHW, velocity_BCTHW, window)
        return [blend_BCTHW.to(dtype) for blend_BCTHW in blends]

    def _times(self, timestep: Tensor | FrameTimes, window: Window, num_frames: int) -> Tensor | FrameTimes:
        if isinstance(timestep, FrameTimes):
            return timestep._replace(index_F=self._windows.cut(timestep.index_F, window, dim=0))
        if timestep.ndim == 1:
            return timestep
        by_frame_BFP = timestep.reshape(timestep.shape[0], num_frames, -1)  # one number per token of each frame
        return self._windows.cut(by_frame_BFP, window, dim=1).flatten(1)

    def _prompts(self, prompts: Sequence[Prompt], window: Window) -> list[Prompt]:
        """The prompts, with what blocks beside are shown of this window."""
        if (control := prompts[0].control) is None:
            return list(prompts)
        cut = control._replace(x_BCTHW=self._windows.cut(control.x_BCTHW, window, dim=2))
        return [prompt._replace(control=cut) for prompt in prompts]


@torch.inference_mode()
def _in_windows(dit: WanDiT, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
    """As `plainly`, in windows of two latent frames that share one, beside the first."""
    view = _Windowed(dit, Windows(each=windows_over(x.shape[2] - 1, 2, 1)))
    return torch.stack([view(x, t.expand(x.shape[0]), prompt) for t in times for prompt in prompts])


def _never(*_: object) -> None:
    """Applies to every network."""


WINDOWS = Rewrite(
    name="dit.windows",
    exactness="lossy",
    replaces="attention over all frames of a video longer than the model was trained on, by windows that overlap",
    reference=torch.inference_mode()(plainly),
    fast=_in_windows,
    refuses=_never,
    example=small_network,
    tolerance=0.5,
    because="frames of different windows do not see each other, and positions begin anew in each",
)
