"""Classes of Diffusers that somebody changed, batches that broadcast, torch.func: the plain class computes."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformerBlock,
)
from tiny_transformers import TINY, compute, take
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from frameloom import accelerate
from frameloom.integrations.diffusers.samples.catalogue import sample_of
from frameloom.integrations.diffusers.samples.sample import Scale, frames_of
from frameloom.integrations.diffusers.swap import is_swapped
from frameloom.ops.registry import ROUNDING_FP32, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated")  # by torch, of itself


def scaled(output):
    """What a script's patch makes of an output: one and a half times that, tuples and classes of outputs included."""
    if isinstance(output, tuple):
        return tuple(map(scaled, output))
    return 1.5 * output if isinstance(output, torch.Tensor) else type(output)(sample=1.5 * output.sample)


def patch_of(method):
    return lambda self, *args, **kwargs: scaled(method(self, *args, **kwargs))


PATCHES = [
    (WanTransformer3DModel, "forward"),
    (WanTransformerBlock, "forward"),
    (WanAttention, "forward"),
    (WanAttnProcessor, "__call__"),
    (FeedForward, "forward"),
    (GELU, "forward"),
    (GELU, "gelu"),
    (FP32LayerNorm, "forward"),
    (PixArtAlphaTextProjection, "forward"),
    (WanRotaryPosEmbed, "forward"),
    (torch.nn.Linear, "forward"),
    (torch.nn.RMSNorm, "forward"),
    (torch.nn.Conv3d, "forward"),
]
LEFT = [
    (WanTransformer3DModel, "forward", "2 blocks, in a forward that is its own, by"),
    (WanTransformerBlock, "forward", "WanTransformerBlock.forward is not as Diffusers has it"),
    (WanAttention, "forward", "WanAttention.forward is not as Diffusers has it"),
    (WanAttnProcessor, "__call__", "WanAttnProcessor.__call__ is not as Diffusers has it"),
    (FeedForward, "forward", "FeedForward.forward is not as Diffusers has it"),
    (PixArtAlphaTextProjection, "forward", "PixArtAlphaTextProjection.forward is not as Diffusers has it"),
    (WanRotaryPosEmbed, "forward", "WanRotaryPosEmbed.forward is not as Diffusers has it"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "name"), PATCHES)
def test_a_class_that_somebody_changed_computes(kind, name, when, monkeypatch):
    tiny = TINY["wan"]
    plain, model, inputs = tiny.make(), tiny.make(), tiny.inputs()
    stock = compute(plain, inputs)
    if when == "after":
        take(model)
        compute(model, inputs)
    with monkeypatch.context() as patches:
        patches.setattr(kind, name, patch_of(getattr(kind, name)))
        if when == "before":
            take(model)
        expected = compute(plain, inputs)
        assert relative_error(expected, stock) > 1e-4
        assert relative_error(compute(model, inputs), expected) <= ROUNDING_FP32
    assert relative_error(compute(model, inputs), stock) <= ROUNDING_FP32


@pytest.mark.parametrize(("kind", "name", "reason"), LEFT)
def test_what_was_changed_is_left_and_the_report_says_so(kind, name, reason, monkeypatch):
    model = TINY["wan"].make()
    monkeypatch.setattr(kind, name, patch_of(getattr(kind, name)))
    entry = take(model)
    assert reason in entry.what
    assert entry.taken == (kind is not WanTransformerBlock)
    changed = [module for module in model.modules() if isinstance(module, kind)]
    changed += [module for module in model.modules() if isinstance(getattr(module, "processor", None), kind)]
    assert changed
    assert not any(map(is_swapped, changed))


@pytest.mark.parametrize("name", ["wan", "wan with times of tokens", "skyreels"])
@pytest.mark.parametrize("one", [("hidden_states",), ("encoder_hidden_states",), ("timestep",)])
def test_batches_that_broadcast(name, one):
    tiny = TINY[name]
    plain, model, inputs = tiny.make(), tiny.make(), tiny.inputs(batch=2)
    inputs |= {key: inputs[key][:1] for key in one}
    take(model)
    expected = compute(plain, inputs)
    got = compute(model, inputs)
    assert got.shape == expected.shape
    assert relative_error(got, expected) <= ROUNDING_FP32


def test_prompts_of_anyflow_that_are_embedded_already():
    sample, scale = sample_of("AnyFlowPipeline"), Scale(frames=5, height=32, width=32)
    generator = torch.Generator().manual_seed(2)
    texts = {name: torch.randn(1, 512, 24, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")}
    asked = sample.ask(scale) | texts | {"prompt": None, "negative_prompt": None}
    frames = []
    for is_taken in (False, True):
        pipe = sample.build(scale)
        if is_taken:
            assert accelerate(pipe, vae=False)["transformer"].taken
        frames.append(frames_of(pipe(**asked, generator=torch.Generator().manual_seed(1))))
    assert (frames[0] - frames[1]).abs().max() <= 1 / 255


@pytest.fixture
def velocity_of():
    """Of the untouched transformer and of the taken one, as a function of the latents; and latents."""
    tiny = TINY["wan"]
    inputs = tiny.inputs()
    x = inputs.pop("hidden_states")
    networks = [tiny.make().requires_grad_(False) for _ in range(2)]
    take(networks[1])
    with sdpa_kernel(SDPBackend.MATH):  # the attention of torch that these transforms know
        yield [lambda x, network=network: network(x, **inputs).sample for network in networks], x


def apart(functions):
    expected, got = functions
    assert expected.abs().max() > 0
    return relative_error(got, expected)


def test_tangents_are_those_of_the_untouched_transformer(velocity_of):
    functions, x = velocity_of
    assert apart([torch.func.jvp(f, (x,), (torch.ones_like(x),))[1] for f in functions]) <= ROUNDING_FP32
    tangents = []
    for f in functions:
        with forward_ad.dual_level(), torch.no_grad():
            tangents.append(forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    assert apart(tangents) <= ROUNDING_FP32


def test_gradients_and_batches_of_torch_func(velocity_of):
    functions, x = velocity_of
    gradients = [torch.func.grad(lambda x, f=f: f(x).square().mean())(x) for f in functions]
    assert apart(gradients) <= ROUNDING_FP32
    assert apart([torch.func.vmap(f)(torch.stack((x, 2 * x))) for f in functions]) <= ROUNDING_FP32
