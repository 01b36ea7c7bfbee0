"""The VAE over several ranks: the same numbers as in one process, and what happens when a row is lost."""

import itertools
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import choose, install
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Policy, relative_error
from frameloom.parallel.picture import cut, grid
from frameloom.parallel.share import Share
from frameloom.parallel.team import Pending, Team
from frameloom.parallel.vae_margin import margin_cells
from frameloom.parallel.vae_passage import SharedPassage
from frameloom.parallel.vae_split import ShardState
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
        z, x = latents(vae, 3, height, width), pictures(vae, 5, height, width)
        decoding = SharedPassage(steps=2, share=share, margin=cells[False], channels_last=last)
        encoding = SharedPassage(steps=2, share=share, margin=cells[True], channels_last=last, encodes=True)
        key = height, width, columns, overlaps, margin, last
        found[key] = (
            relative_error(vae.decode(z, decoding), vae.decode(z)),
            relative_error(vae.encode(x, encoding), vae.encode(x)),
        )
    return found


SIZES = [(7, 5), (3, 4)]
WAYS = [(1, False, False, False), (1, True, False, True), (1, True, True, True)]  # columns, overlaps, margin, last


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_pictures_are_those_of_the_whole(count: int, kind: str) -> None:
    ways = [*WAYS[: 3 if count == 4 else 2], (2, False, False, count == 4)]
    for found in run_ranks(count, errors, kind, SIZES, ways):
        worst = max(found, key=lambda key: max(found[key]))
        assert max(found[worst]) <= 1e-13, worst


class LosingTeam(Team):
    """Loses what exchange number `victim` brought; `count` says how many there were."""

    def __init__(self, team: Team, victim: int) -> None:
        super().__init__(team.ranks, team.ranks[team.index], team.group)
        self.victim, self.count = victim, 0

    def exchange(self, sends, receives):
        pending = super().exchange(sends, receives)
        lost = bool(receives) and self.count == self.victim
        self.count += bool(receives)
        return Lost(pending.works, pending.received) if lost else pending


class Lost(Pending):
    def wait(self):
        for x in super().wait().values():
            x.zero_()
        return self.received


@torch.inference_mode()
def exchanges_that_may_be_lost(world, kind) -> tuple[int, list[int]]:
    """How many exchanges a rank takes part in for one latent frame, and which of them make no difference."""
    vae = small_vae(kind, torch.float64)
    z = latents(vae, 1, 6, 2)

    def decode(victim: int) -> tuple[torch.Tensor, int]:
        team = LosingTeam(world.everyone, victim if world.rank == 1 else -1)
        share = Share.of(team, 6, 2, columns=1, overlaps=victim % 2 == 0)
        out = vae.decode_chunk(SharedPassage(share=share).part(z), ShardState(share, channels_last=False))
        return torch.cat(world.everyone.collect(out.contiguous(), shapes), dim=3), team.count

    scale = vae.spec.spatial_scale
    shapes = [(1, 3, 1, (b - a) * scale, 2 * scale) for a, b in itertools.pairwise(cut(6, world.size))]
    whole, count = decode(-1)
    assert relative_error(whole, vae.decode(z)) <= 1e-14
    return count, [victim for victim in range(count) if torch.equal(decode(victim)[0], whole)]


@pytest.mark.parametrize("kind", SPECS)
def test_no_row_that_is_fetched_can_be_missed(kind: str) -> None:
    """Every convolution over rows fetches, and the attention in the middle."""
    rows = 3 if kind == "2.1" else 2
    for count, harmless in run_ranks(3, exchanges_that_may_be_lost, kind):
        assert count > 8 * rows
        assert harmless == []


def test_parts_are_uneven_and_never_lost() -> None:
    for cells, parts in itertools.product(range(1, 130), (1, 2, 3, 4, 7, 8)):
        bounds = cut(cells, parts)
        sizes = [b - a for a, b in itertools.pairwise(bounds)]
        assert bounds[0] == 0
        assert bounds[-1] == cells == sum(sizes)
        assert len(sizes) == parts
        assert all(size > 0 for size in sizes[: min(cells, parts)])
        assert max(sizes) <= max(1, 1.1 * -(-cells // parts))


def test_wide_pictures_are_divided_in_columns_and_others_in_rows() -> None:
    assert grid(60, 104, 4) == (4, 1)
    assert grid(16, 200, 4) == (1, 4)
    assert grid(16, 200, 16) == (2, 8)
    assert grid(2, 11, 4) == (4, 1)
