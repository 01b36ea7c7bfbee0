"""What the commands say: consoles, bars, and sizes and times in words."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from frameloom.cli.ranks import is_first
from frameloom.types import Progress, ProgressCallback

_SECONDS_BETWEEN_LINES: Final = 10.0
_STAGE_NAMES: Final = {
    "text": "reading the prompt",
    "image": "reading pictures",
    "denoise": "denoising",
    "decode": "decoding",
    "encode": "encoding",
}


def console_of(*, quiet: bool) -> Console:
    """What the first process says, unless it is `quiet`."""
    return Console(quiet=quiet or not is_first(), highlight=False, markup=False)  # a path in brackets is no markup


def page(width: int) -> Console:
    """Where tables go: in a pipe, which has no width of its own, this `width`, so that nothing is cut off."""
    return Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False)


@contextmanager
def byte_bars(console: Console) -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback for the bytes of files that shows bars; None where there is no terminal: then the log tells."""
    if not console.is_terminal or console.quiet:
        yield None
        return
    columns = (TextColumn("{task.description:>28}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bars = Bars(*columns, console=console)
    tasks: dict[str, TaskID] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in tasks:
            bars.start()
            tasks[name] = bars.add_task(name, total=total)
        bars.update(tasks[name], completed=done, total=total)

    try:
        yield show
    finally:
        bars.stop()


def byte_lines(console: Console) -> Callable[[str, int, int], None]:
    """The same in lines: one at the end of each file, and one every ten seconds."""
    told_s = time.monotonic()

    def tell(name: str, done: int, total: int) -> None:
        nonlocal told_s
        if done < total and time.monotonic() < told_s + _SECONDS_BETWEEN_LINES:
            return
        told_s = time.monotonic()
        console.print(f"{name}: {told_bytes(done)}" + (f" of {told_bytes(total)}" if done < total else ""))

    return tell


@contextmanager
def progress_of(console: Console) -> Iterator[ProgressCallback]:
    """A progress callback: bars on a terminal, otherwise a line at the start and the end of each stage."""
    if not console.is_terminal or console.quiet:
        yield lambda news: _plain_line(console, news)
        return
    columns = (TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(news: Progress) -> None:
            if news.stage not in tasks:
                tasks[news.stage] = bars.add_task(_STAGE_NAMES[news.stage], total=news.total)
            bars.update(tasks[news.stage], completed=news.step)

        yield show


def _plain_line(console: Console, news: Progress) -> None:
    every = max(1, news.total // 5)
    if news.step == news.total or (news.step and news.step % every == 0):
        console.print(f"{_STAGE_NAMES[news.stage]}: {news.step}/{news.total}")


def told_bytes(count: int) -> str:
    """Bytes in the unit in which they are read best."""
    amount, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def told_seconds(seconds: float) -> str:
    """The same of seconds."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds >= 0.05 else f"{1000 * seconds:.1f} ms"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
