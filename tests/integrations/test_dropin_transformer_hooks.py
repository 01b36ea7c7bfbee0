"""What others attach to a transformer, before it is taken and after: offloading, caches, hooks, compilers."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_group_offloading,
)
from releases import skip_groups_without_an_accelerator
from tiny_transformers import TINY, compute, give_back, take
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from frameloom import accelerate, restore
from frameloom.integrations.diffusers.samples.catalogue import sample_of
from frameloom.integrations.diffusers.samples.sample import Scale
from frameloom.integrations.diffusers.swap import is_swapped
from frameloom.ops.registry import ROUNDING_FP32, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*should be kept in float32.*")
WHEN = pytest.mark.parametrize("when", ["before", "after"])
STEPS = 6


def both(attach, when, name="wan", exactness="rounding"):
    """The same transformer untouched and taken, with the same thing attached to each."""
    plain = TINY[name].make()
    model = copy.deepcopy(plain)
    attach(plain)
    if when == "before":
        attach(model)
    assert take(model, exactness).taken
    if when == "after":
        attach(model)
    return plain, model


def agree(plain, model, inputs, tolerance=ROUNDING_FP32):
    expected = compute(plain, inputs)
    for _ in range(2):
        assert relative_error(compute(model, inputs), expected) <= tolerance


OFFLOADING = {
    "accelerate, layer by layer": lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
    "diffusers, by blocks": lambda model: apply_group_offloading(
        model, torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "diffusers, by leaves": lambda model: apply_group_offloading(
        model, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level"
    ),
    "diffusers, stored narrower": lambda model: model.enable_layerwise_casting(
        storage_dtype=torch.float16, compute_dtype=torch.float32
    ),
}


@WHEN
@pytest.mark.parametrize("name", ["wan", "vace"])
@pytest.mark.parametrize("how", OFFLOADING)
def test_offloaded_weights_compute_the_same(how, when, name):
    if how in ("diffusers, by blocks", "diffusers, by leaves"):
        skip_groups_without_an_accelerator()
    plain, model = both(OFFLOADING[how], when, name)
    agree(plain, model, TINY[name].inputs())
    give_back(model)
    assert torch.equal(compute(model, TINY[name].inputs()), compute(plain, TINY[name].inputs()))


@WHEN
def test_offloading_that_ends_leaves_ours(when, caplog):
    plain, model = both(lambda model: cpu_offload(model, execution_device=torch.device("cpu")), when)
    inputs = TINY["wan"].inputs()
    compute(model, inputs)
    for network in (plain, model):
        remove_hook_from_submodules(network)
    caplog.clear()
    with caplog.at_level("INFO", logger="frameloom"):
        agree(plain, model, inputs)
    assert not caplog.messages


class Shifts(ModelHook):
    """Changes what comes out, so that it shows whether it was called."""

    def post_forward(self, module, output):
        return output * 1.5 + 1


PLACES = (
    "blocks.0", "blocks.0.norm1", "blocks.0.norm2", "blocks.0.attn1", "blocks.0.attn1.to_q", "blocks.0.attn1.norm_q",
    "blocks.0.attn1.to_out.0", "blocks.0.attn2", "blocks.0.attn2.to_k", "blocks.0.attn2.norm_k", "blocks.0.ffn",
    "blocks.0.ffn.net.0", "blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2", "patch_embedding", "norm_out", "proj_out",
    "condition_embedder.text_embedder", "condition_embedder.text_embedder.linear_2", "condition_embedder.time_proj",
)  # fmt: skip


@WHEN
@pytest.mark.parametrize("place", PLACES)
def test_a_hook_is_called_wherever_it_is(place, when):
    inputs = TINY["wan"].inputs()
    untouched = compute(TINY["wan"].make(), inputs)
    plain, model = both(lambda model: add_hook_to_module(model.get_submodule(place), Shifts()), when)
    agree(plain, model, inputs)
    assert relative_error(compute(model, inputs), untouched) > 1e-3
    remove_hook_from_module(model.get_submodule(place))
    assert relative_error(compute(model, inputs), untouched) <= ROUNDING_FP32


@WHEN
@pytest.mark.parametrize("place", PLACES)
def test_torch_s_own_hook_is_called_wherever_it_is(place, when):
    inputs = TINY["wan"].inputs()
    untouched = compute(TINY["wan"].make(), inputs)

    def attach(model):
        model.get_submodule(place).register_forward_hook(lambda module, args, output: output * 1.5 + 1)

    plain, model = both(attach, when)
    agree(plain, model, inputs)
    assert relative_error(compute(model, inputs), untouched) > 1e-3


@pytest.mark.parametrize("name", ["wan", "vace"])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.Conv3d])
def test_hooks_of_every_module_are_called(kind, name):
    plain, model = both(lambda model: None, "after", name)
    inputs = TINY[name].inputs()
    untouched = compute(plain, inputs)
    hook = register_module_forward_hook(lambda module, args, output: output * 1.5 if isinstance(module, kind) else None)
    try:
        agree(plain, model, inputs)
        assert relative_error(compute(model, inputs), untouched) > 1e-3
    finally:
        hook.remove()
    agree(plain, model, inputs)


class Turned(nn.Module):
    """A layer around an attention, which turns the positions that Diffusers hands on."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, context, mask, rotary):
        return self.attention(x, context, mask, tuple(angles.flip(1) for angles in rotary))


def turns(module, args):
    return tuple(tuple(each.flip(1) for each in given) if isinstance(given, tuple) else given for given in args)


def wraps_attention(model):
    model.blocks[0].attn1 = Turned(model.blocks[0].attn1)


READERS = {
    "a hook on a block": lambda model: model.blocks[0].register_forward_pre_hook(turns),
    "a hook on an attention": lambda model: model.blocks[0].attn1.register_forward_pre_hook(turns),
    "a layer around an attention": wraps_attention,
}


@pytest.mark.parametrize("name", ["wan", "vace", "skyreels"])
@pytest.mark.parametrize("reader", READERS)
def test_positions_are_those_of_diffusers_where_somebody_reads_them(reader, name):
    plain, model = both(READERS[reader], "after", name)
    inputs = TINY[name].inputs()
    agree(plain, model, inputs)
    assert relative_error(compute(model, inputs), compute(TINY[name].make(), inputs)) > 1e-3


def wrapped(forward):
    return functools.partial(forward)


def compiled(forward):
    return torch.compile(forward, backend="eager")


@pytest.mark.parametrize("wrap", [wrapped, compiled])
@pytest.mark.parametrize(
    "place", ["", "blocks.0", "blocks.0.attn1", "blocks.0.ffn", "rope", "condition_embedder.text_embedder"]
)
def test_a_forward_that_was_wrapped_while_it_was_ours_is_the_class_s_own_when_restored(place, wrap):
    plain, model = both(lambda model: None, "after")
    inputs, part = TINY["wan"].inputs(), model.get_submodule(place)
    part.forward = wrap(part.forward)
    agree(plain, model, inputs)
    give_back(model)
    assert torch.equal(compute(model, inputs), compute(plain, inputs))


TAYLOR = {"cache_interval": 2, "disable_cache_before_step": 1, "taylor_factors_dtype": torch.float32}
CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.4),
    "magnitudes": MagCacheConfig(mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS, threshold=0.5),
    "taylor": TaylorSeerCacheConfig(**TAYLOR, cache_identifiers=["^blocks.*attn[12]$"]),
    "taylor, lite": TaylorSeerCacheConfig(**TAYLOR, use_lite_mode=True),
}


def denoise(model, contexts):
    """Steps with both branches, as the pipelines call a transformer."""
    results = []
    for step in range(STEPS):
        for name, inputs in contexts.items():
            with model.cache_context(name):
                results.append(compute(model, inputs | {"timestep": inputs["timestep"] - 50 * step}))
    return torch.stack(results)


@WHEN
def test_faster_cache_skips_the_same_in_a_pipeline(when):
    sample, scale = sample_of("WanPipeline (2.1)"), Scale(frames=5, height=32, width=32, steps=STEPS)
    plain, ours = sample.build(scale), sample.build(scale)
    uncached = sample.run(plain, scale)

    def attach(pipe):
        pipe.transformer.enable_cache(
            FasterCacheConfig(
                spatial_attention_timestep_skip_range=(-1, 901),
                attention_weight_callback=lambda _: 0.5,
                current_timestep_callback=lambda: pipe.current_timestep,
                is_guidance_distilled=True,  # Wan's pipelines call a transformer once for each branch
            )
        )

    attach(plain)
    if when == "before":
        attach(ours)
    assert accelerate(ours, vae=False)["transformer"].taken
    if when == "after":
        attach(ours)
    expected = sample.run(plain, scale)
    assert (expected - uncached).abs().max() > 0.5 / 255
    made = sample.run(ours, scale)
    assert (made - expected).abs().max() <= 0.01 / 255
    assert torch.equal(sample.run(ours, scale), made)
    restore(ours)
    assert torch.equal(sample.run(ours, scale), expected)


@WHEN
@pytest.mark.parametrize("cache", CACHES)
def test_step_caches_of_diffusers_skip_the_same(cache, when):
    contexts = {"cond": TINY["wan"].inputs(1), "uncond": TINY["wan"].inputs(2)}
    plain, model = both(lambda model: model.enable_cache(copy.deepcopy(CACHES[cache])), when)
    uncached = denoise(TINY["wan"].make(), contexts)
    expected = denoise(plain, contexts)
    assert relative_error(expected, uncached) > 1e-4  # it skips something
    assert relative_error(denoise(model, contexts), expected) <= ROUNDING_FP32
    model.disable_cache()
    assert relative_error(denoise(model, contexts), uncached) <= ROUNDING_FP32


@WHEN
def test_attention_that_is_broadcast_skips_the_same(when):
    steps = {}

    def attach(model):
        steps[id(model)] = 500
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            spatial_attention_block_identifiers=("blocks",),
            cross_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: steps[id(model)],
        )
        model.enable_cache(config)

    plain, model = both(attach, when)
    contexts = {"cond": TINY["wan"].inputs(1)}
    expected = denoise(plain, contexts)
    assert relative_error(expected, denoise(TINY["wan"].make(), contexts)) > 1e-4
    assert relative_error(denoise(model, contexts), expected) <= ROUNDING_FP32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@WHEN
def test_compiled_blocks_are_those_of_diffusers(when):
    inputs = TINY["wan"].inputs()
    expected = compute(TINY["wan"].make(), inputs)
    _, model = both(lambda model: None, when)
    torch.compiler.reset()
    if when == "before":
        give_back(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    if when == "before":
        take(model)
    assert relative_error(compute(model, inputs), expected) <= ROUNDING_FP32
    torch.compiler.reset()


def test_a_transformer_that_is_compiled_as_a_whole_is_left():
    model = torch.compile(TINY["wan"].make(), backend="eager")
    entry = take(model)
    assert not entry.taken
    assert "torch.compile" in entry.what
    assert not any(is_swapped(module) for module in model.modules())


def test_a_taken_transformer_can_be_compiled():
    inputs = TINY["wan with times of tokens"].inputs()
    model = TINY["wan with times of tokens"].make()
    expected = compute(model, inputs)
    take(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    assert relative_error(compute(compiled, inputs), expected) <= ROUNDING_FP32
    torch.compiler.reset()
