"""The hub: which files of a repository are needed, and how they come, from a hub server on loopback.

Fetching happens in processes of their own, with the real hub library, which reads its settings once, at import.
"""

import contextlib
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import Hub, git_hash_of, hash_of, serve
from hypothesis import given
from hypothesis import strategies as st

import frameloom
from frameloom.errors import CheckpointError
from frameloom.weights.convert import convert_model
from frameloom.weights.hub import HubName, is_hub_name, parse_name
from frameloom.weights.hub_choice import choose_files
from frameloom.weights.source import open_checkpoint

CHUNK = 10 * 2**20  # the hub library writes what has arrived in pieces of this size

# --- which files: the repositories that people use ---


def sharded(folder, count, stem="diffusion_pytorch_model"):
    start = f"{folder}/" if folder else ""
    index = f"{start}{stem}.safetensors.index.json"
    return [index] + [f"{start}{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


TOKENIZER = [
    f"tokenizer/{name}"
    for name in ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
]
TEXT_ENCODER = ["text_encoder/config.json", *sharded("text_encoder", 5, "model")]
VAE = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
COMMON = ["model_index.json", "scheduler/scheduler_config.json", *TOKENIZER, *TEXT_ENCODER, *VAE]
CLIP = ["image_encoder/config.json", "image_encoder/model.safetensors", "image_processor/preprocessor_config.json"]
UNNEEDED = [".gitattributes", "README.md", "LICENSE.txt", "assets/logo.png", "examples/i2v_input.JPG"]
DIFFUSERS = {
    "Wan2.1-T2V-1.3B-Diffusers": [*COMMON, "transformer/config.json", *sharded("transformer", 2)],
    "Wan2.1-I2V-14B-480P-Diffusers": [*COMMON, *CLIP, "transformer/config.json", *sharded("transformer", 14)],
    "Wan2.2-T2V-A14B-Diffusers": [
        *COMMON,
        *("transformer/config.json", *sharded("transformer", 12)),
        *("transformer_2/config.json", *sharded("transformer_2", 12)),
    ],
}
VOCABULARY = [f"google/umt5-xxl/{Path(name).name}" for name in TOKENIZER]
T5, CLIP_PTH = "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
ORIGINAL = {
    "Wan2.1-T2V-1.3B": ["config.json", "diffusion_pytorch_model.safetensors", T5, "Wan2.1_VAE.pth", *VOCABULARY],
    "Wan2.1-I2V-14B-480P": ["config.json", *sharded("", 7), T5, CLIP_PTH, "Wan2.1_VAE.pth", *VOCABULARY],
    "Wan2.2-TI2V-5B": ["config.json", *sharded("", 3), T5, "Wan2.2_VAE.pth", *VOCABULARY],
    "Wan2.2-I2V-A14B": [
        *("high_noise_model/config.json", *sharded("high_noise_model", 6)),
        *("low_noise_model/config.json", *sharded("low_noise_model", 6)),
        *(T5, "Wan2.1_VAE.pth", *VOCABULARY),
    ],
}
UNNEEDED_ORIGINAL = [*UNNEEDED, "configuration.json", "xlm-roberta-large/sentencepiece.bpe.model", "nohup.out"]


@pytest.mark.parametrize("name", DIFFUSERS)
def test_takes_all_of_a_diffusers_repository_but_pictures_and_prose(name):
    assert choose_files([*DIFFUSERS[name], *UNNEEDED]) == tuple(sorted(DIFFUSERS[name]))


@pytest.mark.parametrize("name", ORIGINAL)
def test_takes_the_parts_of_an_original_repository(name):
    assert choose_files([*ORIGINAL[name], *UNNEEDED_ORIGINAL]) == tuple(sorted(ORIGINAL[name]))


def test_takes_only_the_listed_components():
    found = choose_files([*COMMON, *CLIP, "safety_checker/model.safetensors"], components=["vae", "image_encoder"])
    assert found == ("image_encoder/config.json", "image_encoder/model.safetensors", "model_index.json", *VAE)


def test_takes_texts_and_indexes_alone_when_no_weights_are_wanted():
    found = choose_files(DIFFUSERS["Wan2.1-T2V-1.3B-Diffusers"], weights=False)
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in found
    assert not [name for name in found if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("names", "variant", "taken"),
    [
        ("model.safetensors model.fp16.safetensors", "", "model.safetensors"),
        ("model.safetensors model.fp16.safetensors", "fp16", "model.fp16.safetensors"),
        ("model.fp16.safetensors", "", "model.fp16.safetensors"),
        ("model.safetensors pytorch_model.bin model.bin", "", "model.safetensors"),
        ("pytorch_model.bin training_args.bin", "", "pytorch_model.bin"),
        ("model-00001-of-00001.safetensors model.safetensors", "", "model.safetensors"),
        (
            "model.safetensors model.safetensors.index.json model-00001-of-00002.safetensors",
            "",
            "model-00001-of-00002.safetensors model.safetensors.index.json",
        ),
        (
            "model-00001-of-00001.bf16.safetensors model.safetensors.index.bf16.json model.safetensors",
            "bf16",
            "model-00001-of-00001.bf16.safetensors model.safetensors.index.bf16.json",
        ),
        (
            "model.bf16-00001-of-00001.safetensors model.bf16.safetensors.index.json model.fp16.safetensors",
            "bf16",
            "model.bf16-00001-of-00001.safetensors model.bf16.safetensors.index.json",
        ),
        ("flax_model.msgpack tf_model.h5 evil.bin other.safetensors", "", ""),
    ],
)
def test_takes_one_set_of_weights(names, variant, taken):
    paths = ["model_index.json", *(f"vae/{name}" for name in names.split())]
    found = choose_files(paths, components=["vae"], variant=variant)
    assert found == ("model_index.json", *(f"vae/{name}" for name in taken.split()))


def test_a_variant_counts_where_a_component_has_it():
    paths = ["model_index.json", "vae/model.safetensors", "transformer/model.safetensors"]
    found = choose_files([*paths, "transformer/model.fp16.safetensors"], variant="fp16")
    assert found == ("model_index.json", "transformer/model.fp16.safetensors", "vae/model.safetensors")


def test_safetensors_of_an_original_part_are_preferred_to_its_pickle():
    paths = [*ORIGINAL["Wan2.2-TI2V-5B"], "Wan2.2_VAE.safetensors"]
    assert "Wan2.2_VAE.pth" not in choose_files(paths)


@pytest.mark.parametrize(
    ("paths", "variant", "match"),
    [
        (["model_index.json", "vae/model.fp16.safetensors", "vae/model.bf16.safetensors"], "", "variants bf16, fp16"),
        (["model_index.json", "vae/model.safetensors"], "fp16", "has no variant 'fp16'; it has none: leave --variant"),
        (
            [f"vae/model.{kind}safetensors" for kind in ("", "fp16.", "bf16.")] + ["model_index.json"],
            "fp8",
            "has no variant 'fp8'; choose bf16 or fp16, or leave --variant out",
        ),
        (
            [f"split_files/diffusion_models/wan2.1_t2v_{size}.safetensors" for size in ("1.3B_fp16", "14B_fp16")],
            "",
            "is no whole checkpoint but 2 files .*name one, as 'o/n/split_files/diffusion_models/wan2.1_t2v_1.3B_fp16",
        ),
        (
            [f"{part}Noise/Wan2.2-T2V-A14B-{part}Noise-{kind}.gguf" for part in ("High", "Low") for kind in "abcd"],
            "",
            "is no whole checkpoint but 8 files .* and 5 more",
        ),
        (["README.md"], "", "holds no weights of any kind"),
    ],
)
def test_says_what_cannot_be_chosen(paths, variant, match):
    with pytest.raises(CheckpointError, match=match):
        choose_files(paths, variant=variant, where="o/n")


# --- names ---


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B", HubName(repo="Wan-AI/Wan2.1-T2V-1.3B")),
        ("hf://a/b", HubName(repo="a/b")),
        ("a/b@v1.0", HubName(repo="a/b", revision="v1.0")),
        ("a/b@" + "0" * 40, HubName(repo="a/b", revision="0" * 40)),
        ("a/b@refs/pr/3/x.gguf", HubName(repo="a/b", revision="refs/pr/3", path="x.gguf")),
        ("a/b@feature%2Fnew", HubName(repo="a/b", revision="feature/new")),
        ("a/b@feature/new", HubName(repo="a/b", revision="feature/new")),
        ("hf://a/b@release/v1.0", HubName(repo="a/b", revision="release/v1.0")),
        ("a/b@feature%2Fnew/x.gguf", HubName(repo="a/b", revision="feature/new", path="x.gguf")),
        ("a/b/High/x-Q4_K_M.gguf", HubName(repo="a/b", path="High/x-Q4_K_M.gguf")),
        ("hf://a/b@dev/x.safetensors", HubName(repo="a/b", revision="dev", path="x.safetensors")),
    ],
)
def test_takes_a_name_apart(text, name):
    assert parse_name(text) == name
    assert is_hub_name(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "gpt2", "/a/b", "a//b", "../b", "a/..", "./a/b", "~/a/b", "a/b@", "a/b@..", "a/b@x/../y.gguf"),
        *("a/b/../c.pth", "a/b@-x", "a/b@x%2F..%2Fy", "a/b/c\\d.gguf", "a/b/c\n.gguf", "a/b/C:x.gguf", "datasets/a/b"),
        *("a b/c", "hf://datasets/a/b", "https://huggingface.co/a/b", "a/" + "b" * 600, "models/a/b"),
    ],
)  # fmt: skip
def test_refuses_what_is_no_name(text):
    with pytest.raises(CheckpointError, match="is no name of the hub"):
        parse_name(text)
    assert is_hub_name(text) == text.startswith("hf://")


def test_a_path_that_is_no_weight_file_is_not_looked_for_on_the_hub():
    assert not is_hub_name("models/wan/transformer")


@given(st.text(max_size=40) | st.from_regex(r"[ab./@%:\\-]+", fullmatch=True).map("a/b".__add__))
def test_no_name_leaves_its_folder(text):
    try:
        name = parse_name(text)
    except CheckpointError:
        return
    assert ".." not in f"{name.repo}/{name.revision}/{name.path}".split("/")
    assert not name.path.startswith("/")


# --- fetching ---

PRELUDE = """
import json, logging, pathlib, sys
from frameloom.errors import CheckpointError
from frameloom.weights.hub import *
from frameloom.weights.hub import download_checkpoint, download_files, list_files, parse_name
def told(action, *arguments):
    try: return str(action(*arguments))
    except CheckpointError as error: return f"REFUSED {error}"
"""
WHOLE = PRELUDE + "print(told(lambda: download_checkpoint(list_files(parse_name(sys.argv[1])))))"
FILE = PRELUDE + "print(told(lambda: download_files(sys.argv[1])[0]))"
QUICKLY = """
import time
from huggingface_hub import constants
constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = 0.3
time.sleep = lambda _: None
"""


@pytest.fixture
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def environment(address, home, **settings):
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.lower().endswith("_proxy") and not key.startswith("HF_")
    }
    path = str(Path(frameloom.__file__).parents[1])
    return {**inherited, "HF_ENDPOINT": address, "HF_HOME": str(home), "PYTHONPATH": path, **settings}


def ask(hub: Hub | str, home, code, *arguments, **settings):
    """What a fresh process prints."""
    address = hub if isinstance(hub, str) else hub.address
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(address, home, **settings), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def small_checkpoint():
    files = {name: b"{}" for name in DIFFUSERS["Wan2.1-T2V-1.3B-Diffusers"] if not name.endswith(".safetensors")}
    files |= {name: name.encode() * 50 for name in [*VAE, *TOKENIZER] if name.endswith((".safetensors", ".model"))}
    for folder, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        shard = f"{stem}-00001-of-00001.safetensors"
        files[f"{folder}/{stem}.safetensors.index.json"] = json.dumps({"weight_map": {"a": shard}}).encode()
        files[f"{folder}/{shard}"] = shard.encode() * 100
    return files


def files_in(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


BALLAST = {
    "README.md": b"much",
    "transformer/diffusion_pytorch_model-00001-of-00009.safetensors": b"of an older save",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"another dtype",
    "transformer/diffusion_pytorch_model.bin": b"a pickle",
    "vae/diffusion_pytorch_model.safetensors.bak": b"forgotten",
    "other/model.safetensors": b"no component",
}
DEAD = "http://127.0.0.1:9"


def noise(size):
    return random.Random(size).randbytes(size)


def test_fetches_what_is_needed_once(hub, home):
    files = small_checkpoint()
    hub.add("o/n", files | BALLAST)
    folder = Path(ask(hub, home, WHOLE, "o/n"))
    assert files_in(folder) == files
    assert hub.fetched() <= set(files)
    assert [path for _, path, _ in hub.asked if path.startswith("/api/models/")] == ["/api/models/o/n/revision/main"]
    sent = hub.large_bytes()
    assert sent == sum(len(data) for name, data in files.items() if name.endswith((".safetensors", ".model")))

    hub.asked.clear()
    assert ask(hub, home, WHOLE, "o/n") == str(folder)
    assert [(method, path) for method, path, _ in hub.asked] == [("GET", "/api/models/o/n/revision/main")]


def test_works_from_the_cache_without_the_hub(hub, home):
    hub.add("o/n", small_checkpoint())
    folder = ask(hub, home, WHOLE, "o/n")
    hub.asked.clear()
    assert ask(hub, home, WHOLE, "o/n", HF_HUB_OFFLINE="1") == folder
    assert hub.asked == []
    told = WHOLE.replace("import", "import logging, sys; logging.basicConfig(stream=sys.stdout); import", 1)
    assert ask(DEAD, home, told, "o/n").endswith(
        f"using what was fetched before (commit {Path(folder).name[:8]})\n{folder}"
    )
    hub.repositories["o/n"].refusal = (503, {})
    assert ask(hub, home, WHOLE, "o/n") == folder


def test_names_the_first_file_that_the_cache_lacks(hub, home):
    hub.add("o/n", small_checkpoint())
    folder = Path(ask(hub, home, WHOLE, "o/n"))
    for name in VAE:
        (folder / name).unlink()
    said = ask(hub, home, WHOLE, "o/n", HF_HUB_OFFLINE="1")
    assert said.startswith("REFUSED 'o/n' cannot be asked for while HF_HUB_OFFLINE is set; unset it")
    assert said.endswith("the cache lacks vae/config.json")
    assert "the cache lacks vae/config.json" in ask(DEAD, home, WHOLE, "o/n")
    assert "the cache lacks vae/config.json" in ask(hub, home, WHOLE, f"o/n@{folder.name}", HF_HUB_OFFLINE="1")
    said = ask(hub, home, WHOLE, "o/other", HF_HUB_OFFLINE="1")
    assert said.startswith("REFUSED 'o/other' cannot be asked for while HF_HUB_OFFLINE is set")


def test_the_hub_library_and_we_share_one_cache(hub, home):
    theirs = "from huggingface_hub import snapshot_download; print(snapshot_download('o/n', local_files_only={}))"
    hub.add("o/n", small_checkpoint())
    hub.add("o/m", small_checkpoint() | {"vae/diffusion_pytorch_model.safetensors": b"differs"})
    folder = ask(hub, home, WHOLE, "o/n")
    assert ask(hub, home, theirs.format(True), HF_HUB_OFFLINE="1") == folder
    folder = ask(hub, home, theirs.replace("o/n", "o/m").format(False))
    assert ask(hub, home, WHOLE, "o/m", HF_HUB_OFFLINE="1") == folder
    hub.asked.clear()
    assert ask(hub, home, WHOLE, "o/m") == folder
    assert len(hub.asked) == 1


def test_takes_the_revision_that_is_asked_for(hub, home):
    repository = hub.add("o/n", {"x.gguf": b"new"})
    repository.revisions |= {"v1": {"x.gguf": b"old"}, "feat/x": small_checkpoint()}
    commit = repository.commit("v1")
    code = PRELUDE + "print(json.dumps([told(lambda: download_files(name)[0].read_bytes()) for name in sys.argv[1:]]))"
    asked = ("o/n@v1/x.gguf", f"o/n@{commit}/x.gguf", "o/n/x.gguf", "o/n@v2/x.gguf", "o/n@v1/y.gguf", "o/n")
    *contents, no_revision, no_file, no_path = json.loads(ask(hub, home, code, *asked))
    assert contents == ["b'old'", "b'old'", "b'new'"]
    assert no_revision.startswith("REFUSED 'o/n' has no revision 'v2'; check the branch, tag or commit after the @")
    assert no_file == "REFUSED 'o/n' holds no file 'y.gguf'; did you mean 'o/n/x.gguf'?"
    assert no_path == "REFUSED 'o/n' is a repository, and a file of it is needed; did you mean 'o/n/x.gguf'?"
    hub.asked.clear()
    assert json.loads(ask(hub, home, code, f"o/n@{commit}/x.gguf")) == ["b'old'"]
    assert hub.asked == []  # a commit never changes
    folder = Path(ask(hub, home, WHOLE, "o/n@feat/x"))
    assert files_in(folder) == small_checkpoint()
    assert ask(hub, home, WHOLE, "o/n@feat%2Fx", HF_HUB_OFFLINE="1") == str(folder)


REFUSALS = {
    "o/gated": (403, {"X-Error-Code": "GatedRepo"}, "asks for its licence to be accepted"),
    "o/forbidden": (403, {"X-Error-Message": "no"}, "may not be read with this token (403)"),
    "o/busy": (429, {}, "had too many requests (429); wait some minutes"),
    "o/broken": (500, {}, "cannot be downloaded (the hub answers 500); check the network, or give a local folder"),
    "o/vague": (404, {}, "(404), which may be no model hub; check HF_ENDPOINT"),
}


def test_says_what_the_hub_refused(hub, home):
    for name, (status, headers, _) in REFUSALS.items():
        hub.add(name, {}).refusal = (status, headers)
    hub.add("o/private", small_checkpoint(), token="secret")
    code = PRELUDE + "print(json.dumps([told(list_files, parse_name(name)) for name in sys.argv[1:]]))"
    *known, unknown, private = json.loads(ask(hub, home, code, *REFUSALS, "o/unknown", "o/private"))
    for said, (name, (_, _, match)) in zip(known, REFUSALS.items(), strict=True):
        assert said.startswith(f"REFUSED '{name}' ")
        assert match in said
    assert "is no local folder and no public hub repository; check the name, or log in if private" in unknown
    assert "check the name, or log in if private" in private
    (wrong,) = json.loads(ask(hub, home, code, "o/private", HF_TOKEN="guessed"))
    assert "does not know this token (401); mend HF_TOKEN" in wrong
    assert ask(hub, home, WHOLE, "o/private", HF_TOKEN="secret").startswith(str(home))
    assert not hub.leaked


def listing_of(**file):
    return json.dumps({"id": "o/n", "sha": "0" * 40, "siblings": [{"rfilename": "x.gguf", **file}]}).encode()


STRANGE = (
    b"<html>welcome</html>",
    b"[]",
    b"{}",
    b'{"id": "o/n", "sha": "../../x", "siblings": []}',
    b'{"id": "o/n", "sha": null}',
    listing_of(size=-1),
    listing_of(size="much"),
    listing_of(rfilename=7),
    listing_of(size=1, lfs={"size": 1, "sha256": "../../../x", "pointerSize": 1}),
)


def test_says_what_is_no_hub(hub, home):
    code = PRELUDE + "print(json.dumps([told(list_files, parse_name(name)) for name in sys.argv[1:]]))"
    names = [f"o/n{index}" for index in range(len(STRANGE))]
    for name, answer in zip(names, STRANGE, strict=True):
        hub.add(name, {}).answer = answer
    for said in json.loads(ask(hub, home, code, *names)):
        assert f"got an answer from {hub.address} that no model hub gives; check HF_ENDPOINT" in said
    (said,) = json.loads(ask(DEAD, home, code, "o/n"))
    assert said.startswith(f"REFUSED 'o/n' cannot be downloaded from {DEAD} (ConnectError); check the network")
    (said,) = json.loads(ask("nonsense", home, code, "o/n"))
    assert "cannot be downloaded from nonsense (UnsupportedProtocol)" in said


def test_no_file_of_the_hub_leaves_the_cache(hub, home):
    names = ("../../../evil.gguf", "/evil.gguf", "vae/../../evil.gguf", "a\\..\\evil.gguf")
    hub.add("o/n", dict.fromkeys(names, b"evil"))
    code = PRELUDE + "print(json.dumps([told(download_files, 'o/n', [name]) for name in sys.argv[1:]]))"
    for said in json.loads(ask(hub, home, code, *names)):
        assert said.startswith("REFUSED 'o/n' holds no file")
    assert not list(home.parent.rglob("*evil*"))


FILE_REFUSALS = {
    401: "lists '401.gguf', but its server wants a token that it knows (401); mend HF_TOKEN, or log in",
    403: "lists '403.gguf', but its server refuses it (403); use a token that may read it, or run this again later",
    404: "lists '404.gguf', but its server has no such file (404); run this again later, or choose another revision",
    500: "cannot be downloaded (the hub answers 500); check the network, or give a local folder",
}


def test_says_which_file_is_listed_and_not_given(hub, home):
    files = {f"{status}.gguf": noise(status) for status in FILE_REFUSALS}
    hub.add("o/n", files)
    hub.refused = {hash_of(noise(status)): status for status in FILE_REFUSALS}
    code = PRELUDE + "print(json.dumps([told(download_files, 'o/n', [path]) for path in sys.argv[1:]]))"
    said = json.loads(ask(hub, home, QUICKLY + code, *files))
    assert said == [f"REFUSED 'o/n' {sentence}" for sentence in FILE_REFUSALS.values()]


# --- transfers that do not go well ---


def test_goes_on_where_a_connection_was_cut(hub, home):
    data = noise(CHUNK + 3 * 2**20)
    hub.add("o/n", {"x.gguf": data})
    hub.cut_at = CHUNK + 2**20
    assert Path(ask(hub, home, FILE, "o/n/x.gguf")).read_bytes() == data
    assert hub.large_ranges() == [None, f"bytes={CHUNK}-"]
    assert hub.large_bytes() == len(data) + 2**20


def test_goes_on_where_the_hub_fell_silent(hub, home):
    data = noise(CHUNK + 2 * 2**20)
    hub.add("o/n", {"x.gguf": data})
    hub.cut_at, hub.stall_s = CHUNK, 6.0
    assert Path(ask(hub, home, FILE, "o/n/x.gguf", HF_HUB_DOWNLOAD_TIMEOUT="3")).read_bytes() == data
    assert hub.large_ranges() == [None, f"bytes={CHUNK}-"]


def test_gives_up_when_the_hub_stays_silent(hub, home):
    hub.add("o/n", {"x.gguf": noise(2 * CHUNK)})
    hub.cut_at, hub.cuts, hub.stall_s = 1000, 100, 2.0
    hub.add("o/slow", {}).hang_s = 2.0
    code = PRELUDE + "print(json.dumps([told(download_files, name, ['x.gguf']) for name in sys.argv[1:]]))"
    silent, slow = json.loads(ask(hub, home, QUICKLY + code, "o/n", "o/slow"))
    why = f"cannot be downloaded from {hub.address} (ReadTimeout); check the network, or give a local folder"
    assert (silent, slow) == (f"REFUSED 'o/n' {why}", f"REFUSED 'o/slow' {why}")
    assert len(hub.large_ranges()) == 6


def test_refuses_a_file_that_is_longer_than_the_hub_said(hub, home):
    data = noise(1000)
    hub.add("o/n", {"x.gguf": data})
    hub.surplus = b"more"
    said = ask(hub, home, FILE, "o/n/x.gguf")
    assert said.startswith(
        "REFUSED the server sends more of 'x.gguf' of 'o/n' than the 1000 bytes that the hub announced"
    )
    hub.surplus = b""
    assert Path(ask(hub, home, FILE, "o/n/x.gguf")).read_bytes() == data


def test_refuses_a_file_that_is_shorter_than_the_hub_said(hub, home):
    hub.add("o/n", {"x.gguf": noise(1000)}, sizes={"x.gguf": 1001})
    said = ask(hub, home, FILE, "o/n/x.gguf")
    assert said == "REFUSED 'o/n' sent fewer bytes of a file than it announced; run this again to go on"


def test_goes_on_after_an_interruption(hub, home):
    data = noise(3 * CHUNK)
    hub.add("o/n", {"x.gguf": data})
    hub.pause_s = 0.03
    process = subprocess.Popen(
        [sys.executable, "-c", FILE, "o/n/x.gguf"], env=environment(hub.address, home), stderr=subprocess.PIPE
    )
    while hub.large_bytes() < CHUNK + 2 * 2**20 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=240)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in told
    assert not list(home.rglob("*.gguf"))

    hub.asked.clear()
    hub.served.clear()
    hub.pause_s = 0.0
    assert Path(ask(hub, home, FILE, "o/n/x.gguf")).read_bytes() == data
    (went_on,) = hub.large_ranges()
    assert went_on in (f"bytes={CHUNK}-", f"bytes={2 * CHUNK}-")
    assert hub.large_bytes() <= len(data) - CHUNK


def test_a_file_that_arrives_damaged_is_removed(hub, home):
    data = noise(1000)
    hub.add("o/n", {"x.gguf": data})
    hub.damaged = {hash_of(data)}
    said = ask(hub, home, FILE, "o/n/x.gguf")
    assert said.startswith("REFUSED 'x.gguf' of 'o/n' is damaged (its sha256 is not what the hub says) and was removed")
    assert not list(home.rglob("*.partial"))
    hub.damaged = set()
    assert Path(ask(hub, home, FILE, "o/n/x.gguf")).read_bytes() == data


def test_a_small_file_that_arrives_damaged_is_removed(hub, home):
    data = b'{"small": 1}'
    hub.add("o/n", {"config.json": data})
    hub.damaged = {git_hash_of(data)}
    said = ask(hub, home, FILE, "hf://o/n/config.json")
    assert said.startswith(
        "REFUSED 'config.json' of 'o/n' is damaged (its sha1 is not what the hub says) and was removed"
    )
    hub.damaged = set()
    assert Path(ask(hub, home, FILE, "hf://o/n/config.json")).read_bytes() == data


def test_a_file_damaged_in_the_cache_is_fetched_again(hub, home):
    files = {"x.gguf": noise(1000), "config.json": bytes(range(32, 122))}
    hub.add("o/n", files)
    code = PRELUDE + (
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "for name, size in (('x.gguf', 1000), ('x.gguf', 10), ('config.json', 90), ('config.json', 10)):\n"
        "    download_files('o/n', [name])[0].write_bytes(bytes(size))\n"
        "    download_files('o/n', [name])\n"
        "print(download_files('o/n', [name])[0].parent)"
    )
    *lines, folder = ask(hub, home, code).splitlines()
    assert lines == [
        f"'{name}' of 'o/n' is damaged in the cache ({why})"
        for name, why in (
            ("x.gguf", "its sha256 is not what the hub says"),
            ("x.gguf", "10 of 1000 bytes"),
            ("config.json", "its sha1 is not what the hub says"),
            ("config.json", "10 of 90 bytes"),
        )
    ]
    assert files_in(Path(folder)) == files


def test_what_is_damaged_stays_while_the_hub_cannot_be_asked(hub, home):
    hub.add("o/n", {"config.json": b"{}"})
    file = Path(ask(hub, home, FILE, "hf://o/n/config.json"))
    file.write_bytes(b"[]")
    said = ask(hub, home, FILE, "hf://o/n/config.json", HF_HUB_OFFLINE="1")
    assert said.endswith("unset it, or give a local folder; the cache lacks config.json")
    assert file.read_bytes() == b"[]"
    assert ask(hub, home, FILE, "hf://o/n/config.json") == str(file)
    assert file.read_bytes() == b"{}"


def test_a_hash_is_computed_once(hub, home):
    hub.add("o/n", {"x.gguf": noise(1000)})
    file = Path(ask(hub, home, FILE, "o/n/x.gguf"))
    before = file.stat()
    file.write_bytes(bytes(1000))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ask(hub, home, FILE, "o/n/x.gguf") == str(file)  # what looks untouched is not read again


def test_says_before_the_start_that_there_is_too_little_space(hub, home):
    hub.add("o/n", {"x.gguf": b"x"}, sizes={"x.gguf": 10**18})
    said = ask(hub, home, FILE, "o/n/x.gguf")
    assert said.startswith("REFUSED 'o/n' needs 1,000,000,000.0 GB more in ")
    assert said.endswith("make room, or set HF_HOME to a folder on a larger disk")
    assert hub.large_ranges() == []


def test_says_that_the_disk_is_full_and_goes_on_later(hub, home):
    data = noise(2 * CHUNK)
    hub.add("o/n", {"x.gguf": data})
    no_more = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({CHUNK + 5},) * 2)\n"
    said = ask(hub, home, no_more + FILE, "o/n/x.gguf")
    assert said.startswith("REFUSED 'o/n' does not fit: ")
    hub.asked.clear()
    assert Path(ask(hub, home, FILE, "o/n/x.gguf")).read_bytes() == data
    assert hub.large_ranges() == [f"bytes={CHUNK + 5}-"]


def test_two_processes_fetch_a_file_once(hub, home):
    data = noise(CHUNK)
    hub.add("o/n", {"x.gguf": data})
    hub.pause_s = 0.02
    command = [sys.executable, "-c", FILE, "o/n/x.gguf"]
    started = [
        subprocess.Popen(command, env=environment(hub.address, home), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240)[0].strip() for process in started]
    assert said[0] == said[1]
    assert Path(said[0]).read_bytes() == data
    assert hub.large_bytes() == len(data)


# --- progress ---


def test_tells_how_far_it_is(hub, home):
    files = small_checkpoint()
    hub.add("o/n", files)
    code = PRELUDE + (
        "news = []\n"
        "download_checkpoint(list_files(parse_name('o/n')), on_bytes=lambda *new: news.append(new))\n"
        "print(json.dumps(news))"
    )
    news = json.loads(ask(hub, home, code))
    assert {repo for repo, _, _ in news} == {"o/n"}
    texts = sum(len(data) for name, data in files.items() if not name.endswith(".safetensors"))
    weights = sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))
    assert [total for _, _, total in news] == sorted((total for _, _, total in news), key=[texts, weights].index)
    for total in (texts, weights):
        done = [done for _, done, of in news if of == total]
        assert done == sorted(done)
        assert done[-1] == total


def test_without_a_terminal_there_are_lines_and_no_bars(hub, home):
    files = small_checkpoint() | {"vae/diffusion_pytorch_model.safetensors": noise(2_000_000)}
    hub.add("o/n", files)
    logged = (
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\nlogging.getLogger('frameloom').setLevel(20)\n"
    )
    code = PRELUDE + logged + "download_checkpoint(list_files(parse_name('o/n'))); print(file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(hub.address, home), capture_output=True, text=True, timeout=240
    )
    assert done.stderr == "\n"
    assert done.stdout.splitlines() == ["fetching o/n (3 files, 2.0 MB)", "o/n: 2.0 MB of 2.0 MB"]


# --- the whole ---


def command(address, home, *arguments, **settings):
    """Run the `frameloom` command in a process of its own; its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "frameloom", *arguments],
        env=environment(address, home, **settings), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def on_a_terminal(address, home, *arguments):
    """What a command shows there."""
    terminal, side = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "frameloom", *arguments],
        env=environment(address, home, TERM="xterm", COLUMNS="120"), stdout=side, stderr=side,
    ) as process:  # fmt: skip
        os.close(side)
        shown = b""
        with contextlib.suppress(OSError):  # how the end is told
            while piece := os.read(terminal, 1 << 16):
                shown += piece
        os.close(terminal)
    assert process.returncode == 0, shown
    return shown.decode()


BAR = re.compile(r"o/n .*━.*/[\d.]+ [kM]B")


def test_inspects_and_generates_from_the_hub_and_then_without_it(hub, home, checkpoint_of, tmp_path):
    root = checkpoint_of()
    hub.add("o/n", files_in(root) | BALLAST)
    code, out, err = command(hub.address, home, "inspect", "o/n", "--json")
    assert code == 0, err
    assert json.loads(out)["components"] == frameloom.describe(root)["components"]
    assert not list(home.rglob("*.safetensors"))

    request = ("generate", "a fox", "--width", "32", "--height", "32", "--frames", "5", "--steps", "1", "--model")
    shown = on_a_terminal(hub.address, home, *request, "o/n", "-o", str(tmp_path / "a"))
    assert BAR.search(shown).end() < shown.index("denoising")
    code, _, err = command(DEAD, home, *request, "o/n@main", "-o", str(tmp_path / "b"), "--json")
    assert code == 0, err
    assert files_in(tmp_path / "a")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    assert hub.fetched().isdisjoint(BALLAST)


def with_variant(files):
    """The same with other weights of the transformer beside the plain ones."""
    data = files["transformer/diffusion_pytorch_model.safetensors"]
    size = int.from_bytes(data[:8], "little")
    return {
        **files,
        "transformer/diffusion_pytorch_model.fp16.safetensors": data[: 8 + size] + bytes(len(data) - 8 - size),
    }


def test_fetches_and_opens_the_variant_that_is_asked_for(hub, home, checkpoint_of):
    files = with_variant(files_in(checkpoint_of()))
    hub.add("o/n", files)
    weights = {name for name in files if name.startswith("transformer/") and name.endswith(".safetensors")}
    code = (
        "import sys; from frameloom.weights.source import open_checkpoint\n"
        "print(open_checkpoint('o/n', variant=sys.argv[1]).components['transformer'].files[0].name)"
    )
    for variant, name in (
        ("fp16", "diffusion_pytorch_model.fp16.safetensors"),
        ("", "diffusion_pytorch_model.safetensors"),
    ):
        hub.asked.clear()
        assert ask(hub, home, code, variant) == name
        assert hub.fetched() & weights == {f"transformer/{name}"}
    code, _, err = command(hub.address, home, "inspect", "o/n", "--variant", "fp8")
    assert (code, err) == (
        2, "frameloom: 'o/n' has no variant 'fp8'; choose fp16, or leave --variant out\n"
    )  # fmt: skip


def test_inspects_the_variant_though_the_plain_files_were_fetched_before(hub, home, checkpoint_of):
    files = files_in(checkpoint_of())
    hub.add("o/n", files | {"transformer/diffusion_pytorch_model.fp16.safetensors": one_tensor()})
    ask(hub, home, "from frameloom.weights.source import open_checkpoint; open_checkpoint('o/n')")
    sizes = {}
    for variant in ("", "fp16"):
        code, out, err = command(hub.address, home, "inspect", "o/n", "--variant", variant, "--json")
        assert code == 0, err
        sizes[variant] = {part["name"]: part["bytes"] for part in json.loads(out)["components"]}
    assert sizes[""] == {part["name"]: part["bytes"] for part in frameloom.describe(checkpoint_of())["components"]}
    assert sizes["fp16"] == sizes[""] | {"transformer": 8}
    assert not list(home.rglob("*.fp16.safetensors"))


def one_tensor():
    header = json.dumps({"patch_embedding.bias": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


def test_a_terminal_shows_a_bar_of_a_download_unless_it_is_to_be_quiet(hub, home, checkpoint_of):
    hub.add("o/n", files_in(checkpoint_of()))
    assert BAR.search(on_a_terminal(hub.address, home, "inspect", "o/n"))
    assert not BAR.search(on_a_terminal(hub.address, home / "another", "inspect", "o/n", "--json"))


def test_converting_without_a_terminal_tells_of_the_download_in_lines(hub, home, checkpoint_of, tmp_path):
    hub.add("o/n", files_in(checkpoint_of()))
    code, out, err = command(hub.address, home, "convert", "o/n", str(tmp_path / "out"), "--to", "original")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("o/n: ")]
    assert lines == list(dict.fromkeys(lines))
    assert lines
    assert all(re.fullmatch(r"o/n: [\d.]+ [KM]?B", line) for line in lines)


def test_opens_original_repositories_and_single_files_of_the_hub(hub, home, checkpoint_of, tmp_path):
    for layout in ("original", "single-file"):
        convert_model(checkpoint_of("two experts"), tmp_path / layout, to=layout)
        files = files_in(tmp_path / layout) | {"vae/other.safetensors": b"not asked for"}
        hub.add(f"o/{layout}", {name.replace("high_noise.", "high_noise-v1.1."): data for name, data in files.items()})
    code = (
        "import sys; from frameloom.weights.source import open_checkpoint\n"
        "parts = dict(text_encoder='text_encoders/umt5.safetensors', vae='vae/vae.safetensors',\n"
        "    transformer='diffusion_models/transformer_low_noise.safetensors', tokenizer='tokenizer/tokenizer.json')\n"
        "parts = {part: f'hf://o/single-file/{path}' for part, path in parts.items()}\n"
        "for found in (open_checkpoint('o/original'), open_checkpoint(None, parts=parts)):\n"
        "    print(sorted((name, len(part.tensors), part.num_parameters) for name, part in found.components.items()))"
    )
    expected = open_checkpoint(checkpoint_of("two experts")).components.items()
    facts = str(sorted((name, len(part.tensors), part.num_parameters) for name, part in expected))
    assert ask(hub, home, code).splitlines() == [facts, facts]
    assert not list(home.rglob("other.safetensors"))
