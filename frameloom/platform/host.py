"""The computer itself: its CPU, and the GPU of an Apple computer, which shares the CPU's memory."""

import os
import platform
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from frameloom.platform.base import Detection, Platform, Verdict

_CGROUP = Path("/sys/fs/cgroup")


class Host(Platform):
    """What CPU and Apple GPU have in common: no queues or events, and a peak memory that is the process's."""

    __slots__ = ()

    def peak_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """The most memory that this process had at once.

        Linux's `ru_maxrss` begins with that of the process which started this one; what it calls VmHWM does not.
        """
        own = _kibibytes("VmHWM")
        if own is not None:
            return own * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

    def mark(self, index: int | None = None, torch: Any = torch) -> float:
        """The clock, once the device has done what it was given."""
        self.synchronise(index, torch)
        return time.perf_counter()

    def seconds_between(self, first: float, second: float) -> float:
        """Seconds from one reading of the clock to another."""
        return second - first


class Mps(Host):
    """The GPU of an Apple computer, behind torch.mps."""

    __slots__ = ()

    def detect(self, torch: Any = torch) -> Detection:
        """Whether the build knows Metal, and then whether the system does."""
        if not torch.backends.mps.is_built():
            return Detection(found=False, reason=f"torch {torch.__version__} is built without MPS")
        if not torch.backends.mps.is_available():
            return Detection(found=False, reason="no Apple GPU answers; it needs macOS 14 or newer")
        return Detection(found=True, reason="found an Apple GPU", devices=(self.device_name(torch=torch),))

    def device_name(self, index: int | None = None, torch: Any = torch) -> str:
        """Apple's GPUs have no name but that of the chip."""
        return f"Apple GPU of {cpu_name()}"

    def free_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """What is left of it when torch's tensors have theirs."""
        return max(0, self.total_memory_bytes(index, torch) - int(torch.mps.current_allocated_memory()))

    def total_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """What Metal recommends to use at most, of the memory that CPU and GPU share."""
        return int(torch.mps.recommended_max_memory())

    def synchronise(self, index: int | None = None, torch: Any = torch) -> None:
        """Wait for all that the GPU was given."""
        torch.mps.synchronize()

    def refuses(self, dtype: torch.dtype, index: int | None = None, torch: Any = torch) -> str | None:
        """Metal knows no float64, and bfloat16 since macOS 14."""
        if dtype == torch.float64:
            return "Apple GPUs cannot compute float64"
        if dtype == torch.bfloat16 and not torch.backends.mps.is_macos_or_newer(14, 0):
            return "Apple GPUs compute bfloat16 from macOS 14 on"
        return None

    def compile_needs(self) -> str | None:
        """Nothing: it is not used."""
        return None


class Cpu(Host):
    """The CPU: it is always there."""

    __slots__ = ()

    def detect(self, torch: Any = torch) -> Detection:
        """Its name and the threads that torch uses."""
        name, threads = self.device_name(), torch.get_num_threads()
        return Detection(found=True, reason=f"{name}, {threads} thread{'s' * (threads > 1)}", devices=(name,))

    def device_name(self, index: int | None = None, torch: Any = torch) -> str:
        """What its maker calls it."""
        return cpu_name()

    def free_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """What could be allocated now, within the limit of the process's control group."""
        known = [limit for limit in (_meminfo_available(), _cgroup_free()) if limit is not None]
        return min(known) if known else _physical_bytes() // 2  # macOS does not say what is free

    def total_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """The memory of the machine, or the limit of the process's control group."""
        limit = _cgroup_number("memory.max")
        return _physical_bytes() if limit is None else min(limit, _physical_bytes())

    def synchronise(self, index: int | None = None, torch: Any = torch) -> None:
        """Nothing is under way: a CPU computes while torch is called."""

    def has_bfloat16(self, index: int | None = None, torch: Any = torch) -> bool:
        """Whether the CPU has instructions for it, as far as Linux tells."""
        return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})

    def avoids(self, dtype: torch.dtype, index: int | None = None, torch: Any = torch) -> str | None:
        """CPUs compute any dtype, some of them slowly."""
        if dtype == torch.float16:
            return "CPUs compute float16 slowly"
        if dtype == torch.bfloat16 and not self.has_bfloat16():
            return "this CPU has no bfloat16 arithmetic"
        return None

    def compile_needs(self) -> str | None:
        """The C++ compiler that TorchInductor calls."""
        compiler = "clang++" if sys.platform == "darwin" else "g++"
        return None if shutil.which(compiler) else f"TorchInductor writes C++ for CPUs and finds no {compiler}"


def cpu_flags() -> frozenset[str]:
    """Instruction set extensions of the CPU, as Linux names them; empty where it does not say."""
    return frozenset(_cpuinfo("flags", "features").split())


def _kibibytes(name: str) -> int | None:
    """A line of what Linux says of this process; None where it does not."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def resident_bytes() -> int:
    """What this process has in memory now; where the system does not say, the most it had."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError):
        return CPU.peak_memory_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_name() -> str:
    """What the CPU's maker calls it, or the architecture where the system does not say."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """The value of the first line of /proc/cpuinfo with one of the keys."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            line = next((line for line in file if line.lower().startswith(keys)), "")
    except OSError:
        return ""
    return line.partition(":")[2].strip()


def _meminfo_available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            line = next((line for line in file if line.startswith("MemAvailable:")), None)
    except OSError:
        return None
    return None if line is None else int(line.split()[1]) * 1024


def _cgroup_free() -> int | None:
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    return None if limit is None or used is None else max(0, limit - used)


def _cgroup_number(name: str) -> int | None:
    """A number of the control group; None where it has none ("max" is no limit)."""
    try:
        text = (_CGROUP / name).read_text("ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


MPS = Mps(
    name="mps",
    title="MPS",
    hardware="Apple GPU",
    device_type="mps",
    numbered=False,
    collective=None,
    compiles=Verdict(usable=False, reason="operations run one by one: TorchInductor for Metal is young"),
    triton=Verdict(usable=False, reason="Triton has no backend for Metal"),
    hint="on an Apple computer: pip install torch",
)
CPU = Cpu(
    name="cpu",
    title="CPU",
    hardware="CPU",
    device_type="cpu",
    numbered=False,
    collective="gloo",
    compiles=Verdict(usable=True, reason="TorchInductor writes C++ for it"),
    triton=Verdict(usable=False, reason="Triton is for GPUs; its interpreter on a CPU is for tests"),
    hint="",
)
