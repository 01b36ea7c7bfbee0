"""What `inspect` says of whole checkpoints, of files that are part of one, and of LoRAs."""

import json

import pytest
import torch
from checkpoints import FROM_IMAGE
from safetensors.torch import save_file

import frameloom
from frameloom.errors import CheckpointError
from frameloom.weights.convert import convert
from frameloom.weights.source import open_checkpoint


@pytest.mark.parametrize("kind", ["one expert", "two experts", "per-token timesteps", *FROM_IMAGE])
def test_every_kind_of_checkpoint_is_told_by_name(kind, checkpoint_of):
    facts = frameloom.describe(checkpoint_of(kind))
    said = {part["name"]: part["what"] for part in facts["components"]}
    branch = {"image": "2.1 I2V", "image, two experts": "2.2 I2V", "first and last image": "2.1 FLF2V"}
    branch |= {"two experts": "2.2 T2V"}
    assert said["transformer"].startswith(f"Wan {branch.get(kind, '2.1 T2V')} (2 layers")
    assert said["transformer"].endswith(", high-noise expert" if "transformer_2" in said else " wide)")
    assert said.get("transformer_2", "low-noise expert").endswith("low-noise expert")
    assert said["vae"] == ("Wan VAE 2.2" if kind == "per-token timesteps" else "Wan VAE 2.1")
    assert said["text_encoder"] == "UMT5 (2 layers)"
    assert "lacks" not in facts


def test_files_of_two_experts_are_told_apart_by_their_names(checkpoint_of, tmp_path):
    files = convert(open_checkpoint(checkpoint_of("two experts")), tmp_path, to="single-file")
    for model in (tmp_path, files[1]):
        said = {part["name"]: part["what"] for part in frameloom.describe(model)["components"]}
        assert said["transformer"] == "Wan 2.2 T2V (2 layers, 32 wide), high-noise expert by its name"
        assert said["transformer_2"] == "Wan 2.2 T2V (2 layers, 32 wide), low-noise expert by its name"


@pytest.mark.parametrize("to", ["single-file", "original"])
def test_a_file_that_is_part_of_a_checkpoint_says_what_else_is_needed(to, checkpoint_of, tmp_path):
    files = convert(open_checkpoint(checkpoint_of("one expert")), tmp_path, to=to)
    lacks = {"transformer": ["vae", "text_encoder", "tokenizer"], "vae": ["transformer", "text_encoder", "tokenizer"]}
    for file in files:
        facts = frameloom.describe(file)
        (part,) = facts["components"]
        assert facts["lacks"] == lacks.get(part["name"], ["transformer", "vae", "tokenizer"])


def test_a_lora_is_told_by_its_keys_and_ranks(tmp_path, run):
    lora = {
        f"diffusion_model.blocks.{i}.self_attn.q.{part}.weight": torch.zeros(shape)
        for i in (0, 1)
        for part, shape in (("lora_A", (4, 32)), ("lora_B", (32, 4)))
    }
    save_file(lora | {"something.else": torch.zeros(1)}, tmp_path / "style.safetensors")
    facts = frameloom.describe(tmp_path / "style.safetensors")
    assert (facts["kind"], facts["keys"], facts["modules"], facts["ranks"], facts["layers"]) == ("LoRA", 5, 2, [4], 2)
    assert facts["unknown_keys"] == ["something.else"]
    code, out, _ = run("inspect", tmp_path / "style.safetensors")
    assert code == 0
    assert "a LoRA of 5 keys for 2 modules in 2 layers" in out
    assert "keys of no known kind: something.else" in out


def test_the_command_prints_what_a_file_lacks_and_json(checkpoint_of, tmp_path, run):
    files = convert(open_checkpoint(checkpoint_of("one expert")), tmp_path, to="single-file")
    code, out, _ = run("inspect", files[0])
    assert code == 0
    assert "part of a checkpoint, which also needs: vae, text encoder, tokenizer" in out
    code, out, _ = run("inspect", files[0], "--json")
    assert json.loads(out)["lacks"] == ["vae", "text_encoder", "tokenizer"]


def test_a_file_that_is_nothing_of_this_is_one_sentence(tmp_path, run):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)}, tmp_path / "flux.safetensors")
    with pytest.raises(CheckpointError, match="seems to be a Flux"):
        frameloom.describe(tmp_path / "flux.safetensors")
    (tmp_path / "empty.gguf").write_bytes(b"")
    code, _, err = run("inspect", tmp_path / "empty.gguf")
    assert code == 2
    assert "is empty; download it again" in err
