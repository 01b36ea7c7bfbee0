"""Chooses the device and the dtype to compute in, with a reason for each choice, and asks a device what it has.

The platforms are tried in the order of `PLATFORMS`; a new one is one more entry there.
"""

import difflib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from frameloom.errors import RequestError
from frameloom.platform.accel import MUSA, NPU, XPU
from frameloom.platform.base import Platform
from frameloom.platform.cuda import CUDA, ROCM
from frameloom.platform.host import CPU, MPS

PLATFORMS: tuple[Platform, ...] = (CUDA, ROCM, NPU, MUSA, XPU, MPS, CPU)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_device(name: str = "auto", torch: Any = torch) -> tuple[torch.device, str]:
    """The device called `name` and why it is taken.

    `name`: auto (the first platform that is here), the name of a platform (cpu, cuda, rocm, npu, musa, xpu, mps), or
    one with a number (cuda:1). A name means that device: RequestError if it is not here.
    """
    if not isinstance(name, str):
        raise RequestError(f"device {name!r} is no name; use {_listed('auto', *available_devices(torch))}")
    if name == "auto":
        return _first_found(torch)
    match = re.fullmatch(r"([a-z]+)(?::(0|[1-9]\d{0,3}))?", name)
    platform = _named(match[1], torch) if match else None
    if match is None or platform is None:
        known = _listed("auto", *available_devices(torch))
        raise RequestError(f"device {name!r} is unknown{_nearest(name)}; use {known}")
    found, index = platform.detect(torch), int(match[2] or 0)
    if not found.found:
        raise RequestError(
            f"device {name!r} is not on this machine ({found.reason}); use {_listed(*available_devices(torch))}, "
            f"or for {platform.title}: {platform.hint}"
        )
    if index >= len(found.devices):
        raise RequestError(f"device {name!r} is not on this machine; use {_listed(*available_devices(torch))}")
    return _device(platform, index, torch), "asked for"


def available_devices(torch: Any = torch) -> list[str]:
    """Names that `choose_device` accepts here, besides auto."""
    return [name for platform in PLATFORMS for name in platform.device_names(torch)]


def platform_of(device: torch.device, torch: Any = torch) -> Platform:
    """The platform of a device that was chosen. The meta device counts as the CPU. RequestError on any other."""
    platform = CPU if device.type == "meta" else _named(device.type, torch)
    if platform is None:
        raise RequestError(f"nothing is known of device '{device}'; use {_listed(*available_devices(torch))}")
    return platform


def check_dtype_name(name: str) -> None:
    """Raise RequestError unless `name` is auto or a dtype that can be computed in."""
    if name != "auto" and (not isinstance(name, str) or name not in DTYPES):
        near = difflib.get_close_matches(name, DTYPES, n=1) if isinstance(name, str) else []
        hint = f", the nearest is {near[0]!r}" if near else ""
        raise RequestError(f"dtype {name!r} is unknown{hint}; use auto, {', '.join(DTYPES)}")


def choose_dtype(
    name: str, device: torch.device, *, preferred: torch.dtype, torch: Any = torch
) -> tuple[torch.dtype, str]:
    """The dtype called `name`, or for auto the preferred one if the device computes well in it, and why.

    Raises RequestError on an unknown name, and on one that the device cannot compute in.
    """
    check_dtype_name(name)
    platform = platform_of(device, torch)
    if name != "auto":
        if reason := platform.refuses(DTYPES[name], device.index, torch):
            others = [other for other, dtype in DTYPES.items() if not platform.refuses(dtype, device.index, torch)]
            raise RequestError(f"dtype {name!r} is not possible on {device} ({reason}); use {_listed(*others)}")
        return DTYPES[name], "asked for"
    if reason := platform.avoids(preferred, device.index, torch):
        return DTYPES["float32"], reason
    return preferred, "the dtype of the checkpoint"


@contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn an allocation that failed into a RequestError: no memory for `what`; `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        raise RequestError(f"there is not enough memory for {what}; {remedy}") from error


def is_memory_error(error: BaseException) -> bool:
    """Whether an allocation failed; torch's allocators for CPUs and Apple GPUs have no error class of their own."""
    said = ("can't allocate memory", "MPS backend out of memory")
    failed = isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    return failed or isinstance(error, MemoryError | torch.OutOfMemoryError)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock read next is honest."""
    platform_of(device).synchronise(device.index)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` takes, the device's work included."""
    synchronise(device)
    begun = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begun


def device_name(device: torch.device) -> str:
    """What its maker calls a device."""
    return platform_of(device).device_name(device.index)


def free_memory_bytes(device: torch.device) -> int:
    """What could be allocated now: of the device, or of the machine within the limit of its control group."""
    return platform_of(device).free_memory_bytes(device.index)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the device where it counts it, else of the process."""
    return platform_of(device).peak_memory_bytes(device.index)


def reset_peak_memory(device: torch.device) -> None:
    """Begin to count the peak memory anew, where the device counts it."""
    platform_of(device).reset_peak(device.index)


def _first_found(torch: Any) -> tuple[torch.device, str]:
    for platform in PLATFORMS:
        if platform is not CPU and (found := platform.detect(torch)).found:
            return _device(platform, 0, torch), found.reason
    return _device(CPU, 0, torch), "no accelerator was found"


def _named(name: str, torch: Any) -> Platform | None:
    """The platform of a name; what torch calls cuda is ROCm's in a build for it."""
    if name == "cuda" and torch.version.hip:
        return ROCM
    return next((platform for platform in PLATFORMS if platform.name == name), None)


def _device(platform: Platform, index: int, torch: Any) -> Any:
    """The device as torch names it; a stand-in for torch makes its own."""
    return torch.device(f"{platform.device_type}:{index}" if platform.numbered else platform.device_type)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.partition(":")[0].lower(), [platform.name for platform in PLATFORMS], n=1)
    return f", the nearest name is {near[0]!r}" if near else ""


def _listed(*names: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
