"""What this machine has for making videos, what it lacks, what that costs, and how to get it.

`frameloom doctor` prints the findings as a table. Costs were measured (benchmarks/results), or are said not to be.
"""

import os
import platform as host
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from frameloom import __version__
from frameloom.attention.core import backends
from frameloom.ops.native import native
from frameloom.platform.allocator import is_glibc
from frameloom.platform.base import Platform, Verdict
from frameloom.platform.device import DTYPES, PLATFORMS, choose_device, platform_of
from frameloom.settings import cache_folder

_PYTHONS = ((3, 11), (3, 12))  # the oldest and the newest that the tests run on
_TORCHES = ((2, 11), (2, 13))
_NOT_MEASURED = "not measured"
_COMPILER_HINT = "install g++ (on Debian and Ubuntu: apt install g++)"
_TRITON_HINT = "pip install triton, and install gcc"
# Wan 2.1's VAE, 17 frames of 240x320 in float32, two cores: benchmarks/results/vae-cpu-2026-11-21.json.
_WITHOUT_COMPILER = "decoding on the CPU takes 1.3 times as long (31.6 s for 23.7)"
_OTHER_ALLOCATOR = "decoding takes 1.1 times as long where tensors' memory is given back (23.7 s for 21.9)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One part of the machine: whether it is there or can be used, what was seen, and what it costs if it is not."""

    part: str
    found: bool
    what: str
    costs: str = ""
    hint: str = ""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(device: str = "auto") -> list[Finding]:
    """Everything that was looked at, for the device that a run would use. Raises RequestError if it is not here."""
    where, why = choose_device(device)
    platform = platform_of(where)
    return [
        Finding(part="device", found=True, what=f"{where}: {why}"),
        _memory(platform, where),
        *_versions(),
        *(_platform(known) for known in PLATFORMS),
        *_dtypes(platform, where),
        _compiler(platform),
        _verdict("triton", platform.triton, platform.triton_here(), _TRITON_HINT),
        _verdict("torch.compile", platform.compiles, platform.compile_here(), _compile_hint(platform)),
        *_attention(platform),
        _collectives(platform),
        _allocator(platform),
        _cache(cache_folder()),
    ]


def _memory(platform: Platform, where: torch.device) -> Finding:
    free, total = platform.free_memory_bytes(where.index), platform.total_memory_bytes(where.index)
    return Finding(part="memory", found=True, what=f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB")


def _versions() -> Iterator[Finding]:
    yield _version("python", host.python_version(), sys.version_info[:2], _PYTHONS)
    yield _version("torch", torch.__version__, _numbers(torch.__version__), _TORCHES)
    lacking = list(_lacking_packages())
    yield Finding(
        part="packages",
        found=not lacking,
        what=f"frameloom {__version__}: " + (", ".join(lacking) or "every package as new as it must be"),
        costs="it may fail anywhere" if lacking else "",
        hint="pip install --upgrade frameloom" if lacking else "",
    )


def _version(
    part: str, version: str, numbers: tuple[int, ...], tested: tuple[tuple[int, int], tuple[int, int]]
) -> Finding:
    oldest, newest = (".".join(map(str, bound)) for bound in tested)
    inside = tested[0] <= numbers <= tested[1]
    return Finding(
        part=part,
        found=numbers >= tested[0],
        what=version,
        costs="" if inside else f"not tested: the tests run on {oldest} to {newest}",
        hint="" if inside else f"use {part} {oldest} to {newest}",
    )


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of 2.13.0+cpu."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _lacking_packages() -> Iterator[str]:
    """The requirements that are not met, each with what is asked for."""
    try:
        requirements = metadata.requires("frameloom") or []
    except metadata.PackageNotFoundError:
        yield "not installed but run from its folder"
        return
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)  # those of extras and systems have more to them
        if match is None:
            continue
        name, least = match.groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield f"{name} is missing"
            continue
        if _numbers(version) < _numbers(least):
            yield f"{name} is {version}, and {least} is asked for"


def _platform(platform: Platform) -> Finding:
    found = platform.detect()
    return Finding(
        part=platform.name,
        found=found.found,
        what=found.reason,
        costs="" if found.found else f"needed for {platform.hardware}s only",
        hint="" if found.found else platform.hint,
    )


def _dtypes(platform: Platform, where: torch.device) -> Iterator[Finding]:
    for name, dtype in DTYPES.items():
        refused, avoided = platform.refuses(dtype, where.index), platform.avoids(dtype, where.index)
        yield Finding(
            part=name,
            found=avoided is None,
            what=avoided or f"computed by this {platform.hardware}",
            costs="auto takes float32: twice the memory for weights" if avoided else "",
            hint=f"--dtype {name} computes in it all the same" if avoided and not refused else "",
        )


def _compiler(platform: Platform) -> Finding:
    built = native()
    costs = _WITHOUT_COMPILER if platform.name == "cpu" else "nothing on this device"
    return Finding(
        part="C++ compiler",
        found=built.library is not None,
        what=built.reason,
        costs="" if built.library else costs,
        hint="" if built.library else _COMPILER_HINT,
    )


def _compile_hint(platform: Platform) -> str:
    return _COMPILER_HINT if platform.name == "cpu" else _TRITON_HINT


def _verdict(part: str, meant: Verdict, here: Verdict, hint: str) -> Finding:
    """Something that is meant for the platform or not, and if it is, can be used here or not."""
    lacking = meant.usable and not here.usable
    return Finding(
        part=part,
        found=here.usable,
        what=here.reason,
        costs=f"operations run one by one; {_NOT_MEASURED}" if lacking else "",
        hint=hint if lacking else "",
    )


def _attention(platform: Platform) -> Iterator[Finding]:
    """Every backend; one that cannot run on this platform comes without a hint, and costs nothing."""
    for backend in backends(platform.name):
        yield Finding(
            part=f"attention {backend.name}",
            found=backend.reason_missing is None,
            what=backend.reason_missing or f"can be used; exactness {backend.exactness}",
            costs=_NOT_MEASURED if backend.hint else "",
            hint=backend.hint,
        )


def _collectives(platform: Platform) -> Finding:
    if platform.collective is None:
        return Finding(part="collectives", found=False, what=f"torch has one {platform.hardware} at most")
    return Finding(part="collectives", found=True, what=f"torch.distributed over {platform.collective}")


def _allocator(platform: Platform) -> Finding:
    if platform.name != "cpu":
        return Finding(part="allocator", found=True, what="torch's own, on the device")
    if is_glibc():
        return Finding(part="allocator", found=True, what="glibc: freed memory is kept for the next tensor")
    return Finding(part="allocator", found=False, what="left as it is (not glibc)", costs=_OTHER_ALLOCATOR)


def _cache(folder: Path) -> Finding:
    """The folder of compiled kernels and measured choices; it may not exist yet."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        return Finding(
            part="cache folder",
            found=False,
            what=f"{folder} cannot be written: {os.strerror(error.errno or 0)}",
            costs=f"kernels are compiled and choices measured in every run; {_NOT_MEASURED}",
            hint="set FRAMELOOM_CACHE to a folder that can be written",
        )
    return Finding(part="cache folder", found=True, what=f"{folder}: {size / 1e6:.1f} MB")
