"""What a platform is: a description as data, and the questions that are put to torch about it.

Every question takes the torch namespace, so that decisions about hardware that is not here are tried on a stand-in.
An index is a device's number; None means the current device, as it does in torch.
"""

import importlib
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """Whether a platform can be used here, why or why not, and the names of its devices in order of their numbers."""

    found: bool
    reason: str
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether something is worth using on a platform, and why or why not."""

    usable: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform(ABC):
    """One kind of hardware as torch knows it.

    `device_type` is torch's word for it (that of ROCm is cuda), `toolkit` the attribute of torch.version that a build
    for it sets, `extension` the package that adds it to torch. `collective` names the backend of torch.distributed.
    `numbered` False: torch has one device of it, called without a number. `compiles` and `triton` say whether
    torch.compile and Frameloom's Triton kernels are meant for it; `compile_here` and `triton_here` look whether what
    they need is on this machine.
    """

    name: str
    title: str
    hardware: str
    device_type: str
    numbered: bool = True
    toolkit: str | None = None
    extension: str | None = None
    collective: str | None
    compiles: Verdict
    triton: Verdict
    hint: str

    @abstractmethod
    def detect(self, torch: Any = torch) -> Detection:
        """Look for devices; failures of drivers and extensions become the reason, never an exception."""

    @abstractmethod
    def device_name(self, index: int | None = None, torch: Any = torch) -> str:
        """What its maker calls the device."""

    @abstractmethod
    def free_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """What could be allocated now, torch's own unused reserve included."""

    @abstractmethod
    def total_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """The memory there is."""

    @abstractmethod
    def peak_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """The most memory in use so far: of the device where torch counts it, else of the process."""

    @abstractmethod
    def synchronise(self, index: int | None = None, torch: Any = torch) -> None:
        """Wait until the device has done what it was given."""

    @abstractmethod
    def mark(self, index: int | None = None, torch: Any = torch) -> Any:
        """A point in the device's time, for `seconds_between`."""

    @abstractmethod
    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to a later one."""

    @abstractmethod
    def compile_needs(self) -> str | None:
        """What torch.compile lacks on this machine, or None."""

    def reset_peak(self, index: int | None = None, torch: Any = torch) -> None:
        """Begin to count the peak anew, where that is possible: the peak of a process stays."""
        return

    def stream(self, index: int | None = None, torch: Any = torch) -> Any | None:
        """A new queue of work beside the current one, or None where there is but one."""
        return None

    def event(self, torch: Any = torch) -> Any | None:
        """A new timed event to put into a queue, or None where there are none."""
        return None

    def current(self, index: int | None = None, torch: Any = torch) -> Any | None:
        """The queue that work is put into now, or None where there is but one."""
        return None

    def on(self, queue: Any, torch: Any = torch) -> AbstractContextManager[Any]:
        """Put work into a queue that `stream` made, meanwhile."""
        return nullcontext()

    def pinned(self, count: int, torch: Any = torch) -> Any:
        """Bytes on the host that the device copies from while the host goes on; ordinary ones where it has no such."""
        return torch.empty(count, dtype=torch.uint8)

    def has_bfloat16(self, index: int | None = None, torch: Any = torch) -> bool:
        """Whether the device itself computes bfloat16."""
        return True

    def refuses(self, dtype: torch.dtype, index: int | None = None, torch: Any = torch) -> str | None:
        """Why nothing can be computed in a dtype, or None."""
        return None

    def avoids(self, dtype: torch.dtype, index: int | None = None, torch: Any = torch) -> str | None:
        """Why a dtype is not chosen unless it is asked for, or None."""
        if reason := self.refuses(dtype, index, torch):
            return reason
        if dtype == torch.bfloat16 and not self.has_bfloat16(index, torch):
            return f"this {self.hardware} has no bfloat16 arithmetic"
        return None

    def toolkit_version(self, torch: Any = torch) -> str | None:
        """The version of the toolkit that torch is built with, or None."""
        return None if self.toolkit is None else getattr(torch.version, self.toolkit, None)

    def compile_here(self) -> Verdict:
        """Whether torch.compile is worth using, on this machine."""
        if self.compiles.usable and (lacking := self.compile_needs()):
            return Verdict(usable=False, reason=lacking)
        return self.compiles

    def triton_here(self) -> Verdict:
        """Whether Frameloom's Triton kernels can be used, on this machine."""
        if self.triton.usable and (lacking := triton_needs()):
            return Verdict(usable=False, reason=lacking)
        return self.triton

    def device_names(self, torch: Any = torch) -> list[str]:
        """What `--device` may say for the devices that are here."""
        count = len(self.detect(torch).devices)
        return [f"{self.device_type}:{i}" if self.numbered else self.device_type for i in range(count)]


class Accelerator(Platform):
    """Hardware with a memory, queues and events of its own, behind torch.cuda or a namespace made like it."""

    __slots__ = ()

    def detect(self, torch: Any = torch) -> Detection:
        """Whether the build or the extension knows the platform, and then whether devices answer."""
        if lacking := self._build_lacks(torch):
            return Detection(found=False, reason=lacking)
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")  # torch tells by a warning what is wrong with a driver
                devices = self._devices(torch)
        except Exception as error:  # a driver may fail in any way, and that it does is the answer
            return Detection(found=False, reason=f"no {self.hardware} can be used: {first_line(error)}")
        if devices:
            return Detection(found=True, reason=f"found {counted(devices)}", devices=devices)
        why = f": {first_line(warned[0].message)}" if warned else ""
        return Detection(found=False, reason=f"{self._build(torch)}, but no {self.hardware} answers{why}")

    def device_name(self, index: int | None = None, torch: Any = torch) -> str:
        """What the driver calls the device."""
        return str(self._namespace(torch).get_device_name(index))

    def free_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """What the driver has free, and what torch keeps in reserve."""
        there = self._namespace(torch)
        free, _ = there.mem_get_info(index)
        return int(free + there.memory_reserved(index) - there.memory_allocated(index))

    def total_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """The memory of the device."""
        return int(self._namespace(torch).mem_get_info(index)[1])

    def peak_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """The most that tensors took at once."""
        return int(self._namespace(torch).max_memory_allocated(index))

    def reset_peak(self, index: int | None = None, torch: Any = torch) -> None:
        """Begin to count the peak anew."""
        self._namespace(torch).reset_peak_memory_stats(index)

    def synchronise(self, index: int | None = None, torch: Any = torch) -> None:
        """Wait for all queues of the device."""
        self._namespace(torch).synchronize(index)

    def stream(self, index: int | None = None, torch: Any = torch) -> Any:
        """A new queue of work beside the current one."""
        return self._namespace(torch).Stream(device=index)

    def event(self, torch: Any = torch) -> Any:
        """A new event that knows its time."""
        return self._namespace(torch).Event(enable_timing=True)

    def current(self, index: int | None = None, torch: Any = torch) -> Any:
        """The queue that work is put into now."""
        return self._namespace(torch).current_stream(index)

    def on(self, queue: Any, torch: Any = torch) -> AbstractContextManager[Any]:
        """Put work into a queue, meanwhile."""
        there: AbstractContextManager[Any] = self._namespace(torch).stream(queue)
        return there

    def pinned(self, count: int, torch: Any = torch) -> Any:
        """Memory that the system does not move: copies from it need not wait."""
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def mark(self, index: int | None = None, torch: Any = torch) -> Any:
        """A point in the device's time that the host does not wait for: an event in the device's current queue."""
        with self._namespace(torch).device(index):
            event = self.event(torch)
            event.record()
        return event

    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds between two marks; waits for the second, and for nothing that was queued after it."""
        second.synchronize()
        return float(first.elapsed_time(second)) / 1000  # events count in milliseconds

    def compile_needs(self) -> str | None:
        """What TorchInductor lacks to write Triton kernels, or None."""
        return triton_needs()

    def _namespace(self, torch: Any) -> Any:
        return getattr(torch, self.device_type)

    def _devices(self, torch: Any) -> tuple[str, ...]:
        there = self._namespace(torch)
        return tuple(self.device_name(i, torch) for i in range(there.device_count())) if there.is_available() else ()

    def _build(self, torch: Any) -> str:
        if self.extension is not None:
            return f"{self.extension} is loaded"
        return f"torch {torch.__version__} is built for {self.title} {self.toolkit_version(torch)}"

    def _build_lacks(self, torch: Any) -> str | None:
        """Why this torch cannot know the platform, or None."""
        if self.extension is not None:
            return _load(self.extension, self.device_type, torch)
        if self.toolkit_version(torch):
            return None
        return f"torch {torch.__version__} is built without {self.title}"


def triton_needs() -> str | None:
    """What Triton lacks on this machine, or None: the package, and the C compiler that builds its launchers."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not any(shutil.which(name) for name in ("gcc", "clang")):
        return "triton finds no C compiler (gcc or clang)"
    return None


def first_line(error: object) -> str:
    """The first line of an error or warning; without a message its kind."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def counted(names: Iterable[str]) -> str:
    """Names with the number of those that are equal: "8 x NVIDIA H200"."""
    listed = list(names)
    return ", ".join(f"{n} x {name}" if (n := listed.count(name)) > 1 else name for name in dict.fromkeys(listed))


def _load(package: str, attribute: str, torch: Any) -> str | None:
    """Load the package that adds an attribute to torch, and say what is wrong, or None."""
    if hasattr(torch, attribute):  # torch loads extensions that are installed, unless the environment forbids it
        return None
    if find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except Exception as error:  # the toolkit's libraries are missing, another accelerator is in the way, and so on
        return f"{package} is installed but cannot be loaded: {first_line(error)}"
    return None if hasattr(torch, attribute) else f"{package} is installed but brings no torch.{attribute}"
