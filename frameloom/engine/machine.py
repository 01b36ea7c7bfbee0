"""What a plan is made for: this machine, or a device that is known by its data sheet."""

from dataclasses import dataclass, replace

import torch

from frameloom.platform.device import choose_device, device_name, free_memory_bytes, platform_of
from frameloom.platform.host import CPU, resident_bytes
from frameloom.platform.specs import DeviceSpec, spec_of

LIBRARIES_BYTES = 12_000_000  # code and buffers of the libraries that compute, once they have been called: measured
_AROUND_BYTES = 110_000_000  # tokenizer, video writer and what they import, likewise
_CONTEXT_BYTES = 600_000_000  # what drivers and libraries of accelerators take of their memory: not measured
_HOST_BYTES = 1_500_000_000  # of a process that computes elsewhere: torch with its libraries for accelerators
_HERE = ("auto", "cpu", "cuda", "rocm", "npu", "musa", "xpu", "mps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A device and its host. `spec` None: it is here, as `device`. `is_host`: they are one, with one memory.

    `memory_bytes` and `host_memory_bytes`: what may be used. `base_bytes`: what is taken before weights come.
    """

    name: str
    device: torch.device
    platform: str
    memory_bytes: int
    host_memory_bytes: int
    base_bytes: int
    total_bytes: int
    spec: DeviceSpec | None = None

    @property
    def is_host(self) -> bool:
        """Whether weights of the device lie in the host's memory."""
        return self.platform == "cpu"

    def shared_by(self, processes: int) -> "Machine":
        """What each of several processes has of it: of a host its part, otherwise a device of its own."""
        if not self.is_host or processes == 1:
            return self
        return replace(self, memory_bytes=self.memory_bytes // processes)

    @property
    def host_base_bytes(self) -> int:
        """What the host takes besides weights that wait there."""
        return 0 if self.is_host else _HOST_BYTES


def machine_of(
    name: str, *, memory: int | None = None, host_memory: int | None = None, only_here: bool = False
) -> Machine:
    """The machine called `name`: auto, a platform that is here (cuda:1), or a device of platform/specs.py.

    `memory`, `host_memory`: bytes that may be used instead of what is free, or what the data sheet says. Raises
    RequestError.
    """
    if only_here or name.partition(":")[0] in _HERE:
        return _here(name, memory, host_memory)
    spec = spec_of(name)
    return Machine(
        name=spec.name,
        device=torch.device("meta"),
        platform=spec.platform,
        memory_bytes=memory or spec.memory_bytes,
        host_memory_bytes=host_memory or CPU.total_memory_bytes(),
        base_bytes=_CONTEXT_BYTES,
        total_bytes=memory or spec.memory_bytes,
        spec=spec,
    )


def _here(name: str, memory: int | None, host_memory: int | None) -> Machine:
    device, _ = choose_device(name)
    platform = platform_of(device)
    is_host = platform.name == "cpu"
    taken = resident_bytes()
    free = free_memory_bytes(device) + (taken if is_host else 0)
    return Machine(
        name=device_name(device),
        device=device,
        platform=platform.name,
        memory_bytes=memory or free,
        host_memory_bytes=host_memory or CPU.free_memory_bytes(),
        base_bytes=taken + LIBRARIES_BYTES + _AROUND_BYTES if is_host else _CONTEXT_BYTES,
        total_bytes=memory or platform.total_memory_bytes(device.index),
    )
