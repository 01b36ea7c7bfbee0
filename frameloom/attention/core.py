"""What an attention backend is, the one that runs everywhere, and how one is chosen.

Shapes: B batch, L query tokens, S key tokens, H heads, K head dimension.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from frameloom.errors import RequestError


class Attend(Protocol):
    """softmax(q kᵀ / √K) v over all keys, per head: no mask, no dropout; dtype and device as given."""

    def __call__(self, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> Tensor:
        """Return out_BLHK."""
        ...


def sdpa(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> Tensor:
    """Attention by torch's own scaled_dot_product_attention: every device, every float dtype."""
    q_BHLK, k_BHSK, v_BHSK = q_BLHK.transpose(1, 2), k_BSHK.transpose(1, 2), v_BSHK.transpose(1, 2)
    return F.scaled_dot_product_attention(q_BHLK, k_BHSK, v_BHSK).transpose(1, 2)


BACKENDS: Mapping[str, Attend] = MappingProxyType({"sdpa": sdpa})


def choose(name: str = "auto") -> tuple[Attend, str]:
    """The backend called `name`, or the best one for "auto", and why in a few words.

    An explicit name means that backend or RequestError, never another one.
    """
    if name == "auto":
        return sdpa, "sdpa: runs on every device"
    if name not in BACKENDS:
        known = ", ".join(["auto", *sorted(BACKENDS)])
        raise RequestError(f"attention backend {name!r} does not exist; use one of: {known}")
    return BACKENDS[name], f"{name}: asked for by name"
