"""Filling modules from files: right numbers, one message for what does not fit, a bounded peak of memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import frameloom
from frameloom.errors import CheckpointError, InternalError
from frameloom.weights import tensors as reading
from frameloom.weights.checkpoint import Component
from frameloom.weights.header import read_tensors
from frameloom.weights.load import load_module


class Net(nn.Module):
    """Parameters, a persistent buffer, an integer buffer, a scalar, and a buffer no file holds."""

    def __init__(self, *, width=6):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3, bias=False))
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        with torch.device("cpu"):
            self.register_buffer("table", torch.arange(5), persistent=False)


class Shared(nn.Module):
    """Two names for one tensor, as in UMT5."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(7, 3)
        self.encoder = nn.Module()
        self.encoder.embed_tokens = nn.Embedding(7, 3)


TIED = {"encoder.embed_tokens.weight": "shared.weight"}


def on_meta(kind, **options):
    with torch.device("meta"):
        return kind(**options)


def random_state(module):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator).mul(10).to(value.dtype)
        for name, value in module.state_dict().items()
    }


@pytest.fixture
def state():
    return random_state(Net())


@pytest.fixture
def file(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def assert_same(module, state):
    found = module.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_fills_every_tensor_as_stored(file, state):
    module = on_meta(Net)
    report = load_module(module, [file])
    assert_same(module, state)
    assert (report.num_tensors, report.dropped) == (len(state), ())
    assert report.size_bytes == sum(value.nbytes for value in state.values())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert isinstance(module.scale, nn.Parameter)
    assert not isinstance(module.mean, nn.Parameter)
    assert torch.equal(module.table, torch.arange(5))


def test_takes_a_component_and_several_files(tmp_path, state):
    names = sorted(state)
    save_file({name: state[name] for name in names[::2]}, tmp_path / "a.safetensors")
    save_file({name: state[name] for name in names[1::2]}, tmp_path / "b.safetensors")
    files = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    component = Component(
        name="net",
        folder=tmp_path,
        described_by=tmp_path,
        class_name="Net",
        config={},
        files=files,
        tensors=read_tensors(files),
    )
    for source in (component, files, [str(file) for file in files]):
        module = on_meta(Net)
        load_module(module, source)
        assert_same(module, state)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("staging_bytes", [16, reading.STAGING_BYTES])
def test_converts_floats_and_leaves_integers(tmp_path, monkeypatch, state, stored, dtype, staging_bytes):
    monkeypatch.setattr(reading, "STAGING_BYTES", staging_bytes)  # 16 bytes: a tensor takes many pieces
    kept = {name: value.to(stored) if value.is_floating_point() else value for name, value in state.items()}
    save_file(kept, tmp_path / "x.safetensors")
    module = on_meta(Net)
    load_module(module, [tmp_path / "x.safetensors"], dtype=dtype, keep=lambda name: name.startswith("norm."))
    wanted = {}
    for name, value in kept.items():
        narrow = torch.float32 if name.startswith("norm.") else dtype or stored
        wanted[name] = value.to(narrow) if value.is_floating_point() else value
    assert_same(module, wanted)


def test_reads_float8(tmp_path):
    state = {"weight": torch.randn(3, 4).to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "x.safetensors")
    module = on_meta(nn.Linear, in_features=4, out_features=3, bias=False)
    load_module(module, [tmp_path / "x.safetensors"], dtype=torch.bfloat16)
    assert torch.equal(module.weight, state["weight"].to(torch.bfloat16))


def test_loads_an_empty_tensor(tmp_path):
    save_file({"weight": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    module = on_meta(nn.Embedding, num_embeddings=0, embedding_dim=4)
    load_module(module, [tmp_path / "x.safetensors"], dtype=torch.float16)
    assert (module.weight.shape, module.weight.dtype) == ((0, 4), torch.float16)


def test_renames_and_reports_what_it_dropped(tmp_path, state):
    save_file({f"model.{name}": value for name, value in state.items()} | {"extra": torch.ones(1)}, tmp_path / "x")
    module = on_meta(Net)
    report = load_module(
        module,
        [tmp_path / "x"],
        rename=lambda name: None if name == "extra" else name.removeprefix("model."),
        keep=lambda name: name == "norm.weight",
        dtype=torch.bfloat16,
    )
    assert report.dropped == ("extra",)
    assert torch.equal(module.norm.weight, state["norm.weight"])  # keep is asked for the module's name


def test_refuses_two_tensors_of_one_name(tmp_path):
    save_file({"weight": torch.ones(1, 1), "old.weight": torch.ones(1, 1)}, tmp_path / "x")
    module = on_meta(nn.Linear, in_features=1, out_features=1, bias=False)
    with pytest.raises(CheckpointError, match="stores 'weight' twice"):
        load_module(module, [tmp_path / "x"], rename=lambda name: name.removeprefix("old."))


# --- what does not fit ---


def test_lists_all_that_does_not_fit_in_one_error(tmp_path, state):
    del state["norm.weight"], state["inner.0.bias"]
    state |= {f"stray.{i:02}": torch.ones(1) for i in range(14)}
    state["scale"] = torch.ones(2)
    state["count"] = torch.ones(2)
    save_file(state, tmp_path / "x.safetensors")
    module = on_meta(Net)
    with pytest.raises(CheckpointError) as caught:
        load_module(module, [tmp_path / "x.safetensors"])
    text = str(caught.value)
    assert str(tmp_path / "x.safetensors") in text
    assert "2 missing: inner.0.bias, norm.weight" in text
    assert "14 unexpected: stray.00, " in text
    assert "stray.09 and 4 more" in text
    assert "stray.10" not in text
    assert "2 of another shape or kind: " in text
    assert "scale (stored F32 [2], needed float32 [])" in text
    assert "count (stored F32 [2], needed int64 [2])" in text
    assert all(value.is_meta for value in module.state_dict().values())  # nothing was loaded


def test_refuses_integers_for_a_floating_weight(tmp_path):
    save_file({"weight": torch.ones(3, 4, dtype=torch.int8)}, tmp_path / "x")
    module = on_meta(nn.Linear, in_features=4, out_features=3, bias=False)
    with pytest.raises(CheckpointError, match=r"weight \(stored I8 \[3, 4\], needed float32 \[3, 4\]\)"):
        load_module(module, [tmp_path / "x"], dtype=torch.bfloat16)


def test_a_buffer_that_no_file_can_fill_is_our_own_bug(file):
    module = on_meta(Net)
    module.register_buffer("lost", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(InternalError, match="left lost on the meta device"):
        load_module(module, [file])


def test_names_a_file_that_is_gone(tmp_path):
    with pytest.raises(CheckpointError, match=r"x.safetensors is missing"):
        load_module(on_meta(Net), [tmp_path / "x.safetensors"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_names_a_file_that_shrank_after_it_was_opened(file, dtype):
    tensors = read_tensors([file])
    component = Component(
        name="net", folder=file.parent, described_by=file, class_name="Net", config={}, files=(file,), tensors=tensors
    )
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model.safetensors ends inside '.*'; download it again"):
        load_module(on_meta(Net), component, dtype=dtype)


# --- tied weights ---


@pytest.mark.parametrize("stored", [["shared.weight"], ["encoder.embed_tokens.weight"], [*TIED, *TIED.values()]])
def test_ties_what_is_stored_under_either_name(tmp_path, stored):
    table = torch.randn(7, 3)
    save_file({name: table.clone() for name in stored}, tmp_path / "x")
    module = on_meta(Shared)
    report = load_module(module, [tmp_path / "x"], tied=TIED)
    assert report.num_tensors == 1
    assert torch.equal(module.shared.weight, table)
    assert module.encoder.embed_tokens.weight is module.shared.weight


@pytest.mark.parametrize("other", [torch.ones(7, 3), torch.zeros(7, 3, dtype=torch.float16), torch.zeros(3, 7)])
def test_refuses_tied_names_that_differ(tmp_path, other):
    save_file({"shared.weight": torch.zeros(7, 3), "encoder.embed_tokens.weight": other}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="different values; they must be equal"):
        load_module(on_meta(Shared), [tmp_path / "x"], tied=TIED)


def test_misses_both_tied_names(tmp_path):
    save_file({"other": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"1 missing: shared\.weight; 1 unexpected: other"):
        load_module(on_meta(Shared), [tmp_path / "x"], tied=TIED)


def test_two_names_without_a_tie_are_two_tensors(tmp_path):
    save_file({"shared.weight": torch.ones(7, 3)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.embed_tokens\.weight"):
        load_module(on_meta(Shared), [tmp_path / "x"])


# --- folders that Diffusers wrote ---


def test_fills_networks_that_diffusers_saved(tmp_path):
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    transformer = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32}
    transformer |= {"text_dim": 16, "freq_dim": 16}
    vae = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    for kind, config in ((WanTransformer3DModel, transformer), (AutoencoderKLWan, vae)):
        saved = kind(**config)
        folder = tmp_path / kind.__name__
        saved.save_pretrained(folder, max_shard_size="20KB")
        module = on_meta(kind, **config)
        for name, buffer in saved.named_buffers():  # rotary tables, which no file holds
            owner, _, attribute = name.rpartition(".")
            module.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)
        load_module(module, sorted(folder.glob("*.safetensors")))
        assert_same(module, saved.state_dict())


# --- memory ---

NUM_LAYERS, WIDTH = 12, 2896  # 12 x 33.5 MB in float32: 403 MB

MEASURE = """
import sys, torch
from torch import nn
from frameloom.weights.load import load_module

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

def load(path, width, num_layers, dtype):
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers)))
    load_module(module, [path], dtype=dtype)
    return module

width, num_layers, dtype = int(sys.argv[3]), int(sys.argv[4]), getattr(torch, sys.argv[5])
load(sys.argv[1], 8, 1, dtype)  # code pages and allocator arenas are no weights: have them first
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from here
before = status("VmRSS")
module = load(sys.argv[2], width, num_layers, dtype)
print(status("VmHWM") - before, sum(parameter.nbytes for parameter in module.parameters()))
"""


def write_zeros(path, width, num_layers):
    """A file of float32 zeros with holes: nothing is written, yet each page read is a page of memory."""
    size = 4 * width * width
    header = {
        f"{i}.weight": {"dtype": "F32", "shape": [width, width], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(num_layers)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + num_layers * size)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_weights_and_one_tensor(tmp_path, dtype):
    write_zeros(tmp_path / "small", 8, 1)
    write_zeros(tmp_path / "large", WIDTH, NUM_LAYERS)
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURE,
            tmp_path / "small",
            tmp_path / "large",
            str(WIDTH),
            str(NUM_LAYERS),
            dtype,
        ],
        env={"PYTHONPATH": str(Path(frameloom.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    growth, weights = map(int, run.stdout.split())
    assert weights == NUM_LAYERS * WIDTH * WIDTH * getattr(torch, dtype).itemsize
    print(f"{dtype}: peak growth {growth / 1e6:.1f} MB for {weights / 1e6:.1f} MB of weights")  # noqa: T201
    assert growth >= weights  # else it was not measured
    assert growth <= weights + 4 * WIDTH * WIDTH


# --- other devices ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("staging_bytes", [16, reading.STAGING_BYTES])
def test_fills_on_an_accelerator(file, monkeypatch, state, dtype, staging_bytes):
    monkeypatch.setattr(reading, "STAGING_BYTES", staging_bytes)
    module = on_meta(Net)
    load_module(module, [file], device="cuda", dtype=dtype)
    tensors = [*module.parameters(), *module.buffers()]
    assert all(tensor.device.type == "cuda" for tensor in tensors)
    wanted = {name: value.to(dtype) if value.is_floating_point() and dtype else value for name, value in state.items()}
    assert_same(module.cpu(), wanted)
