"""What networks a set of tensors is: one Part for each, found by keys and shapes alone, under native names.

Names of files decide nothing here. Torch-free; no tensor is read.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from frameloom.errors import CheckpointError
from frameloom.weights import keymap
from frameloom.weights.configs import config_of, model_name, translated
from frameloom.weights.header import BLOCKS, TensorEntry
from frameloom.weights.keymap import KeyMap
from frameloom.weights.scales import with_scales
from frameloom.weights.strangers import refuse_relatives, what_it_seems

JsonObject = Mapping[str, Any]
Entries = Mapping[str, TensorEntry]
Kind = Literal["transformer", "vae", "text_encoder", "image_encoder"]

_MAX_FACTS = 2**20  # characters of JSON in a file's metadata
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_MAX_VAE = 64  # stages, or blocks of one: a file with more is no VAE of Wan's, and its table would be large

# Tensors that Wan's networks bring along and the engine does without, below the prefix of their network or beside it.
_DROPPED = re.compile(
    r"(?:.*\.)?(?:textual\..*|text_model\..*|log_scale|logit_scale|text_projection.*|visual\.head"
    r"|visual_projection\.weight|position_ids|spiece_model)"
)
_TIED = "encoder.embed_tokens.weight"  # UMT5's table under its second name


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One network of a file: its tensors under native names, with their scales, and the config that its shapes say.

    `left_over`: stored names that nothing uses. `vocabulary`: where its tokenizer lies, if the file brings one: the
    tensor of a sentencepiece model, or the metadata of a GGUF file (see vocabulary.py).
    """

    kind: Kind
    layout: str
    model: str
    config: JsonObject
    tensors: Entries
    left_over: tuple[str, ...]
    vocabulary: TensorEntry | Mapping[str, Any] | None


def identify(
    entries: Entries, *, metadata: Mapping[str, Any] | None = None, config: JsonObject | None = None, where: str
) -> tuple[Part, ...]:
    """The networks among the tensors of one file, or of several that belong together: at least one, one of a kind.

    `metadata`: of the file; its "frameloom" may hold JSON with the "kind" and "config" of a network. `config`: that of
    a config.json beside it, in the words of Diffusers, transformers or the original code. Both must agree with the
    shapes. Raises CheckpointError for what is no network of Wan's, saying what it seems to be.
    """
    metadata = metadata or {}
    refuse_relatives(entries, where=where)
    plain = with_scales(entries, metadata, where=where)
    found = tuple(_found(plain))
    if not found:
        raise CheckpointError(f"{where} {what_it_seems(entries)}")
    _check_kinds([one.family.kind for one in found], where=where)
    told = _told(metadata, config, found, where=where)
    left_over = _left_over(plain, found)
    vocabulary = _vocabulary(entries, metadata)
    return tuple(
        _part(one, told.get(one.family.kind, {}), left_over=left_over[index], vocabulary=vocabulary, where=where)
        for index, one in enumerate(found)
    )


def kinds_in(names: Iterable[str]) -> tuple[Kind, ...]:
    """The kinds of networks of which there is the tensor that gives them away."""
    listed = list(names)
    found = (family.kind for family in _FAMILIES if any(_prefix(name, family) is not None for name in listed))
    return tuple(dict.fromkeys(found))


# --- which networks, in which layouts ---


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """A kind of network in one layout. The tensor whose name ends in `anchor` gives it away: before it is the prefix.

    `table`: of the names without the prefix, to which `begins` is put back.
    """

    kind: Kind
    anchor: str
    table: Callable[[Entries], KeyMap]
    begins: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A network: the prefix of its stored names, those that are used, and its tensors under native names."""

    family: _Family
    prefix: str
    layout: str
    used: frozenset[str]
    tensors: Entries


def _found(entries: Entries) -> Iterator[_Found]:
    for family in _FAMILIES:
        for name in entries:
            if (prefix := _prefix(name, family)) is not None:
                yield _natively(entries, family, prefix=prefix)


def _prefix(name: str, family: _Family) -> str | None:
    """What stands before the names of a network, if `name` is the one that gives it away."""
    is_anchor = name == family.anchor or name.endswith("." + family.anchor)
    return name.removesuffix(family.anchor) if is_anchor else None


def _natively(entries: Entries, family: _Family, *, prefix: str) -> _Found:
    own = {family.begins + name[len(prefix) :]: entry for name, entry in entries.items() if name.startswith(prefix)}
    table = family.table(own)
    used, tensors = set(), {}
    for name, entry in own.items():
        for native, piece in _pieces(table, name, entry):
            tensors[native] = _fitted(native, piece)
            used.add(prefix + name[len(family.begins) :])
    if family.kind == "text_encoder" and _TIED in own:
        tensors.setdefault("shared.weight", own[_TIED])
        used.add(prefix + _TIED)
    if family.kind == "transformer":
        tensors = _unfolded(tensors)
    return _Found(family=family, prefix=prefix, layout=table.layout, used=frozenset(used), tensors=tensors)


def _vae_original(own: Entries) -> KeyMap:
    if "encoder.downsamples.0.downsamples.0.residual.2.weight" in own:
        return keymap.vae_22(num_res_blocks=_count(own, "encoder.downsamples.0.downsamples.{}.residual.2.weight"))
    blocks = _count(own, "decoder.upsamples.{}.residual.2.weight")  # of the first stage, one more than num_res_blocks
    starts = (f"decoder.upsamples.{stage * (blocks + 1)}.residual.2.weight" for stage in range(_MAX_VAE))
    stages = sum(1 for _ in itertools.takewhile(own.__contains__, starts))
    return keymap.vae_21(num_res_blocks=blocks - 1, num_stages=stages)


def _vae_diffusers(own: Entries) -> KeyMap:
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in own:
        blocks = _count(own, "encoder.down_blocks.0.resnets.{}.conv1.weight")
        return keymap.vae_22(num_res_blocks=blocks).of_natives("diffusers")
    blocks = _count(own, "decoder.up_blocks.0.resnets.{}.conv1.weight")
    stages = _count(own, "decoder.up_blocks.{}.resnets.0.conv1.weight")
    return keymap.vae_21(num_res_blocks=blocks - 1, num_stages=stages).of_natives("diffusers")


def _count(own: Entries, template: str) -> int:
    """How many there are of the names that the template makes of 0, 1, ...: one at least, _MAX_VAE at most."""
    return next((n for n in range(1, _MAX_VAE) if template.format(n) not in own), _MAX_VAE)


_FAMILIES = (
    _Family(kind="transformer", anchor="blocks.0.self_attn.q.weight", table=lambda _: keymap.DIT_ORIGINAL),
    _Family(kind="transformer", anchor="blocks.0.attn1.to_q.weight", table=lambda _: keymap.DIT_DIFFUSERS),
    _Family(kind="vae", anchor="decoder.middle.1.to_qkv.weight", table=_vae_original),
    _Family(kind="vae", anchor="decoder.mid_block.attentions.0.to_qkv.weight", table=_vae_diffusers),
    _Family(
        kind="text_encoder",
        anchor="blocks.0.pos_embedding.embedding.weight",
        table=lambda _: keymap.UMT5_ORIGINAL,
    ),
    _Family(
        kind="text_encoder",
        anchor="encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        table=lambda _: keymap.UMT5_TRANSFORMERS,
    ),
    _Family(kind="text_encoder", anchor="enc.blk.0.attn_rel_b.weight", table=lambda _: keymap.UMT5_LLAMA_CPP),
    _Family(kind="image_encoder", anchor="visual.patch_embedding.weight", table=lambda _: keymap.CLIP_ORIGINAL),
    _Family(
        kind="image_encoder",
        anchor="embeddings.class_embedding",
        table=lambda _: keymap.CLIP_TRANSFORMERS,
        begins="vision_model.",
    ),
)


# --- the same bytes under another name or shape ---


def _pieces(table: KeyMap, name: str, entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
    """A stored tensor under its native name; three where the layout stacks queries, keys and values."""
    native = table.to_native(name)
    if native is not None:
        yield native, entry
        return
    thirds = [table.to_native(f"{name}[{k}]") for k in range(3)]
    for k, native in enumerate(thirds):
        if native is not None:
            yield native, _third(entry, k)


def _third(entry: TensorEntry, index: int) -> TensorEntry:
    """The first, second or last third of the rows of a tensor. Raises CheckpointError if they are not divisible."""
    if not entry.shape or entry.shape[0] % 3 or entry.dtype in BLOCKS:
        raise CheckpointError(
            f"{entry.file} has '{entry.name}' of shape {list(entry.shape)} ({entry.dtype}), which cannot be divided "
            "into queries, keys and values; give another file"
        )
    size = entry.size_bytes // 3
    per_row = entry.scale is not None and len(entry.scale.shape) > 0 and entry.scale.shape[0] == entry.shape[0]
    return replace(
        entry,
        shape=(entry.shape[0] // 3, *entry.shape[1:]),
        offset=entry.offset + index * size,
        size_bytes=size,
        scale=_third(entry.scale, index) if entry.scale is not None and per_row else entry.scale,
    )


def _fitted(native: str, entry: TensorEntry) -> TensorEntry:
    """Sizes of 1 in front as the engine has them: the original CLIP has more, some writers of GGUF drop them."""
    leaf = native.rpartition("embeddings.")[2]
    if leaf == "class_embedding":
        return replace(entry, shape=(math.prod(entry.shape),))
    if leaf == "position_embedding.weight" and entry.shape[:1] == (1,) and len(entry.shape) == 3:
        return replace(entry, shape=entry.shape[1:])
    if native.endswith(("scale_shift_table", "image_embedder.pos_embed")) and len(entry.shape) == 2:
        return replace(entry, shape=(1, *entry.shape))
    return entry


def _unfolded(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Patch embeddings of four dimensions, as files of at most four fold them, with the first two apart again."""
    for name in ("patch_embedding", "vace_patch_embedding"):
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        if weight is None or bias is None or len(weight.shape) != 4 or not bias.shape or bias.shape[0] == 0:
            continue
        channels, rest = divmod(weight.shape[0], bias.shape[0])
        if not rest:
            tensors[f"{name}.weight"] = replace(weight, shape=(bias.shape[0], channels, *weight.shape[1:]))
    return tensors


# --- one part ---


def _part(
    one: _Found,
    told: JsonObject,
    *,
    left_over: tuple[str, ...],
    vocabulary: TensorEntry | Mapping[str, Any] | None,
    where: str,
) -> Part:
    for entry in one.tensors.values():
        _check_numbers(entry)
    kind = one.family.kind
    config = config_of(kind, one.tensors, told=told, where=where)
    return Part(
        kind=kind,
        layout=one.layout,
        model=model_name(kind, config),
        config=config,
        tensors=one.tensors,
        left_over=left_over,
        vocabulary=vocabulary if kind == "text_encoder" else None,
    )


def _check_numbers(entry: TensorEntry) -> None:
    if entry.dtype in _FLOATS or entry.dtype in BLOCKS or (entry.dtype == "I8" and entry.scale is not None):
        return
    lacks = " without a scale" if entry.dtype == "I8" else ""
    raise CheckpointError(
        f"{entry.file} stores '{entry.name}' as {entry.dtype}{lacks}, which is not readable as weights; take a file "
        "in BF16, F16, scaled fp8 or GGUF"
    )


def _check_kinds(kinds: Sequence[Kind], *, where: str) -> None:
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise CheckpointError(f"{where} holds two of the kind {kind}; give each a file of its own")


def _left_over(entries: Entries, found: Sequence[_Found]) -> list[tuple[str, ...]]:
    """Names that nothing uses, each with the network under whose prefix it stands."""
    lists: list[list[str]] = [[] for _ in found]
    used = frozenset[str]().union(*(one.used for one in found))
    for name in entries:
        if name not in used and not _DROPPED.fullmatch(name):
            fits = [index for index, one in enumerate(found) if name.startswith(one.prefix)]
            lists[max(fits, key=lambda index: len(found[index].prefix), default=0)].append(name)
    return [tuple(names) for names in lists]


def _vocabulary(entries: Entries, metadata: Mapping[str, Any]) -> TensorEntry | Mapping[str, Any] | None:
    for name, entry in entries.items():
        if name.rpartition(".")[2] == "spiece_model":
            return entry
    return metadata if "tokenizer.ggml.tokens" in metadata else None


# --- what is told of a network ---


def _told(
    metadata: Mapping[str, Any], config: JsonObject | None, found: Sequence[_Found], *, where: str
) -> dict[str, JsonObject]:
    """By the kind of network: what its config.json says, and the file itself, which comes first."""
    told: dict[str, JsonObject] = dict([beside] if (beside := translated(config or {})) is not None else [])
    facts = _facts(metadata.get("frameloom"), where=where)
    kind, own = facts.get("kind"), facts.get("config")
    if kind is None or own is None:
        return told
    if not isinstance(own, dict) or kind not in [one.family.kind for one in found]:
        raise CheckpointError(f"{where} says of itself that it is a {kind!r}, which it does not hold; convert it again")
    return {**told, kind: {**told.get(kind, {}), **own}}


def _facts(text: Any, *, where: str) -> JsonObject:
    if text is None:
        return {}
    damaged = CheckpointError(f"{where} holds no readable JSON object as 'frameloom' metadata; convert it again")
    if not isinstance(text, str) or len(text) > _MAX_FACTS:
        raise damaged
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(facts, dict):
        raise damaged
    return facts
