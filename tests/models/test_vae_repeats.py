"""Frames that do not change are encoded once: the same bits, in less work, and only where it is proven."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_wan_vae import KINDS, make_pair, relative_error

from frameloom.memory.vae import VaePlanner
from frameloom.models.vae_fast import choose, install
from frameloom.models.vae_state import BandState, Passage, RepeatingState
from frameloom.models.wan_vae import num_still
from frameloom.ops.registry import Policy
from frameloom.parallel.vae_margin import MarginState
from frameloom.parallel.vae_split import ShardState
from frameloom.platform.tuning import Tuner

WHOLE = Passage(repeats=True)
PASSAGES = [WHOLE, replace(WHOLE, steps=4, channels_last=True), replace(WHOLE, rows=5, tile_rows=4)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def noise(frames, seed=1):
    return 2 * torch.rand(1, 3, frames, 32, 48, generator=torch.Generator().manual_seed(seed)) - 1


def still(frames, value=0.0):
    return torch.full((1, 3, frames, 32, 48), value)


VIDEOS = {
    "a picture and nothing": torch.cat([noise(1), still(80)], dim=2),
    "a picture and a last one": torch.cat([noise(1), still(79), noise(1, seed=2)], dim=2),
    "a picture for a whole video": noise(1).expand(-1, -1, 65, -1, -1),
    "grey, movement, grey": torch.cat([still(33, 0.5), noise(7), still(41, 0.5)], dim=2),
    "two pictures": torch.cat([noise(1).expand(-1, -1, 41, -1, -1), noise(1, 2).expand(-1, -1, 40, -1, -1)], dim=2),
    "frames that are repeated off the beat": torch.cat([noise(3), still(78)], dim=2),
}


def encoded(vae, x, passage):
    """The moments, and how often each part of the encoder ran."""
    ran = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: ran.update([name]))
        for name, module in vae.named_modules()
        if name in ("encoder.conv_in", "encoder.mid_block", "quant_conv")
    ]
    try:
        return vae.encode(x, passage), ran
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("video", VIDEOS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_latents_have_the_bits_they_had(kind, video):
    reference, ours = make_pair(kind)
    x = VIDEOS[video]
    passage = PASSAGES[(list(VIDEOS).index(video) + list(KINDS).index(kind)) % len(PASSAGES)]
    moments, _ = encoded(ours, x, passage)
    assert torch.equal(moments, ours.encode(x, replace(passage, repeats=False, steps=1)))
    if video == "a picture and nothing":
        assert relative_error(moments, reference.encode(x).latent_dist.parameters) <= 1e-5


@pytest.mark.parametrize("passage", PASSAGES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_pictures_are_computed_a_few_times(kind, passage):
    x = VIDEOS["a picture and nothing"]
    _, ran = encoded(make_pair(kind)[1], x, passage)
    per_chunk = 1 if passage.rows is None else -(-32 // 5) if kind != "2.2" else -(-16 // 5)
    assert 0 < ran["encoder.conv_in"] <= 7 * per_chunk
    assert ran["encoder.mid_block"] <= 21


def test_when_all_has_settled_nothing_is_computed():
    x = torch.cat([noise(1), still(240)], dim=2)
    moments, ran = encoded(make_pair("2.1")[1], x, WHOLE)
    assert ran["quant_conv"] < 45 < moments.shape[2]
    assert torch.equal(moments, make_pair("2.1")[1].encode(x))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Policy(exactness="bitwise"), Policy()], ids=["bitwise", "rounding"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_kernels_that_are_chosen_here(kind, policy, tmp_path):
    _, ours = make_pair(kind)
    choices = choose(ours, policy, Tuner(torch.device("cpu"), tmp_path))
    install(ours, choices)
    planner = VaePlanner(spec=ours.spec, dtype=torch.float32, choices=choices, device=torch.device("cpu"))
    x = VIDEOS["a picture and a last one"]
    passage = next(planner.encode(tuple(x.shape)))
    assert passage.repeats
    plainly = ours.encode(x, replace(passage, repeats=False, steps=1))
    for rows in (None, 8, 5) if choices.bands else (None,):
        assert torch.equal(ours.encode(x, replace(passage, rows=rows)), plainly)


class Careless(RepeatingState):
    """Takes for granted that what it remembers has not changed."""

    def _remember(self, owner, x_BCTHW, history):
        BandState._remember(self, owner, x_BCTHW, history)


def test_without_a_look_at_what_is_remembered_the_latents_would_be_others(monkeypatch):
    _, ours = make_pair("2.1")
    x = VIDEOS["a picture and nothing"]
    right = ours.encode(x)
    monkeypatch.setattr("frameloom.models.vae_state.RepeatingState", Careless)
    assert not torch.equal(ours.encode(x, WHOLE), right)


def test_a_video_that_moves_passes_as_it_did():
    _, ours = make_pair("2.1")
    x = noise(33)
    _, ran = encoded(ours, x, replace(WHOLE, steps=4))
    assert ran["encoder.conv_in"] == 3, "one frame, then 16 at a time"
    assert num_still(x, 4) == 0
    assert num_still(VIDEOS["a picture and nothing"], 4) == 19
    assert num_still(torch.full((1, 3, 33, 8, 8), torch.nan), 4) == 0


def test_small_changes_are_changes():
    x = VIDEOS["a picture and nothing"].clone()
    x[0, 1, 60, 13, 17] = 1e-3
    _, ours = make_pair("2.1")
    moments, _ = encoded(ours, x, WHOLE)
    assert torch.equal(moments, ours.encode(x))
    assert not torch.equal(moments, ours.encode(VIDEOS["a picture and nothing"]))


def test_ranks_that_share_a_picture_compute_everything():
    """What repeats in the part of one need not in that of another, which waits for its rows."""
    assert not MarginState.repeats
    assert not ShardState.repeats


def test_it_can_be_switched_off_and_gives_way_to_memory(tmp_path):
    _, ours = make_pair("2.1")
    shape = (1, 3, 81, 64, 96)
    off = choose(ours, Policy(forced={"vae.repeats": False}), Tuner(torch.device("cpu"), tmp_path))
    plain_kernels = dict.fromkeys(("vae.conv_winograd", "vae.conv_winograd_plain", "vae.conv3d_unfold"), False)
    on = choose(ours, Policy(forced=plain_kernels), Tuner(torch.device("cpu"), tmp_path))
    cpu = torch.device("cpu")
    planner = VaePlanner(spec=ours.spec, dtype=torch.float32, choices=off, device=cpu)
    assert not next(planner.encode(shape)).repeats
    planner = replace(planner, choices=on)
    assert next(planner.encode(shape)).repeats
    narrow = next(planner.encode(shape))
    least = planner.needed((1, 3, 64, 96), 20, replace(narrow, rows=8, steps=1, repeats=False), encode=True)
    tight = next(replace(planner, budget_bytes=least).encode(shape))
    assert not tight.repeats
    assert planner.needed((1, 3, 64, 96), 20, replace(tight, repeats=True, steps=1), encode=True) > least
