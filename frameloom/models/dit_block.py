"""A block of the Wan diffusion transformer, and the layers that the network is made of.

From the top: what a block is told and what it gives, the block, attention, the conditions, small layers.
"""

# Shape suffixes: those of models/wan_dit.py.

import math
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.attention.core import Attend, sdpa
from frameloom.models.spec import TransformerSpec
from frameloom.ops.dit_ops import Ops
from frameloom.ops.linear import PlainLinear
from frameloom.ops.norm import layer_norm, rms_norm
from frameloom.ops.quantized import Kernel, Linear
from frameloom.ops.rope import RotaryTable

PromptT = TypeVar("PromptT")  # what a block is told of the prompt
PromptT_contra = TypeVar("PromptT_contra", contravariant=True)
CLIP_NORM_EPS = 1e-5  # fixed in the reference, whatever the checkpoint's eps


class KeysValues(NamedTuple):
    """What the cross-attention of one block sees of a prompt. `bias_BS` is added to the logits of the text's keys.

    `hint`: what is added to the tokens after the block, x_BLD, where the network has hints (models/vace.py).
    """

    text: tuple[Tensor, Tensor]
    bias_BS: Tensor | None
    image: tuple[Tensor, Tensor] | None
    hint: Callable[[], Tensor] | None = None


class Looked(NamedTuple):
    """A block before it reads the prompt: its tokens, and the queries of the cross-attention."""

    x_BLD: Tensor
    q_BLHK: Tensor

    def repeated(self, times: int) -> "Looked":
        """The batch several times over."""
        if times == 1:
            return self
        return Looked(self.x_BLD.repeat(times, 1, 1), self.q_BLHK.repeat(times, 1, 1, 1))


class Affine(Protocol):
    """A norm's weight and bias (D,)."""

    @property
    def weight(self) -> Tensor:
        """What the normed is multiplied by."""
        ...

    @property
    def bias(self) -> Tensor:
        """What is added to it."""
        ...


class ReadsPrompt(Protocol[PromptT_contra]):
    """The cross-attention of a block."""

    def queries(self, x_BLD: Tensor, /) -> Tensor:
        """x_BLD -> q_BLHK, or what else `__call__` begins with."""
        ...

    def __call__(self, q_BLHK: Tensor, prompt: PromptT_contra, /) -> Tensor:
        """q_BLHK -> out_BLD."""
        ...


class BlockSteps(Generic[PromptT]):
    """Self-attention and feed-forward, modulated by the timestep; between them, text and image.

    Whose layers these are is for others to say: `Block`, which has weights, or the block of another library.
    """

    eps: float
    ops: Ops
    attn1: Callable[..., Tensor]
    attn2: ReadsPrompt[PromptT]
    norm2: Affine | None
    ffn: Callable[..., Tensor]

    def forward(self, x_BLD: Tensor, modulation: Sequence[Tensor], rope: RotaryTable, prompt: PromptT) -> Tensor:
        """x_BLD -> x_BLD. `modulation`: the six of `Step.modulation`."""
        return self.read(self.look(x_BLD, modulation, rope), modulation, prompt)

    def look(self, x_BLD: Tensor, modulation: Sequence[Tensor], rope: RotaryTable) -> Looked:
        """All that comes before the prompt is read: self-attention, and the queries of the cross-attention."""
        shift, scale, gate, *_ = modulation
        attended = self.attn1(self.ops.norm_scale_shift(x_BLD, self.eps, scale=scale, shift=shift), rope)
        if self.norm2 is None:
            x_BLD = normed = self.ops.add_gated(x_BLD, attended, gate=gate)
        else:
            affine = {"weight": self.norm2.weight, "bias": self.norm2.bias}
            x_BLD, normed = self.ops.add_norm(x_BLD, attended, self.eps, gate=gate, **affine)
        return Looked(x_BLD, self.attn2.queries(normed))

    def read(self, looked: Looked, modulation: Sequence[Tensor], prompt: PromptT) -> Tensor:
        """The rest: cross-attention to the prompt, feed-forward."""
        *_, shift, scale, gate = modulation
        attended = self.attn2(looked.q_BLHK, prompt)
        x_BLD, normed = self.ops.add_norm(looked.x_BLD, attended, self.eps, scale=scale, shift=shift)
        return self.ops.add_gated(x_BLD, self.ffn(normed), gate=gate)


class Block(BlockSteps[KeysValues], nn.Module):
    """A block with weights of its own."""

    attn1: "SelfAttention"
    attn2: "CrossAttention"
    norm2: "LayerNorm | None"
    ffn: "FeedForward"

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.attn1 = SelfAttention(spec)
        self.attn2 = CrossAttention(spec)
        self.norm2 = LayerNorm(spec.dim, spec.eps) if spec.cross_attn_norm else None
        self.ffn = FeedForward(spec.dim, spec.ffn_dim, dim_out=spec.dim, activation=nn.GELU(approximate="tanh"))
        self.scale_shift_table = modulation_table(6, spec.dim)
        self.ops = Ops()


def modulation_table(count: int, dim: int) -> nn.Parameter:
    """Random numbers (1, count, D), to which those of the timestep are added."""
    table = nn.Parameter(torch.empty(1, count, dim))
    nn.init.normal_(table, std=dim**-0.5)
    return table


class Norm(Protocol):
    """Root mean square norm over the last axis: weight (D,), and what the mean is raised by."""

    @property
    def weight(self) -> Tensor:
        """What the normed is multiplied by."""
        ...

    @property
    def eps(self) -> float:
        """What is added to the mean of the squares."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """(..., D) -> (..., D)."""
        ...


class AttentionSteps:
    """What self- and cross-attention share, whoever has the layers: projections, norms over all heads, `attend`."""

    head_dim: int
    to_q: Callable[..., Tensor]
    to_k: Callable[..., Tensor]
    to_v: Callable[..., Tensor]
    to_out: Callable[..., Tensor]
    norm_q: Norm
    norm_k: Norm
    attend: Attend

    def split_heads(self, x_BLD: Tensor) -> Tensor:
        """x_BLD -> x_BLHK; the head count follows from the input, so a shard of the heads splits as well."""
        return x_BLD.reshape(*x_BLD.shape[:-1], -1, self.head_dim)


class SelfAttentionSteps(AttentionSteps):
    """Every token to every token of the video, with rotary positions.

    `project`: the three projections in one product, (B, L, D) -> (B, L, 3 D); None: one after the other.
    """

    project: Kernel | None
    ops: Ops

    def forward(self, x_BLD: Tensor, rope: RotaryTable) -> Tensor:
        """x_BLD -> out_BLD."""
        if self.project is None:
            q, k, v = self.to_q(x_BLD), self.to_k(x_BLD), self.to_v(x_BLD)
        else:
            q, k, v = self.project(x_BLD).chunk(3, dim=-1)
        q_BLHK = self._turned(q, self.norm_q, rope)
        k_BLHK = self._turned(k, self.norm_k, rope)
        out_BLD: Tensor = self.to_out(self.attend(q_BLHK, k_BLHK, self.split_heads(v)).flatten(2))
        return out_BLD

    def _turned(self, x_BLD: Tensor, norm: Norm, rope: RotaryTable) -> Tensor:
        return self.ops.norm_rotate(x_BLD, norm.weight, norm.eps, rope, self.head_dim)


class CrossAttentionSteps(AttentionSteps):
    """Every video token to the text, and to the image by a softmax of its own; the two are summed."""

    add_k_proj: Callable[..., Tensor]
    add_v_proj: Callable[..., Tensor]
    norm_added_k: Callable[..., Tensor]

    def forward(self, q_BLHK: Tensor, prompt: KeysValues) -> Tensor:
        """q_BLHK -> out_BLD."""
        bias = () if prompt.bias_BS is None else (prompt.bias_BS,)
        attended_BLHK = self.attend(q_BLHK, *prompt.text, *bias)
        if prompt.image is not None:
            attended_BLHK = attended_BLHK + self.attend(q_BLHK, *prompt.image)
        out_BLD: Tensor = self.to_out(attended_BLHK.flatten(2))
        return out_BLD

    def queries(self, x_BLD: Tensor) -> Tensor:
        """x_BLD -> q_BLHK."""
        return self.split_heads(self.norm_q(self.to_q(x_BLD)))

    def keys_and_values(self, text_BSD: Tensor, image_BND: Tensor | None, bias_BS: Tensor | None) -> KeysValues:
        """What this attention sees of a prompt; it does not depend on the step."""
        image = None
        if image_BND is not None:
            k_BND = self.norm_added_k(self.add_k_proj(image_BND))
            image = self.split_heads(k_BND), self.split_heads(self.add_v_proj(image_BND))
        text = self.split_heads(self.norm_k(self.to_k(text_BSD))), self.split_heads(self.to_v(text_BSD))
        return KeysValues(text=text, bias_BS=bias_BS, image=image)


class Attention(AttentionSteps, nn.Module):
    """What self- and cross-attention with weights of their own share."""

    to_q: Linear
    to_k: Linear
    to_v: Linear
    to_out: nn.Sequential
    norm_q: "RMSNorm"
    norm_k: "RMSNorm"

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.head_dim = spec.attention_head_dim
        self.to_q = Linear(spec.dim, spec.dim)
        self.to_k = Linear(spec.dim, spec.dim)
        self.to_v = Linear(spec.dim, spec.dim)
        self.to_out = nn.Sequential(Linear(spec.dim, spec.dim))
        self.norm_q = RMSNorm(spec.dim, spec.eps)
        self.norm_k = RMSNorm(spec.dim, spec.eps)
        self.attend: Attend = sdpa

    @property
    def out(self) -> Linear:
        """The projection of the attended values."""
        layer = self.to_out[0]
        assert isinstance(layer, Linear)
        return layer


class SelfAttention(SelfAttentionSteps, Attention):
    """Self-attention with weights of its own."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__(spec)
        self.project: Kernel | None = None
        self.ops = Ops()

    def fuse_projections(self, make: Callable[[Tensor, Tensor], Kernel] | None = None) -> None:
        """Compute the three projections in one product from now on, by what `make` returns for their joined weights."""
        layers = (self.to_q, self.to_k, self.to_v)
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = torch.cat([layer.bias.detach() for layer in layers])
        self.project = (make or PlainLinear)(weight, bias)
        for layer in layers:
            layer.register_parameter("weight", None)
            layer.register_parameter("bias", None)


class CrossAttention(CrossAttentionSteps, Attention):
    """Cross-attention with weights of its own."""

    add_k_proj: Linear
    add_v_proj: Linear

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__(spec)
        if spec.added_kv_proj_dim is not None:
            self.add_k_proj = Linear(spec.added_kv_proj_dim, spec.dim)
            self.add_v_proj = Linear(spec.added_kv_proj_dim, spec.dim)
            self.norm_added_k = RMSNorm(spec.dim, spec.eps)


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
    """linear, activation, linear, under the names net.0.proj and net.2; `kernel` may compute all three."""

    def __init__(self, dim_in: int, dim_hidden: int, *, dim_out: int, activation: nn.Module) -> None:
        super().__init__()
        first = nn.Sequential()
        first.add_module("proj", Linear(dim_in, dim_hidden))
        self.net = nn.Sequential(first, activation, Linear(dim_hidden, dim_out))
        self.kernel: Kernel | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        y: Tensor = self.net(x) if self.kernel is None else self.kernel(x)
        return y

    @property
    def layers(self) -> tuple[Linear, Linear]:
        """The two linear layers."""
        first, second = self.net[0].get_submodule("proj"), self.net[2]
        assert isinstance(first, Linear)
        assert isinstance(second, Linear)
        return first, second

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of both, as `ops.mlp` takes them."""
        first, second = self.layers
        return first.weight, first.bias, second.weight, second.bias


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
