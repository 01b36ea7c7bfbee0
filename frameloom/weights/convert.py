"""Writes a checkpoint in another layout: Diffusers folders, an original Wan repository, or single files.

Tensor by tensor, so that memory holds one; a second run goes on where the first was ended; every file is read back and
compared. What the engine computes from the result is what it computes from the source, bit for bit, in that dtype.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from frameloom.errors import CheckpointError, OutputError, RequestError
from frameloom.models.clip import image_encoder_key
from frameloom.models.wan_dit import WanDiT
from frameloom.platform.device import DTYPES as FLOATS
from frameloom.weights.checkpoint import Checkpoint, Component
from frameloom.weights.descriptions import describe, metadata_of
from frameloom.weights.destination import check_folder, check_occupied, check_space, only_writer
from frameloom.weights.fingerprint import fingerprint
from frameloom.weights.header import BLOCKS, TensorEntry
from frameloom.weights.hub_fetch import OnBytes
from frameloom.weights.keymap import CLIP_ORIGINAL, DIT_ORIGINAL, UMT5_ORIGINAL, vae_21, vae_22
from frameloom.weights.source import Source, open_checkpoint
from frameloom.weights.tensors import DTYPES, read_tensor
from frameloom.weights.write import NAMES, Planned, Target, make_folder, write_file, write_weights

Layout = Literal["diffusers", "original", "single-file"]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "original", "single-file")

SHARD_BYTES = 10 * 10**9
"""Largest file of a Diffusers component; more is cut into shards with an index, as save_pretrained does."""

_NETWORKS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
_WIDER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}  # what to take where numbers are too large
_NAMES_OF: Mapping[tuple[Layout, str], str] = {
    ("original", "text_encoder"): "models_t5_umt5-xxl-enc-bf16.pth",
    ("original", "image_encoder"): "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    ("single-file", "transformer"): "diffusion_models/transformer.safetensors",
    ("single-file", "text_encoder"): "text_encoders/umt5.safetensors",
    ("single-file", "vae"): "vae/vae.safetensors",
    ("single-file", "image_encoder"): "clip_vision/clip_vision.safetensors",
}


def convert_model(
    model: Source | None,
    destination: str | os.PathLike[str],
    *,
    to: str,
    dtype: str | None = None,
    parts: Mapping[str, Source] | None = None,
    variant: str = "",
    on_bytes: OnBytes | None = None,
) -> list[Path]:
    """Open a checkpoint as `open_checkpoint` does, and write it as `convert` does.

    `dtype`: float32, bfloat16, float16, or None. `on_bytes` is told of what is fetched, and of what is written. Raises
    RequestError for another dtype, and for a layout that is not known.
    """
    if to not in LAYOUTS:
        raise RequestError(f"the layout {to!r} is unknown; use {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}")
    if dtype is not None and dtype not in FLOATS:
        raise RequestError(f"the dtype {dtype!r} is not possible; use {', '.join(FLOATS)}, or none to leave it")
    if not os.fspath(destination):
        raise RequestError("the destination is empty; give a folder that is new, empty, or of an earlier run")
    folder = Path(os.path.expanduser(destination))
    check_folder(folder)
    checkpoint = open_checkpoint(model, parts=parts, variant=variant, on_bytes=on_bytes)
    torch_dtype = None if dtype is None else FLOATS[dtype]
    return convert(checkpoint, folder, to=to, dtype=torch_dtype, on_bytes=on_bytes or (lambda *_: None))


def convert(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    to: Layout,
    dtype: torch.dtype | None = None,
    on_bytes: OnBytes = lambda *_: None,
) -> list[Path]:
    """Write `checkpoint` into the folder `destination` in the layout `to`; returns the weight files.

    `dtype`: of all networks but the VAE, which stays as stored, and but for what is always computed in float32; None
    leaves every tensor as stored. Quantised tensors are expanded, to bfloat16 where nothing else is asked for. Raises
    OutputError, and CheckpointError where the source cannot be read.
    """
    check_folder(destination)
    if destination.exists() and destination.samefile(checkpoint.path):
        raise OutputError(f"'{destination}' is the checkpoint itself; give another folder")
    targets = plan(checkpoint, destination, to=to, dtype=dtype)
    described = describe(checkpoint, destination, targets, to=to)
    make_folder(destination)
    with only_writer(destination):
        check_occupied(checkpoint, destination, targets, described)
        check_space(destination, targets, described)
        for target in targets:
            write_weights(target, _counted(target, on_bytes))
        for path, content in described.items():
            write_file(path, content)
    return [target.path for target in targets]


def plan(checkpoint: Checkpoint, destination: Path, *, to: Layout, dtype: torch.dtype | None = None) -> list[Target]:
    """The weight files that `convert` writes."""
    source = fingerprint(checkpoint)
    targets = []
    for name in _NETWORKS:
        component = checkpoint.components.get(name)
        if component is not None:
            planned = dict(_planned(component, to, None if name == "vae" else dtype))
            facts = metadata_of(checkpoint, component) if to == "single-file" else {}
            paths = _paths(checkpoint, component, destination, to=to, size=sum(p.size_bytes for p in planned.values()))
            told = {"format": "pt", "source": source, **facts}
            parts = _cut(planned, len(paths))
            targets += [
                Target(component=name, path=path, tensors=part, metadata=told)
                for path, part in zip(paths, parts, strict=True)
            ]
    return targets


# --- names and dtypes ---


def _planned(component: Component, to: Layout, dtype: torch.dtype | None) -> Iterator[tuple[str, Planned]]:
    """The tensors of a component as the layout names them, each with how it is read."""
    rename = _rename(component, to)
    thirds: dict[str, list[Planned]] = {}
    for native, entry in component.tensors.items():
        if component.name == "image_encoder" and to != "diffusers":
            if (key := image_encoder_key(native)) is None:
                continue  # no part of what Wan uses, and the other layouts have no place for it
            name = rename(f"vision_model.{key}")  # which newer versions of transformers leave out
        else:
            name = rename(native)
        if name is None:
            raise OutputError(f"'{native}' of the {component.name} has no name in the layout '{to}'; use diffusers")
        planned = _as_dtype(entry, _wanted(component, native, entry, dtype))
        if not name.endswith("]"):
            yield name, planned
            continue
        joined, _, index = name.removesuffix("]").partition("[")  # queries, keys and values of CLIP are one tensor
        parts = thirds.setdefault(joined, [planned] * 3)
        parts[int(index)] = planned
        if len({id(part) for part in parts}) == 3:
            yield joined, _joined(parts)


def _rename(component: Component, to: Layout) -> Callable[[str], str | None]:
    kind = component.name.removesuffix("_2")
    if to == "diffusers" or (to == "single-file" and kind in ("text_encoder", "image_encoder")):
        return lambda name: name  # repackaged encoders have the names of transformers
    if kind == "vae":
        blocks = int(component.config.get("num_res_blocks", 2))
        stages = len(component.config.get("dim_mult", (1, 2, 4, 4)))
        is_residual = component.config.get("is_residual", False)
        table = vae_22(num_res_blocks=blocks) if is_residual else vae_21(num_res_blocks=blocks, num_stages=stages)
    else:
        table = {"transformer": DIT_ORIGINAL, "text_encoder": UMT5_ORIGINAL, "image_encoder": CLIP_ORIGINAL}[kind]
    return table.from_native


def _wanted(component: Component, name: str, entry: TensorEntry, dtype: torch.dtype | None) -> torch.dtype:
    is_plain = entry.dtype not in BLOCKS and entry.scale is None
    stored = DTYPES[entry.dtype] if is_plain else torch.bfloat16
    if not stored.is_floating_point or dtype is None:
        return stored
    keeps = component.name.startswith("transformer") and WanDiT.keep_in_fp32(name)
    return stored if keeps and is_plain else dtype


def _as_dtype(entry: TensorEntry, dtype: torch.dtype) -> Planned:
    return Planned(dtype=NAMES[dtype], shape=entry.shape, read=functools.partial(_read, entry, dtype))


def _read(entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """A stored tensor in `dtype`. Raises CheckpointError where that has no place for its largest number."""
    tensor = read_tensor(entry, dtype=dtype)
    if (entry.scale is None and DTYPES.get(entry.dtype) == dtype) or not tensor.numel():
        return tensor
    if all(bound.isfinite() for bound in tensor.aminmax()):
        return tensor
    wide = read_tensor(entry, dtype=torch.float64 if entry.dtype == "F64" else torch.float32)
    lost = wide[tensor.isinf() & wide.isfinite()]
    if lost.numel():
        largest, name = lost.abs().max().item(), str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"'{entry.name}' in {entry.file} holds numbers up to {largest:g}, and {name} ends at "
            f"{torch.finfo(dtype).max:g}; take {_WIDER.get(dtype, 'no dtype')}"
        )
    return tensor


def _joined(parts: Sequence[Planned]) -> Planned:
    def read() -> Tensor:
        return torch.cat([part.read() for part in parts])

    first = parts[0]
    return Planned(dtype=first.dtype, shape=(3 * first.shape[0], *first.shape[1:]), read=read)


# --- files ---


def _paths(checkpoint: Checkpoint, component: Component, root: Path, *, to: Layout, size: int) -> list[Path]:
    """One path, or one for each shard."""
    name, is_expert = component.name, "transformer_2" in checkpoint.components
    if to == "diffusers":
        stem = "model" if name.endswith("encoder") else "diffusion_pytorch_model"
        return _sharded(root / name / f"{stem}.safetensors", size)
    if to == "original" and name == "vae":
        return [root / ("Wan2.2_VAE.pth" if component.config.get("is_residual") else "Wan2.1_VAE.pth")]
    noise = {"transformer": "high_noise", "transformer_2": "low_noise"}.get(name)
    if to == "original" and noise is not None:
        folder = root / f"{noise}_model" if is_expert else root
        return _sharded(folder / "diffusion_pytorch_model.safetensors", size)
    path = root / _NAMES_OF[to, name.removesuffix("_2")]
    return [path.with_stem(f"{path.stem}_{noise}") if noise is not None and is_expert else path]


def _sharded(path: Path, size: int) -> list[Path]:
    count = -(-size // SHARD_BYTES)
    if count <= 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index:05d}-of-{count:05d}") for index in range(1, count + 1)]


def _cut(planned: Mapping[str, Planned], count: int) -> list[dict[str, Planned]]:
    """The tensors in order, in so many parts of about as many bytes."""
    total = max(1, sum(one.size_bytes for one in planned.values()))
    parts: list[dict[str, Planned]] = [{} for _ in range(count)]
    done = 0
    for name, one in planned.items():
        parts[min(done * count // total, count - 1)][name] = one
        done += one.size_bytes
    return parts


def _counted(target: Target, on_bytes: OnBytes) -> Callable[[int], None]:
    """The callback of one file, which adds up."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        on_bytes(target.path.name, done, target.size_bytes)

    return count
