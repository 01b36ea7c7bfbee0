"""A live VAE of Diffusers computed by the network here: the same numbers, and everything back as it was."""

import copy
import dataclasses
import logging
import threading

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.models.autoencoders import autoencoder_kl_wan
from releases import skip_groups_without_an_accelerator
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import frameloom
from frameloom.integrations.diffusers.swap import held_by, is_swapped
from frameloom.platform import device
from frameloom.platform.host import CPU

LATENTS = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 1.1, 1.2, 1.3]}
WAN21 = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, **LATENTS}
WAN22 = {
    **WAN21,
    "decoder_base_dim": 16,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
KINDS = {
    "2.1": (AutoencoderKLWan, WAN21),
    "2.1 three stages": (
        AutoencoderKLWan,
        {
            **WAN21,
            "dim_mult": [1, 2, 2],
            "temperal_downsample": [True, True],
            "dropout": 0.1,
            "scale_factor_spatial": 4,
        },
    ),
    "2.1 halves time once": (AutoencoderKLWan, {**WAN21, "temperal_downsample": [False, False, True]}),
    "2.2": (AutoencoderKLWan, WAN22),
    "Qwen-Image": (AutoencoderKLQwenImage, WAN21),
    "Qwen-Image with transparency": (AutoencoderKLQwenImage, {**WAN21, "input_channels": 4}),
}
KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def vae_of(kind="2.1", seed=0):
    torch.manual_seed(seed)
    cls, config = KINDS[kind]
    vae = cls(**config).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
    return vae


def pipe_with(vae):
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=None)
    pipe.register_modules(vae=vae)
    return pipe


def taken(vae):
    frameloom.accelerate(pipe_with(vae))
    assert is_swapped(vae)
    return vae


def latents(vae, frames=3, height=6, width=5, batch=1, seed=1):
    shape = (batch, vae.config.z_dim, frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(vae.dtype)


def frames_for(vae, frames=9, height=32, width=48, batch=1, seed=2):
    channels = vae.config.get("input_channels", 3)
    noise = torch.rand((batch, channels, frames, height, width), generator=torch.Generator().manual_seed(seed))
    return (2 * noise - 1).to(vae.dtype)


def decoded(vae, z):
    return vae.decode(z, return_dict=False)[0]


def encoded(vae, x):
    return vae.encode(x).latent_dist.parameters


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def levels(a, b):
    return float((a.float() - b.float()).abs().max()) * 127.5


@KIND
def test_it_decodes_and_encodes_what_it_did(kind):
    vae = vae_of(kind)
    z, x = latents(vae), frames_for(vae)
    video, moments = decoded(vae, z), encoded(vae, x)
    taken(vae)
    assert error(decoded(vae, z), video) <= 1e-5
    assert levels(decoded(vae, z), video) < 0.1
    assert error(encoded(vae, x), moments) <= 1e-5
    assert torch.equal(decoded(vae, z), decoded(vae, z))
    assert not torch.equal(decoded(vae, z), video), "the network here has other bits: it did not compute this"


@KIND
def test_where_bits_have_to_stay_it_computes_by_itself(kind):
    vae = vae_of(kind)
    z, x = latents(vae), frames_for(vae)
    video, moments = decoded(vae, z), encoded(vae, x)
    entry = frameloom.accelerate(pipe_with(vae), "bitwise")["vae"]
    assert not entry.taken
    assert "the last bits would differ" in entry.what
    assert not is_swapped(vae)
    assert torch.equal(decoded(vae, z), video)
    assert torch.equal(encoded(vae, x), moments)


def as_it_is(vae):
    state = {name: (value.clone(), value.stride(), value.dtype) for name, value in vae.state_dict().items()}
    return state, type(vae), sorted(vars(vae)), {name: id(p) for name, p in vae.named_parameters()}


def same(before, after):
    return before[1:] == after[1:] and all(
        torch.equal(value, after[0][name][0]) and rest == list(after[0][name][1:])
        for name, (value, *rest) in before[0].items()
    )


@KIND
def test_restore_gives_everything_back(kind):
    vae = vae_of(kind)
    z, x = latents(vae), frames_for(vae)
    video, moments = decoded(vae, z), encoded(vae, x)
    before = as_it_is(vae)
    pipe = pipe_with(vae)
    frameloom.accelerate(pipe)
    decoded(vae, z), encoded(vae, x)
    assert not same(before, as_it_is(vae))
    frameloom.restore(pipe)
    assert same(before, as_it_is(vae))
    assert torch.equal(decoded(vae, z), video)
    assert torch.equal(encoded(vae, x), moments)


def test_restored_weights_are_those_of_now():
    vae, other = vae_of(), vae_of(seed=5)
    pipe = pipe_with(vae)
    frameloom.accelerate(pipe)
    decoded(vae, latents(vae))
    vae.load_state_dict(other.state_dict())
    vae.to(torch.bfloat16)
    frameloom.restore(pipe)
    wanted = other.to(torch.bfloat16).state_dict()
    for name, value in vae.state_dict().items():
        assert torch.equal(value, wanted[name])
        assert value.stride() == wanted[name].stride()


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("kind", ["2.1", "2.1 halves time once", "2.2"])
def test_frames_that_the_plain_method_ignores_are_ignored(kind, frames):
    vae = vae_of(kind)
    x = frames_for(vae, frames)
    moments = encoded(vae, x)
    assert error(encoded(taken(vae), x), moments) <= 1e-5


def test_frames_that_do_not_change_are_encoded_once():
    vae = vae_of()
    x = torch.cat([frames_for(vae, 1), torch.zeros(1, 3, 48, 32, 48)], dim=2)
    moments = encoded(vae, x)
    taken(vae)
    ran = []
    network = held_by(vae).lent._vae
    network.encoder.conv_in.register_forward_pre_hook(lambda *_: ran.append(1))
    ours = encoded(vae, x)
    assert error(ours, moments) <= 1e-5
    assert 0 < len(ran) <= 6, "of 13 latent frames"


@pytest.mark.parametrize("size", [(36, 48), (33, 41), (8, 60)])
def test_sizes_that_the_compression_does_not_divide(size, caplog):
    vae = vae_of()
    x = frames_for(vae, 5, *size)
    moments = encoded(vae, x)
    assert error(encoded(taken(vae), x), moments) <= 1e-5
    assert "not divided by the compression" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype_and_a_change_of_it(dtype):
    vae = vae_of()
    z = latents(vae)
    exact = decoded(copy.deepcopy(vae).double(), z.double())
    theirs = error(decoded(copy.deepcopy(vae).to(dtype), z.to(dtype)), exact)
    taken(vae)
    decoded(vae, z)
    vae.to(dtype)
    ours = decoded(vae, z.to(dtype))
    assert ours.dtype == dtype
    # In float64 theirs is what the difference comes from: its upsamplers go through float32.
    assert error(ours, exact) <= max(1.1 * theirs, 1e-6)


def test_the_next_call_uses_new_weights():
    vae, other = vae_of(), vae_of(seed=3)
    z = latents(vae)
    wanted = decoded(other, z)
    taken(vae)
    decoded(vae, z)
    vae.load_state_dict(other.state_dict())
    assert error(decoded(vae, z), wanted) <= 1e-5
    vae.load_state_dict({name: 0.5 * value for name, value in other.state_dict().items()}, assign=True)
    assert error(decoded(vae, z), wanted) > 1e-3
    vae.load_state_dict(other.state_dict(), assign=True)
    assert error(decoded(vae, z), wanted) <= 1e-5
    for parameter in vae.parameters():
        parameter.data.mul_(1.25)
    for parameter in other.parameters():
        parameter.data.mul_(1.25)
    assert error(decoded(vae, z), decoded(other, z)) <= 1e-5


def one_channel(p):
    p.data[:, 3] *= -3


def signs_of_one_channel(p):
    p.data[:, 3] *= -1


def two_rows_swapped(p):
    p.data[[1, 2]] = p.data[[2, 1]]


def two_columns_swapped(p):
    p.data[:, [1, 2]] = p.data[:, [2, 1]]


def one_number(p):
    p.data[5, 6, 0, 1, 1] += 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [one_channel, signs_of_one_channel, two_rows_swapped, two_columns_swapped, one_number]
)
def test_a_change_of_a_part_of_a_weight_that_torch_does_not_count(change, dtype):
    vae, other = vae_of(), vae_of()
    vae.to(dtype), other.to(dtype)
    z = latents(vae)
    taken(vae)
    decoded(vae, z)
    assert held_by(vae).lent._made, "points are kept"
    old = decoded(vae, z)
    for each in (vae, other):
        for name, parameter in each.named_parameters():
            if name.startswith("decoder") and parameter.shape[3:] == (3, 3) and min(parameter.shape[:2]) > 7:
                version = parameter._version
                change(parameter)
                assert parameter._version == version
    now = decoded(vae, z)
    assert torch.equal(now, decoded(taken(other), z))
    assert not torch.equal(now, old)


def test_weights_are_used_where_they_are():
    vae = taken(vae_of())
    decoded(vae, latents(vae)), encoded(vae, frames_for(vae))
    live = held_by(vae)
    theirs = {parameter.untyped_storage().data_ptr() for parameter in vae.parameters()}
    weights = dict(vae.named_parameters())
    network, planner = live.lent.bind(weights)
    held = 0
    for module in network.modules():
        kernel = getattr(module, "kernel", None)
        for value in [] if kernel is None else vars(kernel).values():
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in theirs:
                held += value.numel() * value.element_size()
    live.lent.unbind(weights)
    assert 0 < held <= live.lent.extra_bytes(weights)
    assert planner.choices.channels_last
    entry = frameloom.accelerate(pipe_with(vae_of()))["vae"]
    assert entry.extra_bytes == live.lent.extra_bytes(weights)


def views_of_one_buffer(vae):
    numbers = torch.cat([parameter.flatten() for parameter in vae.parameters()])
    sizes = [parameter.numel() for parameter in vae.parameters()]
    for parameter, part in zip(vae.parameters(), numbers.split(sizes), strict=True):
        parameter.data = part.view(parameter.shape)


def shared_with_processes(vae):
    vae.share_memory()


def in_no_plain_order(vae):
    for parameter in vae.parameters():
        parameter.data = parameter.data.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize("share", [views_of_one_buffer, shared_with_processes, in_no_plain_order])
def test_memory_that_is_not_theirs_alone_stays_theirs(share):
    vae = vae_of()
    z, x = latents(vae), frames_for(vae)
    video, moments = decoded(vae, z), encoded(vae, x)
    share(vae)
    before = [(parameter.data_ptr(), parameter.stride()) for parameter in vae.parameters()]
    pipe = pipe_with(vae)
    assert frameloom.accelerate(pipe)["vae"].taken
    for _ in range(2):
        assert error(decoded(vae, z), video) <= 1e-5
        assert error(encoded(vae, x), moments) <= 1e-5
        assert [(parameter.data_ptr(), parameter.stride()) for parameter in vae.parameters()] == before
    frameloom.restore(pipe)
    assert [(parameter.data_ptr(), parameter.stride()) for parameter in vae.parameters()] == before


def test_between_calls_nothing_holds_the_weights():
    """A VAE that is moved to another device after a call leaves nothing on the first."""
    vae = taken(vae_of())
    decoded(vae, latents(vae)), encoded(vae, frames_for(vae))
    lent = held_by(vae).lent
    assert not list(lent._vae.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in vae.parameters()}
    kept = [value for made in lent._made.values() for value in vars(made.kernel).values()]
    assert kept
    shared = [x for x in kept if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in own]
    assert sum(x.numel() for x in shared) <= sum(p.numel() for p in vae.parameters() if p.ndim == 1)


def hooked(vae):
    vae.decoder.conv_in.register_forward_hook(lambda _module, _given, out: 2 * out)


def replaced(vae):
    vae.decoder.mid_block.attentions[0].proj = torch.nn.Sequential(vae.decoder.mid_block.attentions[0].proj)


def trained(vae):
    vae.train()


def offloaded_by_groups(vae):
    skip_groups_without_an_accelerator()
    apply_group_offloading(vae, onload_device=torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "have hooks"),
        (replaced, "decoder.mid_block.attentions.0.proj"),
        (trained, "dropout"),
        (offloaded_by_groups, "have hooks"),
    ],
)
def test_where_ours_does_not_apply_the_plain_method_computes(change, reason, caplog):
    vae = vae_of("2.1 three stages")
    plain = copy.deepcopy(vae)
    z = latents(vae)
    taken(vae)
    change(vae)
    change(plain)
    results = []
    for each in (vae, plain):
        torch.manual_seed(0)
        results.append(decoded(each, z))
    assert torch.equal(*results)
    decoded(vae, z)
    lines = [line for line in caplog.messages if "computes by itself" in line]
    assert len(lines) == 1, lines
    assert reason in lines[0]


def test_gradients_are_recorded_by_the_plain_method(caplog):
    vae = taken(vae_of())
    z = latents(vae).requires_grad_()
    with torch.enable_grad():
        vae.decode(z).sample.sum().backward()
    assert z.grad is not None
    assert vae.decoder.conv_in.weight.grad is not None
    assert "gradients are recorded" in caplog.text


def test_autocast_is_left_to_the_plain_method(caplog):
    vae = vae_of()
    z = latents(vae)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = decoded(vae, z)
        assert torch.equal(decoded(taken(vae), z), wanted)
    assert "autocast" in caplog.text


def test_an_input_of_another_dtype_fails_as_it_did():
    vae = vae_of()
    z = latents(vae).bfloat16()
    with pytest.raises(RuntimeError) as plain:
        vae.decode(z)
    with pytest.raises(RuntimeError) as ours:
        taken(vae).decode(z)
    assert str(ours.value) == str(plain.value)


def test_memory_that_is_too_short_is_left_to_the_plain_method(monkeypatch, caplog):
    vae = taken(vae_of())
    z = latents(vae)
    wanted = decoded(vae, z)
    for free in (1000, 1234):
        monkeypatch.setattr("frameloom.memory.vae.free_memory_bytes", lambda _device, free=free: free)
        assert error(decoded(vae, z), wanted) <= 1e-5
    assert sum("needs at least" in line for line in caplog.messages) == 1, "whatever is free"


@pytest.fixture
def _unknown_device(monkeypatch):
    """Nothing is known of the device that everything is on."""
    monkeypatch.setattr(device, "PLATFORMS", [dataclasses.replace(CPU, name="another")])


@pytest.mark.usefixtures("_unknown_device")
def test_on_a_device_of_which_nothing_is_known_it_is_left():
    vae = vae_of()
    before = as_it_is(vae)
    entry = frameloom.accelerate(pipe_with(vae))["vae"]
    assert not entry.taken
    assert "nothing is known of device 'cpu'" in entry.what
    assert same(before, as_it_is(vae))


def test_where_its_kernels_cannot_be_chosen_the_plain_method_computes(request, caplog):
    vae = vae_of()
    wanted = decoded(vae.double(), z := latents(vae))
    taken(vae.float())
    vae.double()
    request.getfixturevalue("_unknown_device")
    assert torch.equal(decoded(vae, z), wanted)
    assert "nothing is known of device 'cpu'" in caplog.text
    assert not list(held_by(vae).lent._vae.parameters())


def test_a_failure_while_it_is_taken_leaves_it_as_it_was(monkeypatch):
    vae = vae_of()
    before = as_it_is(vae)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("frameloom.engine.lent_vae.install", fail)
    with pytest.raises(MemoryError):
        frameloom.accelerate(pipe_with(vae))
    assert same(before, as_it_is(vae))


@KIND
def test_slices_and_tiles(kind, caplog):
    vae = vae_of(kind)
    z, x = latents(vae, height=10, width=9, frames=2, batch=2), frames_for(vae, 5, 64, 80, batch=2)
    video, moments = decoded(vae, z), encoded(vae, x)
    taken(vae)
    vae.enable_slicing()
    assert error(decoded(vae, z), video) <= 1e-5
    assert error(encoded(vae, x), moments) <= 1e-5
    vae.enable_tiling(32, 32, 24, 24)
    assert error(decoded(vae, z), video) <= 1e-5, "the whole picture, without a blend"
    assert error(encoded(vae, x), moments) <= 1e-5
    assert sum("makes no tiles" in line for line in caplog.messages) == 1
    assert error(vae.tiled_decode(z).sample, video) > 1e-3


def test_outputs_are_ordinary_tensors_of_the_classes_they_were():
    vae = vae_of()
    z, x = latents(vae), frames_for(vae)
    kinds = [type(vae.decode(z)), type(vae.encode(x)), type(vae.decode(z, return_dict=False)), type(vae(x))]
    taken(vae)
    assert [type(vae.decode(z)), type(vae.encode(x)), type(vae.decode(z, return_dict=False)), type(vae(x))] == kinds
    out = decoded(vae, z)
    assert not out.is_inference()
    assert out.is_contiguous()
    assert isinstance(vae, AutoencoderKLWan)


def test_in_inference_mode_and_after_it():
    vae = vae_of()
    z = latents(vae)
    wanted = decoded(vae, z)
    taken(vae)
    with torch.inference_mode():
        assert error(decoded(vae, z), wanted) <= 1e-5
    assert not any(parameter.is_inference() for parameter in vae.parameters())
    with torch.enable_grad():
        vae.decode(z).sample.sum().backward()


def test_copies_and_files_are_of_the_plain_class(tmp_path):
    vae = vae_of()
    z = latents(vae)
    wanted = decoded(vae, z)
    taken(vae)
    ours = decoded(vae, z)
    twin = copy.deepcopy(vae)
    assert type(twin) is AutoencoderKLWan
    assert levels(decoded(twin, z), wanted) < 0.1
    vae.save_pretrained(tmp_path)
    again = AutoencoderKLWan.from_pretrained(tmp_path)
    assert torch.equal(decoded(again, z), wanted)
    assert torch.equal(decoded(vae, z), ours)


def test_a_vae_that_two_pipelines_share():
    vae = vae_of()
    first, second = pipe_with(vae), pipe_with(vae)
    frameloom.accelerate(first)
    assert frameloom.accelerate(second)["vae"].what == "it was taken before"
    frameloom.restore(second)
    assert not is_swapped(first.vae)
    frameloom.restore(first)


def test_torch_compile_sees_the_plain_method(caplog):
    vae = vae_of()
    z = latents(vae, frames=1, height=2, width=2)
    wanted = decoded(vae, z)
    taken(vae)
    compiled = torch.compile(vae.decode, backend="eager")
    assert error(compiled(z).sample, wanted) <= 1e-6
    assert "computes by itself" not in caplog.text


class Overrides(AutoencoderKLWan):
    def _decode(self, z, return_dict=True):
        return super()._decode(0 * z, return_dict=return_dict)


def of_class(cls):
    return lambda: cls(**WAN21).eval()


def with_own_method():
    vae = vae_of()
    vae.decode = torch.compile(vae.decode, backend="eager")
    return vae


def on_meta():
    with torch.device("meta"):
        return vae_of()


def with_foreign_part():
    vae = vae_of()

    class Tiny(torch.nn.Module):
        pass

    vae.decoder = Tiny()
    return vae


def unlike_its_config():
    vae = vae_of()
    vae.register_to_config(base_dim=16)
    return vae


def of_two_dtypes():
    vae = vae_of()
    vae.decoder.half()
    return vae


LEFT = {
    "a subclass": (of_class(Overrides), "_decode of its own"),
    "a method of its own": (with_own_method, "decode of its own"),
    "meta": (on_meta, "meta device"),
    "compiled": (lambda: torch.compile(vae_of(), backend="eager"), "compiled as a whole"),
    "a part of another maker": (with_foreign_part, "Tiny"),
    "not its config": (unlike_its_config, "do not fit its config"),
    "attention scales": (lambda: AutoencoderKLWan(**WAN21, attn_scales=[0.5]), "attn_scales"),
    "two dtypes": (of_two_dtypes, "several dtypes, torch.float16 and torch.float32"),
    "float8": (lambda: vae_of().to(torch.float8_e4m3fn), "quantized"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_is_told_and_unchanged(what):
    make, reason = LEFT[what]
    vae = make()
    pipe = pipe_with(vae)
    before = sorted(vars(vae)), type(vae)
    entry = frameloom.accelerate(pipe)["vae"]
    assert not entry.taken
    assert reason in entry.what
    assert "\n" not in entry.what
    assert (sorted(vars(vae)), type(vae)) == before
    frameloom.restore(pipe)


PATCHED = [
    (AutoencoderKLWan, "_decode"),
    (AutoencoderKLWan, "encode"),
    (autoencoder_kl_wan.WanRMS_norm, "forward"),
    (autoencoder_kl_wan.WanCausalConv3d, "forward"),
    (torch.nn.Conv2d, "_conv_forward"),
]


@pytest.mark.parametrize(("kind", "method"), PATCHED)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_patched_in_a_class_is_called(kind, method, when, monkeypatch, caplog):
    vae = vae_of()
    z, x = latents(vae), frames_for(vae, 5)
    own, called = getattr(kind, method), []

    def patched(self, *args, **words):
        called.append(1)
        return own(self, *args, **words)

    pipe = pipe_with(vae)
    if when == "before":
        monkeypatch.setattr(kind, method, patched)
        entry = frameloom.accelerate(pipe)["vae"]
        assert not entry.taken
        assert f"{method} is not as Diffusers has it" in entry.what
    else:
        frameloom.accelerate(pipe)
        decoded(vae, z)
        assert not caplog.messages
        monkeypatch.setattr(kind, method, patched)
    decoded(vae, z), encoded(vae, x)
    assert called
    assert when == "before" or f"{method} is not as Diffusers has it" in caplog.text


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own rules of differentiation
def test_forward_mode_tangents_are_those_of_the_plain_method(caplog):
    vae = vae_of().requires_grad_(False)
    z, v = latents(vae, 2, 4, 4), latents(vae, 2, 4, 4, seed=7)

    def tangents():
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            made = forward_ad.unpack_dual(decoded(vae, forward_ad.make_dual(z, v))).tangent
        with sdpa_kernel(SDPBackend.MATH):
            return made, torch.func.jvp(lambda z: decoded(vae, z), (z,), (v,))[1]

    wanted = tangents()
    taken(vae)
    assert all(map(torch.equal, tangents(), wanted))
    assert "forward-mode" in caplog.text


def test_restore_waits_for_the_call_that_another_thread_is_in():
    vae = vae_of()
    z = latents(vae)
    wanted = decoded(vae, z)
    before, pipe = as_it_is(vae), pipe_with(vae)
    frameloom.accelerate(pipe)
    live = held_by(vae)
    inside, go_on, made = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        go_on.wait(30)

    live.lent._vae.decoder.conv_in.register_forward_pre_hook(wait)
    caller = threading.Thread(target=lambda: made.append(vae.decode(z.detach()).sample.detach()))
    vae.requires_grad_(False)
    caller.start()
    assert inside.wait(30)
    restorer = threading.Thread(target=frameloom.restore, args=(pipe,))
    restorer.start()
    restorer.join(0.3)
    assert restorer.is_alive()
    go_on.set()
    caller.join(60), restorer.join(60)
    assert levels(made[0], wanted) < 0.1
    vae.requires_grad_(True)
    assert same(before, as_it_is(vae))
    assert live.decode(vae, z) is None, "a call that began before, and comes to the weights after"
    assert type(vae) is AutoencoderKLWan
    assert torch.equal(decoded(vae, z), wanted)


def test_a_subclass_that_changes_nothing_of_it_is_taken():
    class Named(AutoencoderKLWan):
        pass

    vae = Named(**WAN21).eval()
    assert type(taken(vae)).__name__ == "Named"


def test_model_offload_moves_the_weights_and_ours_follows(caplog):
    caplog.set_level(logging.WARNING)
    accelerate = pytest.importorskip("accelerate")
    vae = vae_of()
    z = latents(vae)
    wanted = decoded(vae, z)
    taken(vae)
    _, hook = accelerate.cpu_offload_with_hook(vae, torch.device("cpu"))
    for _ in range(2):
        assert error(decoded(vae, z), wanted) <= 1e-5
        hook.offload()
        assert not held_by(vae).lent._made
    assert not caplog.messages


def test_weights_that_are_offloaded_by_layers_are_brought_back():
    accelerate = pytest.importorskip("accelerate")
    vae = vae_of()
    z = latents(vae)
    wanted = decoded(vae, z)
    before = {name: value.stride() for name, value in vae.state_dict().items()}
    pipe = pipe_with(vae)
    frameloom.accelerate(pipe)
    decoded(vae, z)
    accelerate.cpu_offload(vae, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in vae.parameters())
    frameloom.restore(pipe)
    accelerate.hooks.remove_hook_from_submodules(vae)
    assert {name: value.stride() for name, value in vae.state_dict().items()} == before
    assert torch.equal(decoded(vae, z), wanted)
