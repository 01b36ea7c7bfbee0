"""The plan of a request before it runs: what lies where, what each stage takes, and what would take less.

Pure arithmetic on numbers that others count: `StepPlanner` and `VaePlanner` on the meta device, memory/layout.py.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from frameloom.memory.layout import Layout
from frameloom.memory.meter import amount
from frameloom.types import SizeRules, Stage

_WORTH = 0.95  # of the peak: what takes hardly less is not told


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One decision: what was chosen and why."""

    what: str
    chosen: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage: the peak of the device, what the host takes for it (0 where the host is the device), and seconds."""

    stage: Stage
    device_bytes: int
    host_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Arranged:
    """A way to compute the whole request."""

    layout: Layout
    batched: bool
    passage: str
    stages: tuple[StagePlan, ...]

    @property
    def peak(self) -> StagePlan:
        """The stage that takes the most of the device."""
        return max(self.stages, key=lambda stage: stage.device_bytes)

    @property
    def device_bytes(self) -> int:
        """The peak of the device."""
        return self.peak.device_bytes

    @property
    def host_bytes(self) -> int:
        """The peak of the host."""
        return max(stage.host_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def __str__(self) -> str:
        way = "both branches in one batch" if self.batched else "one branch at a time"
        return f"{self.layout}; {way}; VAE: {self.passage}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a request will take. `cheaper`: the next arrangement that takes less.

    `fits`: in both memories. `remedy`: what to do where it does not, and the nearest request that fits. `rates`: where
    the seconds are from. `lessons`: of each stage the key and the rate that a run of it corrects.
    `here`: the device as torch calls it, if it is on this machine.
    """

    model: str
    request: str
    device: str
    memory_bytes: int
    host_memory_bytes: int
    arranged: Arranged
    choices: tuple[Choice, ...]
    cheaper: Arranged | None
    fits: bool
    remedy: str = ""
    rates: str = ""
    here: str = ""
    lessons: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """Of the arrangement that was chosen."""
        return self.arranged.stages

    @property
    def refusal(self) -> str | None:
        """The sentence that refuses what cannot run: what it needs, what there is, what to do; None where it can."""
        if self.fits:
            return None
        needs, there = amount(self.arranged.device_bytes), amount(self.memory_bytes)
        if self.arranged.device_bytes <= self.memory_bytes:
            needs, there = f"{amount(self.arranged.host_bytes)} beside it", amount(self.host_memory_bytes)
        return f"{self.request} with '{self.model}' need about {needs} of memory, and there are {there}; {self.remedy}"

    def record(self) -> dict[str, Any]:
        """As plain data."""
        found = {**asdict(self), "refusal": self.refusal}
        del found["lessons"], found["here"]
        for name, arranged in (("arranged", self.arranged), ("cheaper", self.cheaper)):
            if arranged is not None:
                told = {"device_bytes": arranged.device_bytes, "host_bytes": arranged.host_bytes}
                found[name] = {"what": str(arranged), **told, "seconds": arranged.seconds, **found[name]}
        return found


def first_that_fits(candidates: Iterable[Arranged], memory_bytes: int, host_memory_bytes: int) -> tuple[Arranged, bool]:
    """The first within both memories and True; of none, the one that takes the least, and False.

    Candidates are made as they are asked for, as counting them takes a while: an iterator goes on behind the first.
    """
    seen: list[Arranged] = []
    for candidate in candidates:
        seen.append(candidate)
        if candidate.device_bytes <= memory_bytes and candidate.host_bytes <= host_memory_bytes:
            return candidate, True
    return min(seen, key=lambda one: one.device_bytes), False


def next_cheaper(candidates: Iterable[Arranged], arranged: Arranged) -> Arranged | None:
    """The first that takes noticeably less of the device."""
    return next((one for one in candidates if one.device_bytes < _WORTH * arranged.device_bytes), None)


def smaller_sizes(size: tuple[int, int, int], rules: SizeRules) -> Iterator[tuple[int, int, int]]:
    """Widths, heights and frames that take less, the nearest first: fewer frames, then smaller pictures."""
    width, height, num_frames = size
    for scale, share in itertools.product((1.0, 0.75, 0.5, 0.25), (1.0, 0.75, 0.5, 0.25)):
        smaller = (
            _multiple(width * scale, rules.width_multiple),
            _multiple(height * scale, rules.height_multiple),
            1 + int((num_frames - 1) * share) // rules.temporal * rules.temporal,
        )
        if smaller != size:
            yield smaller


def _multiple(side: float, step: int) -> int:
    return max(step, int(side) // step * step)
