"""Folders of loose weight files: what is left out, what is missing, what lies there twice."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file

from frameloom.errors import CheckpointError
from frameloom.weights.convert import convert
from frameloom.weights.source import open_checkpoint


@pytest.fixture
def folder(checkpoint_of, tmp_path):
    """Two experts as single files."""
    convert(open_checkpoint(checkpoint_of("two experts")), tmp_path, to="single-file")
    return tmp_path


def test_a_lora_and_hidden_files_in_a_folder_are_left_out(folder, caplog):
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 8)}, folder / "style.safetensors")
    (folder / "vae" / "._vae.safetensors").write_bytes(b"what macOS leaves")
    with caplog.at_level(logging.INFO, "frameloom"):
        components = open_checkpoint(folder).components
    assert components.keys() == {"transformer", "transformer_2", "text_encoder", "vae", "tokenizer"}
    assert "style.safetensors is a LoRA and left out" in caplog.text


@pytest.mark.parametrize("gone", ["high", "low"])
def test_one_of_two_experts_alone_is_told(gone, folder, caplog):
    (folder / "diffusion_models" / f"transformer_{gone}_noise.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "frameloom"):
        components = open_checkpoint(folder).components
    assert "transformer_2" not in components
    assert f"and transformer_{gone}_noise.safetensors is not there: it denoises alone" in caplog.text


def test_an_ending_in_capitals_is_an_ending(folder):
    vae = folder / "vae" / "vae.safetensors"
    vae.rename(vae.with_suffix(".SafeTensors"))
    assert open_checkpoint(folder).components["vae"].files[0].suffix == ".SafeTensors"


def test_two_of_a_kind_are_named_with_the_options_that_choose(folder):
    one = folder / "diffusion_models" / "transformer_high_noise.safetensors"
    shutil.copyfile(one, one.with_name("another.safetensors"))
    words = r"another.safetensors and transformer_high_noise.safetensors; .* --transformer, and --transformer-2"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)
