"""`frameloom verify` and `frameloom doctor`: what this machine computes, and what it lacks."""

import json
from typing import Any

import typer
from rich.table import Table

import frameloom
from frameloom.cli.console import byte_bars, console_of, page
from frameloom.cli.options import DeviceOption, GpusOption, JsonOption, ModelOption, ParallelOption, with_parts
from frameloom.cli.ranks import is_first, share


@with_parts
def verify(
    parts: dict[str, str],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    gpus: GpusOption = None,
    parallel: ParallelOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prove on this machine that the fast ways, and weights kept quantized, compute what the reference does.

    Exit code 1 if one does not. With several devices: that they compute together what one of them computes alone.
    """
    share(gpus, parallel)
    findings = []
    console = console_of(quiet=as_json)
    console.print(
        f"{'':<9}{'rewrite':<44}{'max abs':>8}{'relative':>10}{'PSNR':>8}{'speed':>8}  promise", soft_wrap=True
    )
    with byte_bars(console) as on_bytes:
        found = frameloom.verify_model(model, parts=parts, device=device, parallel=parallel, on_bytes=on_bytes)
        for finding in found:  # one by one: some take minutes
            findings.append(finding)
            console.print(_finding_line(finding), soft_wrap=True)
    broken = [finding.name for finding in findings if finding.kept is False]
    if as_json and is_first():
        print(json.dumps({"findings": [finding.record() for finding in findings], "broken": broken}))
    else:
        console.print(f"{len(broken)} promises are broken: {', '.join(broken)}" if broken else "every promise is kept")
    if broken:
        raise typer.Exit(1)


def _finding_line(finding: Any) -> str:
    """A finding of `verify` in one line."""
    start = f"{finding.verdict:<9}{finding.name:<44}"
    if finding.kept is None:
        return f"{start}{finding.note}"
    numbers = f"{finding.max_abs:>8.1e}{finding.relative:>10.1e}{finding.psnr_db:>5.0f} dB{finding.speedup:>7.2f}x"
    return f"{start}{numbers}  {finding.promise}" + (f": {finding.note}" if finding.note else "")


def doctor(device: DeviceOption = "auto", as_json: JsonOption = False) -> None:
    """Say what this machine has, what it lacks, what that costs, and how to get it."""
    findings = frameloom.diagnose(device)
    if as_json:
        print(json.dumps({"findings": [finding.record() for finding in findings]}))
        return
    table = Table("part", "here", "what was found", "what it costs, and what to do")
    for finding in findings:
        advice_given = "; ".join(filter(None, (finding.costs, finding.hint)))
        table.add_row(finding.part, "yes" if finding.found else "no", finding.what, advice_given)
    page(120).print(table)
