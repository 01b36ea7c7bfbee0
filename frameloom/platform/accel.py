"""Accelerators with a namespace of their own that is made like torch.cuda: Ascend NPU, MUSA, XPU.

None of them was at hand: what is said here comes from torch 2.13, torch_npu 2.11 to 2.13 and torch_musa 2.7 and 2.11.
"""

from typing import Any

import torch

from frameloom.platform.base import Accelerator, Verdict

_OWN_KERNELS = "Frameloom's kernels are for CUDA and ROCm; torch.compile uses Triton by itself"


class Npu(Accelerator):
    """Ascend NPUs, behind torch.npu of torch_npu."""

    __slots__ = ()

    def has_bfloat16(self, index: int | None = None, torch: Any = torch) -> bool:
        """Whether the NPU computes bfloat16 (from the 910B on)."""
        return bool(torch.npu.is_bf16_supported())

    def refuses(self, dtype: torch.dtype, index: int | None = None, torch: Any = torch) -> str | None:
        """The first generation (910A, 310P) has no bfloat16 at all."""
        if dtype == torch.bfloat16 and not self.has_bfloat16(index, torch):
            return "this Ascend NPU cannot compute bfloat16"
        return None


class Musa(Accelerator):
    """Moore Threads' GPUs, behind torch.musa of torch_musa."""

    __slots__ = ()

    def has_bfloat16(self, index: int | None = None, torch: Any = torch) -> bool:
        """Whether the GPU computes bfloat16 (from compute capability 2.2 on); before that it may be emulated."""
        return bool(torch.musa.is_bf16_supported(including_emulation=False))


class Xpu(Accelerator):
    """Intel's GPUs, behind torch.xpu."""

    __slots__ = ()

    def has_bfloat16(self, index: int | None = None, torch: Any = torch) -> bool:
        """Whether the GPU converts bfloat16 itself; before that it is emulated."""
        return bool(torch.xpu.get_device_properties(index).has_bfloat16_conversions)

    def refuses(self, dtype: torch.dtype, index: int | None = None, torch: Any = torch) -> str | None:
        """Arc GPUs have no float64."""
        if dtype == torch.float64 and not torch.xpu.get_device_properties(index).has_fp64:
            return "this Intel GPU cannot compute float64"
        return None

    def free_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """What could be allocated now; where the driver does not tell, what torch itself has not allocated."""
        try:
            free, _ = torch.xpu.mem_get_info(index)
        except RuntimeError:  # integrated GPUs do not tell what is free (torch 2.13)
            return self.total_memory_bytes(index, torch) - int(torch.xpu.memory_allocated(index))
        return int(free + torch.xpu.memory_reserved(index) - torch.xpu.memory_allocated(index))

    def total_memory_bytes(self, index: int | None = None, torch: Any = torch) -> int:
        """The memory there is; drivers that do not tell what is free do tell this."""
        return int(torch.xpu.get_device_properties(index).total_memory)


NPU = Npu(
    name="npu",
    title="Ascend NPU",
    hardware="Ascend NPU",
    device_type="npu",
    extension="torch_npu",
    collective="hccl",
    compiles=Verdict(usable=False, reason="operations run one by one: compiling is off on NPUs, where nobody tried it"),
    triton=Verdict(usable=False, reason="Frameloom's kernels are for CUDA and ROCm"),
    hint="install CANN, then pip install torch-npu of the version of torch",
)
MUSA = Musa(
    name="musa",
    title="MUSA",
    hardware="Moore Threads GPU",
    device_type="musa",
    toolkit="musa",
    extension="torch_musa",
    collective="mccl",
    compiles=Verdict(usable=True, reason="torch_musa brings TorchInductor with its own Triton; not measured"),
    triton=Verdict(usable=False, reason=_OWN_KERNELS),
    hint="install the MUSA SDK and torch_musa: https://github.com/MooreThreads/torch_musa",
)
XPU = Xpu(
    name="xpu",
    title="XPU",
    hardware="Intel GPU",
    device_type="xpu",
    toolkit="xpu",
    collective="xccl",
    compiles=Verdict(usable=True, reason="TorchInductor writes Triton kernels for it; not measured"),
    triton=Verdict(usable=False, reason=_OWN_KERNELS),
    hint="pip install torch --index-url https://download.pytorch.org/whl/xpu",
)
