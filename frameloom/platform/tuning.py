"""Chooses between ways to compute the same thing by timing them here, and remembers the answer in the cache folder."""

import functools
import hashlib
import json
import logging
import os
import platform as host
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from frameloom.lock import Lock
from frameloom.platform.device import platform_of, timed
from frameloom.platform.host import cpu_flags
from frameloom.settings import LOGGER_NAME, cache_folder

log = logging.getLogger(LOGGER_NAME)
_ROUNDS = 3
_TURN_S = 60.0  # that a process waits for the choices of another one, which may stand still
_ABOUT_AS_FAST = 1.05
Agreed = Callable[[Callable[[], Any]], Any]


def alone(make: Callable[[], Any]) -> Any:
    """What `make` gives: the only process decides for itself."""
    return make()


class Tuner:
    """Timed choices of one machine, in one JSON file. A file that cannot be read or written costs time, not the run.

    `agreed`: given how to make a choice, returns the one that all processes of this run take.
    """

    def __init__(self, device: torch.device, folder: Path | None = None, *, agreed: Agreed = alone) -> None:
        self.device = device
        self._agreed = agreed
        self._path = (folder or cache_folder()) / f"choices-{_machine(device)}.json"
        self._known = _read(self._path)
        self._fresh = 0

    def best(self, key: str, names: Sequence[str], prepare: Callable[[], Mapping[str, Callable[[], object]]]) -> str:
        """The name of the fastest way; what `prepare` gives is timed in turns once per `key` and names.

        Of ways that are about as fast it is the first in `names`: a choice by chance would round by chance.
        """
        chosen: str = self._agreed(lambda: self._best(key, names, prepare))
        return chosen

    def _best(self, key: str, names: Sequence[str], prepare: Callable[[], Mapping[str, Callable[[], object]]]) -> str:
        full_key = f"{key} | {' '.join(sorted(names))}"
        if (found := self._known.get(full_key)) in names:
            return str(found)
        with _turn(self._path):  # what another process has chosen meanwhile is taken: else both would round by chance
            kept = _read(self._path)
            if (found := kept.get(full_key)) in names:
                self._known = kept | self._known | {full_key: found}
                return str(found)
            seconds = self._seconds(prepare())
            chosen = next(name for name in names if seconds[name] <= _ABOUT_AS_FAST * min(seconds.values()))
            self._known[full_key] = chosen
            self._fresh += 1
            with suppress(OSError):  # `save` tells of it
                self._write()
        return chosen

    def recall(self, key: str, make: Callable[[], Any], is_whole: Callable[[Any], bool]) -> Any:
        """What `make` gave for this key before, on this machine and with these kernels; else what it gives now.

        It is kept as JSON. `is_whole` tells what was kept from what a damaged file holds.
        """
        found = self._known.get(key)
        if not is_whole(found):
            found = self._known[key] = make()
            self._fresh += 1
        return found

    def number(self, key: str) -> float | None:
        """What `note` has kept for this key, or None."""
        found = self._known.get(key)
        return found if type(found) is float and 0 < found < float("inf") else None

    def note(self, key: str, number: float) -> None:
        """Keep a number that was measured in the middle of other work."""
        self._known[key] = float(number)
        self._fresh += 1

    def save(self) -> None:
        """Write what was measured, beside the final name and then renamed."""
        if not self._fresh:
            return
        try:
            self._write()
        except OSError as error:
            log.warning("measured choices are not kept, and the next run may choose and round otherwise: %s", error)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        known = _read(self._path) | self._known  # another process may have measured meanwhile
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False, encoding="utf-8") as file:
            json.dump(known, file, indent=1, sort_keys=True)
        os.replace(file.name, self._path)
        self._fresh = 0

    def _seconds(self, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        best = dict.fromkeys(ways, float("inf"))
        for round_ in range(_ROUNDS + 1):
            for name, run in ways.items():
                seconds = timed(run, self.device)
                if round_:  # the first round warms up
                    best[name] = min(best[name], seconds)
        return best


class Foreseen(Tuner):
    """What a tuner would choose, without timing anything: what was measured here before, else the last way there is.

    Ways that take more memory stand behind the others, so that nothing is foreseen too small. What was foreseen is not
    kept.
    """

    def _best(self, key: str, names: Sequence[str], prepare: Callable[[], Mapping[str, Callable[[], object]]]) -> str:
        found = self._known.get(f"{key} | {' '.join(sorted(names))}")
        return found if isinstance(found, str) and found in names else names[-1]


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Measure while no other process does; after some time, or where nothing can be locked, all the same."""
    lock, end = None, time.monotonic() + _TURN_S
    while lock is None and time.monotonic() < end:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = Lock(path.with_suffix(".lock"))
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    try:
        yield
    finally:
        if lock is not None:
            lock.remove()


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


@functools.cache
def _machine(device: torch.device) -> str:
    """Changes with whatever may change which way is fastest."""
    kernels = sorted(path for path in (Path(__file__).parents[1] / "ops").iterdir() if path.suffix in (".py", ".cpp"))
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in kernels)).hexdigest()
    parts = [host.machine(), host.system(), torch.__version__, sources]
    if device.type == "cpu":
        parts += [device.type, *sorted(cpu_flags())]
    else:
        where = platform_of(device)
        parts += [where.name, where.device_name(device.index), str(where.toolkit_version())]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
