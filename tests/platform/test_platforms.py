"""Which device is taken and why, on machines that are not here: a stand-in for torch answers as their drivers would."""

import re
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from frameloom.errors import RequestError
from frameloom.platform.accel import MUSA, NPU, XPU
from frameloom.platform.cuda import CUDA, ROCM
from frameloom.platform.device import (
    DTYPES,
    PLATFORMS,
    available_devices,
    choose_device,
    choose_dtype,
    free_memory_bytes,
    is_memory_error,
    peak_memory_bytes,
    platform_of,
    timed,
)
from frameloom.platform.host import CPU, MPS

ACCELERATORS = (CUDA, ROCM, NPU, MUSA, XPU)
GIB = 2**30


class Device:
    """A device as torch.device makes it, of any type."""

    def __init__(self, text):
        self.type, _, number = text.partition(":")
        self.index = int(number) if number else None
        self.text = text

    def __str__(self):
        return self.text


class Event:
    """An event that is done 7 ms after the one recorded before it, once somebody waited for it."""

    clock_ms = 0

    def __init__(self, enable_timing=False):
        assert enable_timing
        self.waited = False

    def record(self):
        Event.clock_ms += 7
        self.at_ms = Event.clock_ms

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited
        return float(end.at_ms - self.at_ms)


@dataclass
class Gpus:
    """What torch.cuda answers, and the namespaces that are made like it."""

    names: tuple = ()
    native_bfloat16: bool = True
    properties: dict = field(default_factory=dict)
    warning: str = ""
    error: str = ""
    calls: list = field(default_factory=list)
    Event = Event

    def is_available(self):
        if self.warning:
            warnings.warn(self.warning, UserWarning, stacklevel=2)
        return bool(self.names)

    def device_count(self):
        return len(self.names)

    def get_device_name(self, index=None):
        if self.error:
            raise RuntimeError(self.error)
        return self.names[index or 0]

    def get_device_properties(self, index=None):
        return SimpleNamespace(**self.properties)

    def is_bf16_supported(self, including_emulation=True):
        return self.native_bfloat16 or including_emulation

    def mem_get_info(self, index=None):
        return 10 * GIB + index, 80 * GIB

    def memory_reserved(self, index=None):
        return 5 * GIB

    def memory_allocated(self, index=None):
        return 2 * GIB

    def max_memory_allocated(self, index=None):
        return 33 * GIB + index

    def reset_peak_memory_stats(self, index=None):
        self.calls.append(("reset", index))

    def synchronize(self, index=None):
        self.calls.append(("synchronize", index))

    def Stream(self, device=None):  # noqa: N802  # torch's name
        return ("a stream of", device)

    @contextmanager
    def device(self, index):
        self.calls.append(("enter", index))
        yield
        self.calls.append(("leave", index))


class Npus(Gpus):
    """torch.npu knows no emulation of bfloat16."""

    def is_bf16_supported(self, including_emulation=False):
        return self.native_bfloat16


def stand_in(*, cuda=None, hip=None, xpu=None, mps=None, macos=15):
    """A torch built for given versions of toolkits, without devices; `mps`: whether a GPU answers, None: not built."""
    metal = SimpleNamespace(
        is_built=lambda: mps is not None,
        is_available=lambda: bool(mps),
        is_macos_or_newer=lambda major, minor: macos >= major,
    )
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda, hip=hip, xpu=xpu),
        backends=SimpleNamespace(mps=metal),
        device=Device,
        get_num_threads=lambda: 8,
        cuda=Gpus(),
        xpu=Gpus(),
        **{name: getattr(torch, name) for name in ("float64", *DTYPES)},
    )


BUILDS = {"cuda": {"cuda": "13.0"}, "rocm": {"hip": "7.2"}, "xpu": {"xpu": "20260000"}}


def machine_with(name, *devices, **facts):
    """A torch on a machine with devices of one platform."""
    machine = stand_in(**BUILDS.get(name, {}))
    gpus = (Npus if name == "npu" else Gpus)(names=devices, **facts)
    setattr(machine, "cuda" if name == "rocm" else name, gpus)
    return machine


def refusal(name, machine):
    with pytest.raises(RequestError) as caught:
        choose_device(name, machine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which device ---


@pytest.mark.parametrize("platform", ACCELERATORS, ids=lambda platform: platform.name)
def test_auto_takes_the_accelerator_that_is_there_and_says_which(platform):
    machine = machine_with(platform.name, "Big One", "Big One")
    device, reason = choose_device("auto", machine)
    assert (str(device), reason) == (f"{platform.device_type}:0", "found 2 x Big One")
    assert platform_of(device, machine) is platform
    assert available_devices(machine) == [f"{platform.device_type}:0", f"{platform.device_type}:1", "cpu"]


@pytest.mark.parametrize("platform", ACCELERATORS, ids=lambda platform: platform.name)
def test_a_name_with_a_number_means_that_device(platform):
    machine = machine_with(platform.name, "One", "Two")
    assert str(choose_device(platform.name, machine)[0]) == f"{platform.device_type}:0"
    assert str(choose_device(f"{platform.name}:1", machine)[0]) == f"{platform.device_type}:1"
    said = refusal(f"{platform.name}:2", machine)
    assert f"use {platform.device_type}:0, {platform.device_type}:1 or cpu" in said


def test_an_apple_gpu_is_taken_before_the_cpu():
    machine = stand_in(mps=True)
    device, reason = choose_device("auto", machine)
    assert (str(device), reason) == ("mps", "found an Apple GPU")
    assert str(choose_device("mps:0", machine)[0]) == "mps"
    assert available_devices(machine) == ["mps", "cpu"]


def test_without_an_accelerator_auto_takes_the_cpu_and_says_so():
    device, reason = choose_device("auto", stand_in())
    assert (str(device), reason) == ("cpu", "no accelerator was found")


def test_of_two_accelerators_the_first_in_the_stated_order_is_taken():
    assert [platform.name for platform in PLATFORMS] == ["cuda", "rocm", "npu", "musa", "xpu", "mps", "cpu"]
    both = machine_with("cuda", "H200")
    both.npu = Npus(names=("910B",))
    assert str(choose_device("auto", both)[0]) == "cuda:0"
    assert str(choose_device("npu", both)[0]) == "npu:0"
    assert str(choose_device("cpu", both)[0]) == "cpu"


def test_rocm_is_the_cuda_device_of_a_build_for_it():
    amd = machine_with("rocm", "MI300X", "MI300X")
    assert str(choose_device("rocm:1", amd)[0]) == "cuda:1"
    device, _ = choose_device("cuda:1", amd)
    assert platform_of(device, amd) is ROCM
    assert platform_of(device, machine_with("cuda", "H200")) is CUDA


def test_rocm_is_refused_where_torch_is_built_for_cuda():
    said = refusal("rocm", machine_with("cuda", "H200"))
    assert "torch 2.13.0 is built without ROCm" in said
    assert "use cuda:0 or cpu" in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda", "torch 2.13.0 is built without CUDA"),
        ("rocm", "torch 2.13.0 is built without ROCm"),
        ("npu:0", "torch_npu is not installed"),
        ("musa", "torch_musa is not installed"),
        ("xpu", "torch 2.13.0 is built without XPU"),
        ("mps", "torch 2.13.0 is built without MPS"),
    ],
)
def test_a_platform_that_is_not_here_is_refused_with_the_reason_and_what_to_install(name, reason):
    said = refusal(name, stand_in())
    assert f"device '{name}' is not on this machine ({reason}); use cpu, or for " in said
    hint = next(platform.hint for platform in PLATFORMS if platform.name == name.partition(":")[0])
    assert said.endswith(hint)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cud", "cuda"), ("CUDA", "cuda"), ("rcom:1", "rocm"), ("nup", "npu"), ("cuda:-1", "cuda"), ("cuda:01", "cuda")],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, nearest):
    said = refusal(name, stand_in())
    assert f"device '{name}' is unknown, the nearest name is '{nearest}'; use auto or cpu" == said


def test_a_name_like_no_other_gets_the_list():
    assert refusal("toaster", stand_in()) == "device 'toaster' is unknown; use auto or cpu"
    assert "use auto, mps or cpu" in refusal(None, stand_in(mps=True))
    assert "use cpu" in refusal("cpu:1", stand_in())


def test_what_a_driver_says_becomes_the_reason():
    machine = stand_in(cuda="13.0")
    assert CUDA.detect(machine).reason == "torch 2.13.0 is built for CUDA 13.0, but no NVIDIA GPU answers"
    machine.cuda = Gpus(warning="the NVIDIA driver is too old\nsecond line")
    assert CUDA.detect(machine).reason.endswith("no NVIDIA GPU answers: the NVIDIA driver is too old")
    machine.cuda = Gpus(names=("H200",), error="driver/library version mismatch")
    found = CUDA.detect(machine)
    assert (found.found, found.reason) == (False, "no NVIDIA GPU can be used: driver/library version mismatch")
    assert str(choose_device("auto", machine)[0]) == "cpu"


def test_apple_computers_without_a_gpu_say_so():
    assert "no Apple GPU answers" in MPS.detect(stand_in(mps=False)).reason


# --- packages that add a platform to torch ---


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """Install a torch_npu of the given source; returns the stand-in for torch that it may change."""
    machine = stand_in()

    def install(source):
        (tmp_path / "torch_npu.py").write_text(source)
        return machine

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "the_torch", SimpleNamespace(torch=machine, npu=Npus(names=("910B",))))
    yield install
    sys.modules.pop("torch_npu", None)


def test_an_extension_that_is_installed_is_loaded_and_its_devices_found(extension):
    machine = extension("import the_torch\nthe_torch.torch.npu = the_torch.npu")
    assert str(choose_device("auto", machine)[0]) == "npu:0"


def test_an_extension_that_cannot_be_loaded_is_a_reason_not_a_crash(extension):
    machine = extension("raise ImportError('libhccl.so: cannot open shared object file')")
    assert str(choose_device("auto", machine)[0]) == "cpu"
    said = refusal("npu", machine)
    assert "torch_npu is installed but cannot be loaded: libhccl.so: cannot open shared object file" in said


def test_an_extension_that_adds_nothing_is_a_reason(extension):
    assert NPU.detect(extension("")).reason == "torch_npu is installed but brings no torch.npu"


def test_an_extension_that_torch_has_loaded_already_is_not_loaded_again(extension):
    machine = extension("raise AssertionError('loaded twice')")
    machine.npu = Npus()
    assert NPU.detect(machine).reason == "torch_npu is loaded, but no Ascend NPU answers"


# --- memory, time ---


@pytest.mark.parametrize("platform", ACCELERATORS, ids=lambda platform: platform.name)
def test_memory_is_what_the_driver_says_and_torchs_own_reserve_counts_as_free(platform):
    machine = machine_with(platform.name, "One", "Two", properties={"total_memory": 80 * GIB})
    assert platform.free_memory_bytes(1, machine) == 13 * GIB + 1
    assert platform.total_memory_bytes(1, machine) == 80 * GIB
    assert platform.peak_memory_bytes(1, machine) == 33 * GIB + 1
    platform.reset_peak(1, machine)
    platform.synchronise(1, machine)
    assert getattr(machine, platform.device_type).calls == [("reset", 1), ("synchronize", 1)]


def test_an_intel_gpu_that_does_not_tell_its_free_memory_has_what_torch_did_not_take():
    machine = machine_with("xpu", "Arc", properties={"total_memory": 16 * GIB})

    def silent(index=None):
        raise RuntimeError("doesn't support querying the available free memory")

    machine.xpu.mem_get_info = silent
    assert XPU.free_memory_bytes(0, machine) == 14 * GIB


def test_an_apple_gpu_has_what_metal_recommends_less_what_is_taken():
    machine = stand_in(mps=True)
    waits = []
    machine.mps = SimpleNamespace(
        recommended_max_memory=lambda: 24 * GIB,
        current_allocated_memory=lambda: 5 * GIB,
        synchronize=lambda: waits.append("waited"),
    )
    assert (MPS.free_memory_bytes(None, machine), MPS.total_memory_bytes(None, machine)) == (19 * GIB, 24 * GIB)
    first = MPS.mark(None, machine)
    assert waits == ["waited"]  # or the clock would be read while the GPU is still busy
    assert MPS.seconds_between(first, first + 2.5) == 2.5


@pytest.mark.parametrize("platform", ACCELERATORS, ids=lambda platform: platform.name)
def test_steps_are_timed_by_events_on_their_device_without_waiting_in_between(platform):
    machine = machine_with(platform.name, "One", "Two")
    first, second = platform.mark(1, machine), platform.mark(1, machine)
    assert getattr(machine, platform.device_type).calls == [("enter", 1), ("leave", 1)] * 2
    assert not first.waited
    assert platform.seconds_between(first, second) == pytest.approx(0.007)
    assert not first.waited
    assert platform.stream(1, machine) == ("a stream of", 1)


def test_a_cpu_is_timed_by_the_clock_and_has_no_streams():
    first = CPU.mark()
    time.sleep(0.01)
    assert 0.01 <= CPU.seconds_between(first, CPU.mark()) < 5
    assert [CPU.stream(), CPU.event(), MPS.stream(), MPS.event()] == [None] * 4


# --- dtypes ---


def chosen(name, machine, preferred, device=None):
    dtype, reason = choose_dtype(name, choose_device(device or "auto", machine)[0], preferred=preferred, torch=machine)
    return str(dtype).removeprefix("torch."), reason


NARROW = {
    "an old NVIDIA GPU": (machine_with("cuda", "T4", properties={"major": 7}), "NVIDIA GPU"),
    "an old Moore Threads GPU": (machine_with("musa", "S80", native_bfloat16=False), "Moore Threads GPU"),
    "an old Intel GPU": (machine_with("xpu", "Xe", properties={"has_bfloat16_conversions": False}), "Intel GPU"),
}
WIDE = {
    "NVIDIA": machine_with("cuda", "H200", properties={"major": 9}),
    "AMD": machine_with("rocm", "MI300X"),
    "Ascend": machine_with("npu", "910B"),
    "Moore Threads": machine_with("musa", "S4000"),
    "Intel": machine_with("xpu", "B580", properties={"has_bfloat16_conversions": True}),
    "Apple": stand_in(mps=True),
}


@pytest.mark.parametrize("name", WIDE)
def test_bfloat16_is_kept_where_the_device_computes_it(name):
    assert chosen("auto", WIDE[name], torch.bfloat16) == ("bfloat16", "the dtype of the checkpoint")
    assert chosen("auto", WIDE[name], torch.float16) == ("float16", "the dtype of the checkpoint")


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_that_would_be_emulated_is_left_unless_it_is_asked_for(name):
    machine, hardware = NARROW[name]
    assert chosen("auto", machine, torch.bfloat16) == ("float32", f"this {hardware} has no bfloat16 arithmetic")
    assert chosen("bfloat16", machine, torch.float32) == ("bfloat16", "asked for")


@pytest.mark.parametrize(
    ("machine", "device"),
    [(machine_with("npu", "910A", native_bfloat16=False), "npu:0"), (stand_in(mps=True, macos=13), "mps")],
    ids=["Ascend 910A", "macOS 13"],
)
def test_a_dtype_that_cannot_be_computed_is_refused_by_name_and_left_by_auto(machine, device):
    assert chosen("auto", machine, torch.bfloat16)[0] == "float32"
    with pytest.raises(
        RequestError, match=rf"dtype 'bfloat16' is not possible on {device} \(.*\); use float32 or float16"
    ):
        chosen("bfloat16", machine, torch.float32)


def test_float64_is_refused_where_the_hardware_has_none():
    assert "float64" in MPS.refuses(torch.float64, None, stand_in(mps=True))
    assert "float64" in XPU.refuses(torch.float64, 0, machine_with("xpu", "Arc", properties={"has_fp64": False}))
    assert XPU.refuses(torch.float64, 0, machine_with("xpu", "Max", properties={"has_fp64": True})) is None
    assert CUDA.refuses(torch.float64, 0, machine_with("cuda", "H200")) is None


def test_an_unknown_dtype_is_refused_with_the_nearest_one():
    with pytest.raises(RequestError, match="dtype 'bfloat61' is unknown, the nearest is 'bfloat16'; use auto, float32"):
        choose_dtype("bfloat61", torch.device("cpu"), preferred=torch.float32)


# --- compilers ---


def test_compiling_needs_a_compiler_on_a_cpu_and_triton_elsewhere(monkeypatch, tmp_path):
    assert (NPU.compile_here().usable, MPS.compile_here().usable) == (False, False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (CPU.compile_here().usable, CUDA.compile_here().usable) == (False, False)
    assert "finds no " in CPU.compile_here().reason
    assert CUDA.triton_here().reason == "triton finds no C compiler (gcc or clang)"
    for name in ("gcc", "g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert CPU.compile_here() == CPU.compiles
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert CUDA.triton_here().reason == CUDA.compile_here().reason == "triton is not installed"
    assert not MUSA.triton_here().usable
    assert "torch.compile uses Triton by itself" in MUSA.triton_here().reason


# --- this machine, and this torch ---


def test_the_functions_that_are_asked_of_torch_are_in_torch():
    asked = [name for name in vars(Gpus) if not name.startswith("_") and callable(getattr(Gpus, name))]
    assert len(asked) == 14
    for namespace in (torch.cuda, torch.xpu):
        assert [name for name in asked if not hasattr(namespace, name)] == []
    assert all(hasattr(torch.mps, name) for name in ("recommended_max_memory", "current_allocated_memory"))
    assert torch.backends.mps.is_macos_or_newer is not None
    assert {"cuda", "hip"} <= vars(torch.version).keys()


def test_the_collectives_are_those_that_torch_takes_by_default():
    defaults = torch.distributed.Backend.default_device_backend_map
    for platform in (CUDA, ROCM, XPU, CPU):
        assert defaults[platform.device_type] == platform.collective
    assert {NPU.collective, MUSA.collective, MPS.collective} == {"hccl", "mccl", None}


def test_this_cpu_has_memory_and_a_name():
    cpu = torch.device("cpu")
    assert platform_of(cpu) is CPU
    assert platform_of(torch.device("meta")) is CPU
    assert 0 < free_memory_bytes(cpu) <= CPU.total_memory_bytes()
    before = peak_memory_bytes(cpu)
    torch.ones(30_000_000)
    assert peak_memory_bytes(cpu) >= before > 10e6
    assert timed(lambda: time.sleep(0.01), cpu) >= 0.01
    assert re.search(r"\w+, (1 thread|\d+ threads)$", CPU.detect().reason)
    assert "cpu" in available_devices()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say more than ru_maxrss")
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    """A process that has held 240 MB starts one that does nothing: that one has not had them."""
    asked = "import torch; from frameloom.platform.device import peak_memory_bytes as p; print(p(torch.device('cpu')))"
    code = (
        f"import subprocess, sys, torch; held = torch.ones(60_000_000); command = [sys.executable, '-c', {asked!r}]; "
        f"print(subprocess.run(command, capture_output=True, text=True, check=True).stdout); {asked}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    started, starting = map(int, done.stdout.split())
    assert 10e6 < started < starting - 150e6


def test_a_device_that_nobody_described_is_refused():
    with pytest.raises(RequestError, match="nothing is known of device 'hpu'"):
        platform_of(torch.device("hpu"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("no memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 20 GB)"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("MPS backend out of memory"), False),
    ],
)
def test_failed_allocations_are_told_from_other_errors(error, expected):
    assert is_memory_error(error) is expected
