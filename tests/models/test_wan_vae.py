"""The WanVAE against Diffusers' AutoencoderKLWan on small random checkpoints, and against itself in other chunks."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from frameloom.errors import RequestError
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import CausalState, Passage
from frameloom.models.wan_vae import WanVAE

WAN21 = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 2}
WAN21_TIME_FIRST = {
    "base_dim": 12,
    "z_dim": 6,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
}
WAN22 = {
    "base_dim": 8,
    "decoder_base_dim": 16,
    "z_dim": 6,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 2,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
KINDS = {"2.1": WAN21, "2.1 three stages": WAN21_TIME_FIRST, "2.2": WAN22}
# 720p-like and odd shapes: height != width, and a size whose latent is a single column
SIZES = [(1, 32, 48), (5, 48, 32), (17, 32, 16)]


def make_pair(kind: str) -> tuple[AutoencoderKLWan, WanVAE]:
    torch.manual_seed(0)
    config = dict(KINDS[kind])
    config |= {
        "latents_mean": [0.1 * i for i in range(config["z_dim"])],
        "latents_std": [1 + 0.1 * i for i in range(config["z_dim"])],
    }
    reference = AutoencoderKLWan(**config).eval()
    with torch.no_grad():  # the norms' gains are all ones at first: a mix-up of them would not show
        for name, parameter in reference.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    with torch.device("meta"):
        ours = WanVAE(VaeSpec.from_config(config)).eval()
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    return reference, ours


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_encode_and_decode_equal_diffusers(kind: str, size: tuple[int, int, int]) -> None:
    reference, ours = make_pair(kind)
    frames, height, width = size
    x = torch.rand(2, 3, frames, height, width) * 2 - 1
    expected = reference.encode(x).latent_dist
    moments = ours.encode(x)
    assert relative_error(moments, expected.parameters) <= 1e-5
    z = torch.randn_like(expected.mode())
    assert relative_error(ours.decode(z), reference.decode(z).sample) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_any_chunk_length_computes_the_same_video(kind: str) -> None:
    _, ours = make_pair(kind)
    x = torch.rand(1, 3, 17, 32, 32) * 2 - 1
    moments = ours.encode(x)
    assert relative_error(ours.encode(x, Passage(steps=4)), moments) <= 1e-5
    assert relative_error(ours.encode(x, Passage(steps=2)), moments) <= 1e-5
    z = torch.randn(1, ours.spec.z_dim, 5, 4, 3)
    video = ours.decode(z)
    assert video.shape[2] == 17
    for latents in (2, 3, 4):
        assert relative_error(ours.decode(z, Passage(steps=latents)), video) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_beginning_may_share_its_chunk_with_what_follows(kind: str) -> None:
    _, ours = make_pair(kind)
    z = torch.randn(1, ours.spec.z_dim, 4, 4, 3)
    assert relative_error(ours.decode_chunk(z, CausalState()), ours.decode(z)) <= 1e-5
    x = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    assert relative_error(ours.encode_chunk(x, CausalState()), ours.encode(x)) <= 1e-5


@torch.no_grad()
def test_later_frames_never_change_earlier_ones() -> None:
    _, ours = make_pair("2.1")
    z = torch.randn(1, 4, 4, 4, 4)
    other = z.clone()
    other[:, :, 3] += 1
    a, b = ours.decode(z), ours.decode(other)
    assert torch.equal(a[:, :, :9], b[:, :, :9])
    assert not torch.equal(a[:, :, 9:], b[:, :, 9:])


@torch.no_grad()
def test_two_videos_do_not_share_memory_of_the_past() -> None:
    _, ours = make_pair("2.1")
    z = torch.randn(1, 4, 3, 4, 4)
    alone = ours.decode(z)
    ours.decode(torch.randn(1, 4, 2, 4, 4))
    assert torch.equal(ours.decode(z), alone)


def test_normalise_is_what_the_reference_pipeline_does_and_denormalise_undoes_it() -> None:
    _, ours = make_pair("2.2")
    z = torch.randn(2, 6, 3, 4, 5)
    mean = torch.tensor(ours.spec.latents_mean).view(1, 6, 1, 1, 1)
    std = torch.tensor(ours.spec.latents_std).view(1, 6, 1, 1, 1)
    assert torch.equal(ours.denormalise(z), z / (1.0 / std) + mean)
    assert relative_error(ours.denormalise(ours.normalise(z)), z) < 1e-6


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 32, 32), "use 5"), ((5, 33, 32), "use 32"), ((5, 32, 7), "use 8"), ((0, 32, 32), "use 1")],
)
def test_a_size_the_compression_does_not_divide_is_one_sentence(shape: tuple[int, int, int], message: str) -> None:
    _, ours = make_pair("2.1")
    with pytest.raises(RequestError, match=message):
        ours.encode(torch.zeros(1, 3, *shape))
