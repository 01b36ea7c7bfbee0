"""The C library's allocator, set up for tensors of many megabytes that come and go."""

import ctypes
import math
import platform
import sys

import numpy as np
import torch
from torch import Tensor

_SMALL_BYTES = 1 << 16
_ALIGNMENT = 64  # as torch's own: MKL sums in another order where memory is aligned otherwise
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> str:
    """Let this process keep what it frees for its next tensors; returns what was done, in a few words.

    glibc gives every freed block over 32 MB back to the system and gets it again page by page, zeroed: writing fresh
    memory is then several times slower than writing memory that was kept.
    """
    if not is_glibc():
        return "left as it is (not glibc)"
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, 1 << 26)
    return "freed memory is kept for the next tensor" if kept else "left as it is (glibc refused)"


def empty(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)`, in memory that the allocator finds again when it is free.

    On a CPU by way of numpy. Torch asks for aligned memory, and glibc before 2.38 does not find the place of an aligned
    block again for another one of its size (its bug 14581): decoding took half as much memory again.
    """
    count = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or count < _SMALL_BYTES:
        return like.new_empty(shape)
    memory = np.empty(count + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[begin : begin + count]).view(like.dtype).view(shape)


def is_glibc() -> bool:
    """Whether this is a C library whose allocator can be told so."""
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
