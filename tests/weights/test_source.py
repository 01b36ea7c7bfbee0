"""Opening a checkpoint folder or hub id: what is read, and one sentence for each way it can be wrong."""

import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import frameloom
from frameloom.errors import CheckpointError
from frameloom.weights import header, source
from frameloom.weights.convert import convert
from frameloom.weights.header import read_header, read_json, read_tensors
from frameloom.weights.source import open_checkpoint

INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.35.0",
    "boundary_ratio": None,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def safetensors(tensors, *, header=None, pad=b""):
    """Bytes of a file with F32 tensors of the given shapes, all zero."""
    end, entries = 0, {"__metadata__": {"format": "pt"}}
    for name, shape in tensors.items():
        begin, end = end, end + 4 * _numel(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries if header is None else header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end) + pad


def _numel(shape):
    numel = 1
    for size in shape:
        numel *= size
    return numel


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_model(folder, stem, *, class_name=None, tensors=None, config=None):
    write_json(folder / "config.json", ({"_class_name": class_name} if class_name else {}) | (config or {}))
    (folder / f"{stem}.safetensors").write_bytes(safetensors(tensors or {"w": (2, 3)}))


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "Wan-tiny"
    write_json(root / "model_index.json", INDEX)
    write_json(root / "scheduler" / "scheduler_config.json", {"flow_shift": 3.0})
    write_json(root / "tokenizer" / "tokenizer.json", {})
    write_model(root / "text_encoder", "model", config={"model_type": "umt5"})
    write_model(root / "vae", "diffusion_pytorch_model", class_name="AutoencoderKLWan")
    write_model(root / "transformer", "diffusion_pytorch_model", class_name="WanTransformer3DModel")
    return root


def change_index(root, **changes):
    write_json(root / "model_index.json", INDEX | changes)


# --- what an opened checkpoint says ---


def test_reads_a_whole_checkpoint(root):
    write_model(root / "transformer", "diffusion_pytorch_model", tensors={"a": (4,), "b.c": (2, 5), "d": ()})
    checkpoint = open_checkpoint(str(root))
    assert (checkpoint.path, checkpoint.name, checkpoint.pipeline) == (root, str(root), "WanPipeline")
    assert (checkpoint.boundary_ratio, checkpoint.expand_timesteps) == (None, False)
    assert checkpoint.index == INDEX
    assert checkpoint.scheduler == {"flow_shift": 3.0}
    assert checkpoint.defaults == {}
    assert set(checkpoint.components) == {"transformer", "vae", "text_encoder", "tokenizer"}
    part = checkpoint.components["transformer"]
    assert (part.name, part.class_name) == ("transformer", "WanTransformer3DModel")
    assert part.files == (root / "transformer" / "diffusion_pytorch_model.safetensors",)
    assert {name: entry.shape for name, entry in part.tensors.items()} == {"a": (4,), "b.c": (2, 5), "d": ()}
    assert part.size_bytes == 4 * (4 + 10 + 1)
    assert checkpoint.components["tokenizer"].files == ()


def test_takes_a_path_object_and_reads_generation_defaults(root):
    write_json(root / "frameloom.json", {"steps": 4})
    assert open_checkpoint(root).defaults == {"steps": 4}


def test_reads_two_experts(root):
    second = ["diffusers", "WanTransformer3DModel"]
    change_index(root, transformer_2=second, boundary_ratio=0.875, expand_timesteps=True)
    write_model(root / "transformer_2", "diffusion_pytorch_model", class_name="WanTransformer3DModel")
    checkpoint = open_checkpoint(root)
    assert (checkpoint.boundary_ratio, checkpoint.expand_timesteps) == (0.875, True)
    assert checkpoint.components["transformer_2"].size_bytes == 24


@pytest.mark.parametrize("encoder", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize("processor", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPProcessor"])
def test_takes_every_name_of_the_image_branch(root, encoder, processor):
    image = {"image_encoder": ["transformers", encoder], "image_processor": ["transformers", processor]}
    change_index(root, _class_name="WanImageToVideoPipeline", **image)
    write_model(root / "image_encoder", "model")
    write_json(root / "image_processor" / "preprocessor_config.json", {})
    assert {"image_encoder", "image_processor"} <= set(open_checkpoint(root).components)


def test_opens_what_diffusers_saves(root, tmp_path):
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2
    )
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer.save_pretrained(root / "transformer", max_shard_size="20KB")
    (root / "transformer" / "diffusion_pytorch_model.safetensors").unlink()  # the hand-written one
    vae.to(torch.float16).save_pretrained(root / "vae", variant="fp16")
    (root / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    UniPCMultistepScheduler(flow_shift=5.0).save_pretrained(root / "scheduler")
    checkpoint = open_checkpoint(root)
    assert checkpoint.scheduler["flow_shift"] == 5.0
    assert len(checkpoint.components["transformer"].files) > 1
    assert [file.name for file in checkpoint.components["vae"].files] == ["diffusion_pytorch_model.fp16.safetensors"]
    for name, module in {"transformer": transformer, "vae": vae}.items():
        stored = checkpoint.components[name].tensors
        state = module.state_dict()
        assert {key: entry.shape for key, entry in stored.items()} == {
            key: tuple(value.shape) for key, value in state.items()
        }
        assert checkpoint.components[name].size_bytes == sum(value.nbytes for value in state.values())


def test_needs_no_torch():
    code = "import sys, frameloom.weights.source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- where the folder is ---


@pytest.mark.parametrize("name", ["", "no such folder", "~nobody-here", "a/b/c", "./nothing", "/nothing/here", "a\0b"])
def test_refuses_what_is_neither_folder_nor_hub_id(name):
    with pytest.raises(CheckpointError, match="give a checkpoint's folder or file, or a hub id 'owner/name'"):
        open_checkpoint(name)


def test_suggests_the_nearest_sibling(root):
    with pytest.raises(CheckpointError, match=r"did you mean '.*/Wan-tiny'\?"):
        open_checkpoint(root.parent / "Wan-tyni")


def test_refuses_a_file(root):
    with pytest.raises(CheckpointError, match=r"give the folder that holds model_index\.json"):
        open_checkpoint(root / "model_index.json")


def test_names_the_parent_when_one_part_is_given(root):
    with pytest.raises(CheckpointError, match=f"give the parent '{root}'"):
        open_checkpoint(root / "transformer")


def test_names_the_child_when_the_folder_above_is_given(root):
    with pytest.raises(CheckpointError, match=f"did you mean '{root}'"):
        open_checkpoint(root.parent)


def test_refuses_a_folder_without_index(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(CheckpointError, match=r"no model_index.json and no weight files; give a checkpoint's folder"):
        open_checkpoint(tmp_path / "x")


# --- model_index.json ---


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "WanPipeline and WanImageToVideoPipeline"),
        ({"_class_name": None}, "supported pipelines are"),
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "supported is WanTransformer3DModel"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "supported is AutoencoderKLWan"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "supported is UMT5EncoderModel"),
        ({"tokenizer": ["transformers", "CLIPTokenizer"]}, "supported is T5Tokenizer or T5TokenizerFast"),
        ({"vae": ["diffusers", ["x"]]}, "supported is AutoencoderKLWan"),
        ({"scheduler": ["diffusers", 3]}, "'scheduler'"),
        ({"safety_checker": ["diffusers", "Checker"]}, "'safety_checker', unknown"),
        ({"../evil": ["diffusers", "AutoencoderKLWan"]}, "'../evil', unknown"),
        ({"some_setting": 3}, "'some_setting', unknown"),
        ({"vae": ["diffusers"]}, "'vae', unknown"),
        ({"vae": [None, None]}, "lists no vae"),
        ({"boundary_ratio": 1.5}, "boundary_ratio 1.5"),
        ({"boundary_ratio": True}, "boundary_ratio True"),
        ({"boundary_ratio": "0.9"}, "boundary_ratio '0.9'"),
        ({"boundary_ratio": 0.9}, "belong together"),
        ({"expand_timesteps": 1}, "true or false"),
    ],
)
def test_refuses_an_index_it_cannot_honour(root, changes, match):
    change_index(root, **changes)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(root)


def test_refuses_a_second_expert_without_boundary(root):
    change_index(root, transformer_2=["diffusers", "WanTransformer3DModel"])
    write_model(root / "transformer_2", "diffusion_pytorch_model")
    with pytest.raises(CheckpointError, match="belong together"):
        open_checkpoint(root)


def test_refuses_an_image_branch_without_encoder(root):
    write_json(root / "transformer" / "config.json", {"image_dim": 1280})
    with pytest.raises(CheckpointError, match="image_encoder"):
        open_checkpoint(root)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{", "no readable JSON"),
        (b"\xff\xfe{}", "no readable JSON"),
        (b"[" * 100_000, "no readable JSON"),
        (b'{"a": 1, "a": 2}', "no readable JSON"),
        (b"[1]", "a JSON list, an object is needed"),
        (b"", "no readable JSON"),
        (b" " * (header.MAX_JSON_BYTES + 1), "more than a configuration needs"),
    ],
)
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_refuses_broken_json(root, name, text, match):
    (root / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(root)


def test_reports_a_file_it_may_not_read(root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(source.Path, "read_bytes", refuse)  # chmod does not stop root, who runs many test machines
    with pytest.raises(CheckpointError, match="check the path and its permissions"):
        open_checkpoint(root)


def test_read_json_names_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        read_json(tmp_path / "config.json")


# --- components ---


def test_names_a_missing_component_folder(root):
    (root / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is missing"):
        open_checkpoint(root)
    (root / "tokenizer").rename(root / "away")
    write_json(root / "scheduler" / "scheduler_config.json", {})
    with pytest.raises(CheckpointError, match=r"tokenizer is missing, though model_index\.json lists it"):
        open_checkpoint(root)


def test_refuses_a_config_of_another_class(root):
    write_json(root / "vae" / "config.json", {"_class_name": "AutoencoderKL"})
    with pytest.raises(CheckpointError, match="is for 'AutoencoderKL'"):
        open_checkpoint(root)


def rename_weights(root, new_name):
    folder = root / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / new_name)
    return folder


def test_takes_the_only_variant(root, caplog):
    rename_weights(root, "diffusion_pytorch_model.fp16.safetensors")
    with caplog.at_level(logging.INFO, "frameloom"):
        files = open_checkpoint(root).components["transformer"].files
    assert [file.name for file in files] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert "transformer holds the variant fp16 alone, which is taken" in caplog.text


def test_prefers_the_files_without_variant(root):
    other = root / "transformer" / "diffusion_pytorch_model.bf16.safetensors"
    other.write_bytes(safetensors({"v": (1,)}))
    assert set(open_checkpoint(root).components["transformer"].tensors) == {"w"}


def test_refuses_to_choose_between_variants(root):
    folder = rename_weights(root, "diffusion_pytorch_model.fp16.safetensors")
    (folder / "diffusion_pytorch_model.bf16.safetensors").write_bytes(safetensors({"w": (2, 3)}))
    with pytest.raises(CheckpointError, match=r"transformer' has the variants bf16, fp16; choose one with --variant"):
        open_checkpoint(root)
    assert open_checkpoint(root, variant="bf16").components["transformer"].files[0].stem.endswith(".bf16")


def test_takes_the_variant_that_is_asked_for_where_a_component_has_it(root, caplog):
    folder = root / "transformer"
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(safetensors({"v": (1,)}))
    with caplog.at_level(logging.INFO, "frameloom"):
        components = open_checkpoint(root, variant="fp16").components
    assert set(components["transformer"].tensors) == {"v"}
    assert components["vae"].files[0].name == "diffusion_pytorch_model.safetensors"
    assert "vae has no variant fp16: its plain files are taken" in caplog.text
    parts = {"transformer": folder}
    assert set(open_checkpoint(root, parts=parts, variant="fp16").components["transformer"].tensors) == {"v"}


def test_an_unknown_variant_is_refused_with_those_that_there_are(root, checkpoint_of, tmp_path):
    with pytest.raises(CheckpointError, match="has no variant 'fp16'; it has none: leave --variant out"):
        open_checkpoint(root, variant="fp16")
    (root / "vae" / "diffusion_pytorch_model.bf16.safetensors").write_bytes(safetensors({"v": (1,)}))
    with pytest.raises(CheckpointError, match="has no variant 'fp16'; choose bf16, or leave --variant out"):
        open_checkpoint(root, variant="fp16")
    (file, *_) = convert(open_checkpoint(checkpoint_of()), tmp_path / "loose", to="single-file")
    for model in (tmp_path / "loose", file):
        with pytest.raises(CheckpointError, match="has no variant 'fp16'; it has none: leave --variant out"):
            frameloom.describe(model, variant="fp16")


def write_shards(root, weight_map, *, index="diffusion_pytorch_model.safetensors.index.json"):
    folder = root / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    write_json(folder / index, {"metadata": {}, "weight_map": weight_map})
    return folder


SHARDS = tuple(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ],
)
def test_reads_shards_through_their_index(root, index):
    folder = write_shards(root, {"a": SHARDS[0], "b": SHARDS[1]}, index=index)
    for shard, name in zip(SHARDS, "ab", strict=True):
        (folder / shard).write_bytes(safetensors({name: (3,)}))
    part = open_checkpoint(root).components["transformer"]
    assert part.files == tuple(folder / shard for shard in SHARDS)
    assert {name: entry.file.name for name, entry in part.tensors.items()} == dict(zip("ab", SHARDS, strict=True))


def test_names_the_missing_shard(root):
    folder = write_shards(root, {"a": SHARDS[0], "b": SHARDS[1]})
    (folder / SHARDS[0]).write_bytes(safetensors({"a": (3,)}))
    with pytest.raises(CheckpointError, match=f"lacks {SHARDS[1]}, listed in"):
        open_checkpoint(root)


@pytest.mark.parametrize(
    "value",
    [
        "../vae/diffusion_pytorch_model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", "",
        "C:x.safetensors", "a..b.safetensors", "..safetensors", ".safetensors", "x.safetensors\n", "x.safetensors/",
        3, None, ["x.safetensors"],
    ],
)  # fmt: skip
def test_opens_no_shard_outside_the_folder(root, value):
    folder = write_shards(root, {"a": SHARDS[0], "b": value})
    (folder / SHARDS[0]).write_bytes(safetensors({"a": (3,)}))
    with pytest.raises(CheckpointError, match=r"only plain \*.safetensors names are opened"):
        open_checkpoint(root)


@pytest.mark.parametrize("weight_map", [{}, [], None, "x.safetensors"])
def test_refuses_an_index_without_weight_map(root, weight_map):
    write_shards(root, weight_map)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(root)


def test_refuses_a_tensor_that_is_in_two_shards(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(safetensors({"w": (1,)}))
    with pytest.raises(CheckpointError, match=r"'w' is in both .*a.safetensors and .*b.safetensors"):
        read_tensors([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.pth", "x.ckpt", "x.pickle"])
def test_refuses_a_component_that_is_only_pickled(root, name):
    rename_weights(root, name)
    with pytest.raises(CheckpointError, match=f"holds only pickles .{name}.*convert them to safetensors"):
        open_checkpoint(root)


def test_names_shards_without_index(root):
    rename_weights(root, SHARDS[0])
    with pytest.raises(CheckpointError, match=r"no \*.safetensors.index.json"):
        open_checkpoint(root)


def test_names_a_component_without_weights(root):
    rename_weights(root, "readme.txt")
    with pytest.raises(CheckpointError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        open_checkpoint(root)


# --- safetensors headers ---


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


GOOD = safetensors({"w": (2, 3)})


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (zipped(), "PyTorch pickle in spite of its name"),
        (pickle.dumps({"w": 1}, protocol=2), "PyTorch pickle in spite of its name"),
        (pickle.dumps({"w": 1}, protocol=5), "PyTorch pickle in spite of its name"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "only a Git LFS pointer"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "GGUF file in spite of its name"),
        (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
        (b"", "not a safetensors file"),
        (b"\0" * 7, "not a safetensors file"),
        (bytes(64), "not a safetensors file"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((header.MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (GOOD[:40], "cut off inside its header"),
        (GOOD[:-1], r"cut off \(\d+ of \d+ bytes\); download it again"),
        (GOOD + b"\0", "longer than its header says"),
        (len(b"{x}").to_bytes(8, "little") + b"{x}", "no readable JSON"),
    ],
)
def test_refuses_what_is_no_safetensors_file(root, content, match):
    path = root / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(root)
    assert str(path) in str(caught.value)
    assert caught.value.__cause__ is None


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"w": 3}, "damaged entry for 'w'"),
        ({"w": {"dtype": "F32"}}, "damaged entry for 'w'"),
        ({"w": entry(offsets=(0, 4, 8))}, "damaged entry for 'w'"),
        ({"w": entry(offsets=(8, 0))}, "damaged entry for 'w'"),
        ({"w": entry(offsets=(-8, 0))}, "damaged entry for 'w'"),
        ({"w": entry(offsets=(0.0, 8.0))}, "damaged entry for 'w'"),
        ({"w": entry(shape=(-2,))}, "damaged entry for 'w'"),
        ({"w": entry(shape=(True, 2))}, "damaged entry for 'w'"),
        ({"w": entry(shape=(2**62,))}, "damaged entry for 'w'"),
        ({"w": entry(dtype="F4")}, "stores 'w' as 'F4'; readable are"),
        ({"w": entry(dtype=[])}, "stores 'w' as"),
        ({"v": entry(), "w": entry()}, "overlaps or leaves a gap"),
        ({"w": entry(offsets=(4, 12))}, "overlaps or leaves a gap"),
        ({"v": entry(), "w": entry(offsets=(16, 24))}, "overlaps or leaves a gap"),
    ],
)
def test_refuses_a_header_that_lies(tmp_path, header, match):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"w": (2,)}, header=header, pad=bytes(64)))
    with pytest.raises(CheckpointError, match=match):
        read_header(path)


def test_reads_only_the_header(tmp_path):
    path = tmp_path / "huge.safetensors"
    numel = 2**38  # 1 TiB of zeros that exist only as a length
    header = json.dumps({"w": entry(shape=(numel,), offsets=(0, 4 * numel))}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + 4 * numel)
        except OSError:
            pytest.skip("this file system has no sparse files of 1 TiB")
    (found,) = read_header(path).values()
    assert (found.offset, found.size_bytes, found.dtype) == (8 + len(header), 4 * numel, "F32")


def test_lists_the_same_tensors_as_the_safetensors_library(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.ones(3, 2, dtype=torch.bfloat16), "b": torch.ones(()), "c": torch.ones(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: (e.dtype, e.shape) for name, e in found.items()} == {
        "a": ("BF16", (3, 2)),
        "b": ("F32", ()),
        "c": ("F32", (0, 4)),
    }


# --- the hub, played by a local server ---


class Hub(BaseHTTPRequestHandler):
    """Answers like the model hub: one repository per status, one of them real."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.ranges.append(self.headers.get("Range"))
        files, repo = self.server.files, "owner/real"
        if self.path.startswith(f"/api/models/{repo}/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()
            ]
            return self._send(200, json.dumps(listing).encode())
        if self.path.startswith(f"/api/models/{repo}"):
            siblings = [{"rfilename": name} for name in files]
            return self._send(200, json.dumps({"id": repo, "sha": "1" * 40, "siblings": siblings}).encode())
        if self.path.startswith(f"/{repo}/resolve/"):
            body = files[self.path.split("/", 5)[5]]
            if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                return self._send(206, body[int(asked[1]) : int(asked[2]) + 1])
            return self._send(200, body)
        codes = {"gated": (403, "GatedRepo"), "broken": (500, ""), "unknown": (404, "RepoNotFound")}
        code, kind = next(value for key, value in codes.items() if key in self.path)
        return self._send(code, b"{}", {"X-Error-Code": kind} if kind else {})

    do_HEAD = do_GET

    def _send(self, code, body, headers=()):
        self.send_response(code)
        for key, value in {
            "Content-Length": str(len(body)),
            "X-Repo-Commit": "1" * 40,
            **dict(headers),
        }.items():
            self.send_header(key, value)
        self.send_header("ETag", f'"{len(body)}-{abs(hash(body))}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(root):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.ranges = [], []
    server.files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    server.files |= {"transformer/evil.bin": b"x", "top.safetensors": GOOD, "other/model.safetensors": GOOD}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


OPEN = "print('OPENED', open_checkpoint(sys.argv[1]).path)"
DESCRIBE = "print(json.dumps(frameloom.describe(sys.argv[1])))"


def open_from(endpoint, name, home, *, cwd, action=OPEN):
    """Open in a fresh process: the hub library reads its address once, at import."""
    code = (
        "import json, sys\nimport frameloom\nfrom frameloom.errors import CheckpointError\n"
        "from frameloom.weights.source import open_checkpoint\n"
        f"try: {action}\n"
        "except CheckpointError as error: print('REFUSED', error, error.__cause__)\n"
    )
    keep = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env = keep | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    env["PYTHONPATH"] = str(source.Path(source.__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", code, name], env=env, cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def address(hub):
    return f"http://127.0.0.1:{hub.server_port}"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("owner/unknown", "is no local folder and no public hub repository; check the name"),
        ("owner/gated", "asks for its licence to be accepted"),
        ("owner/broken", "check the network, or give a local folder"),
    ],
)
def test_says_what_the_hub_refused(hub, tmp_path, name, match):
    said = open_from(address(hub), name, tmp_path / "home", cwd=tmp_path)
    assert said.startswith(f"REFUSED '{name}'")
    assert match in said
    assert said.endswith(" None")  # no chained traceback


def test_says_that_the_hub_cannot_be_reached(tmp_path):
    (tmp_path / "owner" / "name-tiny").mkdir(parents=True)
    said = open_from("http://127.0.0.1:9", "owner/name-tini", tmp_path / "home", cwd=tmp_path)
    assert "check the network, or give a local folder" in said
    assert "did you mean 'owner/name-tiny'?" in said


def test_fetches_the_listed_components_and_no_pickle(hub, tmp_path):
    said = open_from(address(hub), "owner/real", tmp_path / "home", cwd=tmp_path)
    assert said.startswith("OPENED"), said
    fetched = {path.split("/", 5)[5] for path in hub.asked if "/resolve/" in path}
    unwanted = {"transformer/evil.bin", "top.safetensors", "other/model.safetensors"}
    assert fetched == set(hub.files) - unwanted
    hub.asked.clear()
    assert open_from("http://127.0.0.1:9", "owner/real", tmp_path / "home", cwd=tmp_path) == said  # offline, cached


def test_describes_a_hub_checkpoint_without_fetching_its_weights(hub, root, tmp_path):
    said = open_from(address(hub), "owner/real", tmp_path / "home", cwd=tmp_path, action=DESCRIBE)
    facts, local = json.loads(said), frameloom.describe(root)
    for key in ("components", "bytes", "parameters", "defaults"):
        assert facts[key] == local[key]
    weights = [(path, r) for path, r in zip(hub.asked, hub.ranges, strict=True) if path.endswith(".safetensors")]
    assert len(weights) >= 3
    assert all(asked and asked.startswith("bytes=") for _, asked in weights)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_describes_what_was_fetched_before_without_the_hub(hub, tmp_path):
    assert open_from(address(hub), "owner/real", tmp_path / "home", cwd=tmp_path).startswith("OPENED")
    said = open_from("http://127.0.0.1:9", "owner/real", tmp_path / "home", cwd=tmp_path, action=DESCRIBE)
    assert json.loads(said)["components"]


def test_a_hub_checkpoint_without_weights_is_refused_unfetched(hub, tmp_path):
    hub.files = {name: data for name, data in hub.files.items() if not name.startswith("vae/diffusion")}
    said = open_from(address(hub), "owner/real", tmp_path / "home", cwd=tmp_path, action=DESCRIBE)
    assert said.startswith("REFUSED")
    assert "vae holds no diffusion_pytorch_model.safetensors" in said
