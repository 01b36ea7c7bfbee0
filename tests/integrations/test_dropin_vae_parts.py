"""What somebody changed of a part of a VAE, but for its weights, is computed as Diffusers computes it."""

import types

import pytest
import torch
from checkpoints import VAE_21, VAE_22
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

import frameloom

LATENTS = {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
WAN21, WAN22 = VAE_21 | LATENTS, VAE_22 | LATENTS
KINDS = {
    "2.1": lambda: AutoencoderKLWan(**WAN21),
    "2.2": lambda: AutoencoderKLWan(**WAN22),
    "Qwen-Image": lambda: AutoencoderKLQwenImage(**WAN21),
}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def vae_of(kind="2.1"):
    torch.manual_seed(0)
    return KINDS[kind]().eval()


def decoded(vae):
    z = torch.randn((1, 4, 2, 4, 5), generator=torch.Generator().manual_seed(3))
    return vae.decode(z).sample


def part_of(vae, name):
    return next(part for part in vae.decoder.modules() if type(part).__name__.endswith(name))


def circular(vae):
    for conv in vae.decoder.modules():
        if type(conv) is torch.nn.Conv2d and conv.kernel_size == (3, 3):
            conv.padding_mode = "circular"


def own_convolution(vae):
    def convolve(conv, x, weight, bias):
        return 0.1 * torch.nn.Conv3d._conv_forward(conv, x, weight, bias)

    conv = vae.decoder.conv_out
    conv._conv_forward = types.MethodType(convolve, conv)


def dilated(vae):
    conv = vae.decoder.conv_in
    conv.dilation, conv._padding = (1, 2, 2), (2, 2, 2, 2, 2, 0)


def padded(vae):
    vae.decoder.conv_in._padding = (0, 2, 1, 1, 2, 0)


def bilinear(vae):
    part_of(vae, "Upsample").mode = "bilinear"


def scaled_norm(vae):
    part_of(vae, "RMS_norm").scale *= 1.1


def shifted_norm(vae):
    part_of(vae, "RMS_norm").bias = torch.tensor(0.1)


def another_activation(vae):
    vae.decoder.nonlinearity = torch.nn.ReLU()


def without_bias(vae):
    vae.decoder.conv_out.bias = None


CHANGES = {
    circular: "padding_mode is not what its config makes of it",
    own_convolution: "decoder.conv_out has _conv_forward of its own",
    dilated: "decoder.conv_in.dilation",
    padded: "decoder.conv_in._padding",
    bilinear: ".mode is not",
    scaled_norm: ".scale is not",
    shifted_norm: ".bias is not",
    another_activation: "decoder.nonlinearity is ReLU, and its config asks for SiLU",
    without_bias: "decoder.conv_out.bias is nothing",
}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_as_their_config_makes_them_are_taken(kind, caplog):
    vae = vae_of(kind)
    plain = decoded(vae)
    assert frameloom.accelerate({"vae": vae})["vae"].taken
    assert torch.allclose(decoded(vae), plain, atol=1e-4)
    assert not caplog.messages


@pytest.mark.parametrize("kind", ["2.1", "2.2", "Qwen-Image"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_part_is_left_at_the_door(kind, change):
    vae = vae_of(kind)
    change(vae)
    plain = decoded(vae)
    entry = frameloom.accelerate({"vae": vae})["vae"]
    assert not entry.taken
    assert CHANGES[change] in entry.what
    assert torch.equal(decoded(vae), plain)


@pytest.mark.parametrize("kind", ["2.1", "Qwen-Image"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_is_changed_later_is_seen_at_the_next_call(kind, change, caplog):
    vae, plain = vae_of(kind), vae_of(kind)
    frameloom.accelerate({"vae": vae})
    before = decoded(vae)
    assert not caplog.messages
    change(vae), change(plain)
    changed = decoded(vae)
    assert torch.allclose(changed, decoded(plain), atol=1e-6), "their order in memory may be another"
    assert not torch.allclose(changed, before, atol=1e-4)
    assert CHANGES[change] in caplog.text


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_for_all_modules_is_called(register, caplog):
    vae = vae_of()
    frameloom.accelerate({"vae": vae})
    called = []
    handle = getattr(torch.nn.modules.module, register)(lambda part, *_: called.append(part))
    try:
        decoded(vae)
    finally:
        handle.remove()
    assert any(part is vae.decoder.conv_out for part in called)
    assert "have hooks" in caplog.text


def test_dropout_in_a_part_that_is_trained_is_drawn(caplog):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**WAN21, dropout=0.5).eval()
    frameloom.accelerate({"vae": vae})
    vae.decoder.train()
    assert not torch.equal(decoded(vae), decoded(vae))
    assert "with dropout" in caplog.text
