"""The VAE over several ranks: the same numbers as in one process, and what happens when a row is lost."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import choose, install
from frameloom.models.vae_state import Passage, Reach
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Policy, relative_error
from frameloom.parallel.picture import Axis, cut, grid
from frameloom.parallel.vae_split import SharedPassage, Share, ShardState, margin_cells
from frameloom.pipeline.stages import to_uint8
from frameloom.platform.tuning import Tuner

SPECS = {
    "2.1": {"base_dim": 8, "z_dim": 4, "dim_mult": (1, 2, 2, 2), "num_res_blocks": 1},
    "2.2": {
        "base_dim": 8,
        "decoder_base_dim": 8,
        "z_dim": 6,
        "dim_mult": (1, 2, 2, 2),
        "num_res_blocks": 1,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
    },
}
FAST = ("vae.conv_winograd", "vae.upsample_winograd")


def small_vae(kind: str, dtype: torch.dtype = torch.float32) -> WanVAE:
    spec = SPECS[kind]
    z_dim = spec["z_dim"]
    torch.manual_seed(3)
    vae = WanVAE(VaeSpec(**spec, latents_mean=(0.0,) * z_dim, latents_std=(1.0,) * z_dim)).eval().to(dtype)
    with torch.no_grad():  # so that a neighbour's row counts
        for parameter in vae.parameters():
            if parameter.ndim > 3:
                parameter.mul_(1.5)
    return vae


def fast_vae(kind: str, dtype: torch.dtype, world, folder: Path, **forced: bool) -> WanVAE:
    vae = small_vae(kind, dtype)
    tuner = Tuner(torch.device("cpu"), folder, agreed=world.everyone.first)
    install(vae, choose(vae, Policy(forced=forced), tuner))
    return vae


def latents(vae: WanVAE, frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.randn(1, vae.spec.z_dim, frames, height, width, generator=generator).to(next(vae.parameters()).dtype)


def pictures(vae: WanVAE, frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 100 + width)
    scale = vae.spec.spatial_scale
    x = torch.rand(1, 3, frames, height * scale, width * scale, generator=generator) * 2 - 1
    return x.to(next(vae.parameters()).dtype)


@torch.inference_mode()
def errors(world, kind, sizes, ways) -> dict:
    """Relative error of each way to divide each picture, decoded and encoded, in float64."""
    vae = small_vae(kind, torch.float64)
    found = {}
    for (height, width), (columns, overlaps, margin, last) in itertools.product(sizes, ways):
        share = Share.of(world.everyone, height, width, columns=columns, overlaps=overlaps)
        cells = {encodes: margin_cells(vae.spec, encodes=encodes) if margin else None for encodes in (False, True)}
        z, x = latents(vae, 3, height, width), pictures(vae, 9, height, width)
        decoding = SharedPassage(steps=2, share=share, margin=cells[False], channels_last=last)
        encoding = SharedPassage(steps=2, share=share, margin=cells[True], channels_last=last, encodes=True)
        key = height, width, columns, overlaps, margin, last
        found[key] = (
            relative_error(vae.decode(z, decoding), vae.decode(z)),
            relative_error(vae.encode(x, encoding), vae.encode(x)),
        )
    return found


SIZES = [(7, 5), (3, 9), (1, 2), (9, 4)]
WAYS = [(1, False, False, False), (1, True, False, True), (1, True, True, True), (None, True, False, True)]


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_parts_of_pictures_are_those_of_the_whole(count: int, kind: str) -> None:
    ways = [*WAYS, (count, False, False, False), *([(2, False, False, True)] if count == 4 else [])]
    for found in run_ranks(count, errors, kind, SIZES, ways):
        worst = max(found, key=lambda key: max(found[key]))
        assert max(found[worst]) <= 1e-13, worst
