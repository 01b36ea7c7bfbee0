"""UMT5, the text encoder of Wan (arXiv:2304.09151): a T5 encoder whose layers each have a bias for relative positions.

Shapes: B texts, L tokens, H heads, K numbers per head, D channels. Reference: transformers' UMT5EncoderModel, in its
names of weights, its order of operations and of rounding. Written out here because importing transformers takes longer
than a small model takes to make a video.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.errors import CheckpointError
from frameloom.ops.quantized import Embedding, Linear

ACTIVATION = "gated-gelu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Umt5Spec:
    """The config.json of a UMT5 encoder, as far as it decides the numbers; defaults as in the reference."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str) -> Self:
        """Read and check a config. Raises CheckpointError."""
        found = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        for name, value in found.items():
            kind, noun = (float, "number") if name == "layer_norm_epsilon" else (int, "whole number")
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 2**31:
                raise CheckpointError(f"{where} has {name} {value!r}; it must be a {noun} above 0 and below 2^31")
        activation = config.get("feed_forward_proj", ACTIVATION)
        if activation != ACTIVATION:
            raise CheckpointError(f"{where} has feed_forward_proj {activation!r}; Wan's text encoder has {ACTIVATION}")
        spec = cls(**found)
        buckets, distance = spec.relative_attention_num_buckets, spec.relative_attention_max_distance
        if buckets < 4:
            raise CheckpointError(f"{where} has relative_attention_num_buckets {buckets}; it must be 4 or more")
        if distance <= buckets // 4:
            raise CheckpointError(
                f"{where} has relative_attention_max_distance {distance}; it must be above {buckets // 4}, "
                "a quarter of relative_attention_num_buckets"
            )
        return spec


class Umt5Encoder(nn.Module):
    """Token numbers to features, the same embedding table under the two names that files use."""

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.shared = Embedding(spec.vocab_size, spec.d_model)
        self.encoder = _Stack(spec)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make both tables one again, after one of them was replaced."""
        self.encoder.embed_tokens.weight = self.shared.weight
        self.encoder.embed_tokens.kernel = self.shared.kernel

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self.encoder.final_layer_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.encoder.final_layer_norm.weight.device

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """ids (B, L), mask (B, L) with zeros where a text has ended -> x_BLD; masked keys weigh nothing."""
        x_BLD: Tensor = self.encoder(ids_BL, mask_BL.bool()[:, None, None, :])
        return x_BLD


class _Stack(nn.Module):
    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.embed_tokens = Embedding(spec.vocab_size, spec.d_model)
        self.block = nn.ModuleList(_Block(spec) for _ in range(spec.num_layers))
        self.final_layer_norm = _Norm(spec)
        self.buckets, self.distance = spec.relative_attention_num_buckets, spec.relative_attention_max_distance

    def forward(self, ids_BL: Tensor, mask_B11L: Tensor) -> Tensor:
        """ids (B, L) -> x_BLD."""
        x_BLD = self.embed_tokens(ids_BL)
        buckets_LL = position_buckets(ids_BL.shape[1], self.buckets, self.distance, device=ids_BL.device)
        for block in self.block:
            x_BLD = block(x_BLD, buckets_LL, mask_B11L)
        out_BLD: Tensor = self.final_layer_norm(x_BLD)
        return out_BLD


class _Block(nn.Module):
    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_SelfAttentionLayer(spec), _FeedForwardLayer(spec)])

    def forward(self, x_BLD: Tensor, buckets_LL: Tensor, mask_B11L: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        x_BLD = _bounded(attention(x_BLD, buckets_LL, mask_B11L))
        return _bounded(feed_forward(x_BLD))


class _SelfAttentionLayer(nn.Module):
    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(spec)
        self.layer_norm = _Norm(spec)

    def forward(self, x_BLD: Tensor, buckets_LL: Tensor, mask_B11L: Tensor) -> Tensor:
        attended: Tensor = self.SelfAttention(self.layer_norm(x_BLD), buckets_LL, mask_B11L)
        return x_BLD + attended


class _SelfAttention(nn.Module):
    """Without scaling of the logits: T5 has it in its weights."""

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        inner = spec.num_heads * spec.d_kv
        self.d_kv = spec.d_kv
        self.q = Linear(spec.d_model, inner, bias=False)
        self.k = Linear(spec.d_model, inner, bias=False)
        self.v = Linear(spec.d_model, inner, bias=False)
        self.o = Linear(inner, spec.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(spec.relative_attention_num_buckets, spec.num_heads)

    def forward(self, x_BLD: Tensor, buckets_LL: Tensor, mask_B11L: Tensor) -> Tensor:
        q, k, v = (layer(x_BLD).unflatten(-1, (-1, self.d_kv)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias_1HLL = self.relative_attention_bias(buckets_LL).permute(2, 0, 1)[None]
        bias_BHLL = torch.where(mask_B11L, bias_1HLL, torch.finfo(k.dtype).min).contiguous()
        attended_BHLK = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BHLL, scale=1.0)
        out_BLD: Tensor = self.o(attended_BHLK.transpose(1, 2).flatten(2))
        return out_BLD


class _FeedForwardLayer(nn.Module):
    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.DenseReluDense = _GatedFeedForward(spec)
        self.layer_norm = _Norm(spec)

    def forward(self, x_BLD: Tensor) -> Tensor:
        changed: Tensor = self.DenseReluDense(self.layer_norm(x_BLD))
        return x_BLD + changed


class _GatedFeedForward(nn.Module):
    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.wi_0 = Linear(spec.d_model, spec.d_ff, bias=False)
        self.wi_1 = Linear(spec.d_model, spec.d_ff, bias=False)
        self.wo = Linear(spec.d_ff, spec.d_model, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate = self.wi_0(x_BLD)
        # GELU in its tanh form, written out as the reference does it: torch's own rounds otherwise.
        gate = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))))
        hidden = (gate * self.wi_1(x_BLD)).to(self.wo.dtype)
        out_BLD: Tensor = self.wo(hidden)
        return out_BLD


class _Norm(nn.Module):
    """Root mean square norm, in float32 until the weight."""

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(spec.d_model))
        self.eps = spec.layer_norm_epsilon

    def forward(self, x_BLD: Tensor) -> Tensor:
        mean_square = x_BLD.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x_BLD = x_BLD * torch.rsqrt(mean_square + self.eps)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x_BLD = x_BLD.to(self.weight.dtype)
        return self.weight * x_BLD


def position_buckets(length: int, num_buckets: int, max_distance: int, *, device: torch.device) -> Tensor:
    """The bucket of key minus query position, (L, L): half of them for keys ahead; near ones exact, far ones by log."""
    position = torch.arange(length, device=device)
    offset_LL = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance_LL = offset_LL.abs()
    by_log = torch.log(distance_LL.float() / exact) / math.log(max_distance / exact) * (half - exact)
    far_LL = (exact + by_log.to(torch.long)).clamp_max(half - 1)
    return (offset_LL > 0).to(torch.long) * half + torch.where(distance_LL < exact, distance_LL, far_LL)


def _bounded(x_BLD: Tensor) -> Tensor:
    """In float16 infinities become large numbers, as in the reference."""
    if x_BLD.dtype != torch.float16:
        return x_BLD
    most = torch.finfo(x_BLD.dtype).max
    bound = torch.where(torch.isinf(x_BLD).any(), most - 1000, most)
    return torch.clamp(x_BLD, min=-bound, max=bound)
