"""Reads a clip of the shapes world by rule: which colour, which shape, which motion. It knows nothing of any model.

The rules look at frames alone: the background is what the left and right borders show, the shape is what differs from
it, the motion is what happens to its centre, its area and its outline.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from frameloom.shapes.world import COLOURS, Frames

Mask = npt.NDArray[np.bool_]  # (T, H, W)
Numbers = npt.NDArray[np.float64]

_CONTRAST = 48  # RGB distance at which a pixel no longer belongs to the background
_FEWEST_PIXELS = 12  # a smaller blob is noise
_COLOUR_TOLERANCE = 80  # RGB distance past which a colour has no name here


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a clip shows; None where the rules cannot tell."""

    colour: str | None
    shape: str | None
    motion: str | None


def read_clip(frames: Frames) -> Reading:
    """Read uint8 frames (T, H, W, 3)."""
    difference = _difference_from_background(frames.astype(np.float64))
    masks = np.stack([_largest_blob(frame > _CONTRAST) for frame in difference])
    if masks.sum(axis=(1, 2)).min() < _FEWEST_PIXELS:
        return Reading(colour=None, shape=None, motion=None)
    outlines = np.stack([_outline(mask) for mask in masks])
    return Reading(
        colour=_colour(frames, masks, difference),
        shape=_shape(masks, outlines),
        motion=_motion(masks, outlines),
    )


def _difference_from_background(frames: Numbers) -> Numbers:
    """Distance (T, H, W) of each pixel to its row's background colour, read at the left and right borders."""
    borders = np.concatenate([frames[:, :, :2], frames[:, :, -2:]], axis=2)  # (T, H, 4, 3)
    background = np.median(borders, axis=(0, 2))
    distance: Numbers = np.linalg.norm(frames - background[None, :, None, :], axis=-1)
    return distance


def _largest_blob(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest 4-connected set of true pixels."""
    best = np.zeros_like(mask)
    rest = mask.copy()
    while rest.sum() > best.sum():
        blob = np.zeros_like(mask)
        blob[tuple(np.argwhere(rest)[0])] = True
        while True:
            grown = blob.copy()
            grown[1:] |= blob[:-1]
            grown[:-1] |= blob[1:]
            grown[:, 1:] |= blob[:, :-1]
            grown[:, :-1] |= blob[:, 1:]
            grown &= rest
            if (grown == blob).all():
                break
            blob = grown
        rest &= ~blob
        if blob.sum() > best.sum():
            best = blob
    return best


def _colour(frames: Frames, masks: Mask, difference: Numbers) -> str | None:
    """The name whose colour is nearest to the median of the shape's clearest pixels."""
    clear = masks & (difference >= np.median(difference[masks]))  # edges mix with the background
    median = np.median(frames[clear].astype(np.float64), axis=0)
    distances = {name: float(np.linalg.norm(median - np.array(rgb))) for name, rgb in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    if distances[name] > _COLOUR_TOLERANCE or _hue_gap(median, COLOURS[name]) > 0.06:
        return None
    return name


def _hue_gap(a: Numbers, b: tuple[int, int, int]) -> float:
    """Distance on the colour wheel, 0..0.5."""
    gap = abs(colorsys.rgb_to_hsv(*(a / 255))[0] - colorsys.rgb_to_hsv(*(v / 255 for v in b))[0])
    return min(gap, 1 - gap)


_ANGLES = np.linspace(0, 2 * np.pi, 72, endpoint=False)


def _outline(mask: npt.NDArray[np.bool_]) -> Numbers:
    """Distance from the centre of the blob to its edge in 72 directions, in pixels."""
    cy, cx = _centre(mask)
    steps = np.arange(0, max(mask.shape), 0.25)
    rows = np.rint(cy + steps[None] * np.sin(_ANGLES)[:, None]).astype(int)
    columns = np.rint(cx + steps[None] * np.cos(_ANGLES)[:, None]).astype(int)
    inside = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
    hit = inside & mask[np.clip(rows, 0, mask.shape[0] - 1), np.clip(columns, 0, mask.shape[1] - 1)]
    lengths: Numbers = np.where(hit, steps[None], 0).max(axis=1)
    return lengths


def _centre(mask: npt.NDArray[np.bool_]) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


def _harmonic(outline: Numbers, order: int) -> complex:
    """The part of an outline that repeats `order` times around, relative to its mean radius."""
    return complex((outline * np.exp(1j * order * _ANGLES)).mean() * 2 / outline.mean())


def _shape(masks: Mask, outlines: Numbers) -> str:
    """By how often the outline repeats around, and how deep its notches are; the larger half of the frames votes."""
    areas = masks.sum(axis=(1, 2))
    clear = outlines[areas >= np.median(areas)]
    strength = {n: float(np.mean([abs(_harmonic(o, n)) for o in clear])) for n in (3, 4, 5)}
    if max(strength.values()) < 0.06:
        return "circle"
    order = max(strength, key=strength.__getitem__)
    if order == 4:
        return "cross" if strength[4] > 0.19 else "square"
    return "triangle" if order == 3 else "star"


def _motion(masks: Mask, outlines: Numbers) -> str | None:
    """By what changes most: the area, the centre, or the angle of the outline."""
    areas = masks.sum(axis=(1, 2)).astype(np.float64)
    centres = np.array([_centre(mask) for mask in masks])
    change = areas[-3:].mean() / areas[:3].mean()
    if change > 1.8:
        return "growing"
    if change < 1 / 1.8:
        return "shrinking"
    height, width = masks.shape[1:]
    dy, dx = (centres[-2:].mean(axis=0) - centres[:2].mean(axis=0)) / (height, width)
    swing = np.ptp(centres[:, 0]) / height
    if swing > 0.18 and abs(dy) < 0.5 * swing and _turns(centres[:, 0]) >= 2:
        return "bouncing"
    if max(abs(dx), abs(dy)) > 0.18:
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    return "spinning" if _turned(outlines) > np.pi / 3 else None


def _turns(height: Numbers) -> int:
    """How often a path changes direction by more than a quarter of its swing."""
    threshold = np.ptp(height) / 4
    turns, direction, extreme = 0, 0, height[0]
    for value in height[1:]:
        if direction >= 0 and value < extreme - threshold:
            turns, direction, extreme = turns + (direction != 0), -1, value
        elif direction <= 0 and value > extreme + threshold:
            turns, direction, extreme = turns + (direction != 0), 1, value
        elif direction != 0:
            extreme = max(extreme, value) if direction > 0 else min(extreme, value)
    return turns


def _turned(outlines: Numbers) -> float:
    """Radians by which the outline turned over the clip, whichever way."""
    order = max((3, 4, 5), key=lambda n: float(np.mean([abs(_harmonic(o, n)) for o in outlines])))
    phases = np.unwrap(np.angle([_harmonic(o, order) for o in outlines]))
    return float(abs(phases[-1] - phases[0]) / order)
