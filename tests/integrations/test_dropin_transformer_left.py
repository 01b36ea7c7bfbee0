"""Where a taken transformer computes as Diffusers has it, and what is not taken: said, and never another number."""

import copy
import pickle

import diffusers
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from gguf import GGMLQuantizationType, quants
from tiny_transformers import TINY, compute, take
from torch import nn

from frameloom.integrations.diffusers.swap import is_swapped, unswap
from frameloom.ops.registry import ROUNDING_FP32, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*should be kept in float32.*")


def said(caplog):
    return [
        line.partition(" computes as Diffusers has it: ")[::2] for line in caplog.messages if "as Diffusers" in line
    ]


@pytest.fixture
def pair():
    """The same transformer untouched and taken, and inputs."""
    tiny = TINY["wan"]
    model = tiny.make()
    plain = copy.deepcopy(model)
    assert take(model).taken
    return plain, model, tiny.inputs()


@pytest.fixture
def told(caplog):
    with caplog.at_level("INFO", logger="frameloom"):
        yield lambda: said(caplog)


class Doubling(WanAttnProcessor):
    """Somebody's own: attention counts twice."""

    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def test_somebody_s_processor_computes(pair, told):
    plain, model, inputs = pair
    stock = compute(model, inputs)
    for network in (plain, model):
        network.set_attn_processor(Doubling())
    assert relative_error(compute(model, inputs), compute(plain, inputs)) <= ROUNDING_FP32
    assert told() == [("WanAttention", "its processor is Doubling")]  # once, of all calls
    model.set_attn_processor(WanAttnProcessor())
    assert torch.equal(compute(model, inputs), stock)


def doubles_its_convolution(model):
    layer = model.patch_embedding
    layer._conv_forward = lambda x, weight, bias: 2 * nn.Conv3d._conv_forward(layer, x, weight, bias)


def pads_its_patches(model):
    layer = model.patch_embedding  # as many patches, of other numbers
    layer.padding, layer.dilation = (0, 1, 1), (1, 3, 3)


def appends_a_layer(model):
    for block in model.blocks:
        block.attn1.to_out.append(nn.Softsign())


def drops_the_weights_of_a_norm(model):
    for block in model.blocks:
        block.attn1.norm_q.weight = None


def shifts_in_a_norm(model):
    for block in model.blocks:
        block.norm1.bias = nn.Parameter(torch.ones(64), requires_grad=False)


def scales_in_the_last_norm(model):
    model.norm_out.weight = nn.Parameter(torch.full((64,), 2.0), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        doubles_its_convolution,
        pads_its_patches,
        appends_a_layer,
        drops_the_weights_of_a_norm,
        shifts_in_a_norm,
        scales_in_the_last_norm,
    ],
)
def test_what_is_changed_of_a_layer_counts_as_for_the_untouched_transformer(pair, change):
    plain, model, inputs = pair
    compute(model, inputs)
    for network in (plain, model):
        change(network)
    assert relative_error(compute(model, inputs), compute(plain, inputs)) <= ROUNDING_FP32


class Wrapper(nn.Module):
    """A layer in a layer of somebody's own, which shows nothing of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def wrap(model, place):
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, Wrapper(model.get_submodule(place)))


WRAPPED = ["patch_embedding", "condition_embedder", "norm_out", "blocks.0.attn1", "blocks.0.attn1.norm_q"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", WRAPPED)
def test_a_layer_that_is_wrapped_is_called(place, when):
    tiny = TINY["wan"]
    plain, model, inputs = tiny.make(), tiny.make(), tiny.inputs()
    if when == "after":
        take(model)
    for network in (plain, model):
        wrap(network, place)
    if when == "before":
        assert take(model).taken
    assert relative_error(compute(model, inputs), compute(plain, inputs)) <= ROUNDING_FP32


@pytest.mark.parametrize("place", ["rope", "proj_out"])
def test_a_function_in_place_of_a_layer_is_called(place):
    tiny = TINY["wan"]
    plain, model, inputs = tiny.make(), tiny.make(), tiny.inputs()
    take(model)
    for network in (plain, model):
        layer = getattr(network, place)
        delattr(network, place)
        setattr(network, place, layer.forward)
    assert relative_error(compute(model, inputs), compute(plain, inputs)) <= ROUNDING_FP32


def test_where_every_attention_is_wrapped_it_is_left():
    model = TINY["wan"].make()
    for block in range(len(model.blocks)):
        wrap(model, f"blocks.{block}.attn1")
    entry = take(model)
    assert (entry.taken, entry.what) == (False, "in its Wrapper the heads or the norms are not known here")
    assert not any(is_swapped(module) for module in model.modules())


def test_a_backend_of_diffusers_that_was_set_computes(pair, told):
    plain, model, inputs = pair
    expected = compute(plain, inputs)
    with attention_backend("native"):  # a model's backend becomes that of all; this gives it back
        model.set_attention_backend("_native_math")
        assert relative_error(compute(model, inputs), expected) <= ROUNDING_FP32
        model.reset_attention_backend()
    with attention_backend("_native_math"):
        assert relative_error(compute(model, inputs), expected) <= ROUNDING_FP32
    assert told() == [("WanAttention", "the attention backend _native_math was set")]


def test_projections_that_are_fused_compute(pair, told):
    plain, model, inputs = pair
    for act in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        for network in (plain, model):
            getattr(network, act)()
        assert relative_error(compute(model, inputs), compute(plain, inputs)) <= ROUNDING_FP32
    assert told() == [("WanAttention", "its projections are fused")]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of the norms
def test_autocast_computes(pair, told):
    plain, model, inputs = pair
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compute(model, inputs), compute(plain, inputs))
    assert ("WanTransformerBlock", "autocast is on") in told()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_untouched_transformer(pair, told, checkpointing):
    plain, model, inputs = pair
    with torch.inference_mode():
        compute(model, inputs)  # leaves nothing behind that a training step could not use
    for network in (plain, model):
        if checkpointing:
            network.enable_gradient_checkpointing()
        network.train()
        network(**inputs).sample.square().mean().backward()
    for (name, expected), parameter in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad), name
    assert ("WanTransformerBlock", "gradients are recorded") in told()


def test_gradients_of_the_latents(pair):
    plain, model, inputs = pair
    grads = []
    for network in (plain, model):
        network.requires_grad_(False)
        network(**inputs)
        x = inputs["hidden_states"].clone().requires_grad_()
        network(**inputs | {"hidden_states": x}).sample.square().mean().backward()
        grads.append(x.grad)
    assert relative_error(grads[1], grads[0]) <= ROUNDING_FP32


def test_inference_mode_is_as_good(pair):
    plain, model, inputs = pair
    expected = compute(plain, inputs)
    with torch.inference_mode():
        texts = inputs["encoder_hidden_states"].clone()
        for _ in range(2):
            got = model(**inputs | {"encoder_hidden_states": texts}).sample
            assert relative_error(got, expected) <= ROUNDING_FP32
        texts.mul_(-1)  # of which such a tensor keeps no count
        other = model(**inputs | {"encoder_hidden_states": texts}).sample
    assert relative_error(other, expected) > 1e-3


def test_float64_is_left_to_diffusers(pair, told):
    plain, model, inputs = pair
    inputs = {name: x.double() for name, x in inputs.items()}
    assert torch.equal(compute(model.double(), inputs), compute(plain.double(), inputs))
    assert ("WanTransformerBlock", "the input is torch.float64") in told()


def test_timesteps_that_differ_within_a_frame(told):
    tiny = TINY["wan with times of tokens"]
    model, inputs = tiny.make(), tiny.inputs()
    inputs["timestep"][0, 3] += 1
    expected = compute(model, inputs)
    take(model)
    assert relative_error(compute(model, inputs), expected) <= ROUNDING_FP32
    assert told() == [("WanTransformer3DModel", "tokens of one frame have different timesteps")]


def test_while_a_graph_of_cuda_is_captured_nothing_waits_for_the_device(monkeypatch):
    tiny = TINY["wan with times of tokens"]
    plain, model, inputs = tiny.make(), tiny.make(), tiny.inputs()
    take(model)
    ours, theirs = compute(model, inputs), compute(plain, inputs)
    with monkeypatch.context() as captured:
        captured.setattr(torch.cuda, "is_initialized", lambda: True)
        captured.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured.setattr(torch.Tensor, "__bool__", None)  # which would wait
        assert torch.equal(compute(model, inputs), theirs)
    assert torch.equal(compute(model, inputs), ours)


def test_times_of_frames_make_nothing_as_large_as_the_tokens():
    tiny = TINY["wan with times of tokens"]
    model, inputs = tiny.make(), tiny.inputs()
    take(model)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[2].shape))
    compute(model, inputs)
    assert seen == [(1, 3, 6, 64)]


def test_both_ways_to_return(pair):
    _, model, inputs = pair
    (velocity,) = model(**inputs, return_dict=False)
    output = model(*inputs.values(), None, True)
    assert type(output).__name__ == "Transformer2DModelOutput"
    assert torch.equal(velocity, output.sample)


def quantize(model):
    """The linear layers of the blocks as GGUF files have them, in the classes of Diffusers."""
    for block in model.blocks:
        for place, layer in list(block.named_modules()):
            if type(layer) is not torch.nn.Linear or layer.in_features % 32:
                continue
            parent, _, name = place.rpartition(".")
            made = GGUFLinear(layer.in_features, layer.out_features, bias=True, compute_dtype=torch.float32)
            raw = quants.quantize(layer.weight.detach().numpy(), GGMLQuantizationType.Q8_0)
            made.weight = GGUFParameter(torch.from_numpy(raw), quant_type=GGMLQuantizationType.Q8_0)
            made.bias = layer.bias
            setattr(block.get_submodule(parent), name, made)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
def test_quantized_layers_compute_as_they_are(when, told):
    tiny = TINY["wan"]
    plain, model, inputs = quantize(tiny.make()), tiny.make(), tiny.inputs()
    if when == "after":
        take(model)
        compute(model, inputs)
    quantize(model)
    assert isinstance(model.blocks[0].attn1.to_q, GGUFLinear)
    if when == "before":
        take(model)
    expected = compute(plain, inputs)
    assert relative_error(expected, compute(tiny.make(), inputs)) > 1e-4
    assert relative_error(compute(model, inputs), expected) <= ROUNDING_FP32
    assert told() == []


class Halved(torch.Tensor):
    """A weight that is stored as half of itself, as libraries that quantize make classes of their own."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.half = weight.detach() / 2

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Halved(2 * args[0].half)
        args = [2 * arg.half if isinstance(arg, Halved) else arg for arg in args]
        return function(*args, **(kwargs or {}))


def test_weights_of_a_class_of_their_own(told):
    tiny = TINY["wan"]
    model, inputs = tiny.make(), tiny.inputs()
    expected = compute(model, inputs)
    take(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.RMSNorm):
            module.weight = torch.nn.Parameter(Halved(module.weight), requires_grad=False)
    for _ in range(2):
        assert relative_error(compute(model, inputs), expected) <= ROUNDING_FP32
    assert told() == [("WanAttention", "a weight is quantized")]
    plain = tiny.make()
    with torch.no_grad():
        for weight, block in zip(("to_k", "to_v"), (0, 1), strict=True):
            plain.blocks[block].attn2.get_submodule(weight).weight.mul_(-3)
            model.blocks[block].attn2.get_submodule(weight).weight.half.mul_(-3)  # which only its parts count
    assert relative_error(compute(model, inputs), compute(plain, inputs)) <= ROUNDING_FP32


def test_without_weights_it_is_left():
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=8)
    entry = take(model)
    assert (entry.taken, entry.what) == (False, "its weights are on the meta device; load them first")
    assert not any(is_swapped(module) for module in model.modules())


def test_taking_it_twice_changes_nothing():
    for name in ("wan", "vace"):
        model = TINY[name].make()
        take(model)
        kinds = [type(module) for module in model.modules()]
        entry = take(model)
        assert (entry.taken, entry.what) == (True, "it was taken before")
        assert [type(module) for module in model.modules()] == kinds


class Brighter(WanTransformer3DModel):
    """A subclass with a forward of its own, which looks into the rotary table."""

    def forward(self, hidden_states, *args, **kwargs):
        cos, _ = self.rope(hidden_states)
        assert cos.ndim == 4
        return super().forward(hidden_states + 1, *args, **kwargs)


class Named(WanTransformer3DModel):
    """A subclass that computes as its parent."""


def test_a_subclass_keeps_a_forward_of_its_own():
    for kind, keeps in ((Brighter, True), (Named, False)):
        model = TINY["wan"].make()
        model.__class__ = kind
        inputs = TINY["wan"].inputs()
        expected = compute(model, inputs)
        entry = take(model)
        assert entry.taken
        assert ("a forward that is its own" in entry.what) == keeps
        assert is_swapped(model) != keeps
        assert relative_error(compute(model, inputs), expected) <= ROUNDING_FP32


class OwnBlock(WanTransformerBlock):
    """A block that is not Diffusers'."""

    def forward(self, *args):
        return super().forward(*args) * 1.5


def test_blocks_of_another_class_are_left():
    model = TINY["wan"].make()
    for block in model.blocks:
        block.__class__ = OwnBlock
    entry = take(model)
    assert (entry.taken, entry.what) == (False, "its blocks are none of those that are known here")
    assert take(torch.nn.Linear(2, 2)) is None


@pytest.mark.skipif(not hasattr(diffusers, "WanAnimate2Transformer3DModel"), reason="not in this release")
def test_a_transformer_that_keeps_its_reference_in_a_cache_is_left():
    with torch.device("meta"):
        model = diffusers.WanAnimate2Transformer3DModel(num_layers=1, num_heads=1, dim=16, ffn_dim=8)
    entry = take(model)
    assert (entry.taken, entry.what) == (False, "its blocks are none of those that are known here")


def test_copies_and_what_is_saved_know_nothing_of_it(pair, tmp_path):
    plain, model, inputs = pair
    expected = compute(plain, inputs)
    compute(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(is_swapped(module) for module in other.modules())
        assert torch.equal(compute(other, inputs), expected)
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config.items() >= {"num_layers": 2, "_class_name": "WanTransformer3DModel"}.items()
    assert torch.equal(compute(loaded, inputs), expected)
    assert isinstance(model, WanTransformer3DModel)
    assert type(model).__name__ == "WanTransformer3DModel"
    assert list(model.state_dict()) == list(plain.state_dict())


def test_seeds_are_the_user_s(monkeypatch, tmp_path):
    monkeypatch.setenv("FRAMELOOM_CACHE", str(tmp_path))  # nothing was measured here yet
    model = TINY["wan"].make()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    take(model)
    assert torch.equal(torch.rand(3), expected)
    for module in model.modules():
        unswap(module)
