"""The feed-forward of a transformer block: linear, GELU in its tanh form (arXiv:1606.08415), linear."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

_HIDDEN_BYTES = 128 << 20  # of the wide activation that exists at a time; 7,489 tokens of 8,960 in bfloat16


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """(..., D) -> (..., O) in the dtype of x, with weights w1 (M, D), w2 (O, M) and biases of that dtype."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def mlp_rows(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """`mlp` for some tokens at a time: its activation (..., M) never exists whole, which bounds the peak of memory.

    Of 32,760 tokens it would take 587 MB at M = 8,960, and of 75,600 at M = 13,824 2.1 GB, in bfloat16.
    """
    return mlp_in_pieces(x, w1, b1, w2, b2, rows=rows_at_once(w1))


def mlp_in_pieces(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, rows: int) -> Tensor:
    """`mlp` for at most `rows` tokens at a time."""
    return in_pieces(lambda piece: mlp(piece, w1, b1, w2, b2), x, width=w2.shape[0], rows=rows)


def rows_at_once(w1: Tensor) -> int:
    """Tokens whose wide activation is as large as it may get."""
    return max(1, _HIDDEN_BYTES // max(1, w1.shape[0] * w1.element_size()))


def in_pieces(run: Callable[[Tensor], Tensor], x: Tensor, *, width: int, rows: int) -> Tensor:
    """run(x), (..., D) -> (..., width), in pieces of equal size of at most `rows` tokens."""
    flat = x.flatten(0, -2)
    if flat.shape[0] <= rows:
        return run(x)
    out, pieces = flat.new_empty(flat.shape[0], width), -(-flat.shape[0] // rows)
    for piece, part in zip(flat.tensor_split(pieces), out.tensor_split(pieces), strict=True):
        part.copy_(run(piece))
    return out.view(*x.shape[:-1], -1)
