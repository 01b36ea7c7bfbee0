"""The Wan diffusion transformer (arXiv:2503.20314): noisy latent and conditions in, flow velocity out.

Parameter names are those of Diffusers checkpoints (WanTransformer3DModel): a state dict loads strictly.
From the top: the network, its conditions, the block, attention, small layers.
"""

# Shape suffixes: B batch; C latent channels; T, H, W latent frames, rows, columns (in BCTHW); L tokens;
# D width; H heads and K head dimension (in BLHK); S text tokens; N image tokens; E input features of a
# condition; P values of one patch; M timesteps per sample (1, or L: one per token); 6 shift, scale and gate
# of two branches.

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.attention.core import Attend, sdpa
from frameloom.errors import CheckpointError, RequestError
from frameloom.models.spec import TransformerSpec
from frameloom.ops.modulate import add_gated, norm_scale_shift
from frameloom.ops.norm import at_least_fp32, layer_norm, rms_norm
from frameloom.ops.patch import Grid, unpatchify
from frameloom.ops.rope import RotaryTable, rotary_table, rotate

ROPE_TABLES_KEPT = 4  # per network; one for each (token grid, device) in use
CLIP_NORM_EPS = 1e-5  # fixed in the reference, whatever the checkpoint's eps


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockCondition:
    """Everything a block needs beside the tokens. All blocks of a step share one."""

    modulation_BM6D: Tensor
    text_BSD: Tensor
    image_BND: Tensor | None
    rope: RotaryTable


class RunBlocks(Protocol):
    """How the token stream passes the blocks: the seam for step caches and sharded sequences."""

    def __call__(self, blocks: nn.ModuleList, x_BLD: Tensor, cond: BlockCondition, /) -> Tensor:
        """Return x_BLD after the last block."""
        ...


def run_in_order(blocks: nn.ModuleList, x_BLD: Tensor, cond: BlockCondition, /) -> Tensor:
    """Every block once, first to last."""
    for block in blocks:
        x_BLD = block(x_BLD, cond)
    return x_BLD


class WanDiT(nn.Module):
    """The whole network. Two seams may be set on it later: `run_blocks`, and `attend` of every attention."""

    FP32_PARTS: ClassVar[frozenset[str]] = frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})

    def __init__(self, spec: TransformerSpec) -> None:
        """Random weights (none under torch.device("meta")). Raises CheckpointError on an impossible spec."""
        super().__init__()
        _check_spec(spec)
        self.spec = spec
        self.patch_embedding = nn.Conv3d(spec.in_channels, spec.dim, spec.patch_size, stride=spec.patch_size)
        self.condition_embedder = ConditionEmbedder(spec)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.proj_out = nn.Linear(spec.dim, spec.out_channels * spec.patch_volume)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, spec.dim) / spec.dim**0.5)
        self.run_blocks: RunBlocks = run_in_order
        self._rope_tables: dict[tuple[Grid, torch.device], RotaryTable] = {}

    def forward(self, x_BCTHW: Tensor, timestep: Tensor, text_BSE: Tensor, image_BNE: Tensor | None = None) -> Tensor:
        """Return velocity_BCTHW, out_channels wide, in `self.dtype`; inputs may have any float dtype.

        timestep: (B,), or (B, L) with one per token, between 0 and 1000. text_BSE: UMT5 features.
        image_BNE: CLIP features, only for checkpoints with an image branch; where both the first and the last
        frame are given, (B, 514, E) or, as CLIP returns them, (2B, 257, E). Raises RequestError on a misfit.
        """
        self._check_inputs(x_BCTHW, timestep, image_BNE)
        grid = self.token_grid(*x_BCTHW.shape[2:])
        x_BLD = self.patch_embedding(x_BCTHW.to(self.dtype)).flatten(2).transpose(1, 2).contiguous()
        time_BMD, modulation_BM6D = self.condition_embedder.embed_time(timestep, self.dtype)
        cond = BlockCondition(
            modulation_BM6D=modulation_BM6D,
            text_BSD=self.condition_embedder.text_embedder(text_BSE.to(self.dtype)),
            image_BND=self.condition_embedder.embed_image(image_BNE, self.dtype),
            rope=self._rope_table(grid, x_BCTHW.device),
        )
        x_BLD = self.run_blocks(self.blocks, x_BLD, cond)
        return unpatchify(self._project_out(x_BLD, time_BMD), grid, patch_size=self.spec.patch_size)

    def _project_out(self, x_BLD: Tensor, time_BMD: Tensor) -> Tensor:
        shift_BMD, scale_BMD = (self.scale_shift_table + at_least_fp32(time_BMD)[:, :, None]).unbind(2)
        x_BLD = norm_scale_shift(x_BLD, self.spec.eps, scale=scale_BMD, shift=shift_BMD)
        cells_BLP: Tensor = self.proj_out(x_BLD)
        return cells_BLP

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the token stream is computed in."""
        return self.patch_embedding.weight.dtype

    @classmethod
    def keep_in_fp32(cls, name: str) -> bool:
        """Whether the reference keeps the parameter `name` in float32 when the rest is loaded narrower."""
        return not cls.FP32_PARTS.isdisjoint(name.split("."))

    def token_grid(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along t, h, w of a latent of so many cells. Raises RequestError if it cannot be cut."""
        cells = {"frames": num_frames, "height": height, "width": width}
        grid = []
        for (axis, size), patch in zip(cells.items(), self.spec.patch_size, strict=True):
            _check_axis(f"latent {axis}", size, patch=patch, max_tokens=self.spec.rope_max_seq_len)
            grid.append(size // patch)
        return grid[0], grid[1], grid[2]

    def _check_inputs(self, x_BCTHW: Tensor, timestep: Tensor, image_BNE: Tensor | None) -> None:
        batch, channels, *size = x_BCTHW.shape
        if channels != self.spec.in_channels:
            raise RequestError(f"the latent has {channels} channels; this checkpoint takes {self.spec.in_channels}")
        num_tokens = math.prod(self.token_grid(*size))
        if tuple(timestep.shape) not in {(batch,), (batch, num_tokens)}:
            raise RequestError(
                f"timestep has shape {tuple(timestep.shape)}; give ({batch},) or ({batch}, {num_tokens})"
            )
        if image_BNE is None and self.spec.image_dim is not None:
            raise RequestError("this checkpoint needs CLIP image features; give an image")
        if image_BNE is not None and self.spec.image_dim is None:
            raise RequestError("this checkpoint has no CLIP image branch; leave the image features out")

    def _rope_table(self, grid: Grid, device: torch.device) -> RotaryTable:
        """Made on first use and kept: a buffer would stay empty after construction on the meta device."""
        key = grid, device
        if key not in self._rope_tables:
            if len(self._rope_tables) == ROPE_TABLES_KEPT:
                del self._rope_tables[next(iter(self._rope_tables))]  # the oldest
            with torch.inference_mode(False):  # so that a later training step may use it too
                self._rope_tables[key] = rotary_table(grid, self.spec.attention_head_dim, device=device)
        return self._rope_tables[key]


def _check_spec(spec: TransformerSpec) -> None:
    if spec.attention_head_dim % 2:
        raise CheckpointError(f"attention_head_dim is {spec.attention_head_dim}; rotary pairs need an even number")
    has_image = spec.image_dim is not None
    if spec.added_kv_proj_dim != (spec.dim if has_image else None):
        raise CheckpointError(
            f"image_dim {spec.image_dim} does not go with added_kv_proj_dim {spec.added_kv_proj_dim}; "
            f"give null for both, or {spec.dim} (the width) for the latter"
        )


def _check_axis(what: str, size: int, *, patch: int, max_tokens: int) -> None:
    if size < patch or size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        nearest = f"{below} or {above}" if below else f"{above}"
        raise RequestError(f"{what} {size} is not a multiple of {patch} (the patch); use {nearest}")
    if size // patch > max_tokens:
        raise RequestError(
            f"{what} {size} is past the last position of this checkpoint; use {max_tokens * patch} or less"
        )


class ConditionEmbedder(nn.Module):
    """Timestep, text and image features to the width of the network."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.freq_dim = spec.freq_dim
        self.time_embedder = TwoLayers(spec.freq_dim, spec.dim, nn.SiLU())
        self.time_proj = nn.Linear(spec.dim, 6 * spec.dim)
        self.text_embedder = TwoLayers(spec.text_dim, spec.dim, nn.GELU(approximate="tanh"))
        self.image_embedder = None if spec.image_dim is None else ImageEmbedder(spec, spec.image_dim)

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """timestep (B,) or (B, M) -> time_BMD and modulation_BM6D, both in `dtype`.

        Work and memory grow with M: with few distinct timesteps, embed those and index the results.
        """
        time_BME = sinusoids(timestep.reshape(timestep.shape[0], -1), self.freq_dim)
        time_BMD = self.time_embedder(time_BME.to(self.time_embedder.linear_1.weight.dtype)).to(dtype)
        return time_BMD, self.time_proj(F.silu(time_BMD)).unflatten(-1, (6, -1))

    def embed_image(self, image_BNE: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """image_BNE -> image_BND; None for None."""
        if image_BNE is None or self.image_embedder is None:
            return None
        image_BND: Tensor = self.image_embedder(image_BNE.to(dtype))
        return image_BND


def sinusoids(timestep: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of timestep · 10000^(-2i/dim): (...) -> (..., dim) float32 (arXiv:1706.03762)."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = timestep.float()[..., None] * exponent.exp()
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class ImageEmbedder(nn.Module):
    """CLIP features to the width of the network; checkpoints with two frames mark which token is whose."""

    def __init__(self, spec: TransformerSpec, image_dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(image_dim, CLIP_NORM_EPS)
        self.ff = FeedForward(image_dim, image_dim, dim_out=spec.dim, activation=nn.GELU())
        self.norm2 = LayerNorm(spec.dim, CLIP_NORM_EPS)
        self.pos_embed: nn.Parameter | None = None
        if spec.pos_embed_seq_len is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, spec.pos_embed_seq_len, image_dim))

    def forward(self, image_BNE: Tensor) -> Tensor:
        """image_BNE -> image_BND."""
        if self.pos_embed is not None:
            image_BNE = image_BNE.reshape(-1, *self.pos_embed.shape[1:]) + self.pos_embed
        image_BNE = self.norm1(image_BNE).type_as(image_BNE)
        image_BND = self.ff(image_BNE)
        normed_BND: Tensor = self.norm2(image_BND).type_as(image_BND)
        return normed_BND


class Block(nn.Module):
    """Self-attention and feed-forward, modulated by the timestep; between them, text and image."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.attn1 = SelfAttention(spec)
        self.attn2 = CrossAttention(spec)
        self.norm2 = LayerNorm(spec.dim, spec.eps) if spec.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(spec.dim, spec.ffn_dim, dim_out=spec.dim, activation=nn.GELU(approximate="tanh"))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, spec.dim) / spec.dim**0.5)

    def forward(self, x_BLD: Tensor, cond: BlockCondition) -> Tensor:
        """x_BLD -> x_BLD."""
        modulation_BM6D = self.scale_shift_table + at_least_fp32(cond.modulation_BM6D)
        shift1, scale1, gate1, shift3, scale3, gate3 = modulation_BM6D.unbind(2)  # each (B, M, D)

        attended = self.attn1(norm_scale_shift(x_BLD, self.eps, scale=scale1, shift=shift1), cond.rope)
        x_BLD = add_gated(x_BLD, attended, gate=gate1)
        x_BLD = x_BLD + self.attn2(self.norm2(x_BLD).type_as(x_BLD), cond.text_BSD, cond.image_BND)
        fed = self.ffn(norm_scale_shift(x_BLD, self.eps, scale=scale3, shift=shift3))
        return add_gated(x_BLD, fed, gate=gate3)


class Attention(nn.Module):
    """What self- and cross-attention share: projections, norms over all heads, and the `attend` seam."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.head_dim = spec.attention_head_dim
        self.to_q = nn.Linear(spec.dim, spec.dim)
        self.to_k = nn.Linear(spec.dim, spec.dim)
        self.to_v = nn.Linear(spec.dim, spec.dim)
        self.to_out = nn.Sequential(nn.Linear(spec.dim, spec.dim))
        self.norm_q = RMSNorm(spec.dim, spec.eps)
        self.norm_k = RMSNorm(spec.dim, spec.eps)
        self.attend: Attend = sdpa

    def split_heads(self, x_BLD: Tensor) -> Tensor:
        """x_BLD -> x_BLHK; the head count follows from the input, so a shard of the heads splits as well."""
        return x_BLD.reshape(*x_BLD.shape[:-1], -1, self.head_dim)


class SelfAttention(Attention):
    """Every token to every token of the video, with rotary positions."""

    def forward(self, x_BLD: Tensor, rope: RotaryTable) -> Tensor:
        """x_BLD -> out_BLD."""
        q_BLHK = rotate(self.split_heads(self.norm_q(self.to_q(x_BLD))), rope)
        k_BLHK = rotate(self.split_heads(self.norm_k(self.to_k(x_BLD))), rope)
        v_BLHK = self.split_heads(self.to_v(x_BLD))
        out_BLD: Tensor = self.to_out(self.attend(q_BLHK, k_BLHK, v_BLHK).flatten(2))
        return out_BLD


class CrossAttention(Attention):
    """Every video token to the text, and to the image by a softmax of its own; the two are summed."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__(spec)
        if spec.added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(spec.added_kv_proj_dim, spec.dim)
            self.add_v_proj = nn.Linear(spec.added_kv_proj_dim, spec.dim)
            self.norm_added_k = RMSNorm(spec.dim, spec.eps)

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, image_BND: Tensor | None) -> Tensor:
        """x_BLD -> out_BLD."""
        q_BLHK = self.split_heads(self.norm_q(self.to_q(x_BLD)))
        attended_BLHK = self.attend(q_BLHK, *self.text_kv(text_BSD))
        if image_BND is not None:
            attended_BLHK = attended_BLHK + self.attend(q_BLHK, *self.image_kv(image_BND))
        out_BLD: Tensor = self.to_out(attended_BLHK.flatten(2))
        return out_BLD

    def text_kv(self, text_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values k_BSHK, v_BSHK of the text; they do not depend on the step."""
        return self.split_heads(self.norm_k(self.to_k(text_BSD))), self.split_heads(self.to_v(text_BSD))

    def image_kv(self, image_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values k_BNHK, v_BNHK of the image; they do not depend on the step."""
        k_BND = self.norm_added_k(self.add_k_proj(image_BND))
        return self.split_heads(k_BND), self.split_heads(self.add_v_proj(image_BND))


class TwoLayers(nn.Module):
    """linear, activation, linear, under the names that the embedders of the checkpoints use."""

    def __init__(self, dim_in: int, dim_out: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_out)
        self.activation = activation
        self.linear_2 = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        y: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return y


class FeedForward(nn.Module):
    """linear, activation, linear, under the names net.0.proj and net.2."""

    def __init__(self, dim_in: int, dim_hidden: int, *, dim_out: int, activation: nn.Module) -> None:
        super().__init__()
        first = nn.Sequential()
        first.add_module("proj", nn.Linear(dim_in, dim_hidden))
        self.net = nn.Sequential(first, activation, nn.Linear(dim_hidden, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        y: Tensor = self.net(x)
        return y


class LayerNorm(nn.Module):
    """Layer norm with weight and bias; the result is float32 or wider, for the caller to round."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return layer_norm(x, self.eps, weight=self.weight, bias=self.bias)


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, in the dtype of its input."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return rms_norm(x, self.weight, self.eps)
