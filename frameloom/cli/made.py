"""What is told of a video that was made."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from frameloom.cli.console import told_bytes


def print_made(record: dict[str, Any], console: Console, *, as_json: bool) -> None:
    """What became of a request."""
    if as_json:
        print(json.dumps(record))
    else:
        console.print(_timing_table(record))
        console.print(f"The video is at {record['output']}", style="bold", soft_wrap=True)


def _timing_table(record: dict[str, Any]) -> Table:
    """Seconds by stage, beside those that were foreseen."""
    foreseen = record.get("foreseen")
    table = Table("stage", "seconds", *(["foreseen"] if foreseen else []), "")
    for stage, seconds in record["seconds"].items():
        note = f"{seconds / len(record['step_seconds']):.3f} s/step" if stage == "denoise" else ""
        before = [_seconds_or_nothing(foreseen["seconds"].get(stage))] if foreseen else []
        table.add_row(stage, f"{seconds:.2f}", *before, note)
    peak = f"peak memory {told_bytes(record['peak_memory_bytes'])}"
    before = [f"{sum(foreseen['seconds'].values()):.2f}"] if foreseen else []
    peak += f", foreseen {told_bytes(foreseen['peak_memory_bytes'])}" if foreseen else ""
    table.add_row("together", f"{sum(record['seconds'].values()):.2f}", *before, peak)
    return table


def _seconds_or_nothing(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"
