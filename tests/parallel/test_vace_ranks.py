"""VACE on several ranks, which divide tokens, heads and hidden channels, or weights at rest; equal to one rank."""

import pytest
import torch
from ranks import run_ranks
from test_sequence import relative_error, sequence
from test_tensor import fast_choices, random_parameter

from frameloom.models.dit_fast import DitChoices, LoopChoices, install
from frameloom.models.spec import VaceSpec
from frameloom.models.vace import make_dit
from frameloom.models.wan_dit import Control, FrameTimes
from frameloom.ops.native import native
from frameloom.parallel.guidance import one_branch_each
from frameloom.parallel.tensor import divide, join
from frameloom.parallel.weights import shard_dit
from frameloom.pipeline.stages import Predictor
from frameloom.pipeline.vace import VaceConditions

SPEC = VaceSpec(
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=20,
    freq_dim=32,
    ffn_dim=96,
    num_layers=4,
    vace_layers=(0, 2),
    vace_in_channels=6,
)
TIMES = FrameTimes(torch.tensor([[0.0, 900.0], [0.0, 41.5]]), torch.tensor([0, 1, 1]))


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    native("dit")  # else every rank would, at the same time


def random_dit():
    torch.manual_seed(0)
    dit = make_dit(SPEC).eval().requires_grad_(False)
    for name, parameter in dit.named_parameters():
        parameter.copy_(random_parameter(name, parameter))
    return dit


def predictions(dit):
    torch.manual_seed(1)
    x, control = torch.randn(2, 4, 3, 6, 10), Control(torch.randn(1, 6, 3, 6, 10), (0.8, 1.0))
    texts = torch.randn(2, 2, 24, SPEC.text_dim)
    texts[:, :, 17:] = 0
    prompts = [dit.read_prompt(text)._replace(control=control) for text in texts]
    together = [dit.read_prompt(texts.flatten(0, 1))._replace(control=control)]
    return torch.cat(
        [
            v
            for times in (torch.tensor([999.0, 41.5]), TIMES)
            for read in (prompts, together)
            for v in dit.velocities(x, times, read)
        ]
    )


@torch.inference_mode()
def tokens_divided(world, choices):
    dit = random_dit()
    expected = predictions(dit)
    install(dit, choices)
    sequence(world, 1, 2).install(dit)
    return relative_error(predictions(dit), expected)


@torch.inference_mode()
def heads_divided(world, choices):
    dit = random_dit()
    expected = predictions(dit)
    divide(dit, world.everyone)
    install(dit, choices)
    join(dit, world.everyone)
    return relative_error(predictions(dit), expected)


@torch.inference_mode()
def weights_divided(world, choices):
    dit = random_dit()
    expected = predictions(dit)
    shard_dit(dit, world.everyone, torch.device("cpu"))
    install(dit, choices)
    return relative_error(predictions(dit), expected)


@torch.inference_mode()
def branches_divided(world):
    """One branch of the guidance on each rank, both under the control."""
    dit, texts = random_dit(), list(torch.randn(2, 1, 24, SPEC.text_dim, generator=torch.Generator().manual_seed(2)))
    control = Control(torch.ones(1, 6, 3, 6, 10), (0.8, 1.0))
    conditions = VaceConditions(control=control, num_references=0)
    x, t, choices = torch.ones(1, 4, 3, 6, 10), torch.tensor([500.0]), LoopChoices(prompt_once=True)
    divided = conditions.predictor(one_branch_each(Predictor, world.everyone))(texts, choices)(dit, x, t)
    expected = [dit(x, t, text, None, control) for text in texts]
    return relative_error(torch.cat(divided), torch.cat(expected))


@pytest.mark.parametrize("choices", [DitChoices(), fast_choices()], ids=["plainly", "fast"])
@pytest.mark.parametrize("divided", [tokens_divided, heads_divided])
def test_two_ranks_equal_one(divided, choices):
    assert max(run_ranks(2, divided, choices)) <= 1e-5


def test_each_rank_predicts_one_branch_under_the_control():
    assert max(run_ranks(2, branches_divided)) <= 1e-6


def test_divided_weights_equal_whole_ones():
    assert max(run_ranks(2, weights_divided, DitChoices())) <= 1e-6
