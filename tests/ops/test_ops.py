import itertools

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from frameloom.ops.modulate import add_gated, norm_scale_shift
from frameloom.ops.norm import at_least_fp32, layer_norm, rms_norm
from frameloom.ops.patch import unpatchify
from frameloom.ops.rope import rotary_table, rotate, split_head_dim

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_rms_norm_follows_the_formula_over_the_whole_last_axis():
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-3).double(), exact, rtol=1e-5, atol=1e-6)


def test_rms_norm_keeps_the_dtype_of_its_input():
    assert rms_norm(torch.randn(2, 8).bfloat16(), torch.ones(8), 1e-6).dtype == torch.bfloat16


def test_layer_norm_equals_the_reference_before_its_rounding():
    reference = FP32LayerNorm(24, 1e-6)
    torch.nn.init.normal_(reference.weight)
    torch.nn.init.normal_(reference.bias)
    x = torch.randn(3, 5, 24).bfloat16() * 4 + 2
    ours = layer_norm(x, 1e-6, weight=reference.weight, bias=reference.bias)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, reference(x.float()))
    assert torch.equal(ours.bfloat16(), reference(x))


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_narrow_input_is_widened_and_wide_input_stays(given, computed):
    x = torch.randn(2, 8).to(given)
    assert at_least_fp32(x).dtype == computed
    assert layer_norm(x, 1e-6).dtype == computed


@pytest.mark.parametrize("tokens", [1, 5])
def test_modulation_rounds_once_at_the_end(tokens):
    x, branch = torch.randn(2, 3, 5, 24).bfloat16().unbind(0)
    scale, shift, gate = torch.randn(3, 3, tokens, 24).unbind(0)
    normed = torch.nn.functional.layer_norm(x.double(), (24,), eps=1e-6)
    scaled = norm_scale_shift(x, 1e-6, scale=scale, shift=shift)
    assert torch.equal(scaled, (normed * (1 + scale) + shift).bfloat16())
    assert torch.equal(add_gated(x, branch, gate=gate), (x.double() + branch.double() * gate).bfloat16())


@pytest.mark.parametrize(("head_dim", "split"), [(128, (44, 42, 42)), (32, (12, 10, 10)), (10, (6, 2, 2))])
def test_head_dim_is_split_as_in_the_reference(head_dim, split):
    reference = WanRotaryPosEmbed(head_dim, (1, 2, 2), 4)
    assert split_head_dim(head_dim) == split == (reference.t_dim, reference.h_dim, reference.w_dim)


@pytest.mark.parametrize("head_dim", [10, 16, 32, 128])
@pytest.mark.parametrize("grid", [(1, 3, 5), (4, 2, 7)])
def test_rotary_table_equals_the_reference_bit_for_bit(head_dim, grid):
    frames, rows, columns = grid
    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 4), 16)(torch.empty(1, 1, frames, 2 * rows, 4 * columns))
    table = rotary_table(grid, head_dim, device=CPU)
    assert table.cos_LP.dtype == torch.float32
    assert torch.equal(table.cos_LP, cos[0, :, 0, 0::2])
    assert torch.equal(table.sin_LP, sin[0, :, 0, 1::2])


def test_rotation_is_a_complex_product_of_interleaved_pairs():
    table = rotary_table((2, 3, 4), 16, device=CPU)
    x = torch.randn(3, 24, 2, 16)
    turn = torch.complex(table.cos_LP, table.sin_LP)[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x.view(3, 24, 2, 8, 2)) * turn).flatten(-2)
    torch.testing.assert_close(rotate(x, table), expected, rtol=1e-6, atol=1e-6)


def test_rotation_rounds_once_and_keeps_the_dtype():
    table = rotary_table((2, 3, 4), 16, device=CPU)
    x = torch.randn(1, 24, 2, 16).bfloat16()
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_unpatchify_puts_every_value_where_it_belongs():
    grid, patch, channels = (2, 3, 4), (2, 1, 3), 5
    tokens = torch.randn(2, 24, 30)
    latent = unpatchify(tokens, grid, patch_size=patch)
    assert latent.shape == (2, 5, 4, 3, 12)
    for t, h, w in itertools.product(*map(range, grid)):
        for dt, dh, dw in itertools.product(*map(range, patch)):
            first = ((dt * patch[1] + dh) * patch[2] + dw) * channels
            cell = latent[:, :, t * patch[0] + dt, h * patch[1] + dh, w * patch[2] + dw]
            assert torch.equal(cell, tokens[:, (t * 3 + h) * 4 + w, first : first + channels])
