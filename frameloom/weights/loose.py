"""Opens networks that lie in loose files, not in Diffusers layout: single files, and the original repositories.

What a file holds is decided by its keys and shapes (identify.py), never by its name; names only tell the two noise
experts apart (experts.py).
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from frameloom.errors import CheckpointError
from frameloom.settings import LOGGER_NAME
from frameloom.weights.checkpoint import Component, JsonObject, checkpoint_facts
from frameloom.weights.configs import model_name
from frameloom.weights.experts import files_near, is_high, pair_of, the_other
from frameloom.weights.files import WeightFile, read_file
from frameloom.weights.header import read_json, read_tensors, shard_names
from frameloom.weights.identify import Part, identify
from frameloom.weights.lora_keys import split

log = logging.getLogger(LOGGER_NAME)

CLASSES: Mapping[str, str] = {
    "transformer": "WanTransformer3DModel",
    "transformer_2": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
    "image_encoder": "CLIPVisionModel",
    "tokenizer": "T5Tokenizer",
    "image_processor": "CLIPImageProcessor",
}
"""The class of Diffusers or transformers that each component is of."""

VACE_CLASS = "WanVACETransformer3DModel"
FACTS = "frameloom"
"""The key of a file's metadata under which it says what its tensors do not: a JSON object."""

BESIDE = "frameloom-checkpoint.json"
"""A file of a converted repository that says what its layout cannot: scheduler, boundary of the experts, defaults."""

IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
"""How pictures are cut for the image encoder; the original layout has none, and means that of CLIP."""

EXPERT_FOLDERS: Mapping[str, str] = {"high_noise_model": "transformer", "low_noise_model": "transformer_2"}
"""The folders of an original Wan 2.2 repository, and the component in each."""

_REPACKAGED = ("diffusion_models", "unet", "text_encoders", "clip", "vae", "clip_vision", "checkpoints")
_WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_TOKENIZERS = ("google/umt5-xxl", "tokenizer", ".")  # folders in which a repository keeps its tokenizer.json
_LISTED = 8  # names in a line of the log


@dataclass(frozen=True, kw_only=True, slots=True)
class Loose:
    """The components that were found, and what their files say of the checkpoint they belong to."""

    components: Mapping[str, Component]
    facts: JsonObject = field(default_factory=dict)


def open_file(
    path: Path, *, want: str | None = None, must_pair: bool = True, config: JsonObject | None = None
) -> Loose:
    """The components of one weight file, and of the other noise expert's where the name says that there is one.

    `want`: the one component that is taken, whatever else the file holds. `config`: instead of one that lies beside it.
    Raises CheckpointError, also where several files may be the other expert's, unless `must_pair` is off: then a
    warning says so.
    """
    loose = _open_set(path.parent, [read_file(path)], config=config)
    found = dict(loose.components)
    if want is not None:
        return replace(loose, components={want: _wanted(found, want, where=path)} | _tokenizer_of(found))
    if "transformer" in found:
        found |= _experts(found["transformer"], path, must_pair=must_pair)
    return replace(loose, components=found)


def open_folder(folder: Path) -> Loose:
    """The components of all weight files in a folder, such as an original repository, and of its experts' folders.

    Raises CheckpointError where two files hold the same component, naming both.
    """
    components: list[Component] = []
    said = folder / BESIDE
    facts = dict(checkpoint_facts(read_json(said), where=said)) if said.is_file() else {}
    for place, files in _weight_sets(folder):
        read = [read_file(file) for file in files]
        if _is_lora(read):
            log.info("%s is a LoRA and left out; give it with --lora to use it", files[0])
            continue
        one = _open_set(place, read)
        facts.update(one.facts)
        components += [_of_place(component, place) for component in one.components.values()]
    found = _by_name(_told_apart(components), folder)
    beside = _tokenizer_in(folder, found)
    if (folder / "image_processor" / IMAGE_PROCESSOR_FILE).is_file():
        beside["image_processor"] = _plain("image_processor", folder / "image_processor")
    _tell_of_missing_expert(found)
    return Loose(components=found | beside, facts=facts)


def holds_loose_weights(folder: Path) -> bool:
    """Whether there are weight files in a folder, or in those of its experts."""
    return next(_weight_sets(folder), None) is not None


def open_tokenizer(path: Path) -> Component:
    """A tokenizer by itself: a folder with a tokenizer.json or a spiece.model, or that file. Raises CheckpointError."""
    folder = path.parent if path.name in _TOKENIZER_FILES else path
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"'{path}' holds no {' and no '.join(_TOKENIZER_FILES)}; give the tokenizer folder of a Wan checkpoint"
        )
    return _plain("tokenizer", folder)


# --- one set of files ---


def _weight_sets(folder: Path) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """Files that belong together: those of an index, else each by itself; in the folder, its experts' and ComfyUI's."""
    for place in (folder, *(folder / name for name in (*EXPERT_FOLDERS, *_REPACKAGED))):
        if not place.is_dir():
            continue
        sharded: set[Path] = set()
        for index in sorted(place.glob("*.safetensors.index.json")):
            shards = _shards(index)
            sharded |= set(shards)
            yield place, shards
        for path in sorted(place.iterdir()):
            is_hidden = path.name.startswith(".")  # such as what macOS leaves beside every file
            if path.suffix.lower() in _WEIGHTS and not is_hidden and path not in sharded and path.is_file():
                yield place, (path,)


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index lists, all of them there."""
    files = tuple(index.parent / name for name in shard_names(index))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{index.parent} lacks {file.name}, listed in {index.name}; download the rest")
    return files


def _open_set(place: Path, read: Sequence[WeightFile], *, config: JsonObject | None = None) -> Loose:
    """What files hold that belong together."""
    files = tuple(file.path for file in read)
    where = files[0] if len(files) == 1 else place
    listed = {file.path: file.entries for file in read}
    metadata = {key: value for file in read for key, value in file.metadata.items()}
    described = next((path for path in (files[0].with_suffix(".json"), place / "config.json") if path.is_file()), None)
    if config is None and described is not None:
        config = read_json(described)
    parts = identify(
        read_tensors(files, listed.__getitem__),
        metadata=metadata,
        where=str(where),
        config=config,
    )
    return Loose(components=_components(parts, where, files=files), facts=_facts(metadata, where=where))


def _components(parts: Iterable[Part], where: Path, *, files: tuple[Path, ...]) -> dict[str, Component]:
    found: dict[str, Component] = {}
    for part in parts:
        if part.left_over:
            more = f" and {len(part.left_over) - _LISTED} more" if len(part.left_over) > _LISTED else ""
            log.warning(
                "%s holds %d tensors that %s has no use for: %s",
                where, len(part.left_over), part.model, ", ".join(part.left_over[:_LISTED]) + more,
            )  # fmt: skip
        found[part.kind] = Component(
            name=part.kind,
            folder=where,
            described_by=where,
            class_name=VACE_CLASS if part.config.get("vace_layers") else CLASSES[part.kind],
            config=part.config,
            files=files,
            tensors=part.tensors,
        )
        if part.vocabulary is not None:
            found["tokenizer"] = replace(_plain("tokenizer", where), vocabulary=part.vocabulary)
    return found


def _plain(name: str, folder: Path) -> Component:
    """A component without weights."""
    class_name = CLASSES[name]
    return Component(
        name=name, folder=folder, described_by=folder, class_name=class_name, config={}, files=(), tensors={}
    )


def _facts(metadata: Mapping[str, Any], *, where: Path) -> JsonObject:
    """What a file that this engine wrote says of its checkpoint; `identify` has read that it is JSON."""
    text = metadata.get(FACTS)
    return {} if text is None else checkpoint_facts(json.loads(text).get("checkpoint", {}), where=where)


# --- which is which ---


def _wanted(found: Mapping[str, Component], want: str, *, where: Path) -> Component:
    kind = "transformer" if want == "transformer_2" else want
    if kind not in found:
        holds = ", ".join(map(_said, found)) or "nothing that is known"
        raise CheckpointError(f"'{where}' holds no {_said(kind)} ({holds} instead); give another file")
    return replace(found[kind], name=want)


def _tokenizer_of(found: Mapping[str, Component]) -> dict[str, Component]:
    return {"tokenizer": found["tokenizer"]} if "tokenizer" in found else {}


def _tokenizer_in(folder: Path, found: Mapping[str, Component]) -> dict[str, Component]:
    """The tokenizer of a folder, unless a weight file brings one."""
    places = (folder / place for place in _TOKENIZERS)
    place = next((place for place in places if any((place / name).is_file() for name in _TOKENIZER_FILES)), None)
    return {} if place is None or "tokenizer" in found else {"tokenizer": _plain("tokenizer", place)}


def _experts(component: Component, path: Path, *, must_pair: bool) -> dict[str, Component]:
    """One transformer file, and the other noise expert's if there is one beside it."""
    pair = pair_of(path, files_near(path))
    if pair is None:
        return {"transformer": component}
    if not pair.others:
        log.warning("%s is one of two noise experts, and %s is not there: it denoises alone", path, pair.expected)
        return {"transformer": component}
    if len(pair.others) > 1 and not must_pair:
        log.warning("%s is one of two noise experts, and the other may be any of %s", path, _names(pair.others))
        return {"transformer": component}
    found = the_other(pair, path)
    assert found is not None
    why = f", of another {pair.differs}: no other name is nearer" if pair.differs else ""
    log.info("%s: the other noise expert is %s%s", path, found, why)
    other = open_file(found, want="transformer").components["transformer"]
    high, low = (component, other) if pair.is_high else (other, component)
    return {"transformer": replace(high, name="transformer"), "transformer_2": replace(low, name="transformer_2")}


def _is_lora(read: Sequence[WeightFile]) -> bool:
    """Whether a file by itself holds adapters and nothing else."""
    names = [name for file in read for name in file.entries]
    return len(read) == 1 and bool(names) and all(split(name) is not None for name in names)


def _tell_of_missing_expert(found: Mapping[str, Component]) -> None:
    """A warning where one of two experts is there alone."""
    files = [found[name].files[0] for name in EXPERT_FOLDERS.values() if name in found]
    if len(files) == 1 and (pair := pair_of(files[0], ())) is not None:
        expected = pair.expected.name
        log.warning("%s is one of two noise experts, and %s is not there: it denoises alone", files[0], expected)


def _of_place(component: Component, place: Path) -> Component:
    """Of two experts in folders of their own, the folder says which one it is."""
    is_expert = component.name == "transformer" and place.name in EXPERT_FOLDERS
    return replace(component, name=EXPERT_FOLDERS[place.name]) if is_expert else component


def _told_apart(components: Sequence[Component]) -> list[Component]:
    """The same, with the low-noise one of the only two transformers named so, where they are of one model."""
    found = [component for component in components if component.name == "transformer"]
    sides = [is_high(component.files[0]) for component in found]
    models = {model_name("transformer", component.config) for component in found}
    if sorted(map(str, sides)) != ["False", "True"] or len(models) > 1:
        return list(components)
    high, low = (found[sides.index(side)] for side in (True, False))
    pair = pair_of(high.files[0], [low.files[0]])
    if pair is None or not pair.others or pair.differs:
        names = _names([high.files[0], low.files[0]])
        log.info("%s are taken for the two noise experts: they are of one model, and no other is there", names)
    return [replace(one, name="transformer_2") if one is low else one for one in components]


def _by_name(components: Iterable[Component], folder: Path) -> dict[str, Component]:
    """One component of a name. Raises CheckpointError, naming two files of the same."""
    found: dict[str, Component] = {}
    for component in components:
        name = component.name
        if name in found and name != "tokenizer":
            both = f"{found[name].files[0].name} and {component.files[0].name}"
            option = f"--{name.replace('_', '-')}" + (", and --transformer-2" if name == "transformer" else "")
            raise CheckpointError(f"'{folder}' holds two {_said(name)}s, {both}; name the one to take with {option}")
        found[name] = component
    return found


def _names(files: Iterable[Path]) -> str:
    return " and ".join(file.name for file in files)


def _said(name: str) -> str:
    return name.replace("_", " ")
