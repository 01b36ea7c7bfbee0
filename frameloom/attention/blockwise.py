"""Attention to some of the keys at a time, and how the parts are put together (arXiv:2310.01889).

Shapes: B batch, L query tokens, S key tokens, H heads, K head dimension.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

_MOST_LOGITS = 1 << 24  # that plain attention holds at a time: 64 MiB in float32
_aten = torch.ops.aten


class Partial(NamedTuple):
    """Attention to some keys, and the logarithm of the sum of the exponentials of their logits.

    The output is in the dtype of the queries or wider, the logarithm in float32 or wider. No keys: zeros and -inf.
    """

    out_BLHK: Tensor
    lse_BHL: Tensor


def attend_block(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> Partial:
    """softmax(q kᵀ / √K) v over these keys alone: every device, every float dtype, any number of queries and keys.

    By torch's own kernels on a CPU and on GPUs where they take the inputs; else by the formula, some queries at a time.
    """
    if q_BLHK.numel() == 0 or k_BSHK.numel() == 0:
        return _without_keys(q_BLHK)
    heads_first = [_side_by_side(x).transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK)]
    out_BHLK, lse_BHL = _kernel(*heads_first)
    return Partial(out_BHLK.transpose(1, 2), lse_BHL[:, :, : q_BLHK.shape[1]])  # one kernel fills up to 32 queries


def merge(first: Partial, second: Partial) -> Partial:
    """Attention to the keys of both; in float32 or wider, to be rounded by the caller when all parts are there."""
    lse_BHL = torch.logaddexp(first.lse_BHL, second.lse_BHL)
    base_BHL = lse_BHL.masked_fill(lse_BHL == -math.inf, 0.0)  # without any key both weigh exp(-inf - 0) = 0
    return Partial(_weighted(first, base_BHL).add_(_weighted(second, base_BHL)), lse_BHL)


def _weighted(part: Partial, base_BHL: Tensor) -> Tensor:
    return part.out_BLHK * (part.lse_BHL - base_BHL).exp().transpose(1, 2).unsqueeze(-1)


def _without_keys(q_BLHK: Tensor) -> Partial:
    batch, length, heads, _ = q_BLHK.shape
    wide = torch.promote_types(q_BLHK.dtype, torch.float32)
    lse_BHL = torch.full((batch, heads, length), -math.inf, dtype=wide, device=q_BLHK.device)
    return Partial(torch.zeros_like(q_BLHK), lse_BHL)


def _side_by_side(x: Tensor) -> Tensor:
    """As it is where the numbers of a head lie side by side, as the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _kernel(q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
    if q_BHLK.device.type == "cpu":
        return _first_two(_aten._scaled_dot_product_flash_attention_for_cpu(q_BHLK, k_BHSK, v_BHSK))
    if q_BHLK.device.type == "cuda":
        inputs = SDPAParams(q_BHLK, k_BHSK, v_BHSK, None, 0.0, False, False)
        if q_BHLK.shape[-1] % 8 == 0 and can_use_flash_attention(inputs):  # torch fills others up to a multiple of 8
            return _first_two(_aten._scaled_dot_product_flash_attention(q_BHLK, k_BHSK, v_BHSK))
        if can_use_efficient_attention(inputs):
            return _first_two(_aten._scaled_dot_product_efficient_attention(q_BHLK, k_BHSK, v_BHSK, None, True))
    return by_formula(q_BHLK, k_BHSK, v_BHSK)


def _first_two(results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return results[0], results[1]


def by_formula(
    q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, most_logits: int = _MOST_LOGITS
) -> tuple[Tensor, Tensor]:
    """out_BHLK and lse_BHL, both in float32 or wider; at most so many logits, or those of one query, at a time."""
    wide = torch.promote_types(q_BHLK.dtype, torch.float32)
    keys, values = k_BHSK.to(wide), v_BHSK.to(wide)
    out_BHLK = q_BHLK.new_empty(q_BHLK.shape, dtype=wide)
    lse_BHL = q_BHLK.new_empty(q_BHLK.shape[:3], dtype=wide)
    rows = max(1, most_logits // keys[..., 0].numel())
    for start in range(0, q_BHLK.shape[2], rows):
        some = slice(start, start + rows)
        logits_BHLS = q_BHLK[:, :, some].to(wide).mul(q_BHLK.shape[-1] ** -0.5) @ keys.transpose(2, 3)
        lse_BHL[:, :, some] = logits_BHLS.logsumexp(-1)
        out_BHLK[:, :, some] = logits_BHLS.softmax(-1) @ values
    return out_BHLK, lse_BHL
