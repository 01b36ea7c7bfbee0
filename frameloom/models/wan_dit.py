"""The Wan diffusion transformer (arXiv:2503.20314): noisy latent and conditions in, flow velocity out.

Parameter names are those of Diffusers checkpoints (WanTransformer3DModel): a state dict loads strictly.
From the top: the seams, what the blocks are told, the network; what it is made of is in models/dit_block.py.
"""

# Shape suffixes: B batch; C latent channels; T, H, W latent frames, rows, columns (in BCTHW); L tokens;
# D width; H heads and K head dimension (in BLHK); S text tokens; N image tokens; E input features of a
# condition; P values of one patch; F frames of tokens; M distinct timesteps per sample (1; L where each token has
# its own); 6 shift, scale and gate of two branches.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from frameloom.errors import CheckpointError, RequestError
from frameloom.models.adapters import Adapters
from frameloom.models.dit_block import Block, ConditionEmbedder, KeysValues, modulation_table
from frameloom.models.division import Division, Undo
from frameloom.models.spec import TransformerSpec
from frameloom.ops.dit_ops import Ops
from frameloom.ops.norm import at_least_fp32
from frameloom.ops.patch import Grid, unpatchify
from frameloom.ops.rope import RotaryTable, rotary_table

ROPE_TABLES_KEPT = 4  # per network; one for each (token grid, device) in use
_FEW_TIMESTEPS = 8  # per sample: so many have the modulation of all blocks made at once


class FrameTimes(NamedTuple):
    """Timesteps of a video whose frames differ: a few distinct values, and the value of each frame of tokens.

    Work and memory grow with the number of values: an image given as the first frame makes two of them.
    """

    values_BM: Tensor
    index_F: Tensor


class RunBlocks(Protocol):
    """How the token stream passes the blocks, once per prompt: the seam for step caches."""

    def __call__(
        self, blocks: Sequence[Block], x_BLD: Tensor, step: "Step", prompts: Sequence["Prompt"], /
    ) -> list[Tensor]:
        """Return, for each prompt, its tokens after the last block; a prompt may have a multiple of B samples."""
        ...


def run_in_order(blocks: Sequence[Block], x_BLD: Tensor, step: "Step", prompts: Sequence["Prompt"], /) -> list[Tensor]:
    """Every block, first to last. Until the first block reads the prompt, all prompts share one computation."""
    first, *others = blocks
    looked = first.look(x_BLD, step.modulation(0), step.rope)
    results = []
    for prompt in prompts:
        repeats = prompt.batch_size // x_BLD.shape[0]
        mine = step.repeated(repeats)
        x = first.read(looked.repeated(repeats), mine.modulation(0), prompt.of_blocks[0])
        for index, block in enumerate(others, start=1):
            x = block(x, mine.modulation(index), mine.rope, prompt.of_blocks[index])
        results.append(x)
    return results


class Tokens(NamedTuple):
    """All tokens of a latent, or some: values, timestep and positions. `grid` is that of all, in t, h, w."""

    x_BLD: Tensor
    timestep: Tensor | FrameTimes
    rope: RotaryTable
    grid: Grid


ComputeCells = Callable[[Tokens, Sequence["Prompt"]], list[Tensor]]


class ShareTokens(Protocol):
    """Which tokens are computed here: the seam for a sequence that is divided."""

    def __call__(self, compute: ComputeCells, tokens: Tokens, prompts: Sequence["Prompt"], /) -> list[Tensor]:
        """Return, for each prompt, the velocity of all tokens as cells_BLP; `compute` does so for those it is given."""
        ...


def all_tokens(compute: ComputeCells, tokens: Tokens, prompts: Sequence["Prompt"], /) -> list[Tensor]:
    """Every token, here."""
    return compute(tokens, prompts)


class Control(NamedTuple):
    """A latent beside the video's, of its size, with as many samples or one for all; and how much each hint counts."""

    x_BCTHW: Tensor
    strengths: tuple[float, ...]


class Prompt(NamedTuple):
    """Keys and values of every block, first to last. `control`: what blocks beside are shown (models/vace.py)."""

    of_blocks: tuple[KeysValues, ...]
    control: Control | None = None

    @property
    def batch_size(self) -> int:
        """Samples."""
        return self.of_blocks[0].text[0].shape[0]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """What all blocks are told of one step: the modulation by the timestep, and the positions.

    `sums_NBM6D`: the modulation of every block; None where each token has its own timestep, which would be much memory.
    """

    tables_N6D: Tensor
    projection_BM6D: Tensor
    sums_NBM6D: Tensor | None
    last_BM2D: Tensor
    index_F: Tensor | None
    rope: RotaryTable

    def modulation(self, block: int) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self-attention, then of the feed-forward, of one block; see `spread`."""
        if self.sums_NBM6D is not None:
            return self.spread(self.sums_NBM6D[block])
        return self.spread(self.tables_N6D[block] + self.projection_BM6D)

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """values (B, M, n, D) as n tensors that broadcast over tokens: (B, 1, D), (B, L, D) or (B, F, 1, D)."""
        if self.index_F is None:
            return values.unbind(2)
        return values[:, self.index_F].unsqueeze(3).unbind(2)

    def repeated(self, times: int) -> "Step":
        """For a batch that holds this one several times; one sample does for any number."""
        if times == 1 or self.projection_BM6D.shape[0] == 1:
            return self
        sums = self.sums_NBM6D
        return replace(
            self,
            projection_BM6D=self.projection_BM6D.repeat(times, 1, 1, 1),
            sums_NBM6D=None if sums is None else sums.repeat(1, times, 1, 1, 1),
            last_BM2D=self.last_BM2D.repeat(times, 1, 1, 1),
        )


def collapse_padding(text_BSE: Tensor) -> tuple[Tensor, Tensor | None]:
    """Text features without the zeros that fill them up, but for one; and a bias for its key, or None if none fell.

    All these positions are one vector after the projection, so n equal keys weigh as much as one whose logit is
    log(n) larger: bias_S float32. Reads the text on the host, once per prompt.
    """
    used = (text_BSE != 0).any(-1).any(0).tolist()
    length = max((index + 1 for index, is_used in enumerate(used) if is_used), default=0)
    num_padding = text_BSE.shape[1] - length
    if num_padding < 2:
        return text_BSE, None
    bias_S = torch.zeros(length + 1, device=text_BSE.device)
    bias_S[-1] = math.log(num_padding)
    return text_BSE[:, : length + 1], bias_S


class WanDiT(nn.Module):
    """The whole network. Seams that may be set later: `run_blocks`, `share_tokens`, and `attend` of every attention."""

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
        self.scale_shift_table = modulation_table(2, spec.dim)
        self.run_blocks: RunBlocks = run_in_order
        self.share_tokens: ShareTokens = all_tokens
        self.collapses_padding = False
        self.ops = Ops()
        self.division = Division()
        self.adapters: tuple[Adapters, ...] = ()  # models/adapters_beside.py
        self.undo_adapters: tuple[Undo, ...] = ()
        self._rope_tables: dict[tuple[Grid, torch.device], RotaryTable] = {}

    def forward(
        self,
        x_BCTHW: Tensor,
        timestep: Tensor | FrameTimes,
        text_BSE: Tensor,
        image_BNE: Tensor | None = None,
    ) -> Tensor:
        """Return velocity_BCTHW, out_channels wide, in `self.dtype`; inputs may have any float dtype.

        The arguments are those of `velocities` and of `read_prompt`. Raises RequestError on a misfit.
        """
        self._check_latents(x_BCTHW, timestep)
        (velocity_BCTHW,) = self.velocities(x_BCTHW, timestep, [self.read_prompt(text_BSE, image_BNE)])
        return velocity_BCTHW

    def read_prompt(self, text_BSE: Tensor, image_BNE: Tensor | None = None) -> "Prompt":
        """Keys and values of the text and the image in every block: the same in all steps.

        text_BSE: UMT5 features. image_BNE: CLIP features, only for checkpoints with an image branch; where both the
        first and the last frame are given, (B, 514, E) or, as CLIP returns them, (2B, 257, E).
        """
        self._check_image(image_BNE)
        bias_S: Tensor | None = None
        if self.collapses_padding:
            text_BSE, bias_S = collapse_padding(text_BSE)
        text_BSD = self.condition_embedder.text_embedder(text_BSE.to(self.dtype))
        image_BND = self.condition_embedder.embed_image(image_BNE, self.dtype)
        bias_BS = None if bias_S is None else bias_S.expand(text_BSD.shape[0], -1)
        return Prompt(tuple(block.attn2.keys_and_values(text_BSD, image_BND, bias_BS) for block in self.block_list))

    def velocities(self, x_BCTHW: Tensor, timestep: Tensor | FrameTimes, prompts: Sequence["Prompt"]) -> list[Tensor]:
        """The velocity of the same latents under each prompt; what does not depend on the prompt is computed once.

        timestep: (B,), or (B, L) with one per token, between 0 and 1000; or FrameTimes. A prompt of k·B samples
        yields k·B velocities: the latents repeated. Raises RequestError on a misfit.
        """
        grid = self._check_latents(x_BCTHW, timestep)
        x_BLD = self._embed(x_BCTHW, prompts)
        tokens = Tokens(x_BLD, timestep, self._rope_table(grid, x_BCTHW.device), grid)
        cells = self.share_tokens(self._cells, tokens, prompts)
        return [unpatchify(cells_BLP, grid, patch_size=self.spec.patch_size) for cells_BLP in cells]

    def _cells(self, tokens: Tokens, prompts: Sequence["Prompt"]) -> list[Tensor]:
        """cells_BLP for each prompt: the velocities of the patches that the tokens stand for."""
        step = self._step(tokens.timestep, tokens.rope)
        results = self._pass_blocks(tokens.x_BLD, step, prompts)
        return [self._project_out(x, step.repeated(x.shape[0] // tokens.x_BLD.shape[0])) for x in results]

    def _embed(self, x_BCTHW: Tensor, prompts: Sequence["Prompt"]) -> Tensor:
        """The tokens of the latents; a network with blocks beside puts more into each, of what the prompts hold."""
        return self._patches(x_BCTHW, self.patch_embedding)

    def _patches(self, x_BCTHW: Tensor, patches: nn.Conv3d) -> Tensor:
        return self.ops.patch_embed(x_BCTHW.to(self.dtype), patches.weight, patches.bias, self.spec.patch_size)

    def _pass_blocks(self, x_BLD: Tensor, step: "Step", prompts: Sequence["Prompt"]) -> list[Tensor]:
        """What `_embed` made, after the last block, for each prompt."""
        return self.run_blocks(self.block_list, x_BLD, step, prompts)

    def _step(self, timestep: Tensor | FrameTimes, rope: RotaryTable) -> "Step":
        values, index_F = timestep if isinstance(timestep, FrameTimes) else (timestep, None)
        time_BMD, projection_BM6D = self.condition_embedder.embed_time(values, self.dtype)
        tables_N6D = torch.cat([block.scale_shift_table for block in self.block_list])
        projection_BM6D = at_least_fp32(projection_BM6D)
        few = projection_BM6D.shape[1] <= _FEW_TIMESTEPS
        return Step(
            tables_N6D=tables_N6D,
            projection_BM6D=projection_BM6D,
            sums_NBM6D=tables_N6D[:, None, None] + projection_BM6D if few else None,
            last_BM2D=self.scale_shift_table + at_least_fp32(time_BMD)[:, :, None],
            index_F=index_F,
            rope=rope,
        )

    def _project_out(self, x_BLD: Tensor, step: "Step") -> Tensor:
        shift, scale = step.spread(step.last_BM2D)
        x_BLD = self.ops.norm_scale_shift(x_BLD, self.spec.eps, scale=scale, shift=shift)
        cells_BLP: Tensor = self.proj_out(x_BLD)
        return cells_BLP

    @property
    def block_list(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

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

    def _check_latents(self, x_BCTHW: Tensor, timestep: Tensor | FrameTimes) -> Grid:
        batch, channels, *size = x_BCTHW.shape
        if channels != self.spec.in_channels:
            raise RequestError(f"the latent has {channels} channels; this checkpoint takes {self.spec.in_channels}")
        grid = self.token_grid(*size)
        known: list[tuple[int, ...]] = [(batch,), (batch, math.prod(grid))]
        if isinstance(timestep, FrameTimes):
            timestep, known = timestep.index_F, [(grid[0],)]
        if tuple(timestep.shape) not in known:
            allowed = " or ".join(str(shape) for shape in known)
            raise RequestError(f"timestep has shape {tuple(timestep.shape)}; give {allowed}")
        return grid

    def _check_image(self, image_BNE: Tensor | None) -> None:
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
