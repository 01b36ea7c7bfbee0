"""Attention compiled for this machine's CPU: ops/attention.cpp, where there is AVX-512 and a C++ compiler."""

from dataclasses import dataclass

import torch
from torch import Tensor

from frameloom.attention.backend import Backend, Kernel, Place
from frameloom.ops.native import address, kernels, native
from frameloom.platform.host import cpu_flags

_FLAGS = {torch.float32: "avx512f", torch.bfloat16: "avx512_bf16"}


def attend_native(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
    """softmax(q kᵀ / √K) v: float32 or bfloat16 on a CPU, K a multiple of 16; sums and softmax in float32."""
    q_BLHK, k_BSHK, v_BSHK = (_dense(x) for x in (q_BLHK, k_BSHK, v_BSHK))
    out_BLHK = torch.empty(q_BLHK.shape, dtype=q_BLHK.dtype)
    strides = torch.tensor([x.stride()[:3] for x in (q_BLHK, k_BSHK, v_BSHK, out_BLHK)], dtype=torch.int64)
    batch, queries, heads, dim = q_BLHK.shape
    failed = kernels("attention").frameloom_attention(
        address(q_BLHK), address(k_BSHK), address(v_BSHK), None, address(out_BLHK), address(strides), 0,
        batch, queries, k_BSHK.shape[1], heads, dim, dim**-0.5, int(q_BLHK.dtype == torch.bfloat16),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the blocks of attention")
    return out_BLHK


def _dense(x: Tensor) -> Tensor:
    """As it is where the numbers of a head lie side by side, and pairs of bfloat16 begin at whole words."""
    words = all(stride % 2 == 0 for stride in x.stride()[:3]) and x.data_ptr() % 4 == 0
    return x if x.stride(-1) == 1 and (words or x.dtype == torch.float32) else x.contiguous()


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeBackend(Backend):
    """A backend whose kernel is Frameloom's own."""

    def out_of_place(self, place: Place) -> str | None:
        """As `Backend.out_of_place`; the CPU has to have the instructions for the dtype."""
        reason = Backend.out_of_place(self, place)
        flag = _FLAGS[place.dtype or torch.float32] if reason is None else ""
        return reason or (None if flag in cpu_flags() else f"this CPU has no {flag}")

    def lacks(self) -> str | None:
        """Why its kernel cannot be built, or None."""
        built = native("attention")
        return None if built.library else built.reason

    def kernel(self) -> Kernel:
        """The kernel."""
        return attend_native


NATIVE = NativeBackend(
    name="native",
    exactness="rounding",
    platforms=("cpu",),
    package="frameloom",
    function="attend_native",
    wrap=lambda kernel: kernel,
    hint="install g++, on a CPU with AVX-512",
    dtypes=tuple(_FLAGS),
    max_head_dim=256,
    head_dim_step=16,
    # not by this table: whether it is faster than torch's is measured on the machine
)
