"""A decoder that goes on in the middle of a video makes the frames that a whole passage makes."""

import numpy as np
import pytest
import torch
from checkpoints import VAE_21, VAE_22

from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.pipeline import stages

SPECS = {"2.1": VaeSpec.from_config({**VAE_21, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})}
SPECS["2.2"] = VaeSpec.from_config({**VAE_22, "latents_mean": [0.0] * 6, "latents_std": [1.0] * 6})
SPECS["2.1, deeper"] = VaeSpec(
    base_dim=8, z_dim=4, dim_mult=(1, 2, 2, 2), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
)


def vae_of(spec, dtype=torch.float32):
    torch.manual_seed(0)
    return WanVAE(spec).eval().to(dtype)


def latents(spec, frames, seed=1):
    return torch.randn(1, spec.z_dim, frames, 2, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", SPECS)
def test_a_frame_depends_on_no_latent_frame_out_of_reach(kind):
    """And the reach is not guessed too far: some frame depends on all but three of them."""
    spec = SPECS[kind]
    vae, z = vae_of(spec, torch.float64), latents(spec, spec.decoder_reach + 4).double()
    other = z.clone()
    other[:, :, 0] += 1
    with torch.inference_mode():
        same = [torch.cat(list(vae.decode_stream(x, Passage(steps=2))), dim=2) for x in (z, other)]
    differs = (same[0] != same[1]).flatten(3).any(3).any(1).flatten().nonzero()
    farthest = (int(differs.max()) + spec.temporal_scale - 1) // spec.temporal_scale
    assert spec.decoder_reach - 3 <= farthest <= spec.decoder_reach


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", SPECS)
def test_frames_from_the_middle_on_have_the_bits_of_a_whole_passage(kind, steps):
    spec = SPECS[kind]
    vae, z = vae_of(spec), latents(spec, spec.decoder_reach + 14)

    def frames(skipped):
        passed.clear()
        parts = stages.decode(vae, z, iter([Passage(steps=steps)]), lambda _: None, skipped=skipped)
        return np.concatenate(list(parts), axis=1)

    passed = []
    vae.post_quant_conv.register_forward_hook(lambda _module, given, _out: passed.append(given[0].shape[2]))
    whole = frames(0)
    assert sum(passed) == z.shape[2]
    for skipped in (1, 9, whole.shape[1] - 30, whole.shape[1] - 9, whole.shape[1] - 1):
        assert np.array_equal(frames(skipped), whole[:, skipped:]), skipped
    assert sum(passed) <= spec.decoder_reach + 5


def test_where_memory_runs_out_the_next_passage_goes_on_from_there(monkeypatch):
    spec = SPECS["2.1"]
    vae, z = vae_of(spec), latents(spec, spec.decoder_reach + 14)
    whole = np.concatenate(list(stages.decode(vae, z, iter([Passage(steps=2)]), lambda _: None)), axis=1)
    calls = []
    chunk = vae.decode_chunk

    def fails_once(x, state):
        calls.append(x.shape[2])
        if sum(calls) == z.shape[2] - 4:
            raise MemoryError
        return chunk(x, state)

    monkeypatch.setattr(vae, "decode_chunk", fails_once)
    passages = iter([Passage(steps=2), Passage(steps=2, rows=8)])
    again = np.concatenate(list(stages.decode(vae, z, passages, lambda _: None)), axis=1)
    assert np.abs(again.astype(int) - whole).max() <= 1
    assert again.shape == whole.shape
    assert sum(calls) < 2 * z.shape[2] - 8
