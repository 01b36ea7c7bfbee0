"""Whose precision counts: a caller's autocast would hand other dtypes to kernels that were chosen without it."""

from contextlib import AbstractContextManager, nullcontext

import torch


def own_precision(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes of the weights, whatever torch.autocast is on outside."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
