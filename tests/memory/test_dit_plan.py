"""Both branches of the guidance make one batch where memory has room for it."""

import pytest
import torch

from frameloom.memory import dit as plan
from frameloom.memory.dit import StepPlanner
from frameloom.models.dit_fast import DitChoices, LoopChoices
from frameloom.models.spec import TransformerSpec

SPEC = TransformerSpec(num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=3, text_dim=8, freq_dim=16)
ALLOWED = DitChoices(loop=LoopChoices(prompt_once=True, guidance_batched=True))
SMALL, LARGE = (1, 16, 5, 8, 8), (1, 16, 21, 60, 104)


def planner(device="cpu", **changes):
    options = {"spec": SPEC, "dtype": torch.float32, "choices": ALLOWED, "device": torch.device(device)}
    return StepPlanner(**(options | changes))


def test_on_a_cpu_small_videos_make_one_batch():
    loop, why = planner().loop(SMALL, guided=True)
    assert loop.guidance_batched
    assert why == "both branches in one batch: 80 tokens"
    loop, why = planner().loop(LARGE, guided=True)
    assert not loop.guidance_batched
    assert "one branch after the other" in why


def test_without_guidance_there_is_nothing_to_batch():
    _, why = planner().loop(LARGE, guided=False)
    assert why == "one branch: there is no guidance"


def test_what_is_not_allowed_or_asked_for_is_not_planned():
    forbidden, _ = planner(choices=DitChoices(loop=LoopChoices(prompt_once=True))).loop(SMALL, guided=True)
    assert not forbidden.guidance_batched
    insisted, why = planner(insisted=True).loop(LARGE, guided=True)
    assert insisted.guidance_batched
    assert "asked for" in why


@pytest.mark.parametrize(("free", "batched"), [(10**12, True), (10**6, False)])
def test_elsewhere_memory_decides(monkeypatch, free, batched):
    monkeypatch.setattr(plan, "free_memory_bytes", lambda device: free)
    loop, why = planner("meta").loop(SMALL, guided=True)
    assert loop.guidance_batched is batched
    assert "a batch takes about" in why


def test_the_prediction_grows_with_the_video():
    small, large = planner().needed(SMALL), planner().needed(LARGE)
    tokens = 21 * 30 * 52
    assert large > 2 * tokens * 32 * 4  # two branches of the stream itself
    assert large > 50 * small
