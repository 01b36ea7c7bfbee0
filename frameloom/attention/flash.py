"""FlashAttention 2 and 3 (arXiv:2307.08691, arXiv:2407.08608) from their own packages."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from frameloom.attention.backend import Backend, Kernel, only_output


def wrap_flash(flash_attn_func: Callable[..., Any]) -> Kernel:
    """`flash_attn_func` of either package, or of AITER: q, k, v are (batch, tokens, heads, head dimension).

    FlashAttention 3 returned its statistics too, until it learnt `return_attn_probs`.
    """

    def attend(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
        scale = q_BLHK.shape[-1] ** -0.5
        return only_output(flash_attn_func(q_BLHK, k_BSHK, v_BSHK, softmax_scale=scale, causal=False))

    return attend


FLASH2 = Backend(
    name="flash2",
    exactness="rounding",
    platforms=("cuda", "rocm"),
    package="flash_attn",
    function="flash_attn_func",
    wrap=wrap_flash,
    hint="pip install flash-attn --no-build-isolation",
    max_head_dim=256,
    capability_from=(8, 0),
    # never automatic: on CUDA, torch's own attention contains the same kernel
)
FLASH3 = Backend(
    name="flash3",
    exactness="rounding",
    platforms=("cuda",),
    package="flash_attn_interface",
    function="flash_attn_func",
    wrap=wrap_flash,
    hint="build the folder 'hopper' of github.com/Dao-AILab/flash-attention: python setup.py install",
    max_head_dim=256,
    head_dim_step=8,
    capability_from=(9, 0),
    capability_below=(10, 0),
    faster="1.5 to 2 times FlashAttention 2 on Hopper in half precision (arXiv:2407.08608)",
)
