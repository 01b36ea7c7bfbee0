"""Both branches of the guidance make one batch where memory has room for it."""

from dataclasses import replace

import pytest
import torch
from adapter_kinds import KINDS, a_dora, a_lora, for_all

from frameloom.attention.backend import shapes_alone
from frameloom.memory import dit as plan
from frameloom.memory.dit import StepPlanner
from frameloom.memory.meter import peak_bytes
from frameloom.models.adapters_beside import attach
from frameloom.models.dit_block import Attention
from frameloom.models.dit_fast import DitChoices, LoopChoices, install
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.vace import make_dit, under_empty_control
from frameloom.ops.dit_ops import Ops
from frameloom.ops.linear import refuses_packed
from frameloom.ops.mlp import mlp_rows

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


WAYS = {
    "plain": ALLOWED,
    "fused": replace(ALLOWED, fuses_qkv=True),
    "rows": replace(ALLOWED, ops=Ops(mlp=mlp_rows)),
    "packed": replace(ALLOWED, fuses_qkv=True, packs_linear=True, packs_mlp=True),
}


def network(spec=SPEC):
    torch.manual_seed(0)
    return make_dit(spec).eval().requires_grad_(False)


def measured(dit, latents):
    """The most that a step of both branches in one batch takes, in memory that is there."""
    for module in dit.modules():
        if isinstance(module, Attention):
            module.attend = shapes_alone

    def run():
        x = torch.zeros(latents)
        prompt = under_empty_control(dit.read_prompt(torch.zeros(2, 512, dit.spec.text_dim)), dit, x)
        dit.velocities(x, torch.zeros(1), [prompt])

    with torch.inference_mode():
        return peak_bytes(run)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_what_adapters_take_beside_the_weights_is_counted(make, way):
    if WAYS[way].packs_mlp and refuses_packed(torch.empty(1)):
        pytest.skip("this torch packs no weights")
    dit, latents = network(SPEC.first_layers(2)), (1, 16, 5, 32, 32)  # so that no keys of other blocks are held
    sets = [for_all(dit, make)]
    install(dit, WAYS[way])
    planned = planner(experts=(dit,), choices=WAYS[way])
    without = planned.needed(latents)
    attach(dit, sets)
    needed = planned.needed(latents)
    assert needed >= without
    if not WAYS[way].packs_mlp:  # the memory of packed weights cannot be looked at
        assert needed == pytest.approx(plan._OVERHEAD * measured(dit, latents), rel=0.05)
    attach(dit, [])
    assert planned.needed(latents) == without


def test_the_expert_that_takes_most_and_any_block_decide():
    first, second = network(), network()
    planned = planner(experts=(first, second))
    without = planned.needed(SMALL)
    attach(second, [for_all(second, a_lora, parameters=lambda name: name.startswith("blocks.2.ffn"))])
    assert planned.needed(SMALL) > without


def test_adapters_of_vace_blocks_are_counted():
    spec = VaceSpec(
        num_attention_heads=2, attention_head_dim=16, ffn_dim=512, num_layers=3, text_dim=8, freq_dim=16,
        vace_layers=(0, 2), vace_in_channels=6,
    )  # fmt: skip
    dit = network(spec)
    planned, latents = planner(spec=spec, experts=(dit,)), (1, 16, 5, 32, 32)
    without = planned.needed(latents)
    attach(dit, [for_all(dit, a_dora, parameters=lambda name: name.startswith("vace_blocks.1."))])
    assert planned.needed(latents) > without
