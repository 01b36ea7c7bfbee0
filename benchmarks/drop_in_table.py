"""The tables in docs/drop-in.md: each class as it comes, accelerated, again, and restored; and what was measured.

python benchmarks/drop_in_table.py                                 # writes the first anew
python benchmarks/drop_in_table.py --only Wan                      # prints the rows of some
python benchmarks/drop_in_table.py --measured FILE-OF-drop_in.py   # writes the second anew
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging

import frameloom
from frameloom.integrations.diffusers.report import Report
from frameloom.integrations.diffusers.samples.catalogue import SAMPLES
from frameloom.integrations.diffusers.samples.sample import Sample, Scale

DOCS = Path(__file__).resolve().parents[1] / "docs" / "drop-in.md"
BEGIN, END = "<!-- pipelines: benchmarks/drop_in_table.py writes this -->", "<!-- end of pipelines -->"
HEAD = "| pipeline | VAE | transformer | also | levels of 255 apart |\n|---|---|---|---|---|\n"
MEASURED, END_OF_MEASURED = "<!-- measured: benchmarks/drop_in_table.py writes this -->", "<!-- end of measured -->"
MEASURED_HEAD = (
    "| pipeline | VAE's widths | size | times as fast | decoding has of our engine's gain | peak memory, plain | "
    "accelerated |\n|---|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What came of a pipeline: `levels` of 255 between plain and accelerated, `spread` of its frames in [0, 1]."""

    report: Report
    levels: float
    spread: float
    second_is_equal: bool
    restored_is_equal: bool
    weights_are_equal: bool
    classes_are_equal: bool


def prove(sample: Sample, scale: Scale) -> Proof:
    """Run a sample plain, accelerated, once more, and restored."""
    with small_pictures(sample, scale):
        pipe = sample.build(scale)
        weights, classes = _weights(pipe), _classes(pipe)
        plain = sample.run(pipe, scale)
        report = frameloom.accelerate(pipe)
        first, second = sample.run(pipe, scale), sample.run(pipe, scale)
        frameloom.restore(pipe)
        restored = sample.run(pipe, scale)
    return Proof(
        report=report,
        levels=round(float((first - plain).abs().max()) * 255, 4),  # a level of an integer frame is 1/255, rounded
        spread=float(plain.std()),
        second_is_equal=torch.equal(first, second),
        restored_is_equal=torch.equal(plain, restored),
        weights_are_equal=_same(weights, _weights(pipe)),
        classes_are_equal=classes == _classes(pipe),
    )


def row_of(sample: Sample, report: Report | None, levels: str) -> str:
    """A line of the table."""
    if report is None:
        return f"| {sample.name} | | | {sample.missing} | |\n"
    told = {entry.component: "taken" if entry.taken else f"left: {entry.what}" for entry in report.entries}
    networks = ", ".join(dict.fromkeys(what for name, what in told.items() if name.startswith("transformer")))
    also = ", ".join(
        f"{name} {what}" for name, what in told.items() if name != "vae" and not name.startswith("transformer")
    )
    return f"| {sample.name} | {told.get('vae', '')} | {networks} | {also} | {levels} |\n"


def levels_told(levels: float) -> str:
    """An error as the table says it: a bound that is a power of ten, since its digits are those of one machine."""
    bounds = (0.001, 0.01, 0.1)
    return next((f"< {bound}" for bound in bounds if levels < bound), f"{levels:.2g}") if levels else "0"


def measured_rows(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the second table, of records of `frameloom bench drop-in`."""
    for record in sorted(records, key=lambda record: record["case"]["pipeline"] == "all"):
        case = record["case"]
        size = f"{case['height']}x{case['width']}x{case['frames']}"
        size += ", allocator as it comes" if case["allocator"] == "default" else ""
        for found in record["pipelines"]:
            faster, decode, peaks = found["speedup"], found["decode"] or {}, found["peak_bytes"]
            share = decode.get("share_of_gain")
            cells = (
                found["pipeline"],
                "a folder's" if case["model"] else case["widths"],
                size,
                f"{faster['median']:.2f} ({faster['low']:.2f} to {faster['high']:.2f})",
                "" if share is None else f"{share:.0%}",
                *(f"{peaks[side] / 1e9:.2f} GB" if peaks else "" for side in ("diffusers", "accelerated")),
            )
            yield f"| {' | '.join(cells)} |\n"


def write_between(begin: str, end: str, table: str) -> None:
    """Put a table between two lines of the page."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(begin)
    DOCS.write_text(f"{before}{begin}\n{table}{end}{rest.partition(end)[2]}", encoding="utf-8")


@contextlib.contextmanager
def small_pictures(sample: Sample, scale: Scale) -> Iterator[None]:
    """Let pipelines that fit every picture to a million pixels fit it to the scale's."""
    module: Any = sys.modules[getattr(diffusers, sample.pipeline).__module__]
    fits = getattr(module, "calculate_dimensions", None)
    joy = sys.modules.get("diffusers.pipelines.joyimage.image_processor")
    buckets: dict[int, Any] = getattr(joy, "BUCKETS", {})
    kept = dict(buckets)
    if fits:
        module.calculate_dimensions = lambda area, ratio: fits(scale.width * scale.height, ratio)
    buckets |= {area: [(scale.height, scale.width)] for area in kept}
    try:
        yield
    finally:
        buckets |= kept
        if fits:
            module.calculate_dimensions = fits


def _weights(pipe: Any) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{n}.{key}": value.clone() for n, part in parts.items() for key, value in part.state_dict().items()}


def _classes(pipe: Any) -> list[type]:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [type(pipe), *(type(module) for part in parts for module in part.modules())]


def _same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def main() -> None:
    """Write a table, or print the rows that are asked for."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--only", default="", help="a part of the names of pipelines")
    asked.add_argument("--measured", type=Path, help="a record that benchmarks/drop_in.py has written")
    given = asked.parse_args()
    if given.measured:
        records = json.loads(given.measured.read_text("utf-8")).values()
        write_between(MEASURED, END_OF_MEASURED, MEASURED_HEAD + "".join(measured_rows(records)))
        return
    logging.set_verbosity_error()
    rows = []
    for sample in SAMPLES:
        if given.only in sample.name:
            proof = None if sample.missing else prove(sample, Scale())
            rows.append(row_of(sample, proof and proof.report, levels_told(proof.levels) if proof else ""))
            print(rows[-1], end="", flush=True)
    if not given.only:
        write_between(BEGIN, END, HEAD + "".join(rows))


if __name__ == "__main__":
    main()
