"""Reads checkpoints in Diffusers layout: model_index.json, and one folder per component.

JSON and the headers of the safetensors files only, so it is quick. Everything in a checkpoint is untrusted: no name
leaves its folder.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from frameloom.errors import CheckpointError
from frameloom.weights.checkpoint import PIPELINES, Checkpoint, Component, JsonObject, boundary_ratio, expand_timesteps
from frameloom.weights.header import read_header, read_json, read_tensors, shard_names
from frameloom.weights.hub import RemoteFiles
from frameloom.weights.hub_choice import choose_variant

# Accepted class names per component. Transformers renamed its tokenizer and processor classes more than once.
_MODEL_CLASSES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("WanTransformer3DModel", "WanVACETransformer3DModel"),
    "transformer_2": ("WanTransformer3DModel", "WanVACETransformer3DModel"),
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

# Groups: the variant ("fp16"), in either of the two places where libraries write it.
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_layout(
    root: Path,
    name: str,
    *,
    instead: Mapping[str, Component] | None = None,
    remote: RemoteFiles | None = None,
    variant: str = "",
) -> Checkpoint:
    """The checkpoint in a folder with a model_index.json; components that are given `instead` are not looked at.

    `remote`: where weight files are that were not fetched. `variant`: of the weight files, where a component has it.
    Raises CheckpointError.
    """
    index, where, own = read_index(root), root / "model_index.json", root / "frameloom.json"
    instead = instead or {}
    classes = component_classes(index, where=where, without=instead)
    components = {
        part: open_component(root / part, part, class_name=class_name, remote=remote, variant=variant)
        for part, class_name in classes.items()
        if part != "scheduler"
    }
    checkpoint = Checkpoint(
        path=root,
        name=name,
        index=index,
        pipeline=index["_class_name"],
        boundary_ratio=boundary_ratio(index, where=where),
        expand_timesteps=expand_timesteps(index, where=where),
        scheduler=read_json(root / "scheduler" / "scheduler_config.json"),
        defaults=read_json(own) if own.exists() else {},
        components={**components, **instead},
    )
    if "transformer" not in instead:
        _check_parts(checkpoint)
    return checkpoint


# --- model_index.json ---


def read_index(root: Path) -> JsonObject:
    """The model_index.json of a folder. Raises CheckpointError for a pipeline that is not computed here."""
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
    return " and no weight files; give a checkpoint's folder, in Diffusers layout or that of the original code"


def component_classes(index: JsonObject, *, where: Path, without: Collection[str] = ()) -> dict[str, str]:
    """Class name per component that is present (not [null, null]), all of them known; those `without` are left out.

    Raises CheckpointError.
    """
    classes: dict[str, str] = {}
    for part, value in index.items():
        if part.startswith("_") or part in _SETTINGS or part in without:
            continue
        if not (isinstance(value, list) and len(value) == 2):
            raise CheckpointError(f"{where} has '{part}', unknown to this version; use a Wan 2.1 or 2.2 checkpoint")
        if value[1] is not None:
            classes[part] = _known_class(part, value[1], where=where)
    missing = [part for part in _REQUIRED if part not in classes and part not in without]
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


def has_weights(root: Path, classes: Collection[str], remote: RemoteFiles, *, variant: str = "") -> bool:
    """Whether the weight files of every network that a repository has are in the folder, all shards of them."""
    try:
        for part in classes:
            if part in _MODEL_CLASSES:
                read_tensors(_weight_files(root / part, remote.names(part), variant))
    except CheckpointError:
        return False
    return True


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_component(
    folder: Path,
    name: str,
    *,
    class_name: str | None = None,
    remote: RemoteFiles | None = None,
    variant: str = "",
) -> Component:
    """One component's folder; None takes the class that its config.json names. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing, though model_index.json lists it; download the checkpoint again")
    is_model = name in _MODEL_CLASSES
    names = remote.names(name) if remote else _names(folder)
    files = _weight_files(folder, names, variant) if is_model else ()
    described_by = folder / "config.json"
    class_name = class_name or _class_in(described_by, name)
    return Component(
        name=name,
        folder=folder,
        described_by=described_by,
        class_name=class_name,
        config=_config(described_by, class_name) if is_model else {},
        files=files,
        tensors=read_tensors(files, remote.header if remote else read_header),
    )


def _class_in(path: Path, name: str) -> str:
    """The class of a component that no model_index.json lists."""
    first, *_ = _MODEL_CLASSES.get(name) or _PROCESSOR_CLASSES[name]
    return _known_class(name, read_json(path).get("_class_name", first), where=path) if path.is_file() else first


def _config(path: Path, class_name: str) -> JsonObject:
    config = read_json(path)
    if config.get("_class_name", class_name) != class_name:
        raise CheckpointError(
            f"{path} is for {config['_class_name']!r}, model_index.json says {class_name}; download both"
        )
    return config


def _weight_files(folder: Path, names: list[str], variant: str) -> tuple[Path, ...]:
    """The weight files of one component, all of one variant: see `choose_variant`."""
    found: dict[str, Path] = {}
    for name in sorted(names, key=lambda name: name.endswith(".json")):  # an index wins over a single file
        if match := _WEIGHTS.fullmatch(name):
            found[match[1] or match[2] or ""] = folder / name
    if not found:
        raise CheckpointError(_no_weights(folder, names))
    chosen = found[choose_variant(found.keys(), variant, where=str(folder))]
    return _shards(chosen, names) if chosen.suffix == ".json" else (chosen,)


def _shards(index_path: Path, present: list[str]) -> tuple[Path, ...]:
    names = shard_names(index_path)
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
