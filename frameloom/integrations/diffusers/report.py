"""What `accelerate` did with a pipeline, component by component."""

import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from frameloom.memory.meter import amount

_WIDTH, _NARROWEST = 100, 60  # without a terminal; at least
_ROOM = 30  # what the last column needs beside the others, else it is below them
_GAP = "  "


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One component: whether it is computed here, how, or why not.

    `extra_bytes`: what is held beside the pipeline's own weights, such as weights evaluated at Winograd's points.
    """

    component: str
    kind: str
    taken: bool
    what: str
    extra_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """All components of a pipeline that were looked at, in the pipeline's order. Its text is a table."""

    entries: tuple[Entry, ...] = ()

    @property
    def taken(self) -> tuple[Entry, ...]:
        """What is computed here."""
        return tuple(entry for entry in self.entries if entry.taken)

    @property
    def left(self) -> tuple[Entry, ...]:
        """What is as it was."""
        return tuple(entry for entry in self.entries if not entry.taken)

    def __getitem__(self, component: str) -> Entry:
        """The entry of a component. Raises KeyError."""
        for entry in self.entries:
            if entry.component == component:
                return entry
        raise KeyError(component)

    def __str__(self) -> str:
        """A row per component, in columns; what is said of each is wrapped to the width of the terminal."""
        rows = [("component", "class", "", "how, or why not")]
        rows += [(e.component, e.kind, "taken" if e.taken else "left", _told(e)) for e in self.entries]
        return "\n".join(_lines(rows))


def _told(entry: Entry) -> str:
    if not entry.extra_bytes:
        return entry.what
    return f"{entry.what}; holds up to {amount(entry.extra_bytes)} beside its weights"


def _lines(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their cells, the last in what is left of the terminal, or below the others."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    width = max(_NARROWEST, shutil.get_terminal_size((_WIDTH, 24)).columns)
    start = sum(widths) + len(widths) * len(_GAP)
    is_beside = width - start >= _ROOM
    indent = " " * (start if is_beside else 2 * len(_GAP))
    lines = []
    for *cells, last in rows:
        head = "".join(cell.ljust(width) + _GAP for cell, width in zip(cells, widths, strict=True))
        more = [indent + line for line in textwrap.wrap(last, width - len(indent))]
        lines += [head + more[0][start:], *more[1:]] if more and is_beside else [head, *more]
    return [line.rstrip() for line in lines]
