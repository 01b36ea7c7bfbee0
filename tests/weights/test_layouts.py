"""The same weights make the same latents in every layout that users have; quantized files those of their numbers."""

import json
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from layout_files import (
    LAYOUTS,
    build_model,
    llama_t5,
    original_dit,
    original_repository,
    single_files,
    with_vocabulary,
)
from PIL import Image
from quantized_files import as_tensor, cast, in_blocks, numbers, plain, scaled, write_gguf
from safetensors.torch import load_file, save_file

import frameloom
from frameloom.errors import CheckpointError
from frameloom.ops.dequant import BLOCK_TYPES
from frameloom.ops.quantized import is_quantized

KINDS = {
    "text, 3 heads": {"heads": 3},
    "text, 10 heads": {"heads": 10, "layers": 1},
    "image, two experts": {"heads": 2, "kind": "two experts"},
    "image, CLIP": {"heads": 2, "kind": "image"},
    "first and last image": {"heads": 2, "kind": "last image"},
    "VACE": {"heads": 2, "kind": "VACE"},
    "per-token timesteps": {"heads": 2, "kind": "per-token timesteps"},
}


def load(opened, **options):
    model, parts = opened
    options = {"device": "cpu", "dtype": "float32", "exactness": "bitwise", **options}
    return frameloom.load(model, parts=parts or None, **options)


def pictures_of(kind):
    """What a model of a kind starts from."""
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    if kind == "VACE":
        return {"control_video": np.stack([np.asarray(image)] * 5), "references": [image.rotate(90)]}
    found = {} if kind.startswith("text") else {"image": image}
    return found | {"last_image": image.rotate(90)} if "last" in kind else found


def latents_of(opened, *, kind="text", **options):
    """Latents of two steps in float32, by the reference's own arithmetic."""
    asked = {"width": 64, "height": 64, "num_frames": 5, "steps": 2, "guidance_scale": 4.0, "seed": 3}
    asked |= pictures_of(kind)
    with load(opened, **options) as engine:
        held = options.get("quantized") == "keep"
        assert is_quantized(engine._open.experts[0]) == held
        return engine.generate("a red circle", output="latents", **asked)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A model of a kind, and its latents from the folder that Diffusers writes."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("model")
            model = build_model(folder, **KINDS[kind])
            model.pipeline.save_pretrained(str(folder / "whole"))
            made[kind] = model, latents_of((folder / "whole", {}), kind=kind)
        return made[kind]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_makes_the_same_latents(kind, layout, model_of, tmp_path):
    model, wanted = model_of(kind)
    opened = LAYOUTS[layout](model, tmp_path)
    assert torch.equal(latents_of(opened, kind=kind), wanted)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "image_encoder"])
def test_every_part_of_a_file_matters(part, model_of, tmp_path):
    model, wanted = model_of("image, CLIP")
    _, parts = single_files(model, tmp_path)
    state = load_file(parts[part])
    save_file({name: x if x.dtype == torch.uint8 else x * 1.5 for name, x in state.items()}, parts[part])
    assert not torch.equal(latents_of((None, parts), kind="image, CLIP"), wanted)


# --- quantized ---


def mix(name, kind, better):
    """The better type for values and the second half of the feed-forward, as Q4_K_M and its like have it."""
    return better if name.endswith(("to_v.weight", "ffn.net.2.weight", "SelfAttention.v.weight", "wo.weight")) else kind


GGUF = {
    **{
        kind: (kind, kind) for kind in ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_XS")
    },
    "Q4_K_M": ("Q4_K", "Q6_K"),
    "Q3_K_M": ("Q3_K", "Q5_K"),
    "Q2_K": ("Q2_K", "Q3_K"),
}
_PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"plain fp8": "F8_E4M3", "scaled fp8, old": "F8_E4M3", "scaled fp8, new": "F8_E4M3", "scaled e5m2": "F8_E5M2"}
FP8 |= {"plain e5m2": "F8_E5M2", "fp8 by row": "F8_E4M3", "int8": "I8", "int8 by row": "I8", "fp8, metadata": "F8_E4M3"}
FP8 |= {"int8 by row, rotated": "I8", "int8 by row, rotated, metadata": "I8"}


def is_matrix(name, value):
    return value.dim() == 2 and ("block" in name or name == "shared.weight") and "relative" not in name


def in_gguf(name, value, kind, seed):
    """As writers of GGUF store it: rows that are no whole blocks in float16."""
    kind = mix(name, *GGUF[kind])
    if kind not in _PLAIN and value.shape[-1] % BLOCK_TYPES[kind].numbers:
        kind = "F16"
    return plain(value.to(_PLAIN[kind])) if kind in _PLAIN else in_blocks(value, kind, seed=seed)


def in_float8(value, kind):
    if "plain" in kind:
        return cast(value, FP8[kind])
    return scaled(value, FP8[kind], by_row="row" in kind, rotated=16 if "rotated" in kind else 0)


def stored_as(state, kind):
    """A network as a quantized file has it: its matrices narrow, the rest in float32."""

    def one(seed, name, value):
        if not is_matrix(name, value):
            return plain(value)
        return in_gguf(name, value, kind, seed) if kind in GGUF else in_float8(value, kind)

    return {name: one(seed, name, value) for seed, (name, value) in enumerate(state.items())}


def mark_of(stored):
    mark = {"format": {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8_tensorwise"}[stored.dtype]}
    return mark | ({"convrot": True, "convrot_groupsize": stored.rotated} if stored.rotated else {})


def metadata_of(tensors, kind, prefix):
    """What the header of a file says of its numbers, where no tensor does."""
    if "metadata" not in kind:
        return None
    scaled_ones = {name: stored for name, stored in tensors.items() if stored.scale is not None}
    layers = {prefix + name.removesuffix(".weight"): mark_of(stored) for name, stored in scaled_ones.items()}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def with_scales(tensors, kind):
    """What a safetensors file holds: the weights, and beside them their scales under the names of the dialect."""
    found = {name: as_tensor(stored) for name, stored in tensors.items()}
    for name, stored in tensors.items():
        if stored.scale is None:
            continue
        module = name.removesuffix(".weight")
        scale = as_tensor(stored.scale)
        if kind == "scaled fp8, old":
            found |= {f"{module}.scale_weight": scale, f"{module}.scale_input": torch.ones(1)}
        else:
            found[f"{module}.weight_scale"] = scale
            mark = torch.frombuffer(bytearray(json.dumps(mark_of(stored)).encode()), dtype=torch.uint8)
            found |= {} if "metadata" in kind else {f"{module}.comfy_quant": mark}
    if kind == "scaled fp8, old":
        found["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return found


def write_quantized(folder, model, kind, dit, t5):
    """The files of a transformer and a text encoder."""
    if kind in GGUF:
        fold = kind not in _PLAIN  # five dimensions are written by some, folded by others
        return {
            "transformer": write_gguf(folder / "dit.gguf", original_dit(dit), architecture="wan", fold=fold),
            "text_encoder": write_gguf(folder / "t5.gguf", llama_t5(t5), architecture="t5encoder"),
        }
    parts = {part: folder / f"{part}.safetensors" for part in ("transformer", "text_encoder")}
    prefix = "model.diffusion_model." if "new" in kind else ""
    dit = original_dit(dit)
    tensors = {prefix + name: value for name, value in with_scales(dit, kind).items()}
    save_file(tensors, parts["transformer"], metadata=metadata_of(dit, kind, prefix))
    state = with_vocabulary(with_scales(t5, kind), model)
    save_file(state, parts["text_encoder"], metadata=metadata_of(t5, kind, ""))
    return parts


@pytest.fixture(scope="module")
def whole(model_of, tmp_path_factory):
    """A model whose rows are whole blocks, in Diffusers' folder."""
    folder = tmp_path_factory.mktemp("whole")
    model = build_model(folder, heads=2)
    model.pipeline.save_pretrained(str(folder / "whole"))
    return model, folder / "whole"


@pytest.mark.parametrize("kind", [*FP8, *GGUF])
def test_quantized_files_make_the_latents_of_their_numbers(kind, whole, tmp_path):
    model, folder = whole
    dit, t5 = (stored_as(model.state(part), kind) for part in ("transformer", "text_encoder"))
    parts = write_quantized(tmp_path, model, kind, dit, t5)
    shutil.copytree(folder, tmp_path / "plain")
    for tensors, name in ((dit, "transformer/diffusion_pytorch_model"), (t5, "text_encoder/model")):
        plain_numbers = {key: numbers(stored) for key, stored in tensors.items()}
        save_file(plain_numbers, tmp_path / "plain" / f"{name}.safetensors")
    wanted = latents_of((tmp_path / "plain", {}))
    assert wanted.isfinite().all()
    for quantized in ("keep", "expand"):
        options = {"quantized": quantized} if kind not in _PLAIN else {}
        assert torch.equal(latents_of((folder, parts), **options), wanted), quantized


# --- what does not belong together ---


def test_what_nothing_uses_is_named_in_a_warning(whole, tmp_path, caplog):
    model, folder = whole
    state = original_dit(model.state("transformer")) | {"blocks.0.self_attn.q.zeal": torch.ones(2)}
    save_file(state, tmp_path / "dit.safetensors")
    with caplog.at_level(logging.WARNING), load((folder, {"transformer": tmp_path / "dit.safetensors"})):
        assert "holds 1 tensors that Wan 2.1 T2V" in caplog.text
        assert "blocks.0.self_attn.q.zeal" in caplog.text


def test_a_vae_of_the_other_generation_is_refused(model_of, tmp_path):
    kinds = ("text, 3 heads", "per-token timesteps")
    for kind in kinds:
        (tmp_path / kind).mkdir()
    first, second = (single_files(model_of(kind)[0], tmp_path / kind)[1] for kind in kinds)
    for parts, vae in ((first, second["vae"]), (second, first["vae"])):
        with pytest.raises(CheckpointError, match=r"parts that do not fit: .* z_dim"):
            load((None, {**parts, "vae": vae}))


def test_files_that_are_something_else_than_was_asked_for_are_refused(whole, tmp_path):
    model, folder = whole
    _, parts = single_files(model, tmp_path)
    lora = {f"diffusion_model.blocks.0.self_attn.q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    for part, path, said in (
        ("transformer", tmp_path / "lora.safetensors", "is a LoRA"),
        ("transformer", parts["vae"], "holds no transformer"),
        ("vae", parts["transformer"], "holds no vae"),
    ):
        with pytest.raises(CheckpointError, match=said) as error:
            load((folder, {part: path}))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_files_that_end_too_early_are_one_sentence(share, whole, tmp_path):
    model, folder = whole
    dit, t5 = (stored_as(model.state(part), "Q8_0") for part in ("transformer", "text_encoder"))
    files = write_quantized(tmp_path, model, "Q8_0", dit, t5)
    _, parts = single_files(model, tmp_path)
    (tmp_path / "original").mkdir()
    original_repository(model, tmp_path / "original")
    pickled = {"vae": tmp_path / "original/Wan2.1_VAE.pth"}
    for part, path in (*files.items(), *parts.items(), *pickled.items()):
        os.truncate(path, int(path.stat().st_size * share))
        with pytest.raises(CheckpointError) as error:
            load((folder, {part: path}))
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)
