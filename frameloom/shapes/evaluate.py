"""Measures how well the built-in model follows prompts: `python -m frameloom.shapes.evaluate`.

Draws prompts of colour-shape-motion combinations that training never saw, half of them in wordings it never saw
either, generates each, and lets the rule-based reader say what the frames show.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from frameloom.engine.build import build_engine
from frameloom.engine.engine import Engine
from frameloom.errors import FrameloomError
from frameloom.pipeline.media import Video, contact_sheet
from frameloom.shapes import PATH
from frameloom.shapes.reader import Reading, read_clip
from frameloom.shapes.world import HELD_OUT_WORDINGS, TRAINING_WORDINGS, Scene, describe, random_scene, render

SEED = 7
ATTRIBUTES = ("colour", "shape", "motion")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One prompt of the evaluation: what it asks for, and the seed of its noise."""

    scene: Scene
    prompt: str
    new_wording: bool
    seed: int


def trials(count: int, *, seed: int = SEED) -> list[Trial]:
    """`count` prompts of held-out combinations; every second one in a held-out wording."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        scene = random_scene(rng, held_out=True)
        wordings = HELD_OUT_WORDINGS if i % 2 else TRAINING_WORDINGS
        prompt = describe(scene, rng, wordings=wordings)
        found.append(Trial(scene=scene, prompt=prompt, new_wording=bool(i % 2), seed=1000 * seed + i))
    return found


def run(engine: Engine, chosen: list[Trial]) -> list[tuple[Trial, Video, Reading]]:
    """Generate and read every trial, one prompt at a time."""
    results = []
    for number, trial in enumerate(chosen, 1):
        video = engine.generate(trial.prompt, seed=trial.seed)
        results.append((trial, video, read_clip(video.frames)))
        if number % 20 == 0:
            print(f"{number}/{len(chosen)}", flush=True)
    return results


def share_right(readings: list[tuple[Trial, Reading]]) -> dict[str, float]:
    """Per attribute, how many of the readings say what the prompt asked for (0..1)."""
    right: Counter[str] = Counter()
    for trial, reading in readings:
        right.update(name for name in ATTRIBUTES if getattr(reading, name) == getattr(trial.scene, name))
    return {name: right[name] / max(1, len(readings)) for name in ATTRIBUTES}


def reconstruction_psnr(engine: Engine, count: int, *, seed: int = SEED) -> float:
    """Mean PSNR (dB) of held-out clips that go through the VAE and back, against the drawn frames."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(count):
        frames = render(random_scene(rng, held_out=True), rng)
        error = engine.decode(engine.encode(frames)).astype(np.float64) - frames
        values.append(10 * np.log10(255**2 / np.square(error).mean()))
    return float(np.mean(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What an evaluation found."""

    seed: int
    psnr_db: float
    readings: list[tuple[Trial, Reading]]

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """Per group of prompts and per attribute, the share of the readings that is right (0..1)."""
        return {name: share_right(group) for name, group in self.groups.items()}

    @property
    def groups(self) -> dict[str, list[tuple[Trial, Reading]]]:
        """All readings, and those of either kind of wording."""
        return {
            "all": self.readings,
            "wordings seen in training": [(t, r) for t, r in self.readings if not t.new_wording],
            "wordings never seen": [(t, r) for t, r in self.readings if t.new_wording],
        }

    @property
    def misses(self) -> list[dict[str, object]]:
        """Every prompt whose video does not show what it asks for, with its noise's seed and what was read."""
        return [
            {"prompt": t.prompt, "seed": t.seed, "read": [r.colour, r.shape, r.motion]}
            for t, r in self.readings
            if (r.colour, r.shape, r.motion) != t.scene.combination
        ]

    def show(self) -> None:
        """Print the table, the VAE's figure and the misses."""
        table = Table("held-out combinations", "prompts", *ATTRIBUTES, title=f"seed {self.seed}")
        for (name, group), shares in zip(self.groups.items(), self.shares.values(), strict=True):
            table.add_row(name, str(len(group)), *(f"{share:.1%}" for share in shares.values()))
        Console().print(table)
        print(f"VAE reconstruction of held-out clips: {self.psnr_db:.1f} dB")
        for miss in self.misses:
            print(miss)

    def write(self, path: Path) -> None:
        """Write the shares and the misses as JSON."""
        record = {
            "seed": self.seed,
            "prompts": len(self.readings),
            "psnr_db": self.psnr_db,
            "shares": self.shares,
            "misses": self.misses,
        }
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Print the table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PATH), help="folder of the checkpoint")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", type=Path, help="write the shares and every miss to this file")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first eight prompts to this PNG")
    arguments = parser.parse_args()
    if arguments.prompts < 1 or arguments.seed < 0:
        parser.error("--prompts must be 1 or more, --seed 0 or more")
    for path, suffix in ((arguments.json, ".json"), (arguments.sheet, ".png")):
        if path and (path.suffix != suffix or path.is_dir() or not path.parent.is_dir()):
            parser.error(f"{path} cannot be written: give a file ending in {suffix} in a folder that is there")
    try:
        engine = build_engine(arguments.model)
    except FrameloomError as error:
        parser.error(str(error))
    with engine:
        psnr_db = reconstruction_psnr(engine, max(1, arguments.prompts // 4), seed=arguments.seed)
        results = run(engine, trials(arguments.prompts, seed=arguments.seed))
    report = Report(seed=arguments.seed, psnr_db=psnr_db, readings=[(trial, reading) for trial, _, reading in results])
    report.show()
    if arguments.json:
        report.write(arguments.json)
    if arguments.sheet:
        some = results[:8]
        contact_sheet([v for _, v, _ in some], [t.prompt for t, _, _ in some], columns=2).save(arguments.sheet)


if __name__ == "__main__":
    main()
