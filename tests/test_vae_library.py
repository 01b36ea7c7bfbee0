"""frameloom.vae for other programs: whatever holds the weights, the frames that Diffusers makes, and plain errors."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from safetensors.torch import save_file

import frameloom
from frameloom.errors import CheckpointError, RequestError
from frameloom.models.vae_fast import of_other_numbers
from frameloom.weights import keymap

WAN21 = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 2,
    "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 1.1, 1.2, 1.3],
}  # fmt: skip
WAN22 = {
    **WAN21, "decoder_base_dim": 16, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_spatial": 16,
}  # fmt: skip
CONFIGS = {"2.1": WAN21, "2.2": WAN22}
KIND = pytest.mark.parametrize("kind", CONFIGS)


def reference(kind="2.1"):
    torch.manual_seed(0)
    return AutoencoderKLWan(**CONFIGS[kind]).eval().requires_grad_(False)


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def latents(vae, frames=3):
    return torch.randn(1, vae.config.z_dim, frames, 6, 5, generator=torch.Generator().manual_seed(1))


def frames():
    return 2 * torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(2)) - 1


def original_names(vae, kind):
    table = keymap.vae_22(num_res_blocks=2) if kind == "2.2" else keymap.vae_21(num_res_blocks=2, num_stages=4)
    return {table.from_native(name): value for name, value in vae.state_dict().items()}


def same(opened, vae):
    z, x = latents(vae), frames()
    assert error(opened.decode(z), vae.decode(z).sample) <= 1e-5
    assert error(opened.moments(x), vae.encode(x).latent_dist.parameters) <= 1e-5
    assert torch.equal(opened.encode(x), opened.moments(x)[:, : opened.latent_channels])
    return True


@KIND
def test_from_a_folder_a_file_and_a_mapping(kind, tmp_path):
    vae, config = reference(kind), CONFIGS[kind]
    vae.save_pretrained(tmp_path / "vae")
    with frameloom.vae.open(tmp_path / "vae", device="cpu") as opened:
        assert same(opened, vae)
    save_file(original_names(vae, kind), tmp_path / "wan_vae.safetensors")
    with frameloom.vae.open(str(tmp_path / "wan_vae.safetensors"), config, device="cpu") as opened:
        assert same(opened, vae)
    torch.save(original_names(vae, kind), tmp_path / "wan_vae.pth")
    with frameloom.vae.open(tmp_path / "wan_vae.pth", config, device="cpu") as opened:
        assert same(opened, vae)
    for names in (vae.state_dict(), original_names(vae, kind), dict(vae.named_parameters())):
        with frameloom.vae.open(names, vae.config) as opened:
            assert same(opened, vae)


def test_parameters_are_shared_and_given_back():
    state = dict(reference().named_parameters())
    before = {name: (value.clone(), value.stride(), id(value)) for name, value in state.items()}
    opened = frameloom.vae.open(state, WAN21)
    z = torch.randn(1, 4, 2, 5, 4)
    shown = opened.decode(z)
    assert any(value.stride() != before[name][1] for name, value in state.items())
    theirs = {value.untyped_storage().data_ptr() for value in state.values()}
    with opened._network.bound() as network:
        computed = of_other_numbers(opened._planner.choices)  # those keep numbers of their own
        kernels = [getattr(module, "kernel", None) for name, module in network.named_modules() if name not in computed]
        used = [*network.parameters(), *(kernel.weight for kernel in kernels if kernel is not None)]
        assert len(used) > 100
        assert {x.untyped_storage().data_ptr() for x in used} <= theirs
    assert opened.dtype == torch.float32
    opened.close()
    opened.close()
    for name, value in state.items():
        assert torch.equal(value, before[name][0])
        assert (value.stride(), id(value)) == before[name][1:]
    with frameloom.vae.open(state, WAN21) as again:
        assert torch.equal(again.decode(z), shown)
    with pytest.raises(RequestError, match="closed"):
        opened.decode(z)


def test_tensors_of_a_state_dict_stay_views_of_the_parameters():
    vae = reference()
    state = vae.state_dict()
    lie = {name: (value.data_ptr(), value.stride()) for name, value in vae.named_parameters()}
    with frameloom.vae.open(state, WAN21) as opened:
        assert same(opened, vae)
        for each in (vae.state_dict(), state):
            assert {name: (value.data_ptr(), value.stride()) for name, value in each.items()} == lie


def scaled(p):
    with torch.no_grad():
        p.mul_(1.2)


def scaled_uncounted(p):
    p.data.mul_(1.2)


@KIND
@pytest.mark.parametrize("change", [scaled, scaled_uncounted])
@pytest.mark.parametrize("names", [lambda vae: vae.state_dict(), lambda vae: dict(vae.named_parameters())])
def test_the_owner_may_change_the_weights_between_two_calls(kind, change, names):
    vae = reference(kind)
    with frameloom.vae.open(names(vae), vae.config) as opened:
        before = opened.decode(latents(vae))
        for parameter in vae.parameters():
            change(parameter)
        assert same(opened, vae)
        assert error(opened.decode(latents(vae)), before) > 0.01


def test_weights_that_have_become_others_are_told():
    vae = reference()
    with frameloom.vae.open(dict(vae.named_parameters()), WAN21) as opened:
        vae.to(torch.bfloat16)
        with pytest.raises(RequestError, match="bfloat16 on cpu now"):
            opened.decode(latents(vae).float())


def test_streams_may_be_read_in_turns():
    vae = reference()
    z, other = latents(vae, 3), latents(vae, 4)[..., :4]
    with frameloom.vae.open(vae.state_dict(), WAN21) as opened:
        parts = list(zip(opened.stream(z, chunk=1), opened.stream(other, chunk=1), strict=False))
        assert error(torch.cat([part for part, _ in parts], dim=2), vae.decode(z).sample) <= 1e-5
        assert error(torch.cat([part for _, part in parts], dim=2), vae.decode(other[:, :, :3]).sample) <= 1e-5


@pytest.mark.parametrize("from_file", [False, True])
def test_a_stream_that_is_read_after_close_says_so(from_file, tmp_path):
    vae = reference()
    vae.save_pretrained(tmp_path)
    opened = frameloom.vae.open(tmp_path, device="cpu") if from_file else frameloom.vae.open(vae.state_dict(), WAN21)
    begun, fresh = opened.stream(latents(vae), chunk=1), opened.stream(latents(vae), chunk=1)
    next(begun)
    opened.close()
    for stream in (begun, fresh):
        with pytest.raises(RequestError, match="closed"):
            next(stream)


def test_torchs_own_devices_and_dtypes_and_integers_of_numpy():
    vae = reference()
    with frameloom.vae.open(vae.state_dict(), WAN21, device=torch.device("cpu"), dtype=torch.bfloat16) as opened:
        assert opened.dtype == torch.bfloat16
    with frameloom.vae.open(vae.state_dict(), WAN21) as opened:
        z = latents(vae)
        assert torch.equal(opened.decode(z, chunk=np.int64(1), band=np.int32(8)), opened.decode(z, chunk=1, band=8))


def test_a_mapping_in_another_dtype_is_not_touched():
    state = reference().state_dict()
    z = torch.randn(1, 4, 2, 5, 4)
    exact = reference().decode(z).sample
    with frameloom.vae.open(state, WAN21, dtype="bfloat16") as opened:
        assert opened.decode(z).dtype == torch.bfloat16
        assert error(opened.decode(z), exact) < 0.05
        assert all(value.is_contiguous() and value.dtype == torch.float32 for value in state.values())


def test_of_a_mapping_of_two_dtypes_one_has_to_be_named():
    state = {
        name: value.bfloat16() if name.startswith("enc") else value for name, value in reference().state_dict().items()
    }
    with pytest.raises(RequestError, match=r"of several dtypes, torch\.bfloat16 and torch\.float32; name the one"):
        frameloom.vae.open(state, WAN21)
    with frameloom.vae.open(state, WAN21, dtype="float32") as opened:
        assert opened.dtype == torch.float32


def test_weights_of_one_number_that_is_spread_over_all():
    vae = reference()
    state = vae.state_dict()
    name = "decoder.up_blocks.0.resnets.0.conv1.weight"
    vae.get_parameter(name).fill_(0.01)
    state[name] = torch.tensor(0.01).expand(state[name].shape)
    with frameloom.vae.open(state, WAN21) as opened:
        assert same(opened, vae)


def test_of_a_vae_of_qwen_image():
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(**WAN21).eval().requires_grad_(False)
    with frameloom.vae.open(vae.state_dict(), vae.config) as opened:
        assert same(opened, vae)


@KIND
def test_frames_stream_in_chunks_and_bands_of_any_size(kind):
    vae = reference(kind)
    z = latents(vae, 6)
    with frameloom.vae.open(vae.state_dict(), vae.config) as opened:
        whole = opened.decode(z)
        assert error(whole, vae.decode(z).sample) <= 1e-5
        for chunk, band in ((1, None), (4, None), (None, 8), (2, 3)):
            parts = list(opened.stream(z, chunk=chunk, band=band))
            assert error(torch.cat(parts, dim=2), whole) <= 1e-5
            assert error(opened.decode(z, chunk=chunk, band=band), whole) <= 1e-5
            if chunk is not None:
                assert [part.shape[2] for part in parts] == [1, *[4 * chunk] * (5 // chunk), *[4] * (5 % chunk)][
                    : len(parts)
                ]
        assert error(opened.encode(frames(), chunk=2, band=4), opened.encode(frames())) <= 1e-5


def test_a_stream_leaves_gradients_as_the_caller_has_them():
    vae = reference()
    with frameloom.vae.open(vae.state_dict(), WAN21) as opened:
        for part in opened.stream(latents(vae).requires_grad_()):
            assert torch.is_grad_enabled()
            assert not part.requires_grad


def test_normalised_latents_are_those_of_the_sampler():
    vae = reference()
    z = latents(vae)
    mean, std = (torch.tensor(WAN21[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with frameloom.vae.open(vae.state_dict(), WAN21) as opened:
        assert torch.allclose(opened.normalise(z), (z - mean) / std)
        assert torch.allclose(opened.denormalise(opened.normalise(z)), z, atol=1e-6)


def test_bitwise_has_the_bits_of_diffusers_where_its_library_adds_up_in_one_order():
    vae = reference()
    z, x = latents(vae), frames()
    with frameloom.vae.open(vae.state_dict(), WAN21, exactness="bitwise") as opened:
        assert torch.equal(opened.decode(z), vae.decode(z).sample)
        assert torch.equal(opened.moments(x), vae.encode(x).latent_dist.parameters)
        assert any(line.startswith("vae.chunks off") for line in opened.decisions)
        with pytest.raises(RequestError, match="chunk 2 may round otherwise"):
            opened.decode(z, chunk=2)


WRONG_INPUTS = [
    (lambda o: o.decode([[1.0]]), "latents are list"),
    (lambda o: o.decode(torch.zeros(1, 4, 2, 3, 3, dtype=torch.long)), "torch.int64"),
    (lambda o: o.decode(torch.zeros(1, 16, 2, 3, 3)), r"\(1, 16, 2, 3, 3\); give \(B, 4, T, H, W\)"),
    (lambda o: o.decode(torch.zeros(4, 2, 3, 3)), "give"),
    (lambda o: o.decode(torch.zeros(1, 4, 0, 3, 3)), "give"),
    (lambda o: o.decode(torch.zeros(1, 4, 2, 3, 3), chunk=0), "chunk 0"),
    (lambda o: o.decode(torch.zeros(1, 4, 2, 3, 3), band=True), "band True"),
    (lambda o: o.stream(torch.zeros(1, 4, 2, 3, 3), chunk=1.5), "chunk 1.5"),
    (lambda o: o.encode(torch.zeros(1, 3, 4, 16, 16)), "4 frames"),
    (lambda o: o.encode(torch.zeros(1, 3, 5, 20, 16)), "height 20"),
    (lambda o: o.encode(torch.zeros(1, 5, 3, 16, 16)), r"give \(B, 3, T, H, W\)"),
    (lambda o: o.decode(torch.zeros(1, 4, 2, 3, 3, device="meta")), "latents are without values; give a dense"),
    (lambda o: o.decode(torch.zeros(1, 4, 2, 3, 3).to_sparse()), "latents are torch.sparse_coo; give a dense"),
    (lambda o: o.normalise(torch.zeros(1, 3, 2, 3, 3)), r"\(1, 3, 2, 3, 3\); give \(B, 4, T, H, W\)"),
    (lambda o: o.denormalise(torch.zeros(4)), r"\(4,\); give"),
    (lambda o: o.normalise(None), "latents are NoneType"),
]


@pytest.mark.parametrize(("call", "said"), WRONG_INPUTS)
def test_wrong_inputs_are_told_in_a_sentence(call, said):
    with frameloom.vae.open(reference().state_dict(), WAN21) as opened, pytest.raises(RequestError, match=said):
        call(opened)


def test_what_is_no_vae_is_told_in_a_sentence(tmp_path):
    state = reference().state_dict()
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for source, config, error_type, said in (
        (tmp_path / "nothing", None, CheckpointError, "no file or folder"),
        (tmp_path / "other.safetensors", None, CheckpointError, "other.safetensors"),
        (7, None, CheckpointError, "7 is no VAE"),
        ({}, None, CheckpointError, "the mapping is empty; give the tensors of a VAE by their names"),
        (reference(), None, CheckpointError, "a module (AutoencoderKLWan) is not opened as such; give dict("),
        (state, "x", CheckpointError, "config is str; give"),
        (state, 7, CheckpointError, "config is int; give"),
        ({"a": 1}, None, CheckpointError, "int under 'a'"),
        ({name: x.to(torch.int8) for name, x in state.items()}, WAN21, CheckpointError, "int8"),
        (state, None, CheckpointError, "mean and deviation"),
        (state, {**WAN21, "base_dim": 16}, CheckpointError, "base_dim"),
        (state, {**WAN21, "attn_scales": [1.0]}, CheckpointError, "attn_scales"),
        ({name: x for name, x in state.items() if "quant" not in name}, WAN21, CheckpointError, "quant_conv"),
    ):
        with pytest.raises(error_type, match=re.escape(said)):
            frameloom.vae.open(source, config)
    for words, said in (
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "int8"}, "int8"),
        ({"exactness": "best"}, "best"),
        ({"memory": "much"}, "much"),
    ):
        with pytest.raises(RequestError, match=said):
            frameloom.vae.open(state, WAN21, **words)


def test_memory_that_is_too_short_is_told(tmp_path):
    opened = frameloom.vae.open(reference().state_dict(), WAN21, memory=1000)
    with opened, pytest.raises(RequestError, match="needs at least"):
        opened.decode(torch.zeros(1, 4, 2, 3, 3))


def test_importing_the_package_does_not_load_it():
    code = "import frameloom, sys; print('torch' in sys.modules); print(frameloom.vae.open.__module__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "frameloom.vae"]


def test_the_page_runs(tmp_path, monkeypatch):
    """Its examples one after the other, on a small VAE that lies where they look for one."""
    page = Path(frameloom.__file__).parents[1] / "docs" / "vae.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 4
    vae = reference()
    vae.save_pretrained(tmp_path / "Wan2.1-VAE")
    monkeypatch.chdir(tmp_path)
    names = {"live_vae": vae}
    for example in examples:
        exec(compile(example, str(page), "exec"), names)  # noqa: S102  # our own page
