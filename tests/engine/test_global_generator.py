"""Who seeds torch's generator draws the same numbers from it afterwards, whatever was computed and timed in between."""

import pytest
import torch
from checkpoints import TRANSFORMER, VAE_21
from diffusers import AutoencoderKLWan, WanTransformer3DModel

import frameloom

STATISTICS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
PARTS = {
    "vae": lambda: AutoencoderKLWan(**VAE_21, **STATISTICS),
    "transformer": lambda: WanTransformer3DModel(**TRANSFORMER),
}
CALLS = {
    "vae": lambda vae: vae.decode(torch.zeros(1, 4, 1, 4, 4)),
    "transformer": lambda dit: dit(torch.zeros(1, 4, 1, 4, 4), torch.ones(1), torch.zeros(1, 6, 20)),
}


@pytest.fixture(autouse=True)
def _nothing_was_timed_before(monkeypatch, tmp_path):
    monkeypatch.setattr("frameloom.platform.tuning.cache_folder", lambda: tmp_path)
    yield
    assert list(tmp_path.glob("choices-*.json")), "nothing was timed"


def test_an_engine_that_is_loaded_and_generates(checkpoint_of):
    folder = checkpoint_of()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with frameloom.load(folder, device="cpu") as engine:
        engine.generate("a cat", width=64, height=32, num_frames=5, steps=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_a_part_that_is_taken_over_and_called(name):
    part = PARTS[name]().eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert frameloom.accelerate({name: part}).taken
    CALLS[name](part)
    assert torch.equal(torch.get_rng_state(), before)
