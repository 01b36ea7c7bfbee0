"""Chooses the device and the dtype to compute in, with a reason for each choice, and reads peak memory."""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from frameloom.errors import RequestError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_CGROUP_FILES = ("memory.max", "memory.current")


def choose_device(name: str = "auto") -> tuple[torch.device, str]:
    """The device called `name` (auto, cpu, cuda, cuda:1, mps) and why. Raises RequestError if it is not there."""
    if not isinstance(name, str):
        raise RequestError(f"device {name!r} is no name; use auto or one of {', '.join(available_devices())}")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0), f"found {torch.cuda.get_device_name(0)}"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "found an Apple GPU"
        return torch.device("cpu"), "no accelerator was found"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device {name!r} is unknown; use one of {', '.join(available_devices())}") from None
    known = available_devices()
    full_name = f"{device.type}:{device.index or 0}" if device.type == "cuda" else device.type
    if full_name not in known:
        raise RequestError(f"device {name!r} is not on this machine; use one of {', '.join(known)}")
    return torch.device(full_name), "asked for"


def available_devices() -> list[str]:
    """Names that `choose_device` accepts here, besides auto."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def check_dtype_name(name: str) -> None:
    """Raise RequestError unless `name` is auto or a dtype that can be computed in."""
    if name != "auto" and (not isinstance(name, str) or name not in DTYPES):
        raise RequestError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")


def choose_dtype(name: str, device: torch.device, *, preferred: torch.dtype) -> tuple[torch.dtype, str]:
    """The dtype called `name`, or for auto the preferred one if the device computes well in it, and why.

    Raises RequestError on an unknown name.
    """
    check_dtype_name(name)
    if name != "auto":
        return DTYPES[name], "asked for"
    if preferred is torch.float16 and device.type == "cpu":
        return torch.float32, "CPUs compute float16 slowly"
    if preferred is torch.bfloat16 and not _has_bfloat16(device):
        return torch.float32, f"{device.type} has no bfloat16 arithmetic here"
    return preferred, "the dtype of the checkpoint"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type == "cpu":
        return "avx512_bf16" in cpu_flags() or "amx_bf16" in cpu_flags() or "bf16" in cpu_flags()
    return True


def cpu_flags() -> frozenset[str]:
    """Instruction set extensions of the CPU, as Linux names them; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            line = next((line for line in file if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


@contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn an allocation that failed into a RequestError: no memory for `what`; `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        raise RequestError(f"there is not enough memory for {what}; {remedy}") from error


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` takes, the device's work included."""
    synchronise(device)
    begun = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begun


def is_memory_error(error: BaseException) -> bool:
    """Whether an allocation failed; torch's CPU allocator has no error class of its own."""
    failed = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return failed or isinstance(error, MemoryError | torch.OutOfMemoryError)


def free_memory_bytes(device: torch.device) -> int:
    """What could be allocated now: of the device, or of the machine within the limit of its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    limits = [_meminfo_available(), _cgroup_free()]
    known = [limit for limit in limits if limit is not None]
    if known:
        return min(known)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS does not say what is free


def _meminfo_available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            line = next((line for line in file if line.startswith("MemAvailable:")), None)
    except OSError:
        return None
    return None if line is None else int(line.split()[1]) * 1024


def _cgroup_free() -> int | None:
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text("ascii").strip() for name in _CGROUP_FILES)
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the device where it counts it, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
