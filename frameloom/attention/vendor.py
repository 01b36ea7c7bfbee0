"""Kernels of hardware makers: AITER of AMD, and the fused attention of Ascend. Elsewhere torch's own is the maker's."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from frameloom.attention.backend import Backend, Kernel, only_output
from frameloom.attention.flash import wrap_flash


def wrap_npu(npu_fusion_attention: Callable[..., Any]) -> Kernel:
    """`torch_npu.npu_fusion_attention`: BSND is our layout; it scales by 1 unless told, and returns seven things."""

    def attend(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
        heads, head_dim = q_BLHK.shape[2:]
        return only_output(npu_fusion_attention(q_BLHK, k_BSHK, v_BSHK, heads, "BSND", scale=head_dim**-0.5))

    return attend


AITER = Backend(  # its function has the layout and the arguments of FlashAttention 2
    name="aiter",
    exactness="rounding",
    platforms=("rocm",),
    package="aiter",
    function="flash_attn_func",
    wrap=wrap_flash,
    hint="build github.com/ROCm/aiter: python setup.py develop",
    max_head_dim=256,
    head_dim_step=8,
)
NPU_FUSION = Backend(
    name="npu_fusion",
    exactness="rounding",
    platforms=("npu",),
    package="torch_npu",
    function="npu_fusion_attention",
    wrap=wrap_npu,
    hint="pip install torch_npu, in the version for this torch and CANN",
    max_head_dim=512,
    head_dim_step=16,
    # never automatic: on Ascend, torch's own attention calls the same kernel
)
