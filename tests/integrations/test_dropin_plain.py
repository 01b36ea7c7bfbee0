"""Whose a method is: Diffusers' and torch's own are known, whatever was put in their place is not."""

import functools
import types

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.peft_utils import apply_lora_scale
from torch.autograd import forward_ad

from frameloom.integrations.diffusers.plain import is_diffusers_own, refuses_input, refuses_layer

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated")  # by torch, of itself
OWN = [
    *((kind, "forward") for kind in (WanTransformer3DModel, WanTransformerBlock, WanAttention, GELU, FP32LayerNorm)),
    *((kind, "forward") for kind in (torch.nn.Linear, torch.nn.RMSNorm, torch.nn.Conv3d, torch.nn.Dropout)),
    *((AutoencoderKLWan, name) for name in ("forward", "_encode", "_decode", "encode", "decode", "tiled_decode")),
    (WanAttnProcessor, "__call__"),
    (WanTransformer3DModel, "save_pretrained"),
    (WanTransformer3DModel, "__call__"),  # which is torch's
    (WanTransformer3DModel, "from_config"),
]


def wraps(method):
    """As scripts do it."""

    @functools.wraps(method)
    def patch(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return patch


PATCHES = {
    "a function": lambda method: lambda self, *args: 2 * method(self, *args),
    "what says it is the other": wraps,
    "without gradients": lambda method: torch.no_grad()(wraps(method)),
    "in a wrapper of Diffusers": lambda method: apply_lora_scale("attention_kwargs")(wraps(method)),
    "in another": lambda method: apply_forward_hook(wraps(method)),
    "no function": functools.partialmethod,
    "compiled": torch.compile,
}


@pytest.mark.parametrize(("kind", "name"), OWN)
def test_what_the_libraries_wrote_is_their_own(kind, name):
    assert is_diffusers_own(kind, name)
    assert is_diffusers_own(type("Named", (kind,), {}), name)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize(("kind", "name"), OWN[:1] + OWN[5:6] + OWN[9:10] + OWN[15:16])
def test_what_was_put_in_its_place_is_not(kind, name, patch, monkeypatch):
    assert is_diffusers_own(kind, name)
    monkeypatch.setattr(kind, name, PATCHES[patch](getattr(kind, name)))
    assert not is_diffusers_own(kind, name)
    assert not is_diffusers_own(type("Named", (kind,), {}), name)
    monkeypatch.undo()
    assert is_diffusers_own(kind, name)


def test_a_subclass_s_method_is_its_own():
    made = types.new_class("Own", (AutoencoderKLWan,), exec_body=lambda space: space.update(_decode=lambda self: 1))
    assert not is_diffusers_own(made, "_decode")
    assert is_diffusers_own(made, "_encode")
    assert not is_diffusers_own(made, "no_such_method")


def test_a_layer_of_a_patched_class_has_to_be_called(monkeypatch):
    layer = torch.nn.Linear(2, 2)
    assert refuses_layer(layer, torch.nn.Linear) is None
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x)
    assert refuses_layer(layer, torch.nn.Linear) == "Linear.forward is not as Diffusers has it"


def test_tangents_and_the_levels_of_torch_func_are_seen():
    layer, x = torch.nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2)
    seen = []

    def look(x):
        seen.append(refuses_input(layer, x))
        return layer(x).sum()

    look(x)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    look(x)
    reason = "a transform of torch.func, or forward-mode differentiation, is going on"
    assert seen == [None, *[reason] * 4, None]
