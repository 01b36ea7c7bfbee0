"""Paired timings against Diffusers: both sides interleaved in one process, the ratio with its spread, one record."""

import importlib
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from frameloom.errors import RequestError
from frameloom.ops.registry import relative_error
from frameloom.platform.device import device_name, platform_of, timed

Side = Callable[[], Tensor]


def in_turns(sides: Mapping[str, Side], device: torch.device, *, rounds: int) -> dict[str, Any]:
    """Time two sides, the first of them going first in one round and the second in the next.

    Returns how many times faster the first is (median, low, high), the median seconds of each and their ends, and the
    relative error of the round before, which warms up.
    """
    first, second = sides
    error = relative_error(sides[first](), sides[second]())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds):
        for name in (first, second) if round_ % 2 == 0 else (second, first):
            seconds[name].append(timed(sides[name], device))
    ratios = [theirs / ours for theirs, ours in zip(seconds[second], seconds[first], strict=True)]
    return {
        "speedup": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds_between": {name: [min(values), max(values)] for name, values in seconds.items()},
        "relative_error": error,
    }


def peak_in_own_process(module: str, case: Any, name: str) -> int:
    """The most memory, in bytes, of a process or on its device in which a module runs one side of a case once.

    `module` is run with the side and the case, as JSON, and prints the number.
    """
    command = [sys.executable, "-m", module, name, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RequestError(f"the run that measures the memory of {name} failed: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a square matrix product here, in FLOP/s."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(6))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": device_name(device),
        "platform": platform_of(device).name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


def check_words(case: Any, known: Mapping[str, Collection[str]]) -> None:
    """Raise RequestError where an attribute of a case is none of the words known for it, or its rounds are none."""
    for name, words in known.items():
        value = getattr(case, name)
        if value not in words:
            raise RequestError(f"{name} {value!r} is unknown; use one of {', '.join(words)}")
    if case.rounds < 1:
        raise RequestError(f"{case.rounds} rounds measure nothing; use 1 or more")


def check_size(case: Any, *, multiple: int, reason: str) -> None:
    """Raise RequestError where the height and width (multiples) or the frames (4k+1) of a case cannot be computed."""
    height, width, frames = case.height, case.width, case.frames
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise RequestError(f"a picture of {height}x{width} is not possible; use multiples of {multiple} ({reason})")
    if frames < 1 or frames % 4 != 1:
        raise RequestError(f"{frames} frames are not possible; use one more than a multiple of 4, such as 17")


def reference_library() -> Any:
    """Diffusers. Raises RequestError where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError:
        raise RequestError("the comparison needs diffusers, which is not here; run pip install diffusers") from None
