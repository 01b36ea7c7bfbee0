"""Windows over the frames of a long video: where each lies, and how much it counts for each of its frames."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Frames `start` to `stop` of the latents, and the share of each in the blend; the shares of a frame sum to 1."""

    start: int
    stop: int
    shares: tuple[float, ...]


def windows_over(num_frames: int, length: int, overlap: int) -> tuple[Window, ...]:
    """Windows of `length` latent frames over all of them, evenly spread: neighbours share `overlap` frames or more.

    Over the frames that two share, the earlier one goes out by a ramp and the later one comes in. One window where the
    frames are not more than its length. `overlap`: from 0 on, less than `length`.
    """
    if num_frames <= length:
        return (Window(start=0, stop=num_frames, shares=(1.0,) * num_frames),)
    gaps = -(-(num_frames - length) // (length - overlap))
    starts = [round(index * (num_frames - length) / gaps) for index in range(gaps + 1)]
    weights = [_ramps(starts, index, length) for index in range(len(starts))]
    totals = [0.0] * num_frames
    for start, row in zip(starts, weights, strict=True):
        for frame, weight in enumerate(row, start):
            totals[frame] += weight
    return tuple(
        Window(start=start, stop=start + length, shares=tuple(w / totals[f] for f, w in enumerate(row, start)))
        for start, row in zip(starts, weights, strict=True)
    )


def _ramps(starts: Sequence[int], index: int, length: int) -> list[float]:
    """Up over the frames shared with the window before, down over those shared with the next."""
    weights = [1.0] * length
    if index > 0:
        shared = starts[index - 1] + length - starts[index]
        for frame in range(shared):
            weights[frame] = (frame + 1) / (shared + 1)
    if index + 1 < len(starts):
        shared = starts[index] + length - starts[index + 1]
        for frame in range(shared):
            weights[length - shared + frame] *= 1 - (frame + 1) / (shared + 1)
    return weights
