"""Reads files of adapters and fits them to a network: every key is used, or told with the reason why not.

All of a file is untrusted: what fits is decided by names and shapes before numbers are read, and these must be finite.
"""

import functools
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frameloom.errors import CheckpointError, RequestError
from frameloom.models.adapters import Adapter, Adapters
from frameloom.settings import LOGGER_NAME
from frameloom.types import Expert, Lora
from frameloom.weights.files import WeightFile, read_file
from frameloom.weights.header import TensorEntry, read_json
from frameloom.weights.identify import kinds_in
from frameloom.weights.lora_keys import NO_LAYER, Key, Part, expert_of, module_names, split, stranger
from frameloom.weights.lora_parts import Shapes, recipes
from frameloom.weights.scales import with_scales

log = logging.getLogger(LOGGER_NAME)

_TOLD = 12  # unused keys in a warning
_WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
_WIDTHS: Mapping[int, str] = {1536: "Wan 2.1 1.3B", 3072: "Wan 2.2 TI2V 5B", 5120: "Wan 14B"}
_NETWORKS: Mapping[str, str] = {"vae": "VAE"}
_MAX_ALPHA = 1e6
_PEFT_METADATA = "lora_adapter_metadata"  # where Diffusers writes the settings of PEFT
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read_loras(loras: Sequence[Lora], shapes: Shapes, *, expert: Expert | None = None) -> list[Adapters]:
    """What each LoRA changes in a network whose parameters have `shapes`; those for the other expert are left out.

    `expert`: which of two this network is, None where it is the only one. What is not used is told in one warning per
    file. Raises CheckpointError for a file that is damaged, contradicts itself, or fits nothing, and RequestError for
    an expert that there is not.
    """
    found = (_read(lora, shapes, expert) for lora in loras)
    return [adapters for adapters in found if adapters is not None]


def _read(lora: Lora, shapes: Shapes, expert: Expert | None) -> Adapters | None:
    """What one LoRA changes; None where it is for the other expert."""
    if expert is None and lora.expert is not None:
        raise RequestError(f"LoRA '{lora.path}' is asked for the {lora.expert}-noise expert; this model has but one")
    try:
        path = _file(lora, expert)
        if expert is not None and (lora.expert or expert_of(path.name)) not in (None, expert):
            return None
        adapters = _adapters(lora, read_file(path), shapes, expert)
    except OSError as error:
        raise CheckpointError(f"LoRA '{lora.path}' cannot be read ({error}); check the file and its disk") from None
    if adapters is not None:
        _tell(adapters)
    return adapters


def describe_lora(path: Path) -> dict[str, Any] | None:
    """What a LoRA file holds, by its keys; None for a file that is none. Raises CheckpointError."""
    file = read_file(path)
    keys = [key for name in file.entries if (key := split(name)) is not None]
    if not keys:
        return None
    ranks = {file.entries[key.name].shape[0] for key in keys if key.part == "down"}
    layers = {match[0] for key in keys if (match := re.search(r"blocks[._]\d+", key.module))}
    return {
        "model": str(path),
        "kind": "LoRA",
        "keys": len(file.entries),
        "unknown_keys": sorted(file.entries.keys() - {key.name for key in keys}),
        "modules": len({key.module for key in keys}),
        "parts": sorted({key.part for key in keys}),
        "ranks": sorted(ranks),
        "layers": len(layers),
        "dtypes": sorted({entry.dtype for entry in file.entries.values()}),
        "bytes": sum(entry.size_bytes for entry in file.entries.values()),
    }


# --- which file ---


def _file(lora: Lora, expert: Expert | None) -> Path:
    """The file, of a folder the only one, or of two experts' the right one."""
    path = Path(os.path.expanduser(lora.path))
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix == ".safetensors")
    of_experts = {expert_of(file.name): file for file in files}
    wanted = lora.expert or expert
    if len(files) == 2 and wanted in of_experts and None not in of_experts:
        return of_experts[wanted]
    if len(files) != 1:
        raise CheckpointError(f"'{path}' holds {len(files)} safetensors files; give the one LoRA that you mean")
    return files[0]


# --- what is in it ---


def _adapters(lora: Lora, file: WeightFile, shapes: Shapes, expert: Expert | None) -> Adapters | None:
    """What a file changes; None where all of it is for the other expert, which gets it."""
    _refuse_networks(file)
    stored = with_scales(file.entries, file.metadata, where=str(file.path))
    keys, unused = _split(stored)
    mine = _own(keys, lora, expert)
    others = {key.name for key in keys} - {key.name for key in mine}
    if expert is None or lora.expert is not None:
        unused |= dict.fromkeys(others, "it is for another noise expert")
    elif others and not mine:
        return None
    scaling = _peft_scaling(file, expert)
    changes: dict[str, Adapter] = {}
    for module, parts in _by_module(mine, shapes, unused, where=file.path).items():
        entries = {part: stored[key.name] for part, key in parts.items()}
        named = next(iter(parts.values())).module
        for recipe in recipes(module, entries, shapes, functools.partial(scaling, named)):
            if (problem := recipe.problem) is None:
                changes[recipe.name] = recipe.adapter()
            else:
                unused |= {entry.name: problem for entry in recipe.entries.values()}
    if not changes:
        raise CheckpointError(_fits_nothing(file, keys, unused, shapes))
    return Adapters(
        name=str(file.path),
        strength=lora.strength,
        changes=changes,
        num_keys=len({key.name for key in mine} | unused.keys()),
        unused=tuple(f"{key}: {reason}" for key, reason in sorted(unused.items())),
    )


def _refuse_networks(file: WeightFile) -> None:
    """Raise CheckpointError for a whole network, which is given by another option."""
    if not (kinds := kinds_in(file.entries)):
        return
    what = " and ".join(_NETWORKS.get(kind, kind.replace("_", " ")) for kind in kinds)
    option = f"--{kinds[0].replace('_', '-')}" if len(kinds) == 1 else "--model"
    raise CheckpointError(f"{file.path} holds a whole {what} and is no LoRA; give it with {option}")


def _split(stored: Mapping[str, TensorEntry]) -> tuple[list[Key], dict[str, str]]:
    """The keys taken apart, and those that are of no adapter, with the reason."""
    keys, unused = [], {}
    for name, entry in stored.items():
        key = split(name)
        if key is None:
            unused[name] = "it is of no kind of adapter that is known"
        else:
            _check_entry(entry, key)
            keys.append(key)
    return keys, unused


def _check_entry(entry: TensorEntry, key: Key) -> None:
    if entry.dtype in _WHOLE_NUMBERS and entry.scale is None and key.part != "alpha":
        raise CheckpointError(
            f"{entry.file} stores '{entry.name}' as {entry.dtype}; give a LoRA in bfloat16 or float32"
        )
    if 0 in entry.shape:
        raise CheckpointError(f"{entry.file} has an empty '{entry.name}' {list(entry.shape)}; download it again")


def _own(keys: Sequence[Key], lora: Lora, expert: Expert | None) -> list[Key]:
    """The keys for this network: Diffusers' prefixes tell experts apart where a file has both of them.

    `transformer.` alone is in any file of Diffusers'; `transformer_2.` alone is for the low-noise expert, unless the
    user says otherwise.
    """
    named = {key.expert for key in keys} - {None}
    wanted: Expert = expert or "high"
    if named == {"high"} or (named == {"low"} and lora.expert is not None):
        return list(keys)
    return [key for key in keys if key.expert in (None, wanted)]


def _by_module(
    keys: Sequence[Key], shapes: Shapes, unused: dict[str, str], *, where: Path
) -> dict[str, dict[Part, Key]]:
    """The parts of each module, by its native name; what no module answers to goes into `unused`."""
    names = module_names(shapes)
    found: dict[str, dict[Part, Key]] = {}
    for key in keys:
        if key.module not in names:
            unused[key.name] = stranger(key.module)
            continue
        parts = found.setdefault(names[key.module], {})
        if key.part in parts:
            raise CheckpointError(
                f"{where} says one thing twice, as '{parts[key.part].name}' and '{key.name}'; keep one"
            )
        parts[key.part] = key
    return found


# --- PEFT's settings, where a file has no alpha ---


def _peft_scaling(file: WeightFile, expert: Expert | None) -> Callable[[str, int], float]:
    """The scale by the name of a module, as in the file, and its rank."""
    settings = _peft_settings(file, "transformer_2." if expert == "low" else "transformer.")
    patterns = settings.get("alpha_pattern") or {}
    root = math.sqrt if settings.get("use_rslora") is True else float
    default = settings.get("lora_alpha", settings.get("alpha"))
    alphas = [*patterns.values(), default] if isinstance(patterns, dict) else [patterns]
    if not all(value is None or (type(value) in (int, float) and 0 < value < _MAX_ALPHA) for value in alphas):
        raise CheckpointError(f"{file.path} comes with settings of PEFT whose alpha is no number; download both again")

    def scaling(module: str, rank: int) -> float:
        own = (value for name, value in patterns.items() if f".{module}".endswith(f".{name.removeprefix('^')}"))
        alpha = next(own, default)
        return 1.0 if alpha is None else alpha / root(rank)

    return scaling


def _peft_settings(file: WeightFile, prefix: str) -> Mapping[str, Any]:
    """Of the file's metadata, as Diffusers writes them, or of the file beside it, as PEFT does."""
    beside = file.path.with_name(_PEFT_CONFIG)
    if file.path.name == _PEFT_FILE and beside.is_file():
        return read_json(beside)
    try:
        found = json.loads(file.metadata.get(_PEFT_METADATA, "{}"))
    except (ValueError, RecursionError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file.path} has metadata '{_PEFT_METADATA}' that cannot be read; save it again")
    own = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    return own or {key.removeprefix("transformer."): value for key, value in found.items()}


# --- what is told ---


def _fits_nothing(file: WeightFile, keys: Sequence[Key], unused: Mapping[str, str], shapes: Shapes) -> str:
    """Sentence about a file of which nothing is used: which model it seems to be for, or else why."""
    if not unused:
        return f"{file.path} holds no tensors; download it again"
    none = f"none of the {len(file.entries)} keys of {file.path}"
    reason, _ = Counter(unused.values()).most_common(1)[0]
    example = next(key for key, why in unused.items() if why == reason)
    if (other := _other_model(file, keys, shapes)) is not None:
        own = _own_model(shapes)
        return f"{none} fits this model of width {own[0]} with {own[1]} layers; it seems to be for {other}"
    if reason == NO_LAYER:
        return f"{none} fits this model; it seems to be for another kind of model, as it has '{example}'"
    return f"{none} can be used, such as '{example}': {reason}; give a whole LoRA for the transformer of this model"


def _own_model(shapes: Shapes) -> tuple[int, int]:
    """Width and number of layers."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return shapes["patch_embedding.weight"][0], len(layers)


def _other_model(file: WeightFile, keys: Sequence[Key], shapes: Shapes) -> str | None:
    """For which model adapters seem to be, if their width or their layers are not those of this one."""
    layers = {int(match[1]) for key in keys if (match := re.search(r"(?<!vace_)blocks[._](\d{1,4})", key.module))}
    widths = {
        file.entries[key.name].shape[:1]
        for key in keys
        if key.part in ("up", "diff", "diff_b") and re.search(r"(?:self_attn[._]|attn1[._]to_)q$", key.module)
    }
    if not layers or len(widths) != 1:
        return None
    width, (own_width, own_layers) = math.prod(widths.pop()), _own_model(shapes)
    if width == own_width and max(layers) < own_layers:
        return None
    image = ", with an image branch" if any(re.search("k_img|add_k", key.module) for key in keys) else ""
    known = f" ({_WIDTHS[width]})" if width in _WIDTHS else ""
    return f"one of width {width}{known} with {max(layers) + 1} layers{image}: take that model"


def _tell(adapters: Adapters) -> None:
    log.info(
        "LoRA %s: %d of %d keys change %d parameters, strength %g",
        adapters.name, adapters.num_keys - len(adapters.unused), adapters.num_keys, len(adapters.changes),
        adapters.strength,
    )  # fmt: skip
    if not adapters.unused:
        return
    told, rest = adapters.unused[:_TOLD], adapters.unused[_TOLD:]
    lines = [*told, *([f"and {len(rest)} more"] if rest else [])]
    log.warning("LoRA %s: %d keys are not used:\n  %s", adapters.name, len(adapters.unused), "\n  ".join(lines))
    if rest:  # what is quiet says the first alone
        log.info("LoRA %s: the other keys that are not used:\n  %s", adapters.name, "\n  ".join(rest))
