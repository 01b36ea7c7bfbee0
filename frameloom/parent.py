"""What a process may want when the one that has started it dies. Torch-free."""

import ctypes
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def when_parent_dies(number: signal.Signals) -> None:
    """Get a signal when the parent dies, where the kernel can do that; elsewhere a broken pipe has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
