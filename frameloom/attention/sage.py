"""SageAttention (arXiv:2410.02367, arXiv:2411.10958): q kᵀ in 8-bit integers, so another function than attention."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from frameloom.attention.backend import Backend, Kernel, only_output


def wrap_sage(sageattn: Callable[..., Any]) -> Kernel:
    """`sageattn` takes its layouts by name: NHD is (batch, tokens, heads, head dimension), with that one innermost."""

    def attend(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BLHK, k_BSHK, v_BSHK))
        return only_output(sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=q.shape[-1] ** -0.5))

    return attend


SAGE = Backend(
    name="sage",
    exactness="lossy",
    platforms=("cuda",),
    package="sageattention",
    function="sageattn",
    wrap=wrap_sage,
    hint="build github.com/thu-ml/SageAttention: python setup.py install",
    max_head_dim=128,
    capability_from=(8, 0),
)
