"""Opens a Wan checkpoint, in whatever files it lies, and checks it at the door.

A folder or hub repository in Diffusers layout or that of the original code, single files, and any mixture of them.
Reads JSON and the headers of weight files only; load.py reads the weights. Everything in a checkpoint is untrusted:
nothing in it is run, no name leaves its folder.
"""

import difflib
import functools
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from frameloom.errors import CheckpointError, InternalError
from frameloom.settings import LOGGER_NAME
from frameloom.weights.assemble import assemble
from frameloom.weights.checkpoint import Checkpoint, Component, JsonObject
from frameloom.weights.diffusers_layout import component_classes, has_weights, open_component, open_layout, read_index
from frameloom.weights.experts import pair_of, the_other
from frameloom.weights.header import read_json
from frameloom.weights.hub import (
    RemoteFiles,
    download,
    download_checkpoint,
    download_files,
    is_hub_name,
    list_files,
    parse_name,
)
from frameloom.weights.hub_choice import no_such_variant, variant_of
from frameloom.weights.hub_fetch import OnBytes
from frameloom.weights.loose import CLASSES, Loose, holds_loose_weights, open_file, open_folder, open_tokenizer

log = logging.getLogger(LOGGER_NAME)

Source = str | os.PathLike[str]

_EXPERTS = ("transformer", "transformer_2")
PARTS = (*_EXPERTS, "text_encoder", "vae", "image_encoder", "tokenizer")
"""The components that may be given one by one."""


def open_checkpoint(
    model: Source | None,
    *,
    parts: Mapping[str, Source] | None = None,
    variant: str = "",
    fetch_weights: bool = True,
    on_bytes: OnBytes | None = None,
) -> Checkpoint:
    """Open a folder, a weight file, or "owner/name[@revision][/file]" of the hub, which is downloaded first.

    `parts`: components that are taken from elsewhere, each a weight file, a folder or a name of the hub; with all that
    are needed, `model` may be None. `variant`: such as "fp16", of weight files in Diffusers layout, for every component
    that has it. Without `fetch_weights` the weight files of a Diffusers repository stay on the hub, if they were not
    fetched before: only their headers are read, and the components' `files` are names. `on_bytes` is told how far a
    download is; without it the log is. Raises CheckpointError, one sentence that says what to do, for what is missing,
    damaged or not supported.
    """
    name = "the parts" if model is None else os.fspath(model)
    try:
        wish = _Wish(variant=variant, fetch_weights=fetch_weights, on_bytes=on_bytes)
        instead = _parts({part: source for part, source in (parts or {}).items() if source is not None}, wish)
        if model is None:
            found = assemble(instead.components, facts=instead.facts, name=name, path=Path())
        else:
            found = _opened(name, instead, wish)
        _tell_variants(found.components, variant, name)
        return found
    except OSError as error:
        raise CheckpointError(f"'{name}' cannot be read ({error}); check the path and its permissions") from None


def open_parts(model: Source, *, variant: str = "", on_bytes: OnBytes | None = None) -> Mapping[str, Component]:
    """The components of a checkpoint, or those that a file or folder holds though they make no whole checkpoint.

    Raises CheckpointError as `open_checkpoint` does.
    """
    path = Path(os.path.expanduser(os.fspath(model)))
    if path.exists() and not (path / "model_index.json").exists():
        return open_loose(path, variant=variant).components
    return open_checkpoint(model, variant=variant, on_bytes=on_bytes).components


def open_vae(source: Source, *, config: JsonObject | None = None, variant: str = "") -> Component:
    """The VAE of a folder (its own, a checkpoint's, or one of loose files), of a weight file, or of the hub.

    `config`: in the words of Diffusers' config.json, instead of what lies beside the weights. Raises CheckpointError.
    """
    name = os.fspath(source)
    try:
        path = _local(name) or _hub_file(name, with_pair=False, on_bytes=None)
        if path.is_file():
            return open_file(path, want="vae", config=config).components["vae"]
        found = _part_of_folder("vae", path, variant=variant).components["vae"]
        return found if config is None else replace(found, config=config)
    except OSError as error:
        raise CheckpointError(f"'{name}' cannot be read ({error}); check the path and its permissions") from None


def open_loose(path: Path, *, variant: str = "") -> Loose:
    """What a weight file holds, or a folder that is in no Diffusers layout, whether it makes a checkpoint or not.

    Raises CheckpointError.
    """
    if path.is_file():
        found = open_file(path, must_pair=False)
    elif _is_vae(path):  # which makes sense alone
        found = Loose(components={"vae": open_component(path, "vae", variant=variant)})
    else:
        found = _loose_folder(path)
    _tell_variants(found.components, variant, str(path))
    return found


def _is_vae(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == CLASSES["vae"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wish:
    """What `open_checkpoint` was asked for besides the names of files."""

    variant: str
    fetch_weights: bool
    on_bytes: OnBytes | None


def _opened(name: str, instead: Loose, wish: _Wish) -> Checkpoint:
    path, remote = _place(name, instead.components, wish)
    if path.is_dir() and (path / "model_index.json").exists():
        found = open_layout(path, name, instead=instead.components, remote=remote, variant=wish.variant)
        if "transformer" not in instead.components:
            return found
        facts: JsonObject = {"scheduler": found.scheduler, **instead.facts}
        return assemble(found.components, facts=facts, name=name, path=path)
    loose = open_file(path) if path.is_file() else _loose_folder(path)
    facts = instead.facts if "transformer" in instead.components else loose.facts
    return assemble({**loose.components, **instead.components}, facts=facts, name=name, path=path)


def _loose_folder(folder: Path) -> Loose:
    """What a folder without model_index.json holds."""
    is_part = (folder.resolve().parent / "model_index.json").is_file()
    if holds_loose_weights(folder) and not is_part:
        return open_folder(folder)
    read_index(folder)  # says what is missing
    raise InternalError(f"'{folder}' has a model_index.json after all")


def _tell_variants(found: Mapping[str, Component], variant: str, name: str) -> None:
    """Tell where other weight files are taken than was asked for. Raises CheckpointError if no component has them."""
    parts = found.values()
    names = [file.name for part in parts for file in part.files]
    names += [file.name for part in parts if part.folder.is_dir() for file in part.folder.iterdir()]
    if variant and variant not in map(variant_of, names):
        raise no_such_variant(variant, names, where=name)
    for part in parts:
        taken = variant_of(part.files[0].name) if part.files else variant
        if variant and taken != variant:
            log.info("%s has no variant %s: its %s files are taken", part.folder, variant, taken or "plain")
        elif taken != variant:
            log.info("%s holds the variant %s alone, which is taken", part.folder, taken)


def _parts(given: Mapping[str, Source], wish: _Wish) -> Loose:
    """Components from elsewhere; what a file says of the whole checkpoint is heeded of the transformer's.

    What a file brings besides the part that was asked of it gives way to what was asked for by name.
    """
    asked: dict[str, Component] = {}
    brought: dict[str, Component] = {}
    facts: JsonObject = {}
    for part, source in given.items():
        if part not in PARTS:
            raise CheckpointError(f"there is no part '{part}'; parts are {', '.join(PARTS)}")
        found = _part(part, os.fspath(source), wish, alone="transformer_2" in given)
        brought.update(found.components)
        asked[part] = found.components[part]
        facts = found.facts if part == "transformer" else facts
    return Loose(components={**brought, **asked}, facts=facts)


def _part(part: str, source: str, wish: _Wish, *, alone: bool) -> Loose:
    """The component `part` of a file, a folder or a hub name; with a text encoder, the tokenizer in its file.

    `alone`: both noise experts are given, so none is looked for beside the other.
    """
    with_pair = part == "transformer" and not alone
    path = _local(source) or _hub_file(source, with_pair=with_pair, on_bytes=wish.on_bytes)
    if part == "tokenizer":
        return Loose(components={part: open_tokenizer(path)})
    if path.is_dir():
        return _part_of_folder(part, path, variant=wish.variant)
    if with_pair:
        found = open_file(path)
        if part in found.components:
            return _only(found, _EXPERTS)
    return open_file(path, want=part)  # which says what it holds instead


def _part_of_folder(part: str, folder: Path, *, variant: str) -> Loose:
    inside = folder / part if (folder / "model_index.json").is_file() else folder
    if (inside / "config.json").is_file():
        return Loose(components={part: open_component(inside, part, variant=variant)})
    found = _loose_folder(folder)
    if part not in found.components:
        raise CheckpointError(f"'{folder}' holds no {part.replace('_', ' ')}; give its file, or another folder")
    wanted = (*_EXPERTS, "tokenizer") if part == "transformer" else (part, "tokenizer")
    return _only(found, wanted)


def _only(found: Loose, names: Collection[str]) -> Loose:
    return replace(found, components={name: one for name, one in found.components.items() if name in names})


# --- where it is ---


def _place(name: str, instead: Mapping[str, Component], wish: _Wish) -> tuple[Path, RemoteFiles | None]:
    """The file or folder that `name` means, fetched if it is on the hub; and where its weights are if they are not."""
    local = _local(name)
    if local is not None:
        return local, None
    parsed = parse_name(name)
    if parsed.path:
        return _hub_file(name, with_pair="transformer" not in instead, on_bytes=wish.on_bytes), None
    listing = list_files(parsed, hint=_suggestion(Path(name)))
    root = download(listing, ["model_index.json", "frameloom.json"], on_bytes=wish.on_bytes)
    fetch = functools.partial(download_checkpoint, listing, variant=wish.variant, on_bytes=wish.on_bytes)
    if not (root / "model_index.json").exists():
        return fetch(), None
    classes = component_classes(read_index(root), where=root / "model_index.json", without=instead)
    root, remote = fetch(components=classes, weights=wish.fetch_weights), RemoteFiles(listing)
    is_here = wish.fetch_weights or has_weights(root, classes, remote, variant=wish.variant)
    return root, None if is_here else remote


def _hub_file(name: str, *, with_pair: bool, on_bytes: OnBytes | None) -> Path:
    """A weight file of the hub; and beside it the other noise expert's, if its repository has one."""
    path = Path(parse_name(name).path)

    def other(paths: Iterable[str]) -> list[str]:
        pair = pair_of(path, map(Path, paths)) if with_pair else None
        found = None if pair is None else the_other(pair, path)
        return [] if found is None else [found.as_posix()]

    return download_files(name, also=other, on_bytes=on_bytes)[0]


def _local(name: str) -> Path | None:
    """The file or folder that a name means, or None when it can only be one of the hub."""
    path = Path(os.path.expanduser(name))  # pathlib raises for an unknown ~user
    if path.name == "model_index.json" and path.is_file():
        raise CheckpointError(f"'{name}' is a file; give the folder that holds model_index.json")
    if name and path.exists():
        return path
    if is_hub_name(name):
        return None
    raise CheckpointError(
        f"there is no file or folder '{name}'{_suggestion(path)}; give a checkpoint's folder or file, or a hub id "
        "'owner/name'"
    )


def _suggestion(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (did you mean '{path.parent / close[0]}'?)" if close else ""
