"""Networks filled from quantized files: held as stored or expanded, the same bits; what does not fit, and memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from quantized_files import Stored, cast, in_blocks, plain, scaled, write
from safetensors.torch import load_file, save_file

import frameloom
from frameloom.errors import CheckpointError, RequestError
from frameloom.models.dit_fast import choose, install
from frameloom.models.dit_rewrites import NETWORK, QKV_FUSED
from frameloom.models.encoders import TIED
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.umt5 import Umt5Encoder, Umt5Spec
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.dit_rewrites import LINEAR_PACKED, MLP_PACKED, MLP_ROWS
from frameloom.ops.quantized import Linear, is_quantized
from frameloom.ops.registry import Policy, relative_error
from frameloom.platform.device import choose_dtype
from frameloom.platform.tuning import Tuner
from frameloom.weights import tensors as reading
from frameloom.weights.files import read_file
from frameloom.weights.keymap import DIT_ORIGINAL
from frameloom.weights.load import load_module
from frameloom.weights.tensors import read_tensor

SPEC = TransformerSpec(
    num_attention_heads=2, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=512,
    num_layers=2,
)  # fmt: skip
TEXT_SPEC = Umt5Spec(vocab_size=40, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4)
KINDS = ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F8_E4M3", "I8", "float8"]
_MIXED = ("Q4_K", "Q6_K", "F8_E4M3", "Q8_0", "float8", "I8")


def stored_as(kind, weight, *, seed=0):
    if kind == "mixed":
        kind = _MIXED[seed % len(_MIXED)]
    if kind == "float8":
        return cast(weight, "F8_E4M3")
    return (
        scaled(weight, kind, by_row=kind == "I8") if kind in ("F8_E4M3", "I8") else in_blocks(weight, kind, seed=seed)
    )


def write_network(path, network, kind):
    """Matrices of the blocks and the table quantized, the rest in float32, as the files that people have."""
    tensors = {}
    for seed, (name, value) in enumerate(network.state_dict().items()):
        matrix = value.dim() == 2 and "block" in name and "relative" not in name
        quantized = matrix or name == "shared.weight"
        if name not in TIED:
            tensors[name] = stored_as(kind, value * 0.5, seed=seed) if quantized else plain(value)
    return write(path, tensors)


@pytest.fixture(scope="module")
def dits():
    torch.manual_seed(0)
    return WanDiT(SPEC).eval()


def load_dit(component, quantized, dtype=torch.float32):
    with on_meta():
        dit = WanDiT(SPEC).eval()
    load_module(dit, component, dtype=dtype, keep=WanDiT.keep_in_fp32, quantized=quantized)
    return dit


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 3, 8, 6, generator=generator), torch.randn(1, 20, 32, generator=generator)
    return x, torch.tensor([500.0]), text


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@torch.inference_mode()
def test_a_transformer_held_as_stored_has_the_bits_of_the_expanded_one(tmp_path, dits, latents, kind):
    component = write_network(tmp_path / "x", dits, kind)
    for dtype in (torch.float32, torch.bfloat16):
        held, expanded = load_dit(component, "keep", dtype), load_dit(component, "expand", dtype)
        assert is_quantized(held)
        assert not is_quantized(expanded)
        wanted = expanded(*latents)
        assert wanted.isfinite().all()
        assert wanted.float().std() > 1e-3
        assert torch.equal(held(*latents), wanted)
        assert all(module.stored is not None for module in held.blocks.modules() if isinstance(module, Linear))


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@torch.inference_mode()
def test_a_text_encoder_held_as_stored_has_the_bits_of_the_expanded_one(tmp_path, kind):
    torch.manual_seed(0)
    component = write_network(tmp_path / "x", Umt5Encoder(TEXT_SPEC), kind)
    ids, mask = torch.arange(12).view(2, 6) * 3, torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    results = []
    for quantized in ("keep", "expand"):
        with on_meta():
            encoder = Umt5Encoder(TEXT_SPEC).eval()
        load_module(encoder, component, dtype=torch.bfloat16, tied=TIED, quantized=quantized)
        assert (encoder.shared.weight is None) == (quantized == "keep")
        assert (encoder.dtype, encoder.device.type) == (torch.bfloat16, "cpu")
        results.append(encoder(ids, mask))
    assert results[0].float().std() > 1e-3
    assert torch.equal(*results)


def test_pieces_of_any_length_make_the_same_weights(tmp_path, monkeypatch, dits):
    component = write_network(tmp_path / "x", dits, "mixed")
    wanted = load_dit(component, "expand").state_dict()
    monkeypatch.setattr(reading, "STAGING_BYTES", 4096)
    found = load_dit(component, "expand").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_no_layer_can_hold_is_expanded(tmp_path, dits):
    tensors = {name: plain(value) for name, value in dits.state_dict().items()}
    for name in ("proj_out.weight", "blocks.0.norm2.bias", "patch_embedding.weight"):
        tensors[name] = cast(dits.state_dict()[name], "F8_E5M2")
    dit = load_dit(write(tmp_path / "x", tensors), "keep")
    assert not is_quantized(dit)
    for name in ("proj_out.weight", "blocks.0.norm2.bias", "patch_embedding.weight"):
        assert torch.equal(dit.get_parameter(name), dits.state_dict()[name].to(torch.float8_e5m2).float())


def test_rows_that_are_no_whole_blocks_are_expanded(tmp_path):
    torch.manual_seed(0)
    spec = Umt5Spec(vocab_size=64, d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    encoder = Umt5Encoder(spec)
    tensors = {name: plain(value) for name, value in encoder.state_dict().items() if name not in TIED}
    table = in_blocks(encoder.shared.weight.detach().view(-1, 256), "Q4_K")
    tensors["shared.weight"] = Stored(dtype="Q4_K", shape=(64, 48), data=table.data)
    load_module(encoder, write(tmp_path / "x", tensors), dtype=torch.float32, tied=TIED, quantized="keep")
    assert encoder.shared.weight.shape == (64, 48)


def add_blocks(writer, name, stored):
    rows = np.frombuffer(stored.data, dtype=np.uint8).reshape(stored.shape[0], -1)
    writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[stored.dtype])


def add_plain(writer, name, value):
    """GGUF has four dimensions at most."""
    if value.dim() > 4:
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
        value = value.flatten(0, 1)
    writer.add_tensor(name, value.numpy())


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_fills_a_transformer(tmp_path, dits):
    kinds = ("Q4_K", "Q6_K", "Q8_0", "Q5_1", "IQ4_XS")
    writer, state = gguf.GGUFWriter(tmp_path / "x.gguf", "wan"), {}
    for seed, (name, value) in enumerate(dits.state_dict().items()):
        if value.dim() == 2 and name.startswith("blocks"):
            state[name] = in_blocks(value, kinds[seed % len(kinds)], seed=seed)
            add_blocks(writer, name, state[name])
        else:
            state[name] = plain(value)
            add_plain(writer, name, value)
    finish(writer)
    entries = read_file(tmp_path / "x.gguf").entries
    found = load_dit(replace(write(tmp_path / "y", state), tensors=entries), "expand").state_dict()
    wanted = load_dit(write(tmp_path / "y", state), "expand").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert is_quantized(load_dit(replace(write(tmp_path / "y", state), tensors=entries), "keep"))


# --- the engine ---


def test_an_engine_makes_the_same_video_of_weights_held_as_stored(float8_checkpoint):
    frames = []
    for quantized in ("keep", "expand"):
        options = {"exactness": "bitwise", "dtype": "float32", "quantized": quantized}
        with frameloom.load(float8_checkpoint, **options) as engine:
            assert is_quantized(engine._open.experts[0]) == (quantized == "keep")
            frames.append(engine.generate("a cat", width=64, height=32, num_frames=5, steps=2).frames)
    assert frames[0].std() > 0
    assert np.array_equal(*frames)


def test_quantized_checkpoints_compute_in_bfloat16_where_the_device_does(float8_checkpoint):
    with frameloom.load(float8_checkpoint, compilation="off", exactness="bitwise") as engine:
        expected, _ = choose_dtype("auto", torch.device("cpu"), preferred=torch.bfloat16)
        assert engine._open.experts[0].dtype == expected


def write_gguf(path, folder):
    """The transformer of a checkpoint as GGUF files are: original names, what is no matrix of a block left plain."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_string("frameloom", json.dumps({"kind": "transformer", "config": config}))
    (weights,) = folder.glob("*.safetensors")
    for native, value in load_file(weights).items():
        name, whole_blocks = DIT_ORIGINAL.from_native(native), value.shape[-1] % 32 == 0
        if value.dim() == 2 and native.startswith("blocks.") and whole_blocks:
            add_blocks(writer, name, in_blocks(value, "Q8_0" if "attn1" in native else "Q4_0"))
        else:
            add_plain(writer, name, value)
    finish(writer)
    return path


def write_scaled_text_encoder(path, folder):
    """The text encoder of a checkpoint as one file for ComfyUI, in scaled float8."""
    config = json.loads((folder / "config.json").read_text())
    (weights,) = folder.glob("*.safetensors")
    state = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, value in load_file(weights).items():
        if value.dim() == 2 and "block" in name and "relative" not in name:
            scale = value.abs().max() / 448
            state[name.replace(".weight", ".scale_weight")] = scale
            state[name] = (value / scale).to(torch.float8_e4m3fn)
        else:
            state[name] = value
    save_file(state, path, metadata={"frameloom": json.dumps({"kind": "text_encoder", "config": config})})
    return path


def test_quantized_parts_of_all_kinds_make_the_same_video_held_as_stored(checkpoint_of, tmp_path):
    folder = checkpoint_of()
    parts = {
        "transformer": write_gguf(tmp_path / "a.gguf", folder / "transformer"),
        "text_encoder": write_scaled_text_encoder(tmp_path / "b.safetensors", folder / "text_encoder"),
    }
    frames = []
    for quantized in ("keep", "expand"):
        options = {"exactness": "bitwise", "dtype": "float32", "quantized": quantized}
        with frameloom.load(folder, parts=parts, **options) as engine:
            pipeline = engine._open
            held = [is_quantized(network) for network in (pipeline.experts[0], pipeline.text_encoder.model)]
            assert held == [quantized == "keep"] * 2
            frames.append(engine.generate("a cat", width=64, height=32, num_frames=5, steps=2).frames)
    assert frames[0].std() > 0
    assert np.array_equal(*frames)


def test_an_unknown_word_for_quantized_weights_is_told_the_known_ones():
    with pytest.raises(RequestError, match=r"quantized 'kepe' is unknown; use keep .* or expand"):
        frameloom.load(quantized="kepe")


# --- rewrites ---


def example(latents):
    x, time, text = latents
    return x, torch.cat((time, time / 2)), torch.stack((text, torch.zeros_like(text)))


@pytest.mark.parametrize("rewrite", [rewrite for rewrite in NETWORK if rewrite is not QKV_FUSED], ids=lambda r: r.name)
def test_every_rewrite_of_the_network_keeps_its_promise(tmp_path, dits, latents, rewrite):
    dit = load_dit(write_network(tmp_path / "x", dits, "Q4_K"), "keep")
    inputs = dit, *example(latents)
    error = relative_error(rewrite.fast(*inputs), rewrite.reference(*inputs))
    assert error <= rewrite.tolerance


def choose_for(dit, **wishes):
    """As on a platform that has no kernels of ours, and where joined projections would be taken."""
    return choose(dit, Policy(forced=wishes), Tuner(torch.device("cpu")), platform_name="npu")


@torch.inference_mode()
def test_rewrites_that_need_plain_weights_are_refused_with_the_reason(tmp_path, dits, latents):
    dit = load_dit(write_network(tmp_path / "x", dits, "mixed"), "keep")
    wanted = dit(*latents)
    choices = choose_for(dit)
    told = {decision.name: decision for decision in choices.decisions}
    for rewrite in (QKV_FUSED, LINEAR_PACKED, MLP_PACKED):
        assert (told[rewrite.name].used, told[rewrite.name].reason) == (False, "the weights are quantized")
        with pytest.raises(RequestError, match=f"{rewrite.name}=on is not possible here: the weights are quantized"):
            choose_for(dit, **{rewrite.name: True})
    assert told[MLP_ROWS.name].used
    install(dit, choices)
    assert relative_error(dit(*latents), wanted) < 1e-5


@torch.inference_mode()
def test_the_feed_forward_may_be_computed_some_tokens_at_a_time(tmp_path, dits, latents):
    component = write_network(tmp_path / "x", dits, "Q8_0")
    dit, wanted = load_dit(component, "keep"), load_dit(component, "expand")(*latents)
    install(dit, choose_for(dit, **{MLP_ROWS.name: True}))
    assert is_quantized(dit)
    assert relative_error(dit(*latents), wanted) < 1e-5


# --- what does not fit ---


def test_a_scale_of_another_shape_is_named(tmp_path, dits):
    name = "blocks.0.attn1.to_q.weight"
    tensors = {key: plain(value) for key, value in dits.state_dict().items()}
    good = scaled(dits.state_dict()[name], "F8_E4M3")
    for scale, told in ((plain(torch.ones(3)), r"F32 \[3\]"), (in_blocks(torch.ones(1, 256), "Q8_0"), "Q8_0")):
        tensors[name] = replace(good, scale=scale)
        component = write(tmp_path / "x", tensors)
        for quantized in ("keep", "expand"):
            with pytest.raises(CheckpointError, match=rf"to_q.weight \(stored F8_E4M3 .* with a scale {told}"):
                load_dit(component, quantized)
        with pytest.raises(CheckpointError, match=f"a scale of another shape for '{name}'"):
            read_tensor(component.tensors[name])


def test_a_scale_of_what_has_none_is_refused(tmp_path, dits):
    tensors = {key: plain(value) for key, value in dits.state_dict().items()}
    tensors["proj_out.bias"] = Stored(dtype="I64", shape=(16,), data=bytes(128), scale=plain(torch.ones(1)))
    with pytest.raises(CheckpointError, match="stored as I64 cannot be read"):
        load_dit(write(tmp_path / "x", tensors), "expand")


def test_blocks_of_another_shape_are_named(tmp_path, dits):
    tensors = {key: plain(value) for key, value in dits.state_dict().items()}
    tensors["blocks.0.attn1.to_q.weight"] = in_blocks(torch.zeros(128, 256), "Q4_K")
    with pytest.raises(CheckpointError, match=r"to_q.weight \(stored Q4_K \[128, 256\], needed float32 \[256, 256\]\)"):
        load_dit(write(tmp_path / "x", tensors), "keep")


def test_a_type_of_activations_is_refused_by_name(tmp_path, dits):
    tensors = {key: plain(value) for key, value in dits.state_dict().items()}
    tensors["proj_out.weight"] = Stored(dtype="Q8_K", shape=(16, 256), data=bytes(16 * 292))
    with pytest.raises(CheckpointError, match="stored as Q8_K cannot be read"):
        load_dit(write(tmp_path / "x", tensors), "expand")


@pytest.mark.parametrize("kind", ["Q4_K", "F8_E4M3"])
@pytest.mark.parametrize("quantized", ["keep", "expand"])
def test_a_file_that_ends_too_early_is_named(tmp_path, dits, kind, quantized):
    component = write_network(tmp_path / "x", dits, kind)
    last = component.tensors["blocks.1.ffn.net.2.weight"]
    os.truncate(tmp_path / "x", last.offset + last.size_bytes - 1)
    with pytest.raises(CheckpointError, match=r"x ends inside 'blocks.1.ffn.net.2.weight'; download it again"):
        load_dit(component, quantized)


def test_weights_that_stay_as_stored_are_not_divided(tmp_path, dits):
    with on_meta():
        dit = WanDiT(SPEC)
    component = write_network(tmp_path / "x", dits, "Q4_K")
    with pytest.raises(RequestError, match=r"stay quantized and can neither be divided .* expand them"):
        load_module(dit, component, take=lambda name, whole: whole, quantized="keep")
    load_module(dit, component, take=lambda name, whole: whole, quantized="expand")


# --- memory ---

MEASURE = """
import os, sys, torch
from pathlib import Path
from frameloom.ops.quantized import Linear
from frameloom.weights.checkpoint import Component
from frameloom.weights.header import TensorEntry, stored_bytes
from frameloom.weights.load import load_module

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

def load(width, num_layers, kind, quantized):
    size = stored_bytes(kind, (width, width))
    with open(sys.argv[1], "wb") as file:
        file.truncate(num_layers * size)  # a file of zeros with holes
    path, entries = Path(sys.argv[1]), {}
    for i in range(num_layers):
        name = f"{i}.weight"
        entries[name] = TensorEntry(
            name=name, dtype=kind, shape=(width, width), file=path, offset=i * size, size_bytes=size)
    component = Component(name="x", folder=path.parent, described_by=path, class_name="", config={}, files=(path,),
        tensors=entries)
    with torch.device("meta"):
        module = torch.nn.Sequential(*(Linear(width, width, bias=False) for _ in range(num_layers)))
    report = load_module(module, component, dtype=torch.bfloat16, quantized=quantized)
    return module, report.size_bytes

width, num_layers = int(sys.argv[2]), int(sys.argv[3])
for case in sys.argv[4:]:
    if os.fork():  # each in a process of its own: what one has freed another would take
        os.wait()
        continue
    load(256, 1, *case.split())  # code pages and allocator arenas are no weights: have them first
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    module, size = load(width, num_layers, *case.split())
    print(case, status("VmHWM") - before, size, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of memory")
def test_peak_memory_is_the_weights_and_buffers(tmp_path):
    width, num_layers = 4096, 4
    cases = [f"{kind} {quantized}" for kind in ("Q4_K", "F8_E4M3") for quantized in ("keep", "expand")]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "x", str(width), str(num_layers), *cases],
        env={"PYTHONPATH": str(Path(frameloom.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == len(cases)
    for line in run.stdout.splitlines():
        kind, quantized, growth, held = line.split()
        print(f"{kind} {quantized}: peak growth {int(growth) / 1e6:.1f} MB for {int(held) / 1e6:.1f} MB")  # noqa: T201
        assert int(growth) <= int(held) + 5 * reading.STAGING_BYTES
        assert quantized == "keep" or int(growth) >= int(held)  # what is kept lies in the mapped file until it is used
