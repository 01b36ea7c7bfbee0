"""What lies beside the weights of a converted checkpoint: configs, indices of shards, the tokenizer."""

import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frameloom.errors import OutputError
from frameloom.models.encoders import TEXT_LENGTH
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.tokenizer import write_tokenizer
from frameloom.weights.assemble import facts_of
from frameloom.weights.checkpoint import Checkpoint, Component
from frameloom.weights.loose import BESIDE, EXPERT_FOLDERS, FACTS, IMAGE_PROCESSOR_FILE
from frameloom.weights.vocabulary import tokenizer_in
from frameloom.weights.write import Target, make_folder

_DIFFUSERS = "0.35.0"  # the first release that knows all of Wan 2.2
_OF_TRANSFORMERS = ("text_encoder", "tokenizer", "image_encoder", "image_processor")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
_TOKENIZER_IN = {"diffusers": "tokenizer", "original": "google/umt5-xxl", "single-file": "tokenizer"}
_CHANNELS_OF_5B = 48


def metadata_of(checkpoint: Checkpoint, component: Component) -> dict[str, str]:
    """The metadata that says what names and shapes do not."""
    facts = {"kind": component.name.removesuffix("_2"), "config": dict(component.config)}
    if component.name == "transformer":
        facts["checkpoint"] = facts_of(checkpoint)
    return {FACTS: json.dumps(facts, sort_keys=True, ensure_ascii=False)}


def write_descriptions(checkpoint: Checkpoint, root: Path, targets: Sequence[Target], *, to: str) -> None:
    """JSON files and the tokenizer, and the indices of shards."""
    for _, group in itertools.groupby(targets, key=lambda target: target.component):
        _write_index(list(group))
    _write_tokenizer(checkpoint.components["tokenizer"], root / _TOKENIZER_IN[to])
    if (processor := checkpoint.components.get("image_processor")) is not None:
        _copy((IMAGE_PROCESSOR_FILE,), processor.folder, root / "image_processor")
    if to == "original":
        _write_original(checkpoint, root, targets)
    elif to == "diffusers":
        _write_diffusers(checkpoint, root)


def _write_index(shards: Sequence[Target]) -> None:
    """The index of a component that is cut into shards."""
    if len(shards) == 1:
        return
    folder = shards[0].path.parent
    weight_map = {name: shard.path.name for shard in shards for name in shard.tensors}
    size = sum(shard.size_bytes for shard in shards)
    stem = shards[0].path.stem.partition("-0")[0]
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / f"{stem}.safetensors.index.json", content)


def _write_tokenizer(component: Component, folder: Path) -> None:
    if not (component.folder / "tokenizer.json").is_file():
        write_tokenizer(tokenizer_in(component), folder)
        return
    _copy(_TOKENIZER_FILES, component.folder, folder)


def _copy(names: Sequence[str], source: Path, folder: Path) -> None:
    """Those of some files that there are."""
    make_folder(folder)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_diffusers(checkpoint: Checkpoint, root: Path) -> None:
    classes: dict[str, Any] = {"scheduler": ["diffusers", checkpoint.scheduler["_class_name"]]}
    for name, component in checkpoint.components.items():
        library = "transformers" if name in _OF_TRANSFORMERS else "diffusers"
        classes[name] = [library, component.class_name]
        if component.config:
            _write_json(root / name / "config.json", {"_class_name": component.class_name, **component.config})
    index = {
        "_class_name": checkpoint.pipeline,
        "_diffusers_version": _DIFFUSERS,
        **dict(sorted(classes.items())),
        "boundary_ratio": checkpoint.boundary_ratio,
        "expand_timesteps": checkpoint.expand_timesteps,
    }
    _write_json(root / "scheduler" / "scheduler_config.json", dict(checkpoint.scheduler))
    if checkpoint.defaults:
        _write_json(root / "frameloom.json", dict(checkpoint.defaults))
    _write_json(root / "model_index.json", index)


def _write_original(checkpoint: Checkpoint, root: Path, targets: Sequence[Target]) -> None:
    experts = EXPERT_FOLDERS if "transformer_2" in checkpoint.components else {".": "transformer"}
    for folder, name in experts.items():
        _write_json(root / folder / "config.json", original_config(checkpoint.components[name].config))
    for target in targets:
        if target.path.suffix == ".pth":
            _write_json(target.path.with_suffix(".json"), dict(checkpoint.components[target.component].config))
    _write_json(root / BESIDE, facts_of(checkpoint))


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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    make_folder(path.parent)
    try:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); run the same command again to go on") from None
