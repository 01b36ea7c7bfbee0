"""What lies beside the weights of a converted checkpoint: configs, indices of shards, the tokenizer."""

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frameloom.errors import CheckpointError, OutputError
from frameloom.models.encoders import TEXT_LENGTH
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.tokenizer import write_tokenizer
from frameloom.weights.assemble import facts_of
from frameloom.weights.checkpoint import Checkpoint, Component
from frameloom.weights.loose import BESIDE, EXPERT_FOLDERS, FACTS, IMAGE_PROCESSOR_FILE
from frameloom.weights.vocabulary import tokenizer_in
from frameloom.weights.write import Target

_DIFFUSERS = "0.35.0"  # the first release that knows all of Wan 2.2
_OF_TRANSFORMERS = ("text_encoder", "tokenizer", "image_encoder", "image_processor")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
_TOKENIZER_IN = {"diffusers": "tokenizer", "original": "google/umt5-xxl", "single-file": "tokenizer"}
_CHANNELS_OF_5B = 48
_MAX_BYTES = 256 * 2**20  # of one file that is copied; the tokenizer.json of UMT5 has 17 MB


def metadata_of(checkpoint: Checkpoint, component: Component) -> dict[str, str]:
    """The metadata that says what names and shapes do not."""
    facts = {"kind": component.name.removesuffix("_2"), "config": dict(component.config)}
    if component.name == "transformer":
        facts["checkpoint"] = facts_of(checkpoint)
    return {FACTS: json.dumps(facts, sort_keys=True, ensure_ascii=False)}


def describe(checkpoint: Checkpoint, root: Path, targets: Sequence[Target], *, to: str) -> dict[Path, bytes]:
    """The files that belong into `root` beside the weights, in the order in which they are written: all they hold.

    Indices of shards, JSON files and the tokenizer. Raises CheckpointError where the tokenizer cannot be read.
    """
    files: dict[Path, bytes] = {}
    for _, group in itertools.groupby(targets, key=lambda target: target.component):
        files |= _index(list(group))
    files |= _tokenizer(checkpoint.components["tokenizer"], root / _TOKENIZER_IN[to])
    if (processor := checkpoint.components.get("image_processor")) is not None:
        files |= _copied((IMAGE_PROCESSOR_FILE,), processor.folder, root / "image_processor")
    if to == "original":
        files |= _original(checkpoint, root, targets)
    elif to == "diffusers":
        files |= _diffusers(checkpoint, root)
    return files


def _index(shards: Sequence[Target]) -> dict[Path, bytes]:
    """The index of a component that is cut into shards."""
    if len(shards) == 1:
        return {}
    folder = shards[0].path.parent
    weight_map = {name: shard.path.name for shard in shards for name in shard.tensors}
    size = sum(shard.size_bytes for shard in shards)
    stem = shards[0].path.stem.partition("-0")[0]
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return {folder / f"{stem}.safetensors.index.json": _json(content)}


def _tokenizer(component: Component, folder: Path) -> dict[Path, bytes]:
    """The files it has, or those made of its bare vocabulary."""
    if (component.folder / "tokenizer.json").is_file():
        return _copied(_TOKENIZER_FILES, component.folder, folder)
    tokenizer = tokenizer_in(component)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            write_tokenizer(tokenizer, Path(scratch))
        except Exception as error:  # the library raises bare Exception where the disk is full
            raise OutputError(f"the tokenizer cannot be written into {scratch} ({error}); make room there") from None
        return _copied(_TOKENIZER_FILES, Path(scratch), folder)


def _copied(names: Sequence[str], source: Path, folder: Path) -> dict[Path, bytes]:
    """Those of some files that there are."""
    return {folder / name: _content(source / name) for name in names if (source / name).is_file()}


def _content(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, more than a tokenizer needs; download it again")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _diffusers(checkpoint: Checkpoint, root: Path) -> dict[Path, bytes]:
    """The model_index.json comes last: it says that all the rest is there."""
    files = {root / "scheduler" / "scheduler_config.json": _json(checkpoint.scheduler)}
    classes: dict[str, Any] = {"scheduler": ["diffusers", checkpoint.scheduler["_class_name"]]}
    for name, component in checkpoint.components.items():
        library = "transformers" if name in _OF_TRANSFORMERS else "diffusers"
        classes[name] = [library, component.class_name]
        if component.config:
            files[root / name / "config.json"] = _json({"_class_name": component.class_name, **component.config})
    if checkpoint.defaults:
        files[root / "frameloom.json"] = _json(checkpoint.defaults)
    index = {
        "_class_name": checkpoint.pipeline,
        "_diffusers_version": _DIFFUSERS,
        **dict(sorted(classes.items())),
        "boundary_ratio": checkpoint.boundary_ratio,
        "expand_timesteps": checkpoint.expand_timesteps,
    }
    return {**files, root / "model_index.json": _json(index)}


def _original(checkpoint: Checkpoint, root: Path, targets: Sequence[Target]) -> dict[Path, bytes]:
    experts = EXPERT_FOLDERS if "transformer_2" in checkpoint.components else {".": "transformer"}
    configs = {name: checkpoint.components[name].config for name in checkpoint.components}
    transformers = {root / at / "config.json": _json(original_config(configs[name])) for at, name in experts.items()}
    pickles = {t.path.with_suffix(".json"): _json(configs[t.component]) for t in targets if t.is_pickle}
    return {**transformers, **pickles, root / BESIDE: _json(facts_of(checkpoint))}


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the original code, of a transformer's config."""
    spec = TransformerSpec.from_config(config)
    takes_image = spec.in_channels != spec.out_channels
    kind = "flf2v" if spec.pos_embed_seq_len is not None else "i2v" if takes_image else "t2v"
    vace = {}
    if isinstance(spec, VaceSpec):
        vace = {"vace_layers": list(spec.vace_layers), "vace_in_dim": spec.vace_in_channels}
        kind = "vace"
    return {
        "_class_name": "VaceWanModel" if vace else "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": spec.dim,
        "eps": spec.eps,
        "ffn_dim": spec.ffn_dim,
        "freq_dim": spec.freq_dim,
        "in_dim": spec.in_channels,
        "model_type": "ti2v" if spec.in_channels == _CHANNELS_OF_5B else kind,
        "num_heads": spec.num_attention_heads,
        "num_layers": spec.num_layers,
        "out_dim": spec.out_channels,
        "text_len": TEXT_LENGTH,
        **vace,
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n").encode()
