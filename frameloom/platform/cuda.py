"""NVIDIA's and AMD's GPUs: one namespace of torch, told apart by what the build was made for."""

from typing import Any

import torch

from frameloom.platform.base import Accelerator, Verdict

_BFLOAT16_SINCE = 8  # compute capability: Ampere


class Cuda(Accelerator):
    """GPUs behind torch.cuda of a build for CUDA."""

    __slots__ = ()

    def has_bfloat16(self, index: int | None = None, torch: Any = torch) -> bool:
        """Whether the GPU computes bfloat16; before Ampere torch emulates it."""
        return bool(torch.cuda.get_device_properties(index).major >= _BFLOAT16_SINCE)


CUDA = Cuda(
    name="cuda",
    title="CUDA",
    hardware="NVIDIA GPU",
    device_type="cuda",
    toolkit="cuda",
    collective="nccl",
    compiles=Verdict(usable=True, reason="TorchInductor writes Triton kernels for it"),
    triton=Verdict(usable=True, reason="Frameloom's kernels are written for it"),
    hint="pip install torch --index-url https://download.pytorch.org/whl/cu130",
)
# torch says "nccl" on ROCm too: there it is RCCL. It also says that all of them compute bfloat16.
ROCM = Accelerator(
    name="rocm",
    title="ROCm",
    hardware="AMD GPU",
    device_type="cuda",
    toolkit="hip",
    collective="nccl",
    compiles=Verdict(usable=True, reason="TorchInductor writes Triton kernels for it; not measured"),
    triton=Verdict(usable=True, reason="it runs the kernels written for CUDA; not measured"),
    hint="choose ROCm at https://pytorch.org/get-started/locally",
)
