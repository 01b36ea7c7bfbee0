"""What a pipeline is asked beside its prompt: callbacks, an end before its time, latents; and pipelines made of it."""

from typing import Any

import diffusers
import pytest
import torch

import frameloom
from frameloom.integrations.diffusers.samples.catalogue import sample_of
from frameloom.integrations.diffusers.samples.sample import Scale, frames_of
from frameloom.integrations.diffusers.swap import is_swapped

SAMPLE, SCALE = sample_of("WanPipeline (2.1)"), Scale(frames=5, height=32, width=32, steps=3)
LEVEL = 1 / 255


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """A pipeline as it comes, and its twin, which is accelerated."""
    plain, ours = SAMPLE.build(SCALE), SAMPLE.build(SCALE)
    assert len(frameloom.accelerate(ours).taken) == 2
    return plain, ours


def asked(pipe: Any, **more: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    return frames_of(pipe(**SAMPLE.ask(SCALE) | {"generator": noise} | more))


def test_a_callback_sees_and_changes_the_latents_of_each_step(pair: tuple[Any, Any]) -> None:
    seen: list[list[torch.Tensor]] = [[], []]

    def turned(which: int) -> Any:
        def at_end(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen[which].append(given["latents"].clone())
            return {"latents": given["latents"].flip(-1)} if step == 0 else {}

        return at_end

    plain, ours = (asked(pipe, callback_on_step_end=turned(which)) for which, pipe in enumerate(pair))
    assert len(seen[0]) == len(seen[1]) == SCALE.steps
    assert all((a - b).abs().max() <= 1e-4 for a, b in zip(*seen, strict=True))
    assert (plain - asked(pair[0])).abs().max() > LEVEL, "the callback changed nothing"
    assert (plain - ours).abs().max() <= LEVEL


def test_a_callback_may_end_it(pair: tuple[Any, Any]) -> None:
    def after_the_first(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return given

    plain, ours = (asked(pipe, callback_on_step_end=after_the_first) for pipe in pair)
    assert (plain - asked(pair[0])).abs().max() > LEVEL, "it went on to the end"
    assert (plain - ours).abs().max() <= LEVEL


def test_latents_may_be_had_and_given(pair: tuple[Any, Any]) -> None:
    given = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    given = given[:, : pair[0].vae.config.z_dim]
    ask = SAMPLE.ask(SCALE) | {"latents": given, "output_type": "latent"}
    plain, ours = (pipe(**ask).frames for pipe in pair)
    assert plain.shape == ours.shape == given.shape
    assert (plain - ours).abs().max() <= 1e-4


def test_a_pipeline_made_of_another_shares_what_is_taken(pair: tuple[Any, Any]) -> None:
    ours = pair[1]
    made = diffusers.WanVideoToVideoPipeline.from_pipe(ours)
    assert made.vae is ours.vae
    assert is_swapped(made.vae)
    assert is_swapped(made.transformer)
    frameloom.restore(made)
    assert not is_swapped(ours.vae)
    assert not is_swapped(ours.transformer)
    assert torch.equal(asked(ours), asked(pair[0]))
