"""How long small videos take alone and together, measured: which way is faster is not guessed."""

import logging
import math
from collections import deque
from statistics import median
from typing import Final

import msgspec

from frameloom.settings import LOGGER_NAME

_KEPT: Final = 5
_ENOUGH: Final = 3
"""Measurements of a way before it is judged."""
_SHAPES: Final = 200  # that are remembered; those that were made last
_FAILED_S: Final = 86_400.0
"""What a batch that came to nothing counts for."""
_LOG = logging.getLogger(f"{LOGGER_NAME}.serve")


class Pace:
    """Seconds for each video of a shape, by how many were made together; a text keeps it, other text is passed over.

    Until there are enough measurements both ways take turns, alone first; from then on the medians say.
    """

    def __init__(self, kept: str | None = None) -> None:
        self._seconds: dict[str, dict[int, deque[float]]] = {}
        self._told: set[tuple[str, int]] = set()
        try:
            known = msgspec.json.decode(kept, type=dict[str, dict[int, list[float]]]) if kept else {}
        except msgspec.DecodeError:
            return  # nothing is lost: the next jobs teach it again
        for shape, ways in known.items():
            self._seconds[shape] = {number: deque(seconds, maxlen=_KEPT) for number, seconds in ways.items()}

    @property
    def text(self) -> str:
        """All that was measured."""
        return msgspec.json.encode(
            {shape: {n: list(each) for n, each in ways.items()} for shape, ways in self._seconds.items()}
        ).decode()

    def learn(self, shape: str, number: int, seconds: float | None) -> None:
        """So many videos of a shape took so long, in all; None: the batch came to nothing."""
        ways = self._seconds.pop(shape, {})
        self._seconds[shape] = ways  # the last
        ways.setdefault(number, deque(maxlen=_KEPT)).append(_FAILED_S if seconds is None else seconds / number)
        while len(self._seconds) > _SHAPES:
            del self._seconds[next(iter(self._seconds))]
        for together in ways:
            self._tell(shape, together, ways)

    def number(self, shape: str, most: int) -> int:
        """How many to make together now, of as many as there are."""
        ways = self._seconds.get(shape, {})
        alone = len(ways.get(1, ()))
        batches = sum(len(seconds) for number, seconds in ways.items() if number > 1)
        if alone < _ENOUGH and alone <= batches:
            return 1
        return next((number for number in range(most, 1, -1) if not _is_slow(ways, number)), 1)

    def _tell(self, shape: str, number: int, ways: dict[int, deque[float]]) -> None:
        """In the log, once."""
        if number == 1 or not _is_slow(ways, number) or (shape, number) in self._told:
            return
        self._told.add((shape, number))
        each_s = median(ways[number])
        took = "failed" if each_s >= _FAILED_S else f"took {each_s:.2f} s each"
        _LOG.info(
            "%s: no %d are made together any more: they %s, and alone %.2f s", shape, number, took, _alone_s(ways)
        )


def _is_slow(ways: dict[int, deque[float]], number: int) -> bool:
    """Whether so many together were measured, and not faster than alone."""
    seconds = ways.get(number, ())
    return len(seconds) >= _ENOUGH and median(seconds) >= _alone_s(ways)


def _alone_s(ways: dict[int, deque[float]]) -> float:
    return median(ways[1]) if ways.get(1) else math.inf
