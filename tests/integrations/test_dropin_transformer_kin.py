"""Transformers whose blocks are Wan's but for their attention, inside their pipelines: frames before, kept keys."""

import pytest
import torch

from frameloom import accelerate, restore
from frameloom.integrations.diffusers.samples.catalogue import sample_of
from frameloom.integrations.diffusers.samples.sample import Scale
from frameloom.integrations.diffusers.swap import is_swapped
from frameloom.ops.registry import ROUNDING_FP32, relative_error

SCALE = Scale()
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of Helios' scheduler


def velocities(sample, pipe):
    """What the transformer returned at every call."""
    seen = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    sample.run(pipe, SCALE)
    hook.remove()
    return seen


@pytest.mark.parametrize("name", ["HeliosPipeline", "AnyFlowPipeline"])
def test_blocks_are_ours_and_attention_is_theirs(name):
    sample = sample_of(name)
    pipe = sample.build(SCALE)
    expected = velocities(sample, pipe)
    for exactness in ("rounding", "bitwise"):
        what = accelerate(pipe, exactness=exactness, vae=False)["transformer"].what
        assert "attention as Diffusers has it" in what
        assert "norm_rotate" not in what
        block = pipe.transformer.blocks[0]
        assert [is_swapped(part) for part in (block, block.attn1, block.attn2, block.ffn)] == [True, False, False, True]
        results = velocities(sample, pipe)
        restore(pipe)
        assert len(results) == len(expected) > 1
        for result, velocity in zip(results, expected, strict=True):
            assert relative_error(result, velocity) <= (ROUNDING_FP32 if exactness == "rounding" else 0)


@pytest.mark.parametrize("past", [0, 5])
@torch.no_grad()
def test_a_text_that_only_the_new_frames_read(past):
    pipe = sample_of("HeliosPipeline").build(SCALE)
    block, width = pipe.transformer.blocks[0], pipe.transformer.blocks[0].norm1.normalized_shape[0]
    assert block.guidance_cross_attn
    generator = torch.Generator().manual_seed(2)
    tokens, head_dim = 7 + past, width // block.attn1.heads
    x, context, temb, rope = (
        torch.randn(2, *shape, generator=generator)
        for shape in ((tokens, width), (9, width), (tokens, 6, width), (tokens, 2 * head_dim))
    )
    expected = block(x, context, temb, rope, 7)
    accelerate(pipe, exactness="bitwise", vae=False)
    assert torch.equal(block(x, context, temb, rope, 7), expected)
