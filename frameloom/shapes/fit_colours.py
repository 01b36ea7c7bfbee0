"""Fits the colours of the built-in model's latents, for previews: `python -m frameloom.shapes.fit_colours`.

Least squares over drawn clips: the latents that the encoder makes of them, and the mean colour of what each cell shows.
Prints the rows that `pipeline/latent_colours.py` holds.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.engine.build import build_engine
from frameloom.engine.engine import Engine
from frameloom.pipeline.latent_colours import with_neighbours
from frameloom.shapes import PATH
from frameloom.shapes.world import COLOURS, random_scene, render

CLIPS = 96
SEED = 11
SIDE = 3  # of the cells that a colour is told by: one cell alone names three colours of five, nine name four
_OF_SHAPE = 10  # times as much as the background a cell of the shape counts
_NEAR = 0.25  # in [-1, 1]; a cell this near to the colour of the shape is of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """Latent cells of a clip with those around them, their mean colours in [-1, 1], and which are of the shape.

    `rgb`: the colour of the shape, likewise.
    """

    near_NC: Tensor
    colours_N3: Tensor
    is_shape_N: Tensor
    rgb: Tensor


def drawn(engine: Engine, clips: int, *, seed: int = SEED) -> list[Cells]:
    """Cells of drawn clips, without the first latent frame of each: it is of another kind."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(clips):
        scene = random_scene(rng)
        frames = render(scene, rng)
        latents_CTHW = engine.encode(frames)[0, :, 1:]
        levels_CTHW = torch.from_numpy(frames[1:]).permute(3, 0, 1, 2).float() / 127.5 - 1
        count, height, width = latents_CTHW.shape[1:]
        colours_N3 = F.adaptive_avg_pool3d(levels_CTHW, (count, height, width)).flatten(1).T
        rgb = torch.tensor(COLOURS[scene.colour]) / 127.5 - 1
        is_shape_N = (colours_N3 - rgb).norm(dim=1) < _NEAR
        near_NC = with_neighbours(latents_CTHW, SIDE).flatten(1).T
        found.append(Cells(near_NC=near_NC, colours_N3=colours_N3, is_shape_N=is_shape_N, rgb=rgb))
    return found


def fitted(clips: list[Cells]) -> Tensor:
    """The rows (C + 1, 3) that map cells to colours best; the last is added to every cell."""
    near_NC = torch.cat([clip.near_NC for clip in clips])
    ones_N1 = torch.ones_like(near_NC[:, :1])
    weights_N1 = torch.cat([1 + _OF_SHAPE * clip.is_shape_N for clip in clips]).sqrt()[:, None]
    colours_N3 = torch.cat([clip.colours_N3 for clip in clips])
    inputs = (torch.cat((near_NC, ones_N1), dim=1) * weights_N1).double()
    rows: Tensor = torch.linalg.lstsq(inputs, (colours_N3 * weights_N1).double()).solution
    return rows


def mapped(clip: Cells, rows: Tensor) -> Tensor:
    """Colours (N, 3) of cells by the rows."""
    return (clip.near_NC @ rows[:-1].float() + rows[-1].float()).clamp(-1, 1)


def named_rightly(clips: list[Cells], rows: Tensor) -> float:
    """Share of the clips whose shape is nearest to its own colour, of all that have a name."""
    names = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    seen = [clip for clip in clips if clip.is_shape_N.any()]
    means = [mapped(clip, rows)[clip.is_shape_N].mean(0) for clip in seen]
    nearest = [names[(names - mean).norm(dim=1).argmin()] for mean in means]
    return sum(torch.equal(name, clip.rgb) for name, clip in zip(nearest, seen, strict=True)) / len(seen)


def main() -> None:
    """Print the rows, and how well they do on clips that they were not fitted to."""
    with build_engine(PATH) as engine:
        rows = fitted(drawn(engine, CLIPS))
        share = named_rightly(drawn(engine, CLIPS // 3, seed=SEED + 1), rows)
    texts = [f"({', '.join(f'{value:.3f}' for value in row)})," for row in rows.tolist()]
    for start in range(0, len(texts), 4):
        print(" ".join(texts[start : start + 4]))
    print(f"colours named rightly: {share:.0%}", file=sys.stderr)


if __name__ == "__main__":
    main()
