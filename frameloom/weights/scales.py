"""Which stored numbers are to be multiplied by which: fp8 and int8 weights as ComfyUI, Kijai and LightX2V write them.

Old: `X.scale_weight` beside `X.weight`. New: `X.weight_scale`, and the kind of numbers in `X.comfy_quant` or in the
metadata (`_quantization_metadata`), of int8 also whether its rows are rotated (convrot). Scales of the inputs serve fp8
arithmetic: weights that are multiplied out do without. Torch-free.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from frameloom.errors import CheckpointError
from frameloom.settings import LOGGER_NAME
from frameloom.weights.header import TensorEntry

log = logging.getLogger(LOGGER_NAME)

# The formats that are a stored number times its scale, and the dtype they are stored in.
FORMATS: Mapping[str, str] = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}

_GROUPS = tuple(4**fours for fours in range(1, 7))  # numbers that convrot rotates together
_SCALES = (".weight_scale", ".scale_weight")
_OLD_SIGN = "scaled_fp8"  # says that the fp8 weights of an old file have scales
_MARK = ".comfy_quant"
_NAMED = 3  # weights that a message names
_MAX_MARK_BYTES = 4096  # real ones have under 200
_MAX_METADATA = 4 * 2**20  # characters: 20 times the largest real one
# Only of use to fp8 arithmetic, or a sign that there are scales.
_UNNEEDED = re.compile(r"(?:.*\.)?(?:scaled_fp8|comfy_quant|scale_input|input_scale)")
# Numbers packed in other ways: more than a scale is needed to read them.
_PACKED = re.compile(
    r".*\.(?:weight_scale_2|weight_scale_inv|weight_s_rel|weight_zero_point|weight_packed|qweight|qzeros"
    r"|weight\.(?:absmax|quant_map|quant_state\..*)|proj_down|smooth_factor)"
)


def with_scales(
    entries: Mapping[str, TensorEntry], metadata: Mapping[str, Any], *, where: str
) -> dict[str, TensorEntry]:
    """The tensors with their scales attached, and without what only said so. `where` names the file in messages.

    Raises CheckpointError for weights that are packed in a way that a scale does not undo.
    """
    _refuse_packed(entries)
    described, rotated = [], {}
    for module, told in _descriptions(entries, metadata, where=where):
        stores, weight = f"{where} stores '{module}'", entries.get(f"{module}.weight")
        _check_format(stores, told, weight)
        if weight is not None:
            described.append(f"{module}.weight")
        if weight is not None and told.get("convrot"):
            rotated[f"{module}.weight"] = _rotation(stores, told, weight)
    scale_of = dict(_pairs(entries))
    _check_none_lacks(entries, scale_of, described, where=where)
    used = set(scale_of.values())
    kept = {name: entry for name, entry in entries.items() if name not in used and not _UNNEEDED.fullmatch(name)}
    for name, scale in scale_of.items():
        kept[name] = replace(kept[name], scale=_checked(entries[scale], kept[name]), rotated=rotated.get(name, 0))
    return kept


def _check_none_lacks(
    entries: Mapping[str, TensorEntry], scale_of: Mapping[str, str], described: Sequence[str], *, where: str
) -> None:
    """Every weight that the file calls quantized has a scale. In old files one that has none is meant as it is."""
    if lacking := [name for name in described if name not in scale_of]:
        raise CheckpointError(f"{where} lacks the scales of {_listed(lacking)}; download it again")
    if any(name.endswith(_OLD_SIGN) for name in entries):
        bare = [name for name, entry in entries.items() if entry.dtype.startswith("F8_") and name not in scale_of]
        if weights := [name for name in bare if name.endswith(".weight")]:
            log.warning("%s has no scales for %s: they count as 1, as in ComfyUI", where, _listed(weights))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _pairs(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, str]]:
    """The name of each weight that has a scale, and that of the scale. One without a weight is left where it is."""
    for name in entries:
        for suffix in _SCALES:
            weight = f"{name.removesuffix(suffix)}.weight"
            if name.endswith(suffix) and weight in entries:
                yield weight, name


def _checked(scale: TensorEntry, weight: TensorEntry) -> TensorEntry:
    rows = weight.shape[0] if weight.shape else 1
    shape = tuple(size for size in scale.shape if size != 1)
    if scale.dtype not in ("F32", "BF16", "F16", "F64"):
        raise CheckpointError(f"{scale.file} stores the scale '{scale.name}' as {scale.dtype}; take it as F32")
    if shape not in ((), (rows,)) or (shape and scale.shape[0] != rows):
        raise CheckpointError(
            f"{scale.file} has '{scale.name}' of shape {list(scale.shape)} for {list(weight.shape)}; readable is one "
            "scale for a weight or one per row, so take a file quantized in that way"
        )
    return scale


def _refuse_packed(entries: Mapping[str, TensorEntry]) -> None:
    for name, entry in entries.items():
        if _PACKED.fullmatch(name):
            raise CheckpointError(
                f"{entry.file} holds '{name}', so its weights are packed in a way that is not readable; "
                f"take {_readable()}, or GGUF"
            )


def _descriptions(
    entries: Mapping[str, TensorEntry], metadata: Mapping[str, Any], *, where: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Modules and what the file says of the numbers of their weights."""
    for name, entry in entries.items():
        if name.endswith(_MARK):
            yield name.removesuffix(_MARK), _read_mark(entry)
    text = metadata.get("_quantization_metadata")
    if text is not None:
        layers = _parsed(text, what=f"{where} in its metadata").get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(told, dict) for told in layers.values()):
            raise CheckpointError(f"{where} has '_quantization_metadata' that lists no layers; download it again")
        yield from layers.items()


def _read_mark(entry: TensorEntry) -> Mapping[str, Any]:
    if entry.dtype not in ("U8", "I8") or entry.size_bytes > _MAX_MARK_BYTES:
        raise CheckpointError(f"{entry.file} has a damaged '{entry.name}'; download it again")
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        return _parsed(file.read(entry.size_bytes), what=f"{entry.file} in '{entry.name}'")


def _parsed(text: Any, *, what: str) -> Mapping[str, Any]:
    damaged = CheckpointError(f"{what} holds no readable JSON object; download it again")
    if not isinstance(text, str | bytes) or len(text) > _MAX_METADATA:
        raise damaged
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(found, dict):
        raise damaged
    return found


def _check_format(stores: str, told: Mapping[str, Any], weight: TensorEntry | None) -> None:
    name = told.get("format")
    if not isinstance(name, str) or name not in FORMATS:
        raise CheckpointError(f"{stores} as {name!r}, which is not readable; take {_readable()}")
    if weight is not None and weight.dtype != FORMATS[name]:
        raise CheckpointError(f"{stores} as {weight.dtype}, but says that it is {name}; download it again")


def _rotation(stores: str, told: Mapping[str, Any], weight: TensorEntry) -> int:
    """How many numbers of a row are rotated together."""
    size = told.get("convrot_groupsize", 256)
    fits = isinstance(size, int) and size in _GROUPS and len(weight.shape) == 2 and not weight.shape[1] % size
    if told.get("format") != "int8_tensorwise" or not fits:
        raise CheckpointError(
            f"{stores} of shape {list(weight.shape)} as {told.get('format')} rotated in groups of {size!r}; readable "
            "is int8_tensorwise in groups of a power of 4 that divides the rows, so take a file quantized in that way"
        )
    return int(size)


def _readable() -> str:
    return f"a file in {' or '.join(FORMATS)}"
