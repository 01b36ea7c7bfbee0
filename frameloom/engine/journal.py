"""The journal of a job: what a request has computed, on the disk as it comes, so that a run that dies loses nothing.

A job is a folder. Each entry in it is one safetensors file that appears whole or not at all, and carries the job it
belongs to and the SHA-256 of its numbers: one that is damaged, or of another job, is as if it were not there. A disk
that is full or broken ends the journal and not the run.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from frameloom.models.vae_state import Frames
from frameloom.pipeline.keep import Forgets, Tensors
from frameloom.pipeline.sinks import write_whole
from frameloom.sampling.flow import SamplerState
from frameloom.settings import LOGGER_NAME
from frameloom.weights.write import NAMES

log = logging.getLogger(LOGGER_NAME)

Entry = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors, and what is said of them."""

_COST: Final = 100  # a step is kept when so many times what that takes have passed since the last one: 1 % of the run
_FIRST_COST_S: Final = 0.01
_STEPS_KEPT: Final = 2  # if the last one is damaged there is one before it
_CHOICE: Final = "choice"
_STEP: Final = "step-"
_FRAMES: Final = "frames-"


class Journal:
    """The entries of one job; one process writes them at a time.

    `job`: what its entries carry, a digest of what was asked. `seconds`: spent here. A `pipeline.keep.Keeper`.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self.folder, self.job = folder, job
        self.seconds = 0.0
        self._broken = False
        self._last_s, self._cost_s = time.monotonic(), _FIRST_COST_S

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """The entry `name`, on the host; if there is none what `make` gives, which becomes the entry."""
        found = self.read(name)
        if found is not None:
            log.info("journal: %s is there already", name)
            return found[0]
        made = make()
        self.write(name, made)
        return made

    def on_disk(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """As `once`, as it lies in the entry's file: memory that the system may take back. Nobody writes to it.

        Where there is no file, because nothing can be written, it stays in memory.
        """
        there = self.once(name, make)
        mapped = self.mapped(name)
        return there if mapped is None else mapped

    def choice(self, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The same of what was chosen: anything that JSON can say."""
        found = self.read(name)
        if found is not None:
            chosen: Mapping[str, Any] = json.loads(found[1][_CHOICE])
            return chosen
        made = make()
        self.write(name, {}, {_CHOICE: json.dumps(dict(made))})
        return made

    def walked(self) -> tuple[Tensor, SamplerState] | None:
        """The latents and the sampler's state after the last step that can be read; None if there is none."""
        found = self.newest(_STEP)
        if found is None:
            return None
        history, facts = dict(found[0]), found[1]
        latents = history.pop("latents")
        state = SamplerState(step=int(facts["step"]), sampler=facts["sampler"], history=history)
        log.info("journal: going on after step %d", state.step)
        return latents, state

    def walk(self, latents_BCTHW: Tensor, state: SamplerState) -> None:
        """A step is done; it is kept so seldom that this takes no more than 1 % of the time."""
        begun = time.monotonic()
        if begun - self._last_s < _COST * self._cost_s:
            return
        facts = {"step": str(state.step), "sampler": state.sampler}
        self.write(f"{_STEP}{state.step:06d}", {"latents": latents_BCTHW, **state.history}, facts)
        for name in self._names(_STEP)[:-_STEPS_KEPT]:
            self._path(name).unlink(missing_ok=True)
        self._last_s = time.monotonic()
        self._cost_s = self._last_s - begun

    def frames(self) -> Iterator[Frames]:
        """The frames that are there, uint8 (t, H, W, 3), from the first one on without a gap."""
        count = 0
        for name in self._names(_FRAMES):
            found = self.read(name) if int(name.removeprefix(_FRAMES)) == count else None
            if found is None:
                return
            part: Frames = found[0]["frames"].numpy()
            count += len(part)
            yield part

    def keep_frames(self, first: int, frames: Frames) -> None:
        """Frames uint8 (t, H, W, 3), of which the first has the number `first`."""
        # They can be computed again from the latents: no frame waits for the disk.
        self.write(f"{_FRAMES}{first:06d}", {"frames": torch.from_numpy(np.ascontiguousarray(frames))}, waits=False)

    def newest(self, start: str) -> Entry | None:
        """The last of the numbered entries that can be read."""
        return next((found for name in reversed(self._names(start)) if (found := self.read(name))), None)

    def forget(self, *, but: tuple[str, ...] = ()) -> None:
        """Remove the entries, other than some, and what a killed run was writing."""
        kept = {self._path(name) for name in but}
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob(".*.partial")):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _names(self, start: str) -> list[str]:
        numbered = (path.stem for path in self.folder.glob(f"{start}*.safetensors"))
        return sorted(name for name in numbered if name.removeprefix(start).isdigit())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @property
    def is_broken(self) -> bool:
        """Whether an entry could not be written; then none was since."""
        return self._broken

    def write(self, name: str, tensors: Tensors, facts: Mapping[str, str] | None = None, *, waits: bool = True) -> None:
        """Put an entry in its place, whole; `waits` until it is on the disk. After an error nothing is written."""
        if self._broken:
            return
        try:
            self.put(name, tensors, facts, waits=waits)
        except OSError as error:
            self._broken = True
            log.warning(
                "the journal %s cannot be written (%s); the run goes on, and if it ends early what was kept before is "
                "left", self.folder, error.strerror,
            )  # fmt: skip

    def put(self, name: str, tensors: Tensors, facts: Mapping[str, str] | None = None, *, waits: bool = True) -> None:
        """The same. Raises OSError."""
        begun = time.monotonic()
        held = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
        told = {**(facts or {}), "job": self.job, "sha256": _digest(held, facts or {})}
        try:
            write_whole(self._path(name), *_in_pieces(held, told), waits=waits)
        finally:
            self.seconds += time.monotonic() - begun

    def read(self, name: str) -> Entry | None:
        """The numbers and the facts of an entry; None, with a line in the log, of one that is not as it was written."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                facts = file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (no __iter__)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("journal: %s cannot be read and is computed again (%s)", path, error)
            return None
        digest, job = facts.pop("sha256", ""), facts.pop("job", "")
        if job != self.job or digest != _digest(tensors, facts):
            why = "belongs to another job" if job != self.job else "is damaged"
            log.warning("journal: %s %s and is computed again", path, why)
            return None
        return tensors, facts

    def mapped(self, name: str) -> Tensors | None:
        """The numbers of an entry that was just read or written, where they lie; None if they cannot be had."""
        if self._broken:
            return None
        try:
            with safe_open(self._path(name), framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no __iter__)
        except (OSError, SafetensorError) as error:
            log.warning("journal: %s cannot be mapped and stays in memory (%s)", self._path(name), error)
            return None


class NoJournal(Forgets):
    """Keeps nothing, and has nothing."""

    def on_disk(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives."""
        return make()

    def frames(self) -> Iterator[Frames]:
        """None."""
        return iter(())

    def keep_frames(self, first: int, frames: Frames) -> None:
        """Nothing is done."""


NO_JOURNAL: Final = NoJournal()


def _in_pieces(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file, without a copy of the numbers: the latents of a long video are what grows with its frames."""
    entries: dict[str, Any] = {"__metadata__": dict(facts)}
    end = 0
    for name, x in tensors.items():
        start, end = end, end + x.nbytes
        entries[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little")
    yield header
    for x in tensors.values():
        yield _bytes(x)


def _bytes(x: Tensor) -> memoryview:
    """The numbers of a contiguous tensor on the host, as they lie in memory."""
    numbers: memoryview = x.reshape(-1).view(torch.uint8).numpy().data
    return numbers


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    told = hashlib.sha256(json.dumps(sorted(facts.items())).encode())
    for name, x in sorted(tensors.items()):
        told.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        told.update(_bytes(x.contiguous()))
    return told.hexdigest()
