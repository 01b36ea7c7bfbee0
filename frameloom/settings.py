"""Every environment variable Frameloom reads, and its log. Nothing else reads os.environ.

FRAMELOOM_LOG: level of the log (debug, info, warning, error); the command line shows info and above by default.
FRAMELOOM_CACHE: folder for what is worth keeping between runs (compiled kernels, measured choices); by default
frameloom in XDG_CACHE_HOME or ~/.cache.
FRAMELOOM_JOBS: folder of the jobs, by default frameloom/jobs in XDG_STATE_HOME or ~/.local/state.
FRAMELOOM_DATA: data folder of `frameloom serve`, by default frameloom/serve in XDG_STATE_HOME or ~/.local/state.
FRAMELOOM_API_KEY: the secret of the one key of `frameloom serve`, where there is no file of keys.
TORCHINDUCTOR_CACHE_DIR: folder for what torch.compile generates; set here, to one in the cache folder, if it is not.
MKL_CBWR: the order in which MKL sums; set by the command, to AUTO, if it is not.
CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES, MUSA_VISIBLE_DEVICES, ZE_AFFINITY_MASK: of several workers of a server
each is given its part of these devices.

One of several processes knows its place from what torchrun, or the launcher of `--gpus`, sets: RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_USE_AGENT_STORE, TORCHELASTIC_RESTART_COUNT.
FRAMELOOM_HEART_FD, FRAMELOOM_STORE_FD: descriptors that the launcher hands to its ranks. For them it also sets, unless
they are set, OMP_NUM_THREADS (an equal share of the cores), GLOO_SOCKET_IFNAME and TORCH_CPP_LOG_LEVEL. MASTER_PORT set
for the launcher is the port to use; by default a free one is found.
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from frameloom.errors import RequestError

LOGGER_NAME = "frameloom"
LOOPBACK = "127.0.0.1"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def log_level(*, quiet: bool = False) -> int:
    """The level asked for by FRAMELOOM_LOG, else info, or warning when quiet. Raises RequestError on another word."""
    name = os.environ.get("FRAMELOOM_LOG", "").lower()
    if not name:
        return logging.WARNING if quiet else logging.INFO
    if name not in _LEVELS:
        raise RequestError(f"FRAMELOOM_LOG is {name!r}; use one of {', '.join(_LEVELS)}")
    return _LEVELS[name]


def cache_folder() -> Path:
    """Where compiled kernels and measured choices are kept; it may not exist yet. Raises RequestError."""
    return _folder("FRAMELOOM_CACHE", "XDG_CACHE_HOME", ".cache")


def jobs_folder() -> Path:
    """Where jobs are kept; it may not exist yet. Raises RequestError."""
    path = _folder("FRAMELOOM_JOBS", "XDG_STATE_HOME", ".local/state")
    return path if os.environ.get("FRAMELOOM_JOBS") else path / "jobs"


def data_folder() -> Path:
    """Where the server keeps jobs and videos; it may not exist yet. Raises RequestError."""
    path = _folder("FRAMELOOM_DATA", "XDG_STATE_HOME", ".local/state")
    return path if os.environ.get("FRAMELOOM_DATA") else path / "serve"


def api_key() -> str:
    """The secret of the server's one key, or nothing."""
    return os.environ.get("FRAMELOOM_API_KEY", "")


def _folder(name: str, parent: str, below_home: str) -> Path:
    """What the variable `name` says, else frameloom in that of the variable `parent`, or below the user's home."""
    chosen = os.environ.get(name)
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        return Path(os.environ.get(parent) or Path.home() / below_home) / "frameloom"
    except RuntimeError:  # an unknown ~user, or one without a home
        known = f"{name} is {chosen!r}, whose home is unknown" if chosen else "this user has no home folder"
        raise RequestError(f"{known}; set {name} to a folder that can be written") from None


def keep_compiled_code() -> None:
    """Let torch.compile keep what it generates in the cache folder; torch reads no other setting for it."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """What a process that was started as one of several knows of itself and of where the others meet.

    `local_rank` of `local_world_size` processes on this machine. `agent_store`: torchrun serves the store at
    `address`:`port`, otherwise rank 0 does; `attempt` counts torchrun's restarts. `heart_fd` and `store_fd` (rank 0's
    listening socket) are there under our own launcher alone.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    agent_store: bool = False
    attempt: int = 0
    heart_fd: int | None = None
    store_fd: int | None = None


_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_RANKS = (
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "FRAMELOOM_HEART_FD", "FRAMELOOM_STORE_FD",
)  # fmt: skip
_DEVICES = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "MUSA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_START_ANEW = "start with --gpus or torchrun, or unset RANK and WORLD_SIZE"


def launched() -> Launched | None:
    """This process's place among those it was started with, or None. Raises RequestError where that makes no sense."""
    if not any(os.environ.get(name) for name in ("RANK", "WORLD_SIZE")):
        return None
    missing = [name for name in _PLACE if not os.environ.get(name)]
    if missing:
        there = next(name for name in ("RANK", "WORLD_SIZE") if os.environ.get(name))
        raise RequestError(f"{there} is set and {', '.join(missing)} not; {_START_ANEW}")
    world_size = _number("WORLD_SIZE", 1, 2**16)
    local_world_size = _number("LOCAL_WORLD_SIZE", 1, world_size)
    return Launched(
        rank=_number("RANK", 0, world_size - 1),
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", 0, local_world_size - 1),
        local_world_size=local_world_size,
        address=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT", 1, 2**16 - 1),
        agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number("TORCHELASTIC_RESTART_COUNT", 0, 2**31) if "TORCHELASTIC_RESTART_COUNT" in os.environ else 0,
        heart_fd=_descriptor("FRAMELOOM_HEART_FD"),
        store_fd=_descriptor("FRAMELOOM_STORE_FD"),
    )


def master_port() -> int | None:
    """The port asked for by MASTER_PORT, or None. Raises RequestError."""
    unset = "unset MASTER_PORT and a free port is found"
    return _number("MASTER_PORT", 1, 2**16 - 1, unset) if os.environ.get("MASTER_PORT") else None


def ask_for_same_sums() -> None:
    """Let MKL sum in one order wherever tensors begin in memory; of use before torch is imported.

    That costs nothing that could be measured. Who has set MKL_CBWR keeps it.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")


def rank_environment(rank: int, count: int, *, port: int, heart_fd: int, store_fd: int | None) -> dict[str, str]:
    """The environment of one of `count` ranks that are started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port, "FRAMELOOM_HEART_FD": heart_fd,
    }  # fmt: skip
    if store_fd is not None:
        ours["FRAMELOOM_STORE_FD"] = store_fd
    unless_set = {
        "OMP_NUM_THREADS": max(1, cores // count),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # of a rank that dies the launcher tells, once
    }
    foreign = ("TORCHELASTIC_", "FRAMELOOM_STORE_FD")
    given = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {name: str(value) for name, value in (unless_set | given | ours).items()}


def worker_environment(number: int, workers: int, ranks: int) -> dict[str, str]:
    """The environment of one of a server's `workers`, which has so many ranks: devices and cores of its own.

    One worker alone has them all, as any process has.
    """
    given = {name: value for name, value in os.environ.items() if name not in (*_PLACE, *_OF_RANKS)}
    if workers == 1:
        return given
    mine = range(number * ranks, (number + 1) * ranks)
    for name in _DEVICES:
        there = given[name].split(",") if given.get(name) else None
        chosen = [str(index) for index in mine] if there is None else [there[i] for i in mine if i < len(there)]
        given[name] = ",".join(chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // (workers * ranks))), **given}


def _number(name: str, low: int, high: int, remedy: str = _START_ANEW) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
        raise RequestError(f"{name} is {text!r}, where a whole number from {low} to {high} belongs; {remedy}")
    return int(text)


def _descriptor(name: str) -> int | None:
    return _number(name, 0, 2**20) if name in os.environ else None
