"""The C library's allocator, set up for tensors of many megabytes that come and go."""

import ctypes
import platform
import sys

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


def is_glibc() -> bool:
    """Whether this is a C library whose allocator can be told so."""
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
