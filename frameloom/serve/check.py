"""`frameloom serve --check`: everything that a start needs is tried, and nothing of it is left behind.

Torch-free: what needs torch, the model and the devices, is asked of a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from frameloom.config import lora
from frameloom.errors import RequestError
from frameloom.lock import holder_of, is_held
from frameloom.serve.config import ServeConfig
from frameloom.serve.door import address_of, open_door, refuse_strangers
from frameloom.serve.jobs.job import JOB_ID, StoreError
from frameloom.serve.jobs.sqlite import SqliteStore

_PATIENCE_S: Final = 300.0
_COUNT: Final = """
import json, sys
from frameloom.errors import RequestError
from frameloom.platform.device import choose_device, platform_of
try:
    device, why = choose_device(sys.argv[1])
    count = len(platform_of(device).detect().devices)
    print(json.dumps({"device": str(device), "why": why, "count": count, "named": device.index is not None}))
except RequestError as error:
    sys.exit(f"frameloom: {error}")
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that a start needs: whether all is well, what was seen, and what to do where it is not."""

    part: str
    is_well: bool
    what: str


def check(config: ServeConfig) -> Iterator[Finding]:
    """Try one thing after the other."""
    looks: tuple[tuple[str, Callable[[ServeConfig], str]], ...] = (
        ("keys", _keys), ("address", _address), ("data folder", _folder), ("free space", _space), ("job store", _store),
        ("model", _model), ("devices", _devices),
    )  # fmt: skip
    for part, look in looks:
        yield _found(part, look, config)
    for name, source in config.loras.items():
        yield _found(f"LoRA {name}", partial(_lora, source), config)


def _found(part: str, look: Callable[[ServeConfig], str], config: ServeConfig) -> Finding:
    try:
        return Finding(part=part, is_well=True, what=look(config))
    except (RequestError, StoreError) as error:
        return Finding(part=part, is_well=False, what=str(error))
    except OSError as error:
        return Finding(part=part, is_well=False, what=f"{error.filename or config.data}: {error.strerror}")


def _keys(config: ServeConfig) -> str:
    refuse_strangers(config)
    if not config.keys:
        who = "everybody who reaches it" if config.is_public else "everybody on this machine"
        return f"none: {who} may ask, and sees all jobs"
    return f"{len(config.keys)}: {', '.join(key.name for key in config.keys)}"


def _address(config: ServeConfig) -> str:
    with open_door(config.host, config.port) as door:
        return "a free port will be found" if config.port == 0 else f"{address_of(door)} is free"


def _folder(config: ServeConfig) -> str:
    """Write, sync and rename a file, as the server does."""
    made = [folder for folder in (config.data, *config.data.parents) if not folder.exists()]
    try:
        config.data.mkdir(parents=True, exist_ok=True)
        lock = config.data / "lock"
        if is_held(lock):
            raise RequestError(f"{config.data} is in use by the server with process number {holder_of(lock)}")
        trial = config.data / f"trial-{os.getpid()}"
        try:
            with trial.open("wb") as file:
                file.write(bytes(4096))
                os.fsync(file.fileno())
            trial.rename(trial.with_suffix(".renamed"))
        finally:
            for path in (trial, trial.with_suffix(".renamed")):
                path.unlink(missing_ok=True)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
    return f"{config.data}: can be written" + (", and will be made" if made else "")


def _space(config: ServeConfig) -> str:
    there = next(folder for folder in (config.data, *config.data.parents) if folder.exists())
    free, reserve = shutil.disk_usage(there).free, config.keeping.reserve_bytes
    if free <= reserve:
        raise RequestError(f"{free / 1e9:.1f} GB are free, and --reserve keeps {reserve / 1e9:.1f} GB; make room")
    return f"{free / 1e9:.1f} GB, of which {reserve / 1e9:.1f} GB stay free"


def _store(config: ServeConfig) -> str:
    path = config.data / "jobs.sqlite"
    if not path.exists():
        return "none yet; the first start makes it"
    if is_held(config.data / "lock"):
        return "not looked at while a server uses it"
    has_jobs = any(JOB_ID.fullmatch(folder.name) for folder in (config.data / "videos").glob("*"))
    store = SqliteStore(path, expects_jobs=has_jobs)
    try:
        queue = store.queue()
        return f"whole: {queue.queued} jobs wait, {len(store.ended())} have ended"
    finally:
        store.close()


def _model(config: ServeConfig) -> str:
    parts = [word for name, source in config.parts.items() for word in (f"--{name.replace('_', '-')}", source)]
    variant = ["--variant", config.variant] if config.variant else []
    model = [config.model] if config.model is not None else []
    told = _asked("-m", "frameloom", "inspect", "--json", *variant, *parts, *(["--", *model] if model else []))
    names = ", ".join(component["name"] for component in told.get("components", ()))
    return f"{config.name}: {told.get('pipeline') or 'a model'} of {names}" if names else f"{config.name}: found"


def _devices(config: ServeConfig) -> str:
    told = _asked("-c", _COUNT, config.engine.device)
    device, count, needed = told["device"], told["count"], config.workers * config.gpus_per_worker
    if device.startswith("cpu"):
        return f"{device} ({told['why']}); {needed} processes share its {os.cpu_count()} cores"
    if needed > (1 if told["named"] else count):
        raise RequestError(
            f"{config.workers} workers of {config.gpus_per_worker} devices need {needed}, and there are {count} of "
            f"{device}; use fewer --workers or --gpus-per-worker"
        )
    return f"{device} ({told['why']}): {needed} of {count} are used"


def _lora(source: str, _: ServeConfig) -> str:
    given = lora(source)
    _asked("-m", "frameloom", "inspect", "--json", "--", given.path)
    return f"{given.path}, strength {given.strength:g}"


def _asked(*arguments: str) -> dict[str, Any]:
    """What another process says in JSON. Raises RequestError with its sentence."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=_PATIENCE_S, check=False,
            stdin=subprocess.DEVNULL, cwd=Path.cwd(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RequestError(f"it took longer than {_PATIENCE_S:.0f} seconds to look at it") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RequestError((lines[-1] if lines else f"exit code {done.returncode}").removeprefix("frameloom: "))
    told: dict[str, Any] = json.loads(done.stdout)
    return told
