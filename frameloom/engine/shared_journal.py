"""The journal of several ranks: the first one reads and writes, and all go on from the same place."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from frameloom.engine.journal import Entry, Journal
from frameloom.models.vae_state import Frames
from frameloom.parallel.team import Team
from frameloom.pipeline.keep import Tensors
from frameloom.sampling.flow import SamplerState


class SharedJournal(Journal):
    """`journal`: of the first rank; None elsewhere."""

    def __init__(self, team: Team, journal: Journal | None) -> None:
        super().__init__(Path() if journal is None else journal.folder, "" if journal is None else journal.job)
        self._team, self._journal = team, journal

    def read(self, name: str) -> Entry | None:
        """The first rank's entry, on every rank."""
        return self._told(lambda journal: journal.read(name))

    def newest(self, start: str) -> Entry | None:
        """The first rank's, on every rank."""
        return self._told(lambda journal: journal.newest(start))

    def write(self, name: str, tensors: Tensors, facts: Mapping[str, str] | None = None, *, waits: bool = True) -> None:
        """On the first rank."""
        if self._journal is not None:
            self._journal.write(name, tensors, facts, waits=waits)

    def mapped(self, name: str) -> Tensors | None:
        """On the first rank; the others have what they computed, or were told."""
        return None if self._journal is None else self._journal.mapped(name)

    def walk(self, latents_BCTHW: Tensor, state: SamplerState) -> None:
        """On the first rank."""
        if self._journal is not None:
            self._journal.walk(latents_BCTHW, state)

    def frames(self) -> Iterator[Frames]:
        """On the first rank."""
        return iter(()) if self._journal is None else self._journal.frames()

    def _told(self, find: Callable[[Journal], Entry | None]) -> Entry | None:
        found = None if self._journal is None else find(self._journal)
        told = self._team.agree(None if found is None else [list(found[0]), found[1]])
        if told is None:
            return None
        names, facts = told
        mine = dict.fromkeys(names) if found is None else found[0]
        return {name: self._team.tensor_of_first(mine[name]) for name in names}, facts
