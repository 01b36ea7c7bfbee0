"""How long jobs take, learned from those that were made: seconds per pixel, frame and step."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

import msgspec

from frameloom.serve.jobs.job import Job
from frameloom.types import PICTURES
from frameloom.wire import Card

_KEPT: Final = 15
_STRENGTH: Final = 0.8  # of a request that starts from a video and names none
_SIZES: Final = ("width", "height", "num_frames", "steps", "fps")
_OWN: Final = ("prompt", "negative_prompt", "seed")  # of each video, however many are made together
_ALONE: Final = (*PICTURES, "references", "extends", "windows", "window_frames", "window_overlap")
_STAGES: Final = {"text": (0, 2), "image": (2, 4), "denoise": (4, 88), "decode": (88, 99), "encode": (88, 99)}


class Speed:
    """What was learned of the last jobs of a model, as a text that can be kept; other text is passed over."""

    def __init__(self, kept: str | None = None) -> None:
        self._rates: deque[float] = deque(maxlen=_KEPT)
        try:
            self._rates.extend(msgspec.json.decode(kept, type=list[float]) if kept else ())
        except msgspec.DecodeError:
            return  # nothing is lost: the next jobs teach it again

    @property
    def text(self) -> str:
        """All that was learned."""
        return msgspec.json.encode(list(self._rates)).decode()

    def learn(self, units: float, seconds: float) -> None:
        """A job of so many units took so long."""
        if units > 0 and seconds > 0:
            self._rates.append(seconds / units)

    def seconds(self, units: float, card: Card | None, usual_seconds: float | None) -> float:
        """What so many units take: as the last jobs, else as the worker foresees of its usual request; 0 if unknown."""
        if self._rates:
            return units * median(self._rates)
        usual = units_of({}, card) if card and usual_seconds else 0.0
        return units * usual_seconds / usual if usual and usual_seconds else 0.0


def units_of(request: Mapping[str, Any], card: Card | None) -> float:
    """Pixels x frames x steps, twice with guidance; what a request leaves open is as the card says; 0 if unknown."""
    known = {**(card.defaults if card else {}), **{name: value for name, value in request.items() if value is not None}}
    try:
        size = known["width"] * known["height"] * known["num_frames"] * known["steps"]
        guided = 2 if known.get("guidance_scale", 1.0) > 1 else 1
        share = (known.get("strength") or _STRENGTH) if "video" in request else 1.0
        return float(size * guided * share)
    except (KeyError, TypeError):
        return 0.0


def alike_of(job: Job, card: Card | None) -> tuple[str, str] | None:
    """The shape of a small video in words, and all that must be equal of those that are made together.

    None of a job that is made alone: it is large, begins with pictures, goes on from a video or goes in windows, or
    nothing is known of the model.
    """
    asked = {name: value for name, value in job.ask.request.items() if value is not None}
    if card is None or not asked.keys().isdisjoint(_ALONE):
        return None
    known = {**asked, **job.ask.resolved}
    sizes = {name: known.get(name, card.defaults.get(name)) for name in _SIZES}
    width, height, frames, steps, rate = sizes.values()
    if width is None or height is None or frames is None or steps is None or rate is None:
        return None
    tokens = width // card.width_multiple * (height // card.height_multiple) * (1 + (frames - 1) // card.temporal)
    if tokens > card.small_tokens or frames > card.defaults.get("num_frames", 0):
        return None
    is_guided = known.get("guidance_scale", card.defaults.get("guidance_scale", 1.0)) > 1
    shape = f"{width}x{height}, {frames} frames, {steps} steps, {'with' if is_guided else 'without'} guidance"
    rest = {name: value for name, value in asked.items() if name not in (*_SIZES, *_OWN)}
    return shape, repr((sizes, sorted(rest.items()), job.ask.loras, job.ask.quality))


def progress_of(stage: str, step: int, total: int) -> int:
    """How far a job is, 0 to 99, when `step` of `total` steps of a stage are done."""
    low, high = _STAGES.get(stage, (0, 0))
    return low + (high - low) * min(step, total) // total if total > 0 else low
