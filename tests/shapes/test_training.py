"""Training: a resumed run equals an unbroken one, captions and clips are what the model will be asked for."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frameloom.attention.core import sdpa
from frameloom.models.dit_block import CrossAttention
from frameloom.shapes import PATH
from frameloom.shapes.export import WEIGHTS, export, read_back
from frameloom.shapes.train_dit import TEXT_TOKENS, LatentClips, SmallAttention, TextAndVideo, caption
from frameloom.shapes.train_vae import SPEC, STAGES, cut, stage_at
from frameloom.shapes.training import Trainer, orthogonalise, rng_for, to_video
from frameloom.shapes.world import random_scene, render


def steps(trainer, count):
    for _ in range(count):
        x = torch.from_numpy(rng_for(trainer.step, salt=9).standard_normal((4, 3), dtype=np.float32))
        trainer.update(F.mse_loss(trainer.model(x), x.flip(1)))


def make(path, total=20):
    torch.manual_seed(0)
    return Trainer(nn.Linear(3, 3), path=path, total_steps=total, learning_rate=0.05, ema_decay=0.9)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    whole = make(tmp_path / "whole.pt")
    steps(whole, 12)
    first = make(tmp_path / "parts.pt")
    steps(first, 5)
    first.save()
    second = make(tmp_path / "parts.pt")
    assert second.step == 5
    steps(second, 7)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(whole.average[name], second.average[name]) for name in whole.average)
    assert second.elapsed_s >= first.seconds
    assert [path.name for path in tmp_path.iterdir()] == ["parts.pt"]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_a_step_moves_all_directions_alike(shape):
    torch.manual_seed(0)
    uneven = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[2]))
    before, after = torch.linalg.svdvals(uneven), torch.linalg.svdvals(orthogonalise(uneven))
    assert (before.amax(1) / before.amin(1)).min() > 2.5
    assert after.min() > 0.5
    assert after.max() < 1.3


def test_matrices_and_the_rest_have_an_optimiser_each(tmp_path):
    model = nn.Sequential(nn.Conv3d(2, 3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    muon, adam = Trainer(model, path=tmp_path / "x.pt", total_steps=1, learning_rate=0.1, plain=("2.",)).optimisers
    names = {id(p): name for name, p in model.named_parameters()}
    found = [[names[id(p)] for group in o.param_groups for p in group["params"]] for o in (muon, adam)]
    assert found == [["0.weight"], ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]]


def test_the_average_follows_the_weights_and_can_replace_them(tmp_path):
    trainer = make(tmp_path / "x.pt")
    steps(trainer, 10)
    raw = trainer.model.weight.detach().clone()
    averaged = trainer.use_average().weight
    assert not torch.equal(raw, averaged)
    assert torch.equal(averaged, trainer.average["weight"])


def test_averaged_weights_fit_networks_with_tied_weights(tmp_path):
    model = TextAndVideo()
    Trainer(model, path=tmp_path / "x.pt", total_steps=1, learning_rate=0.1).use_average()
    assert model.text_encoder.encoder.embed_tokens.weight is model.text_encoder.shared.weight


def test_one_key_stands_for_the_padding():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 8) for n in (6, 9, 9))
    padded_k, padded_v = (torch.cat([x, x[:, -1:].expand(-1, 20, -1, -1)], dim=1) for x in (k, v))
    bias = torch.zeros(9)
    bias[-1] = math.log(21)
    assert torch.allclose(SmallAttention(bias)(q, k, v), sdpa(q, padded_k, padded_v), atol=1e-6)
    assert not torch.allclose(SmallAttention()(q, k, v), sdpa(q, padded_k, padded_v), atol=1e-3)


@torch.no_grad()
def test_training_computes_what_generation_computes():
    """The trainable module, with its short text, against the plain networks on all 512 positions."""
    torch.manual_seed(0)
    model = TextAndVideo().eval()
    model.transformer.proj_out.weight.normal_(0, 0.1)
    x, t = torch.randn(2, 8, 5, 16, 16), torch.tensor([100.0, 900.0])
    ids = torch.tensor([[3, 50, 20, 1] + [0] * (TEXT_TOKENS - 4), [5, 1] + [0] * (TEXT_TOKENS - 2)])
    mask = (ids != 0).long()
    trained = model(x, t, ids, mask)
    for module in model.transformer.modules():
        if hasattr(module, "attend"):
            module.attend = sdpa
    text = model.text_encoder(ids, mask) * mask[..., None]
    plain = model.transformer(x, t, F.pad(text, (0, 0, 0, 512 - TEXT_TOKENS)))
    assert (trained - plain).norm() / plain.norm() < 1e-5
    assert any(isinstance(module, CrossAttention) for module in model.transformer.modules())


def test_captions_are_sometimes_empty_and_mostly_whole():
    rng = np.random.default_rng(0)
    scene = random_scene(rng)
    texts = [caption(scene, rng) for _ in range(600)]
    empty = sum(text == "" for text in texts) / len(texts)
    assert 0.05 < empty < 0.15
    assert sum(scene.shape in text.lower() and scene.colour in text.lower() for text in texts) > 450


@pytest.mark.parametrize("stage", STAGES)
def test_pieces_of_clips_have_the_stage_s_size(stage):
    rng = np.random.default_rng(0)
    piece = cut(render(random_scene(rng), rng), stage, rng)
    assert piece.shape == (stage.frames, stage.size, stage.size, 3)
    assert to_video([piece]).abs().max() <= 1
    assert (stage.frames - 1) % SPEC.temporal_scale == 0


def test_stages_follow_one_another():
    assert stage_at(0) is STAGES[0]
    assert stage_at(STAGES[0].steps) is STAGES[1]
    assert stage_at(10**6) is STAGES[-1]


def test_training_can_go_on_from_the_shipped_weights(tmp_path):
    vae, start = read_back(PATH)
    model = TextAndVideo()
    model.load_state_dict(start)
    rng = np.random.default_rng(0)
    config = json.loads((PATH / "vae" / "config.json").read_text())
    mean, std = (torch.tensor(config[f"latents_{name}"]) for name in ("mean", "std"))
    clips = LatentClips(latents=torch.zeros(1, 8, 1, 1, 1), scenes=[random_scene(rng)], mean=mean, std=std)
    export(tmp_path, vae, model, clips)
    for name in ("vae/config.json", "transformer/config.json", f"vae/{WEIGHTS}", f"transformer/{WEIGHTS}"):
        assert (tmp_path / name).read_bytes() == (PATH / name).read_bytes()
