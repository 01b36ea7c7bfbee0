"""Guidance on two groups of ranks: the latents of one process, with one expert and two, and tokens divided as well."""

import logging

import pytest
import torch
from ranks import run_ranks
from test_sequence import ALONE, digest, random_dit

from frameloom.errors import InternalError
from frameloom.models.dit_fast import LoopChoices
from frameloom.ops.registry import ROUNDING_FP32, relative_error
from frameloom.parallel.guidance import one_branch_each
from frameloom.parallel.sequence import SequenceParallel
from frameloom.parallel.team import Team
from frameloom.pipeline.stages import Predictor, Prompts, denoise
from frameloom.sampling.guidance import ExpertSwitch
from frameloom.sampling.unipc import make_sampler
from frameloom.settings import LOGGER_NAME

FLOW = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
WAYS = {
    "plain": LoopChoices(),
    "turns": LoopChoices(prompt_once=True),
    "shared": LoopChoices(prompt_once=True, shared_branches=True),
    "batched": LoopChoices(prompt_once=True, shared_branches=True, guidance_batched=True),
}


def features(batch):
    """Of a prompt and of a negative one: (B, S, E) each."""
    return torch.randn(2, batch, 9, 12, generator=torch.Generator().manual_seed(5)).unbind(0)


@torch.inference_mode()
def latents(experts, *, make=Predictor, choices=WAYS["shared"], per_token=False, guided=True):
    text, negative = features(batch=2)
    prompts = Prompts(text_BSE=text, negative_BSE=negative if guided else None, make_predictor=make)
    return denoise(
        experts,
        lambda: torch.randn(2, 4, 2, 6, 10, generator=torch.Generator().manual_seed(6)),
        prompts,
        sampler=make_sampler({**FLOW, "flow_shift": 3.0}, 3),
        switch=ExpertSwitch(
            boundary_ratio=0.8 if len(experts) == 2 else None, guidance_scale=4.0, guidance_scale_2=3.0
        ),
        per_token=per_token,
        on_step=lambda _: None,
        choices=choices,
    )


def on_two_groups(world, way, num_experts, per_token):
    """Whether this rank's latents are those of one process that computes the branches in turn; and their bits."""
    half = world.size // 2
    pair = world.divide([(rank, rank + half) for rank in range(half)])
    experts = [random_dit(seed) for seed in range(num_experts)]
    expected = latents(experts, choices=WAYS["turns"], per_token=per_token)
    make = one_branch_each(Predictor, pair)
    result = latents(experts, make=make, choices=WAYS[way], per_token=per_token)
    return torch.equal(result, expected), digest(result)


@pytest.mark.parametrize("way", WAYS)
def test_two_groups_walk_to_the_same_bits_as_one_process(way: str) -> None:
    first, second = run_ranks(2, on_two_groups, way, 1, False)
    assert first == second
    assert first[0]


@pytest.mark.parametrize("per_token", [False, True])
def test_two_experts_take_turns_in_both_groups(per_token: bool) -> None:
    first, second = run_ranks(2, on_two_groups, "shared", 2, per_token)
    assert first == second
    assert first[0]


def with_divided_tokens(world, ring, ulysses):
    """Four ranks: two groups of two that divide the tokens. Error against one process, the bits, and bytes sent."""
    experts = [random_dit(seed) for seed in range(2)]
    expected = latents(experts)
    group = world.divide([(0, 1), (2, 3)])
    pair = world.divide([(0, 2), (1, 3)])
    ways = SequenceParallel(ring=group if ring == 2 else ALONE, ulysses=group if ulysses == 2 else ALONE)
    for expert in experts:
        ways.install(expert)
    before = pair.sent_bytes
    result = latents(experts, make=one_branch_each(Predictor, pair))
    return relative_error(result, expected), digest(result), pair.sent_bytes - before


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2)])
def test_groups_that_divide_their_tokens_walk_to_the_same_latents(ring: int, ulysses: int) -> None:
    first, *others = run_ranks(4, with_divided_tokens, ring, ulysses)
    error, _, sent = first
    assert error <= ROUNDING_FP32
    assert sent == 3 * 2 * 4 * 2 * 6 * 10 * 4  # in each of 3 steps one velocity, in float32
    assert all(other == first for other in others)


def mixed_up(world):
    """Error of ranks that both take themselves for the group of the first branch."""
    pair = Team((0, 1) if world.rank == 0 else (1, 0), world.rank, world.everyone.group)
    experts = [random_dit()]
    return relative_error(latents(experts, make=one_branch_each(Predictor, pair)), latents(experts))


def test_groups_that_predict_the_same_branch_are_noticed() -> None:
    assert min(run_ranks(2, mixed_up)) > 1e-2


def test_without_guidance_both_groups_compute_the_same_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER_NAME)
    experts = [random_dit()]
    result = latents(experts, make=one_branch_each(Predictor, Team((0, 1), 0, None)), guided=False)
    assert torch.equal(result, latents(experts, guided=False))
    assert caplog.text.count("both groups of ranks compute the same") == 1


def test_other_numbers_of_groups_are_a_mistake() -> None:
    with pytest.raises(InternalError, match="over 3 groups"):
        one_branch_each(Predictor, Team((0, 1, 2), 0, None))
