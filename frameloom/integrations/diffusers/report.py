"""What `accelerate` did with a pipeline, component by component."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

_WIDTH, _NARROWEST = 100, 40
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
        """A row per component, in columns; what is said of each is wrapped."""
        rows = [("component", "class", "", "how, or why not")]
        rows += [(e.component, e.kind, "taken" if e.taken else "left", e.what) for e in self.entries]
        return "\n".join(_lines(rows))


def _lines(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their cells, the last in what is left of a hundred characters."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    room = max(_NARROWEST, _WIDTH - sum(widths) - len(widths) * len(_GAP))
    lines = []
    for *cells, last in rows:
        first, *more = textwrap.wrap(last, room) or [""]
        start = _GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{start}{_GAP}{first}".rstrip())
        lines += [" " * len(start) + _GAP + line for line in more]
    return lines
