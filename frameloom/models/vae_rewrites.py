"""The rewrites of the WanVAE as a whole: how a video is cut on its way through, and all rewrites that there are."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.ops import vae_rewrites as operations
from frameloom.ops import winograd
from frameloom.ops.registry import Rewrite, Sizes

TILE_ROWS = winograd.TILE  # so that all tiles of a layer, and of the layers behind it, end at the same rows
_Z_DIM = 4
_SMALL: Mapping[str, Any] = MappingProxyType(
    {
        "base_dim": 8,
        "z_dim": _Z_DIM,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "latents_mean": [0.0] * _Z_DIM,
        "latents_std": [1.0] * _Z_DIM,
    }
)


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """A small random VAE and latents (B, Z, T, H, W) of at most seven rows and columns."""
    height, width = (1 + min(side, 12) // 2 for side in (sizes.height, sizes.width))
    with torch.random.fork_rng():
        torch.manual_seed(sizes.seed)
        vae = WanVAE(VaeSpec.from_config(dict(_SMALL))).eval().to(device, dtype)
        z = torch.randn(sizes.batch, _Z_DIM, 1 + min(sizes.frames, 3), height, width)
    return vae, z.to(device, dtype)


@torch.inference_mode()
def _plainly(vae: WanVAE, z: Tensor) -> Tensor:
    return vae.decode(z)


def _by(passage: Passage) -> Callable[[WanVAE, Tensor], Tensor]:
    @torch.inference_mode()
    def decode(vae: WanVAE, z: Tensor) -> Tensor:
        return vae.decode(z, passage)

    return decode


def _still_example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """The same VAE, and frames (B, 3, T, H, W) that stop moving after the fifth, and move again at the end."""
    vae, _ = _example(sizes, dtype, device)
    height, width = (vae.spec.spatial_scale * (1 + min(side, 12) // 6) for side in (sizes.height, sizes.width))
    moving = torch.rand(sizes.batch, 3, 9, height, width, generator=torch.Generator().manual_seed(sizes.seed)) * 2 - 1
    x = torch.cat([moving[:, :, :5], moving[:, :, 5:6].expand(-1, -1, 48, -1, -1), moving[:, :, 5:]], dim=2)
    return vae, x.to(device, dtype)


@torch.inference_mode()
def _encoded(vae: WanVAE, x: Tensor, passage: Passage) -> Tensor:
    return vae.encode(x, passage)


def refuses_tiles(weight: Tensor) -> str | None:
    """Why convolutions are not computed in tiles of rows where the weights are; None where they are."""
    on_cpu = weight.device.type in ("cpu", "meta")
    return None if on_cpu else "it is for a CPU: a GPU has too little to do with four rows"


BUFFERS = Rewrite(
    name="vae.buffers",
    exactness="bitwise",
    replaces="concatenating each convolution's input with the frames before it, and keeping a copy of its end",
    reference=_plainly,
    fast=_by(Passage(steps=1)),
    refuses=operations.never,
    example=_example,
    tolerance=0.0,
    because="the same numbers are written to one buffer instead",
    dtypes=(torch.float32, torch.bfloat16),
)
REPEATS = Rewrite(
    name="vae.repeats",
    exactness="bitwise",
    replaces="encoding frames that do not change, such as those behind the picture that a video starts from",
    reference=lambda vae, x: _encoded(vae, x, Passage(buffers=False)),
    fast=lambda vae, x: _encoded(vae, x, Passage(repeats=True)),
    refuses=operations.never,
    example=_still_example,
    tolerance=0.0,
    because="a part of the encoder whose input and memory are those of before gives what it gave; both are compared",
    dtypes=(torch.float32, torch.bfloat16),
)
TILES = Rewrite(
    name="vae.row_tiles",
    exactness="rounding",
    replaces="a library's convolutions over all rows at once, whose sums depend on how many rows there are",
    reference=_plainly,
    fast=_by(Passage(steps=1, tile_rows=TILE_ROWS)),
    refuses=lambda vae, *_: refuses_tiles(next(vae.parameters())),
    example=_example,
    because="asked for four rows at a time, the library may sum in another order than for all",
    dtypes=(torch.float32, torch.bfloat16),
)
CHUNKS = Rewrite(
    name="vae.chunks",
    exactness="rounding",
    replaces="one latent frame at a time",
    reference=_plainly,
    fast=_by(Passage(steps=3)),
    refuses=operations.never,
    example=_example,
    because="a convolution over more frames may be cut up in another way by the library",
)
BANDS = Rewrite(
    name="vae.bands",
    exactness="rounding",
    replaces="whole pictures, by bands of rows that remember the rows they need",
    reference=_plainly,
    fast=_by(Passage(steps=1, rows=2)),
    refuses=operations.never,
    example=_example,
    because="every row is computed from the same rows; a GPU's library may sum in another order for another height",
)
VAE_REWRITES = (BUFFERS, REPEATS, TILES, CHUNKS, BANDS, *operations.OPERATIONS)
