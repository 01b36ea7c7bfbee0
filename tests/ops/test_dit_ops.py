"""The denoiser's operations: references and providers against formulas in float64, and which provider is chosen."""

import inspect
import logging
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.errors import RequestError
from frameloom.ops import dit_ops, mlp, modulate, native_dit, patch, rope, triton_modulate, triton_rope
from frameloom.ops.dit_ops import Checked, Compiler, Ops, ops_for
from frameloom.ops.dit_rewrites import ADD_NORM_TRITON, NORM_ROTATE_TRITON, OPERATIONS
from frameloom.ops.native import native
from frameloom.ops.norm import at_least_fp32, layer_norm, rms_norm
from frameloom.ops.registry import Policy, Sizes, make_policy, relative_error
from frameloom.ops.triton_rows import refuses_rows

CPU = torch.device("cpu")
EPS = 1e-6
B, F, N, D = 2, 3, 4, 24
L = F * N
SHAPES = {"sample": (B, 1, D), "frame": (B, F, 1, D), "token": (B, L, D), "one for all": (1, 1, D)}
TRITON = {
    modulate.mul_add: triton_modulate.mul_add_triton,
    modulate.add_gated: triton_modulate.add_gated_triton,
    modulate.norm_scale_shift: triton_modulate.norm_scale_shift_triton,
    modulate.add_norm: triton_modulate.add_norm_triton,
    modulate.norm_tanh_mul_add: triton_modulate.norm_tanh_mul_add_triton,
    rope.norm_rotate: triton_rope.norm_rotate_triton,
}
OTHERS = {patch.patch_conv: patch.patch_embed, mlp.mlp: mlp.mlp_rows}
both_ways = pytest.mark.parametrize("way", ["reference", "triton"])
each_kind = pytest.mark.parametrize("kind", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def provider(reference, way):
    return reference if way == "reference" else TRITON[reference]


def stream(dtype=torch.float32, width=D):
    return torch.randn(B, L, width).to(dtype)


def per_token(m):
    """The same values, written out for every token, in float64."""
    m = m.double()
    if m.ndim == 4:
        return m.repeat_interleave(N, dim=2).flatten(1, 2)
    return m.expand(B, L, m.shape[-1])


def normed(x, kind="layer", weight=None, bias=None):
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    x = x if weight is None else x * weight.double()
    return x if bias is None else x + bias.double()


def assert_rounded(result, exact, dtype):
    """Within float32's error, or as near as bfloat16 gets: rounded once, a rare number to the other side."""
    assert result.dtype == dtype
    assert result.shape == exact.shape
    if dtype == torch.float32:
        assert relative_error(result, exact) < 1e-6
    else:
        assert relative_error(result, exact) <= 1.1 * relative_error(exact.to(dtype), exact)


@both_ways
@each_kind
@each_dtype
def test_mul_add_is_its_formula(way, kind, dtype):
    a, b, c = stream(dtype), torch.randn(SHAPES[kind]), torch.randn(SHAPES["frame"])
    exact = a.double() * (1.5 + per_token(b))
    run = provider(modulate.mul_add, way)
    assert_rounded(run(a, 1.5, b, c), exact + per_token(c), dtype)
    assert_rounded(run(a, 1.5, b, 0.25), exact + 0.25, dtype)


@both_ways
@each_kind
@each_dtype
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_scale_shift_is_its_formula(way, kind, dtype, norm):
    x, scale, shift = stream(dtype), *torch.randn(2, *SHAPES[kind])
    weight, bias = torch.randn(2, D)
    run = provider(modulate.norm_scale_shift, way)
    exact = normed(x, norm) * (1 + per_token(scale)) + per_token(shift)
    assert_rounded(run(x, EPS, scale=scale, shift=shift, kind=norm), exact, dtype)
    exact = normed(x, norm, weight, bias) * (1 + per_token(scale)) + per_token(shift)
    assert_rounded(run(x, EPS, scale=scale, shift=shift, kind=norm, weight=weight, bias=bias), exact, dtype)


@both_ways
@each_kind
def test_add_norm_gives_the_sum_and_its_norm(way, kind):
    x, branch, gate, scale = stream(), stream(), *torch.randn(2, *SHAPES[kind])
    weight, bias = torch.randn(2, D)
    run = provider(modulate.add_norm, way)
    summed, result = run(x, branch, EPS, gate=gate, weight=weight, bias=bias, scale=scale)
    exact = x.double() + branch.double() * per_token(gate)
    assert_rounded(summed, exact, torch.float32)
    assert_rounded(result, normed(exact, "layer", weight, bias) * (1 + per_token(scale)), torch.float32)
    summed, result = run(x, branch, EPS, kind="rms")
    assert_rounded(summed, x.double() + branch.double(), torch.float32)
    assert_rounded(result, normed(x.double() + branch.double(), "rms"), torch.float32)


@both_ways
@each_kind
@each_dtype
def test_a_branch_may_be_normed_and_gated_by_a_tanh(way, kind, dtype):
    x, branch, gate, weight = stream(dtype), stream(dtype), 4 * torch.randn(SHAPES[kind]), torch.randn(D)
    run = provider(modulate.norm_tanh_mul_add, way)
    exact = x.double() + per_token(gate).tanh() * normed(branch, "rms", weight)
    assert_rounded(run(x, branch, gate, EPS, weight=weight), exact, dtype)
    exact = x.double() + per_token(gate).tanh() * normed(branch, "layer")
    assert_rounded(run(x, branch, gate, EPS, kind="layer"), exact, dtype)
    assert run(x, branch, gate * 1e30, EPS).isfinite().all()


@each_dtype
def test_add_norm_has_the_bits_of_the_functions_it_is_made_of(dtype):
    x, branch, gate, scale, shift = stream(dtype), stream(dtype), *torch.randn(3, B, 1, D)
    weight, bias = torch.randn(2, D)
    summed, result = modulate.add_norm(x, branch, EPS, gate=gate, weight=weight, bias=bias)
    assert torch.equal(summed, (at_least_fp32(x) + branch * gate).type_as(x))
    assert torch.equal(result, layer_norm(summed, EPS, weight=weight, bias=bias).type_as(x))
    summed, result = modulate.add_norm(x, branch, EPS, scale=scale, shift=shift)
    assert torch.equal(summed, x + branch)
    assert torch.equal(result, modulate.norm_scale_shift(x + branch, EPS, scale=scale, shift=shift))


@both_ways
@settings(max_examples=15, deadline=None, derandomize=True)
@given(frames=st.integers(1, 5), tokens=st.integers(1, 4), batch=st.integers(1, 3), width=st.integers(1, 40))
def test_a_modulation_per_frame_is_one_per_token_with_repeated_values(way, frames, tokens, batch, width):
    x, branch = torch.randn(2, batch, frames * tokens, width)
    m = torch.randn(batch, frames, 1, width)
    repeated = m.repeat_interleave(tokens, dim=2).flatten(1, 2)
    for run in (
        lambda m: provider(modulate.mul_add, way)(x, 1.0, m, m),
        lambda m: provider(modulate.add_gated, way)(x, branch, gate=m),
        lambda m: provider(modulate.norm_scale_shift, way)(x, EPS, scale=m, shift=m),
        lambda m: torch.stack(provider(modulate.add_norm, way)(x, branch, EPS, gate=m, shift=m)),
        lambda m: provider(modulate.norm_tanh_mul_add, way)(x, branch, m, EPS),
    ):
        assert torch.equal(run(m), run(repeated))


@both_ways
def test_operands_are_read_where_they_lie(way):
    wide = torch.randn(B, L, 3 * D)
    x, branch, _ = wide.chunk(3, dim=-1)
    gate, scale = torch.randn(B, 1, 6, D).unbind(2)[:2]
    given = provider(modulate.add_norm, way)(x, branch, EPS, gate=gate, scale=scale)
    packed = provider(modulate.add_norm, way)(x.clone(), branch.clone(), EPS, gate=gate.clone(), scale=scale.clone())
    assert all(torch.equal(a, b) for a, b in zip(given, packed, strict=True))


@both_ways
@pytest.mark.parametrize("shape", [(B, D), (B, 5, D), (B, 5, 1, D), (B, F, 2, D), (3, 1, D), (B, 1, D + 1)])
def test_a_modulation_that_fits_nothing_is_refused(way, shape):
    m, x = torch.randn(shape), stream()
    with pytest.raises(RequestError, match=r"per sample, \(2, frames, 1, 24\) per frame"):
        provider(modulate.mul_add, way)(x, 1.0, m, 0.0)


@both_ways
def test_words_that_mean_nothing_are_refused(way):
    x, m = stream(), torch.randn(B, 1, D)
    table = rope.rotary_table((F, 2, 2), 8, device=CPU)
    with pytest.raises(RequestError, match="norm 'group' is unknown"):
        provider(modulate.norm_scale_shift, way)(x, EPS, scale=m, shift=m, kind="group")
    run = provider(rope.norm_rotate, way)
    for arguments, words in (
        ((table, 8, "pairs"), "layout 'pairs' is unknown"),
        ((table, 7, "halves"), "heads of 7 channels"),
        ((table, 16, "halves"), "heads of 16 channels do not divide a width of 24"),
        ((table, 12, "halves"), r"need \(12, 6\)"),
        ((of_heads(3, 3), 8, "halves"), r"shape \(3, 3, 12, 4\).* or \(2, 3, 12, 4\) where heads differ"),
        ((of_heads(B, 2), 8, "halves"), r"shape \(2, 2, 12, 4\)"),
        ((rope.RotaryTable(*(angles[None] for angles in table)), 8, "halves"), r"shape \(1, 12, 4\)"),
    ):
        with pytest.raises(RequestError, match=words):
            run(x, torch.ones(D), EPS, *arguments[:2], layout=arguments[2])


@each_dtype
def test_norm_rotate_has_the_bits_of_the_functions_it_is_made_of(dtype):
    x, weight, table = stream(dtype), torch.randn(D), rope.rotary_table((F, 2, 2), 8, device=CPU)
    separately = rope.rotate(rms_norm(x, weight, EPS).view(B, L, 3, 8), table)
    assert torch.equal(rope.norm_rotate(x, weight, EPS, table, 8), separately)


def turned(x, weight, table, pairs):
    """(B, L, H, K) float64: `pairs` are the first and second places of a head's pairs."""
    unit = normed(x, "rms", weight).unflatten(-1, (-1, 8))
    turn = torch.complex(table.cos_LP.double(), table.sin_LP.double())
    turn = turn[:, None] if turn.dim() == 2 else turn.transpose(1, 2)
    product = torch.complex(unit[..., pairs[0]], unit[..., pairs[1]]) * turn
    out = torch.empty_like(unit)
    out[..., pairs[0]], out[..., pairs[1]] = product.real, product.imag
    return out


def of_heads(batch, heads):
    """Angles of every sample and head, in the order of LTX-2's in memory: (B, H, L, P) of (B, L, H, P)."""
    angles = torch.randn(batch, L, heads, 4).swapaxes(1, 2)
    return rope.RotaryTable(angles.cos(), angles.sin())


PAIRS = {"interleaved": (slice(0, 8, 2), slice(1, 8, 2)), "halves": (slice(0, 4), slice(4, 8))}


@both_ways
@pytest.mark.parametrize("layout", PAIRS)
def test_queries_are_normed_over_all_heads_and_turned(way, layout):
    x, weight, table = stream(), torch.randn(D), rope.rotary_table((F, 2, 2), 8, device=CPU)
    run = provider(rope.norm_rotate, way)
    result, exact = run(x, weight, EPS, table, 8, layout=layout), turned(x, weight, table, PAIRS[layout])
    assert_rounded(result, exact, torch.float32)
    backwards = rope.RotaryTable(table.cos_LP, -table.sin_LP)
    assert relative_error(run(x, weight, EPS, backwards, 8, layout=layout), exact) > 0.1


@pytest.mark.parametrize("way", ["reference", "triton", "native"])
@pytest.mark.parametrize("shape", [(B, 3), (1, 3), (B, 1)])
@each_dtype
def test_heads_may_have_angles_of_their_own(way, shape, dtype):
    if way == "native" and native("dit").library is None:
        pytest.skip(native("dit").reason)
    x, weight, table = stream(dtype), torch.randn(D), of_heads(*shape)
    run = native_dit.norm_rotate_native if way == "native" else provider(rope.norm_rotate, way)
    result = run(x, weight, EPS, table, 8, layout="halves")
    exact = turned(x, weight.to(dtype), table, PAIRS["halves"])
    angles = tuple(part.expand(B, 3, L, 4) for part in table)
    diffusers = apply_split_rotary_emb(rms_norm(x, weight, EPS), angles).view(B, L, 3, 8)
    assert result.dtype == dtype
    assert relative_error(result, exact) <= max(1e-6, 1.1 * relative_error(diffusers, exact))


def test_rotation_by_halves_is_that_of_the_reference_implementation():
    x, table = torch.randn(B, L, 3, 8), rope.rotary_table((F, 2, 2), 8, device=CPU)
    cos, sin = (angles.expand(B, 3, L, 4) for angles in table)
    reference = apply_split_rotary_emb(x.transpose(1, 2), (cos, sin)).transpose(1, 2)
    torch.testing.assert_close(rope.rotate_halves(x, table), reference, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    patch_size=st.one_of(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)),
    size=st.tuples(st.integers(3, 6), st.integers(3, 7), st.integers(3, 8)),
    bias=st.booleans(),
)
def test_patches_are_embedded_as_the_convolution_does(patch_size, size, bias):
    patch_grid = patch.full_patch_size(patch_size)
    x, weight = torch.randn(2, 3, *size).double(), torch.randn(5, 3, *patch_grid).double()
    offset = torch.randn(5).double() if bias else None
    expected = torch.nn.functional.conv3d(x, weight, offset, stride=patch_grid).flatten(2).transpose(1, 2)
    for embed in (patch.patch_conv, patch.patch_embed):
        torch.testing.assert_close(embed(x, weight, offset, patch_size), expected)


def test_whole_patches_are_a_matrix_product_and_others_a_convolution(monkeypatch):
    weight, called = torch.randn(5, 3, 1, 2, 2), []
    convolve = patch.F.conv3d
    monkeypatch.setattr(patch.F, "conv3d", lambda *a, **k: called.append(1) or convolve(*a, **k))
    patch.patch_embed(torch.randn(1, 3, 2, 4, 6), weight, None, (1, 2, 2))
    assert not called
    patch.patch_embed(torch.randn(1, 3, 2, 5, 6), weight, None, (1, 2, 2))
    assert called


@pytest.mark.parametrize(
    ("given", "meant"), [(2, (2, 2, 2)), ((2,), (2, 2, 2)), ((2, 3), (1, 2, 3)), ((1, 2, 3), (1, 2, 3))]
)
def test_a_patch_size_may_be_short(given, meant):
    assert patch.full_patch_size(given) == meant


@pytest.mark.parametrize("wrong", [0, (1, 2, 2, 2), (), (1, -2, 2), (1.5, 2)])
def test_a_patch_size_that_is_none_is_refused(wrong):
    with pytest.raises(RequestError, match="is impossible; give one, two"):
        patch.full_patch_size(wrong)


def test_a_patch_that_does_not_fit_is_refused():
    weight = torch.randn(5, 3, 1, 2, 2)
    with pytest.raises(RequestError, match=r"use \(1, 2, 2\)"):
        patch.patch_embed(torch.randn(1, 3, 2, 4, 6), weight, None, 2)
    with pytest.raises(RequestError, match="holds no patch"):
        patch.patch_embed(torch.randn(1, 3, 2, 1, 6), weight, None, (1, 2, 2))


def mlp_inputs(dtype=torch.float64):
    shapes = ((2, 7, 6), (20, 6), (20,), (5, 20), (5,))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def test_the_feed_forward_is_its_formula():
    x, w1, b1, w2, b2 = mlp_inputs()
    hidden = x @ w1.T + b1
    gelu = 0.5 * hidden * (1 + ((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)).tanh())
    torch.testing.assert_close(mlp.mlp(x, w1, b1, w2, b2), gelu @ w2.T + b2)


@pytest.mark.parametrize("rows", [1, 3, 7, 13, 14])
def test_the_feed_forward_in_pieces_is_the_whole(rows):
    inputs = mlp_inputs()
    torch.testing.assert_close(mlp.mlp_in_pieces(*inputs, rows=rows), mlp.mlp(*inputs))


def test_pieces_of_the_feed_forward_bound_its_memory(monkeypatch):
    widest, linear = [], mlp.F.linear
    monkeypatch.setattr(mlp.F, "linear", lambda *a: widest.append(linear(*a)) or widest[-1])
    weights = [torch.empty(shape, device="meta") for shape in ((8960, 4), (8960,), (4, 8960), (4,))]
    out = mlp.mlp_rows(torch.empty(1, 32760, 4, device="meta"), *weights)
    assert out.shape == (1, 32760, 4)
    assert max(tensor.numel() * 4 for tensor in widest) <= 128 << 20


@pytest.mark.parametrize(("reference", "fast"), [*TRITON.items(), *OTHERS.items()], ids=lambda f: f.__name__)
def test_a_provider_is_called_as_its_reference_is(reference, fast):
    assert inspect.signature(fast) == inspect.signature(reference)


@pytest.mark.parametrize("rewrite", OPERATIONS, ids=lambda rewrite: rewrite.name)
def test_on_the_meta_device_a_provider_gives_shapes_alone(rewrite):
    # Nothing is computed where memory is being planned; there may be no GPU for it.
    def on_meta(value):
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return rope.RotaryTable(*map(on_meta, value)) if isinstance(value, rope.RotaryTable) else value

    inputs = [on_meta(value) for value in rewrite.example(Sizes(), torch.bfloat16, CPU)]
    fast, reference = rewrite.fast(*inputs), rewrite.reference(*inputs)
    assert fast.is_meta
    assert (fast.shape, fast.dtype) == (reference.shape, reference.dtype)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([torch.zeros(1, 2, 8193)], "longer than 8192"),
        ([torch.zeros(1, 2, 8), torch.zeros(1, 2, 8).double()], "float64"),
        ([torch.zeros(1, 2, 8), torch.zeros(1, 8, 2).mT], "side by side"),
        ([torch.zeros(1, 2, 8), torch.zeros(1, 1, 8, device="meta")], "on cpu and meta"),
    ],
)
def test_inputs_that_a_kernel_cannot_take_are_refused_with_a_reason(inputs, reason):
    assert reason in refuses_rows(*inputs)
    assert refuses_rows(torch.zeros(1, 2, 8), torch.zeros(1, 1, 8)) is None


def test_a_kernel_without_gradients_does_not_drop_them():
    with torch.inference_mode(False):
        x, branch, gate = (torch.ones(1, 2, 8, requires_grad=True) for _ in range(3))
        ops, _ = with_triton()
        ops.add_gated(x, branch, gate=gate).sum().backward()
        assert gate.grad is not None


def with_triton(**options):
    return ops_for("cuda", **options)


def test_where_a_kernel_cannot_take_an_input_the_reference_does_and_says_so(caplog):
    x, gate = torch.randn(1, 2, 8).double(), torch.randn(1, 1, 8).double()
    checked = Checked(name="dit.some", fast=triton_modulate.add_gated_triton, reference=modulate.add_gated)
    with caplog.at_level(logging.WARNING, "frameloom"):
        results = [checked(x, x, gate=gate) for _ in range(3)]
    assert all(torch.equal(result, modulate.add_gated(x, x, gate=gate)) for result in results)
    assert len([line for line in caplog.messages if "dit.some is not used" in line]) == 1
    with pytest.raises(RequestError, match=r"dit\.some=on is not possible here: it computes in float32"):
        replace(checked, insisted=True)(x, x, gate=gate)


NAMES = [rewrite.name for rewrite in OPERATIONS]


@pytest.mark.parametrize(
    ("platform", "kernels"),
    [*((name, True) for name in ("cuda", "rocm")), *((n, False) for n in ("musa", "xpu", "mps", "npu", "cpu"))],
)
def test_triton_is_for_the_platforms_it_is_for(platform, kernels):
    ops, told = ops_for(platform)
    on = {decision.name for decision in told if decision.used}
    assert {decision.name for decision in told} == set(NAMES) - {"dit.linear_packed", "dit.mlp_packed"}
    assert ("dit.add_norm_triton" in on) is kernels
    compiled = platform == "cpu" and native("dit").library is not None
    assert ("dit.add_norm_native" in on) is compiled
    assert isinstance(ops.add_norm, Checked) is (kernels or compiled)
    assert {"dit.patch_linear", "dit.mlp_rows"} <= on
    assert all(decision.reason for decision in told)


def test_bitwise_means_the_references():
    ops, told = ops_for("cuda", policy=Policy(exactness="bitwise"))
    assert ops == Ops()
    assert not any(decision.used for decision in told)


@pytest.mark.parametrize(("name", "words"), [("add_norm", "for cuda and rocm"), ("norm_tanh_mul_add", "no network")])
def test_a_kernel_that_is_insisted_on_where_it_cannot_be_is_an_error(name, words):
    with pytest.raises(RequestError, match=words):
        ops_for("cpu", policy=make_policy("rounding", [f"dit.{name}_triton=on"], NAMES))


def fake_compiler():
    """Marks what it is given: the chains become those of other names."""
    rewrite = replace(ADD_NORM_TRITON, name="dit.elementwise_compiled")
    refuses = {"mps": "not here"}.get
    return Compiler(rewrite=rewrite, refuses=refuses, apply=lambda ops, insisted: replace(ops, add_gated=insisted))


@pytest.mark.parametrize(
    ("platform", "wishes", "compiled"),
    [
        ("musa", [], True),
        ("xpu", [], True),
        ("cpu", [], False),
        ("cuda", [], False),
        ("mps", [], False),
        ("cpu", ["dit.elementwise_compiled=on"], True),
        ("cuda", ["dit.elementwise_compiled=on"], True),
        ("xpu", ["dit.elementwise_compiled=off"], False),
    ],
)
def test_chains_are_compiled_where_there_is_no_kernel_or_on_request(platform, wishes, compiled):
    compiler = fake_compiler()
    policy = make_policy("rounding", wishes, [*NAMES, compiler.rewrite.name])
    ops, told = ops_for(platform, policy=policy, compiler=compiler)
    decision = {d.name: d for d in told}[compiler.rewrite.name]
    assert decision.used is compiled
    assert isinstance(ops.add_gated, bool) is compiled
    with pytest.raises(RequestError, match="not here"):
        ops_for("mps", policy=replace(policy, forced={compiler.rewrite.name: True}), compiler=compiler)


def test_every_operation_has_its_reference_as_the_default():
    defaults = {field.name: getattr(Ops(), field.name) for field in fields(Ops)}
    assert all(function.__module__.startswith("frameloom.ops.") for function in defaults.values())
    assert not any(isinstance(function, Checked) for function in defaults.values())
    assert set(dit_ops._TRITON) | set(dit_ops._EVERYWHERE) == set(defaults)


def test_a_rotation_the_wrong_way_would_be_noticed():
    inputs = NORM_ROTATE_TRITON.example(Sizes(), torch.float32, CPU)
    table = inputs[2]
    wrong = NORM_ROTATE_TRITON.fast(*inputs[:2], rope.RotaryTable(table.cos_LP, -table.sin_LP), inputs[3])
    right = NORM_ROTATE_TRITON.reference(*inputs)
    assert relative_error(NORM_ROTATE_TRITON.fast(*inputs), right) <= NORM_ROTATE_TRITON.tolerance
    assert relative_error(wrong, right) > 0.1


def test_the_kernels_are_built_for_a_gpu_without_one(tmp_path):
    # The interpreter takes Python that Triton's compiler does not; and it has been switched on in this process.
    pytest.importorskip("triton")
    script = Path(__file__).parent / "build_kernels.py"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr[-2000:]
    kernels = ("_mul_add_kernel", "_add_norm_kernel", "_norm_tanh_kernel", "_norm_rotate_kernel")
    assert out.stdout.split() == [*(name for kernel in kernels for name in [kernel] * 2), "_kernel"]


def test_native_kernels_are_not_chosen_for_a_dtype_that_they_cannot_compute() -> None:
    _, told = ops_for("cpu", dtype=torch.float16)
    native = {decision.name: decision for decision in told if decision.name.endswith("_native")}
    assert len(native) == 4
    assert not any(decision.used for decision in native.values())
    with pytest.raises(RequestError, match=r"is not possible here: it is for float32 and bfloat16, not torch.float16"):
        ops_for("cpu", dtype=torch.float16, policy=make_policy("rounding", ["dit.add_norm_native=on"], NAMES))
