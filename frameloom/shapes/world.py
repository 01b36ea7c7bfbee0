"""The world of the built-in model: one coloured shape that moves on a plain or graded background, and its captions.

A Scene is data; `render` draws it, `describe` words it. Every random choice comes from the generator handed in.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]  # (T, H, W, 3)
Field = npt.NDArray[np.float32]  # one number per pixel

SIZE = 64  # pixels, height and width
NUM_FRAMES = 17
FPS = 8

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 40),
    "green": (40, 180, 70),
    "cyan": (30, 200, 215),
    "blue": (40, 80, 230),
    "purple": (150, 60, 210),
    "pink": (250, 120, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 18),
    "grey": (128, 128, 132),
    "white": (242, 242, 240),
    "navy": (22, 28, 66),
    "cream": (246, 236, 208),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
# What a motion is called: while it happens ("a circle moving left") and as a sentence ("a circle moves left").
MOTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "left": (
        ("moving left", "sliding left", "drifting to the left", "going left"),
        ("moves left", "slides to the left", "goes left"),
    ),
    "right": (
        ("moving right", "sliding right", "drifting to the right", "going right"),
        ("moves right", "slides to the right", "goes right"),
    ),
    "up": (("moving up", "rising", "floating upwards", "going up"), ("moves up", "rises", "goes upwards")),
    "down": (
        ("moving down", "falling", "sinking downwards", "going down"),
        ("moves down", "falls", "goes downwards"),
    ),
    "growing": (("growing", "getting bigger", "becoming larger"), ("grows", "gets bigger", "becomes larger")),
    "shrinking": (
        ("shrinking", "getting smaller", "becoming smaller"),
        ("shrinks", "gets smaller", "becomes smaller"),
    ),
    "spinning": (("spinning", "rotating", "turning around"), ("spins", "rotates", "turns around")),
    "bouncing": (("bouncing", "jumping", "hopping up and down"), ("bounces", "jumps", "hops up and down")),
}
TRAINING_WORDINGS = (
    "{a} {colour} {shape} {doing} on {background}",
    "{a} {colour} {shape} {does} on {background}",
    "{colour} {shape} {doing}, {background}",
    "{a} {colour} {shape} {doing}",
    "{a} {colour} {shape} {does}",
    "the {colour} {shape} is {doing} on {background}",
    "a video of {a} {colour} {shape} {doing} on {background}",
    "{background}, {a} {colour} {shape} {doing}",
    "one {colour} {shape}, {doing}, on {background}",
    "a {shape} that is {colour} {does} on {background}",
    "{a} {colour} {shape}. it is {doing}. {background}.",
    "{doing}: {a} {colour} {shape} on {background}",
)
HELD_OUT_WORDINGS = (
    "on {background} {a} {colour} {shape} {does}",
    "a {shape}, {colour}, {doing}",
    "a video of one {colour} {shape}. the {shape} {does}.",
    "{doing}, {colour} {shape}",
    "on {background}, the {shape} that is {doing} is {colour}",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One clip as data. `background` has one name (plain) or two (graded from the top one to the bottom one)."""

    colour: str
    shape: str
    motion: str
    background: tuple[str, ...]

    @property
    def combination(self) -> tuple[str, str, str]:
        """What may be held out of training."""
        return self.colour, self.shape, self.motion


def is_visible(shape: str, motion: str) -> bool:
    """A spinning circle looks like a resting one: the world leaves it out."""
    return (shape, motion) != ("circle", "spinning")


def combinations() -> list[tuple[str, str, str]]:
    """Every colour, shape and motion that can be seen (312)."""
    return [(c, s, m) for c, s, m in product(COLOURS, SHAPES, MOTIONS) if is_visible(s, m)]


def is_held_out(combination: tuple[str, str, str]) -> bool:
    """About one combination in six is never trained on; the choice depends on its words alone."""
    return zlib.crc32(" ".join(combination).encode()) % 6 == 0


def random_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """A scene from the training combinations, or from those never trained on."""
    pool = [c for c in combinations() if is_held_out(c) == held_out]
    colour, shape, motion = pool[rng.integers(len(pool))]
    names = list(BACKGROUNDS)
    count = 1 if rng.random() < 0.5 else 2
    background = tuple(names[i] for i in rng.permutation(len(names))[:count])
    return Scene(colour=colour, shape=shape, motion=motion, background=background)


def describe_background(background: tuple[str, ...]) -> str:
    """'a navy background', or 'a black to white gradient'."""
    if len(background) == 1:
        return f"a {background[0]} background"
    return f"a {background[0]} to {background[1]} gradient"


def describe(scene: Scene, rng: np.random.Generator, *, wordings: tuple[str, ...] = TRAINING_WORDINGS) -> str:
    """One caption of the scene."""
    doing, does = MOTIONS[scene.motion]
    return wordings[rng.integers(len(wordings))].format(
        a="an" if scene.colour[0] in "aeiou" else "a",
        colour=scene.colour,
        shape=scene.shape,
        doing=doing[rng.integers(len(doing))],
        does=does[rng.integers(len(does))],
        background=describe_background(scene.background),
    )


def vocabulary() -> list[str]:
    """Every word the captions can hold, sorted."""
    phrases = (phrase for doing, does in MOTIONS.values() for phrase in (*doing, *does))
    text = " ".join((*TRAINING_WORDINGS, *HELD_OUT_WORDINGS, *phrases))
    names = (*COLOURS, *BACKGROUNDS, *SHAPES, "background", "gradient", "to", "a", "an")
    words = {word.strip(",.:") for word in text.split() if "{" not in word}
    return sorted(words.union(names) - {""})


# --- drawing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Where the shape is in one frame: centre and size in pixels, angle in radians (clockwise on screen)."""

    x: float
    y: float
    size: float
    angle: float = 0.0


def render(scene: Scene, rng: np.random.Generator) -> Frames:
    """Draw the clip: uint8 (NUM_FRAMES, SIZE, SIZE, 3), edges smoothed over one pixel."""
    poses = _trajectory(scene.motion, rng)
    background = _draw_background(scene.background)
    colour = np.array(COLOURS[scene.colour], np.float32)
    coverage = np.stack([_coverage(scene.shape, pose) for pose in poses])[..., None]
    frames = background * (1 - coverage) + colour * coverage
    return np.round(frames).astype(np.uint8)


def _draw_background(names: tuple[str, ...]) -> Field:
    top, bottom = (np.array(BACKGROUNDS[name], np.float32) for name in (names[0], names[-1]))
    mix = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    return np.broadcast_to(top * (1 - mix) + bottom * mix, (SIZE, SIZE, 3))


def _trajectory(motion: str, rng: np.random.Generator) -> list[Pose]:
    times = np.linspace(0, 1, NUM_FRAMES)
    middle = SIZE / 2
    size, aside, along = rng.uniform(11, 13), rng.uniform(-4, 4), rng.uniform(-4, 4)
    reach = rng.uniform(18, 21)  # the path's length; a spin's is 99 to 116 degrees
    paths: dict[str, Callable[[float], Pose]] = {
        "left": lambda t: Pose(x=middle + reach * (0.5 - t), y=middle + aside, size=size),
        "right": lambda t: Pose(x=middle - reach * (0.5 - t), y=middle + aside, size=size),
        "up": lambda t: Pose(x=middle + aside, y=middle + reach * (0.5 - t), size=size),
        "down": lambda t: Pose(x=middle + aside, y=middle - reach * (0.5 - t), size=size),
        "growing": lambda t: Pose(x=middle + aside / 2, y=middle + along / 2, size=6 + 8 * t),
        "shrinking": lambda t: Pose(x=middle + aside / 2, y=middle + along / 2, size=14 - 8 * t),
        "spinning": lambda t: Pose(x=middle + aside, y=middle + along, size=size, angle=math.radians(5.5 * reach) * t),
        "bouncing": lambda t: Pose(
            x=middle + aside, y=41 - (reach - 4) * abs(math.sin(2 * math.pi * t)), size=size - 1
        ),
    }
    return [paths[motion](float(t)) for t in times]


def _coverage(shape: str, pose: Pose) -> Field:
    """How much of each pixel the shape covers, 0..1, from the signed distance of the pixel's centre to its edge."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    dx, dy = columns - pose.x, rows - pose.y
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance: Field = np.clip(0.5 - _DISTANCES[shape](u, v, pose.size), 0, 1).astype(np.float32)
    return distance


def _circle(u: Field, v: Field, size: float) -> Field:
    return np.hypot(u, v) - np.float32(size)


def _pointed(points: int, outer: float, inner: float, turn: float) -> Callable[[Field, Field, float], Field]:
    """A star polygon: `points` tips at `outer` x size, notches at `inner` x size; `turn` lays it on its base."""
    half = math.pi / points

    def distance(u: Field, v: Field, size: float) -> Field:
        radius, angle = np.hypot(u, v), np.arctan2(v, u) - turn
        folded = np.abs(
            (angle + half) % (2 * half) - half
        )  # every edge lies over the same wedge, from a tip to a notch
        x, y = radius * np.cos(folded), radius * np.sin(folded)
        ex, ey = inner * math.cos(half) - outer, inner * math.sin(half)  # along the edge, from tip to notch
        normal = math.hypot(ex, ey)
        signed = ((x - outer * size) * ey - y * ex) / normal
        return signed.astype(np.float32)

    return distance


def _cross(u: Field, v: Field, size: float) -> Field:
    long, short = 1.154 * size, 0.415 * size
    x, y = np.abs(u), np.abs(v)
    bars: Field = np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long))
    return bars


# Outer radii give every shape the area of the circle of the same size.
_DISTANCES: dict[str, Callable[[Field, Field, float], Field]] = {
    "circle": _circle,
    "square": _pointed(4, 1.2533, 0.8862, math.pi / 4),
    "triangle": _pointed(3, 1.5551, 0.7776, -math.pi / 2),
    "star": _pointed(5, 1.5412, 0.6935, -math.pi / 2),
    "cross": _cross,
}
