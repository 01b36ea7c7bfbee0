"""Opens a Wan checkpoint in Diffusers layout, a local folder or a hub id, and checks it at the door.

Reads JSON and the headers of the safetensors files only, so it is quick and needs no torch; load.py reads the
weights. Everything in a checkpoint is untrusted: nothing is unpickled, no name leaves its folder.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from frameloom.errors import CheckpointError
from frameloom.weights.checkpoint import Checkpoint, Component, JsonObject
from frameloom.weights.header import read_header, read_json, read_tensors
from frameloom.weights.hub import RemoteFiles, download

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
# Accepted class names per component. Transformers renamed its tokenizer and processor classes more than once.
_MODEL_CLASSES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("WanTransformer3DModel",),
    "transformer_2": ("WanTransformer3DModel",),
    "vae": ("AutoencoderKLWan",),
    "text_encoder": ("UMT5EncoderModel",),
    "image_encoder": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
}
_PROCESSOR_CLASSES: Mapping[str, tuple[str, ...]] = {
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    "image_processor": (
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "CLIPProcessor",
    ),
}
_REQUIRED = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_SETTINGS = ("boundary_ratio", "expand_timesteps")  # entries of model_index.json that are values, not components

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Groups: the variant ("fp16"), in either of the two places where libraries write it.
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?")
_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_checkpoint(model: str | os.PathLike[str], *, fetch_weights: bool = True) -> Checkpoint:
    """Open a local folder or a hub id ("owner/name", downloaded first) in Diffusers layout.

    Without `fetch_weights` the weight files of a hub id stay there, if they were not fetched before: only their
    headers are read, and the components' `files` are names. Raises CheckpointError, one sentence that says what to do,
    for what is missing, damaged or not supported.
    """
    name = os.fspath(model)
    try:
        folder = _local_folder(name)
        root = folder or download(name, ["model_index.json", "frameloom.json"], hint=_suggestion(Path(name)))
        index = _read_index(root)
        classes = _component_classes(index, where=root / "model_index.json")
        if folder is not None:
            return _checkpoint(root, name, index=index, classes=classes)
        suffixes = ("*.json", "*.safetensors") if fetch_weights else ("*.json",)
        root = download(name, _component_patterns(classes, suffixes), hint=_suggestion(Path(name)))
        if not fetch_weights and not _has_weights(root, classes):
            remote = RemoteFiles(name, commit=root.name)
            return _checkpoint(root, name, index=index, classes=classes, remote=remote)
        return _checkpoint(root, name, index=index, classes=classes)
    except OSError as error:
        raise CheckpointError(f"'{name}' cannot be read ({error}); check the path and its permissions") from None


def open_parts(model: str | os.PathLike[str]) -> Mapping[str, Component]:
    """The components of a checkpoint; or the VAE alone that a local folder holds, as `save_pretrained` writes it.

    Raises CheckpointError as `open_checkpoint` does.
    """
    folder = Path(os.path.expanduser(os.fspath(model)))
    alone = folder / "config.json"
    if folder.is_dir() and not alone.is_file() and not (folder / "model_index.json").exists():
        raise CheckpointError(
            f"'{folder}' has no model_index.json and no config.json; give a checkpoint, or the folder of a VAE alone"
        )
    if not alone.is_file() or (folder / "model_index.json").exists():
        return open_checkpoint(model).components
    (class_name,) = _MODEL_CLASSES["vae"]
    found = read_json(alone).get("_class_name")
    if found != class_name:
        raise CheckpointError(f"{alone} is for {found!r}; give a checkpoint, or a folder that holds an {class_name}")
    return {"vae": _component(folder, "vae", class_name=class_name)}


def _checkpoint(
    root: Path, name: str, *, index: JsonObject, classes: Mapping[str, str], remote: RemoteFiles | None = None
) -> Checkpoint:
    own = root / "frameloom.json"
    checkpoint = Checkpoint(
        path=root,
        name=name,
        index=index,
        pipeline=index["_class_name"],
        boundary_ratio=_boundary_ratio(index, where=root / "model_index.json"),
        expand_timesteps=_expand_timesteps(index, where=root / "model_index.json"),
        scheduler=read_json(root / "scheduler" / "scheduler_config.json"),
        defaults=read_json(own) if own.exists() else {},
        components={
            part: _component(root / part, part, class_name=classes[part], remote=remote)
            for part in classes
            if part != "scheduler"
        },
    )
    _check_parts(checkpoint)
    return checkpoint


# --- where the folder is ---


def _local_folder(name: str) -> Path | None:
    """The folder `name` means, or None when it can only be a hub id."""
    path = Path(os.path.expanduser(name))  # pathlib raises for an unknown ~user
    if path.is_file():
        raise CheckpointError(f"'{name}' is a file; give the folder that holds model_index.json")
    if name and path.is_dir():
        return path
    if _HUB_ID.fullmatch(name):
        return None
    raise CheckpointError(
        f"there is no folder '{name}'{_suggestion(path)}; give a checkpoint folder or a hub id 'owner/name'"
    )


def _suggestion(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (did you mean '{path.parent / close[0]}'?)" if close else ""


def _component_patterns(classes: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    """Files to fetch: of the listed components only, and never a pickle."""
    return ["model_index.json", "frameloom.json", "tokenizer/*.model", "tokenizer/*.txt"] + [
        f"{part}/{suffix}" for part in classes for suffix in suffixes
    ]


# --- model_index.json ---


def _read_index(root: Path) -> JsonObject:
    path = root / "model_index.json"
    if not path.is_file():
        raise CheckpointError(f"'{root}' has no model_index.json{_layout_hint(root)}")
    index = read_json(path)
    if index.get("_class_name") not in PIPELINES:
        raise CheckpointError(
            f"{path} asks for {index.get('_class_name')!r}; supported pipelines are {' and '.join(PIPELINES)}"
        )
    return index


def _layout_hint(root: Path) -> str:
    parent = root.resolve().parent
    if (parent / "model_index.json").is_file():
        return f"; it is one part of a checkpoint: give the parent '{parent}'"
    inside = sorted(entry.parent for entry in root.glob("*/model_index.json"))
    if inside:
        return f"; did you mean '{inside[0]}'?"
    return "; give a checkpoint in Diffusers layout (its name usually ends in -Diffusers)"


def _component_classes(index: JsonObject, *, where: Path) -> dict[str, str]:
    """Class name per component that is present (not [null, null]), all of them known."""
    classes: dict[str, str] = {}
    for part, value in index.items():
        if part.startswith("_") or part in _SETTINGS:
            continue
        if not (isinstance(value, list) and len(value) == 2):
            raise CheckpointError(f"{where} has '{part}', unknown to this version; use a Wan 2.1 or 2.2 checkpoint")
        if value[1] is not None:
            classes[part] = _known_class(part, value[1], where=where)
    missing = [part for part in _REQUIRED if part not in classes]
    if missing:
        raise CheckpointError(f"{where} lists no {', '.join(missing)}; a Wan checkpoint needs {', '.join(_REQUIRED)}")
    return classes


def _known_class(part: str, class_name: object, *, where: Path) -> str:
    if part == "scheduler" and isinstance(class_name, str):
        return class_name  # judged by sampling, which knows what it can compute
    known = _MODEL_CLASSES.get(part) or _PROCESSOR_CLASSES.get(part)
    if known is None:
        raise CheckpointError(
            f"{where} lists the component '{part}', unknown to this version; use a Wan 2.1 or 2.2 checkpoint"
        )
    if not isinstance(class_name, str) or class_name not in known:
        raise CheckpointError(f"{where} asks for {class_name!r} as {part}; supported is {' or '.join(known)}")
    return class_name


def _boundary_ratio(index: JsonObject, *, where: Path) -> float | None:
    value = index.get("boundary_ratio")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise CheckpointError(f"{where} has boundary_ratio {value!r}; it must be null or between 0 and 1, as 0.875")
    return float(value)


def _expand_timesteps(index: JsonObject, *, where: Path) -> bool:
    value = index.get("expand_timesteps")
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where} has expand_timesteps {value!r}; it must be true or false")
    return bool(value)


def _check_parts(checkpoint: Checkpoint) -> None:
    """Parts that only make sense together."""
    parts = checkpoint.components
    where = checkpoint.path / "model_index.json"
    if ("transformer_2" in parts) != (checkpoint.boundary_ratio is not None):
        raise CheckpointError(f"{where}: transformer_2 and boundary_ratio belong together, but only one is given")
    wants_image = parts["transformer"].config.get("image_dim") is not None
    has_image = {"image_encoder", "image_processor"} <= parts.keys()
    if wants_image and not has_image:
        raise CheckpointError(
            f"{where} lists no image_encoder and image_processor, but the transformer has an image_dim"
        )


# --- one component ---


def _has_weights(root: Path, classes: Mapping[str, str]) -> bool:
    """Whether the weight files of every network are in the folder, all shards of them."""
    try:
        for part in classes:
            if part in _MODEL_CLASSES:
                read_tensors(_weight_files(root / part, _names(root / part)))
    except CheckpointError:
        return False
    return True


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _component(folder: Path, name: str, *, class_name: str, remote: RemoteFiles | None = None) -> Component:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing, though model_index.json lists it; download the checkpoint again")
    is_model = name in _MODEL_CLASSES
    names = remote.names(name) if remote else _names(folder)
    files = _weight_files(folder, names) if is_model else ()
    return Component(
        name=name,
        folder=folder,
        described_by=folder / "config.json",
        class_name=class_name,
        config=_config(folder / "config.json", class_name) if is_model else {},
        files=files,
        tensors=read_tensors(files, remote.header if remote else read_header),
    )


def _config(path: Path, class_name: str) -> JsonObject:
    config = read_json(path)
    if config.get("_class_name", class_name) != class_name:
        raise CheckpointError(
            f"{path} is for {config['_class_name']!r}, model_index.json says {class_name}; download both"
        )
    return config


def _weight_files(folder: Path, names: list[str]) -> tuple[Path, ...]:
    """The weight files of one component: without a variant if there is such a set, else its only variant."""
    found: dict[str, Path] = {}
    for name in sorted(names, key=lambda name: name.endswith(".json")):  # an index wins over a single file
        if match := _WEIGHTS.fullmatch(name):
            found[match[1] or match[2] or ""] = folder / name
    if not found:
        raise CheckpointError(_no_weights(folder, names))
    if "" not in found and len(found) > 1:
        raise CheckpointError(f"{folder} holds the variants {', '.join(sorted(found))}; keep one of them")
    chosen = found.get("") or next(iter(found.values()))
    return _shards(chosen, names) if chosen.suffix == ".json" else (chosen,)


def _shards(index_path: Path, present: list[str]) -> tuple[Path, ...]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map; download it again")
    for value in weight_map.values():  # file names from outside: only a plain name in this folder will do
        if not isinstance(value, str) or not _SHARD.fullmatch(value) or ".." in value:
            raise CheckpointError(
                f"{index_path} names the weight file {value!r}; only plain *.safetensors names are opened"
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if name not in present]
    if missing:
        raise CheckpointError(
            f"{index_path.parent} lacks {_some(missing)}, listed in {index_path.name}; download the rest"
        )
    return tuple(index_path.parent / name for name in names)


def _no_weights(folder: Path, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return f"{folder} holds only pickles ({_some(pickles)}), which can run code; convert them to safetensors"
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return f"{folder} holds {_some(shards)} but no *.safetensors.index.json listing them; download it again"
    return f"{folder} holds no diffusion_pytorch_model.safetensors or model.safetensors; download it again"


def _some(names: list[str]) -> str:
    """The first three of `names` as text."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
