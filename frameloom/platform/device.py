"""Chooses the device and the dtype to compute in, with a reason for each choice, and reads peak memory."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from frameloom.errors import RequestError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
        on_cpu = "can't allocate memory" in str(error)  # its allocator has no error class of its own
        if not (on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)):
            raise
        raise RequestError(f"there is not enough memory for {what}; {remedy}") from error


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the device where it counts it, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
