"""Chooses, among the names of a repository's files, those that a checkpoint needs: one set of weights per component.

Pure, and by names alone; what the files hold is judged when they are here.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from frameloom.errors import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
_COMPONENTS = (
    "transformer", "transformer_2", "vae", "text_encoder", "image_encoder", "tokenizer", "image_processor", "scheduler",
)  # fmt: skip
_OWN = ("frameloom.json", "frameloom-checkpoint.json")  # what this program wrote beside them
_TEXTS = (".json", ".model", ".txt")  # configs and vocabularies
# A variant ("fp16") stands in one of three places, depending on which library wrote the file, and when.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<before>\w+))?(?P<shard>-\d{5}-of-\d{5})?"
    r"(?:\.(?P<after>\w+))?\.(?P<kind>safetensors|bin)(?P<index>\.index(?:\.(?P<last>\w+))?\.json)?",
    re.ASCII,
)

# Original repositories: the DiT at the root (Wan 2.1, 5B) or one per folder (A14B), the rest as files of their own.
_EXPERTS = ("", "high_noise_model", "low_noise_model")
_VOCABULARY = "google/umt5-xxl"
_PARTS = re.compile(r"((?:models_t5_umt5|models_clip_)[\w.-]+|Wan\d\.\d_VAE)\.(?:pth|safetensors|json)", re.ASCII)


def choose_files(
    paths: Iterable[str],
    *,
    components: Collection[str] | None = None,
    variant: str = "",
    weights: bool = True,
    where: str = "the repository",
) -> tuple[str, ...]:
    """What to fetch of a repository in Diffusers or original layout: `paths` are its files, with forward slashes.

    Of every component one set of weights: safetensors where there are any, else pickles; `variant` ("fp16") where the
    component has it, else the set without a variant, else the only variant; shards rather than a single file if they
    have an index. `components`: only these folders of a Diffusers layout. Without `weights` the texts and indexes
    alone. Raises CheckpointError for another layout, and for variants nobody chose among; `where` names the repository.
    """
    folders = _by_folder(paths)
    if "model_index.json" in folders.get("", ()):
        chosen = _of_diffusers(folders, components or _COMPONENTS, variant, where=where)
    elif any(_is_expert(folders.get(folder, ())) for folder in _EXPERTS):
        chosen = _of_original(folders, variant, where=where)
    else:
        raise CheckpointError(_no_layout(folders, where))
    if variant and not any(variant_of(path) == variant for path in chosen):
        in_use = {path.rpartition("/")[0] for path in chosen}
        raise no_such_variant(variant, (name for folder in in_use for name in folders[folder]), where=where)
    return tuple(sorted(path for path in chosen if weights or not is_weights(path)))


def variant_of(path: str) -> str:
    """The variant of a weight file, or of an index of some, by its name, such as "fp16"; "" for one without."""
    match = _WEIGHTS.fullmatch(PurePosixPath(path).name)
    return (match["before"] or match["after"] or match["last"] or "") if match else ""


def choose_variant(there: Collection[str], variant: str, *, where: str) -> str:
    """Of the variants of a component ("": the plain files) the one to take: the asked one, the plain, or the only one.

    Raises CheckpointError where there are several and nobody chose.
    """
    chosen = next((name for name in (variant, "") if name in there), None)
    if chosen is not None:
        return chosen
    if len(there) > 1:
        raise CheckpointError(f"'{where}' has the variants {', '.join(sorted(there))}; choose one with --variant")
    return next(iter(there))


def no_such_variant(variant: str, paths: Iterable[str], *, where: str) -> CheckpointError:
    """What to raise where none of the weight files among `paths` is of the variant."""
    others = sorted({other for path in paths if (other := variant_of(path))})
    instead = f"choose {' or '.join(others)}, or leave --variant out" if others else "it has none: leave --variant out"
    return CheckpointError(f"'{where}' has no variant {variant[:40]!r}; {instead}")


def is_weights(path: str) -> bool:
    """Whether a file is large and holds tensors, and not a text or the index of such files."""
    return path.endswith(WEIGHT_SUFFIXES)


def is_index(path: str) -> bool:
    """Whether a file lists the shards of a component."""
    match = _WEIGHTS.fullmatch(PurePosixPath(path).name)
    return match is not None and match["index"] is not None


def _by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    """Names of files per folder, "" for the root."""
    folders: dict[str, list[str]] = {}
    for path in sorted(paths):
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    return folders


def _of_diffusers(
    folders: Mapping[str, Sequence[str]], components: Iterable[str], variant: str, *, where: str
) -> list[str]:
    chosen = [name for name in ("model_index.json", *_OWN) if name in folders[""]]
    for part in components:
        names = folders.get(part, ())
        texts = [name for name in names if name.endswith(_TEXTS) and not _WEIGHTS.fullmatch(name)]
        chosen += [f"{part}/{name}" for name in (*texts, *_weights(names, variant, where=f"{where}/{part}"))]
    return chosen


def _of_original(folders: Mapping[str, Sequence[str]], variant: str, *, where: str) -> list[str]:
    chosen = [f"{_VOCABULARY}/{name}" for name in folders.get(_VOCABULARY, ()) if name.endswith(_TEXTS)]
    for folder in _EXPERTS:
        names = folders.get(folder, ())
        if _is_expert(names):
            start = f"{folder}/" if folder else ""
            chosen += [start + name for name in ("config.json", *_weights(names, variant, where=where))]
    root = [name for name in folders.get("", ()) if name in _OWN or _PARTS.fullmatch(name)]
    better = {name.replace(".safetensors", ".pth") for name in root if name.endswith(".safetensors")}
    return chosen + [name for name in root if name not in better]


def _is_expert(names: Iterable[str]) -> bool:
    return "config.json" in names and any(_WEIGHTS.fullmatch(name) for name in names)


def _weights(names: Iterable[str], variant: str, *, where: str) -> list[str]:
    """One set of weights of a folder with its index; none if there is none."""
    matches = [match for name in names if (match := _WEIGHTS.fullmatch(name))]
    kind = "safetensors" if any(match["kind"] == "safetensors" for match in matches) else "bin"
    sets: dict[str, list[re.Match[str]]] = {}
    for match in matches:
        if match["kind"] == kind:
            sets.setdefault(variant_of(match.string), []).append(match)
    if not sets:
        return []
    return _one_of_each(sets[choose_variant(sets.keys(), variant, where=where)])


def _one_of_each(matches: Sequence[re.Match[str]]) -> list[str]:
    """Not both the shards and the single file that hold the same tensors."""
    single = [match.string for match in matches if not match["shard"] and not match["index"]]
    sharded = [match.string for match in matches if match["shard"]]
    index = [match.string for match in matches if match["index"]]
    return index + (sharded or single) if index else single or sharded


def _no_layout(folders: Mapping[str, Sequence[str]], where: str) -> str:
    files = [f"{folder}/{name}".lstrip("/") for folder, names in folders.items() for name in names if is_weights(name)]
    if not files:
        return f"'{where}' holds no weights of any kind; check the name (one in Diffusers layout ends in -Diffusers)"
    some = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    return f"'{where}' is no whole checkpoint but {len(files)} files ({some}); name one, as '{where}/{files[0]}'"
