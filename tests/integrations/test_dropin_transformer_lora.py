"""LoRAs that Diffusers loads by PEFT, before a transformer is taken and after: what the untouched pipeline makes."""

import pytest
import torch

from frameloom import accelerate, restore
from frameloom.integrations.diffusers.samples.catalogue import sample_of
from frameloom.integrations.diffusers.samples.sample import Scale
from frameloom.integrations.diffusers.swap import is_swapped
from frameloom.ops.registry import ROUNDING_FP32, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # by PEFT, of any second adapter
SAMPLE, SCALE = sample_of("WanPipeline"), Scale(frames=5, steps=2)
LAYERS = (
    "blocks.{}.attn1.to_q", "blocks.{}.attn1.to_v", "blocks.{}.attn1.to_out.0", "blocks.{}.attn2.to_k",
    "blocks.{}.attn2.to_v", "blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.net.2",
)  # fmt: skip
TEXT_LAYER = "condition_embedder.text_embedder.linear_1"


def adapter(transformer, seed, *, with_text=True):
    """A LoRA of rank 3 under the keys of Diffusers, strong enough to show."""
    generator = torch.Generator().manual_seed(seed)
    names = [layer.format(block) for layer in LAYERS for block in range(2)] + [TEXT_LAYER] * with_text
    state = {}
    for name in names:
        layer = transformer.get_submodule(name)
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(3, layer.in_features, generator=generator) / 4
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, 3, generator=generator) / 4
    return state


class Pair:
    """The same pipeline untouched and taken; what is done is done to both."""

    def __init__(self):
        self.plain, self.ours = SAMPLE.build(SCALE), SAMPLE.build(SCALE)
        generator = torch.Generator().manual_seed(3)
        width = self.ours.transformer.config.text_dim
        self.prompts = {"prompt_embeds": torch.randn(1, 32, width, generator=generator)}
        self.prompts["negative_prompt_embeds"] = torch.randn(1, 32, width, generator=generator)
        for text in self.prompts.values():
            text[:, 20:] = 0
        self.seen = []

    def take(self):
        report = accelerate(self.ours, vae=False)
        assert report["transformer"].taken

    def each(self, act):
        for pipe in (self.plain, self.ours):
            act(pipe)

    def agree(self, **more):
        """Both compute the same; twice ours, from the very same tensors of a prompt all the time. What came out."""
        expected = self.latents(self.plain, more)
        for _ in range(2):
            assert relative_error(self.latents(self.ours, more), expected) <= ROUNDING_FP32
        return expected

    def latents(self, pipe, more):
        return pipe(
            **self.prompts, height=32, width=64, num_frames=5, num_inference_steps=2, output_type="latent",
            generator=torch.Generator().manual_seed(1), **more,
        ).frames  # fmt: skip


@pytest.fixture
def pair():
    return Pair()


def load(name, seed, **how):
    return lambda pipe: pipe.load_lora_weights(adapter_of(pipe, seed, **how), adapter_name=name)


def adapter_of(pipe, seed, **how):
    return adapter(pipe.transformer, seed, **how)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lora_is_loaded_weighed_and_unloaded(pair, when):
    untouched = pair.agree()
    if when == "after":
        pair.take()
        pair.agree()
    pair.each(load("one", 5))
    if when == "before":
        pair.take()
    strong = pair.agree()
    assert relative_error(strong, untouched) > 1e-2
    weak = pair.agree(attention_kwargs={"scale": 0.5})
    assert relative_error(weak, strong) > 1e-3
    pair.each(lambda pipe: pipe.set_adapters(["one"], adapter_weights=[0.25]))
    assert relative_error(pair.agree(), weak) > 1e-3
    pair.each(lambda pipe: pipe.disable_lora())
    assert relative_error(pair.agree(), untouched) <= ROUNDING_FP32
    pair.each(lambda pipe: pipe.enable_lora())
    pair.agree()
    pair.each(lambda pipe: pipe.unload_lora_weights())
    assert relative_error(pair.agree(), untouched) <= ROUNDING_FP32
    assert all(is_swapped(block.ffn) for block in pair.ours.transformer.blocks)


def test_two_loras_together(pair):
    pair.take()
    pair.each(load("one", 5))
    pair.each(load("two", 6))
    pair.each(lambda pipe: pipe.set_adapters(["one", "two"], adapter_weights=[0.7, 0.4]))
    both = pair.agree()
    pair.each(lambda pipe: pipe.delete_adapters("two"))
    assert relative_error(pair.agree(), both) > 1e-3


@pytest.mark.parametrize("with_text", [True, False])
def test_a_lora_that_is_merged_and_gone_between_two_calls_with_one_prompt(pair, with_text):
    pair.take()
    untouched = pair.agree()
    pair.each(load("one", 5, with_text=with_text))
    pair.each(lambda pipe: pipe.fuse_lora())
    pair.each(lambda pipe: pipe.unload_lora_weights())  # writes to weights in a way that they do not count
    merged = pair.agree()
    assert relative_error(merged, untouched) > 1e-2


def test_a_merged_lora_is_taken_out_again(pair):
    pair.take()
    untouched = pair.agree()
    pair.each(load("one", 5))
    pair.each(lambda pipe: pipe.fuse_lora(lora_scale=0.5))
    assert relative_error(pair.agree(), untouched) > 1e-2
    pair.each(lambda pipe: pipe.unfuse_lora())
    pair.each(lambda pipe: pipe.unload_lora_weights())
    assert relative_error(pair.agree(), untouched) <= ROUNDING_FP32


def test_restored_with_a_lora_it_is_the_untouched_pipeline_with_it(pair):
    pair.take()
    pair.each(load("one", 5))
    pair.agree()
    restore(pair.ours)
    assert torch.equal(pair.latents(pair.ours, {}), pair.latents(pair.plain, {}))
    assert not any(is_swapped(module) for module in pair.ours.transformer.modules())
