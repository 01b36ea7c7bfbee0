"""Small random networks of the kinds that the checkpoint at hand may not be, in files as those of a checkpoint."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from frameloom.models.encoders import TIED, build_text_encoder
from frameloom.models.meta import on_meta
from frameloom.models.spec import Index, TransformerSpec, VaceSpec
from frameloom.models.umt5 import Umt5Spec
from frameloom.models.vace import make_dit
from frameloom.ops.dequant import BLOCK_TYPES, turned
from frameloom.ops.quantized import QuantizedWeight
from frameloom.weights.checkpoint import Component, JsonObject
from frameloom.weights.header import TensorEntry

_SMALL = TransformerSpec(
    num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=24, freq_dim=32,
    ffn_dim=256, num_layers=3,
)  # fmt: skip
_FROM_IMAGE = replace(_SMALL, in_channels=36)  # latents of the image and a mask beside the noise
_WITH_CLIP = replace(_FROM_IMAGE, image_dim=20, added_kv_proj_dim=_SMALL.dim)
SPECS: Mapping[str, TransformerSpec] = MappingProxyType(
    {
        "image network": _FROM_IMAGE,
        "image network with CLIP": _WITH_CLIP,
        "first-and-last-image network": replace(_WITH_CLIP, pos_embed_seq_len=2 * 257),
        "VACE network": VaceSpec(**asdict(_SMALL), vace_layers=(Index(0), Index(2)), vace_in_channels=6),
    }
)

_WIDTH = 256  # whole blocks of every type
_QUANTIZED = replace(
    _SMALL, attention_head_dim=_WIDTH // 4, text_dim=_WIDTH, freq_dim=_WIDTH, ffn_dim=2 * _WIDTH, num_layers=2
)
_TEXT = Umt5Spec(vocab_size=96, d_model=_WIDTH, d_kv=_WIDTH // 4, d_ff=2 * _WIDTH, num_layers=2, num_heads=4)
# Of GGUF's types: where the float16 scales of a block lie, and how large they are for numbers as large as weights.
_SCALES = (("Q8_0", (0,), 8e-4), ("Q4_K", (0, 2), 2e-4), ("Q6_K", (208,), 6e-5), ("IQ4_XS", (0,), 4e-5))
_GROUP = 16  # numbers that are rotated together
Weights = Mapping[str, Tensor]
Quantize = Callable[[int, Tensor], "Stored"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stored:
    """A tensor as a file has it, and the numbers, float32, that it stands for."""

    weight: QuantizedWeight
    plain: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """A network whose weights are quantized, and the same with the numbers that they stand for."""

    name: str
    stored: Component
    plain: Component


def write_network(folder: Path, kind: str) -> Component:
    """A transformer of one of the kinds in SPECS."""
    spec = SPECS[kind]
    stored = {name: _in_float32(weight) for name, weight in _random_transformer(spec).items()}
    return _write(folder / f"{kind}.bin", "transformer", stored, config=asdict(spec))


def write_quantized(folder: Path) -> Iterator[Sample]:
    """A transformer and a text encoder in blocks of GGUF, and both as float8 and int8 in all their ways."""
    transformer, text_encoder = _random_transformer(_QUANTIZED), _random(build_text_encoder(asdict(_TEXT)))
    for way, quantize in (("in GGUF's blocks", _in_blocks), ("in 8 bits a number", _in_8_bits)):
        yield _sample(folder, f"transformer {way}", transformer, quantize, config=asdict(_QUANTIZED))
        yield _sample(folder, f"text encoder {way}", text_encoder, quantize, config=asdict(_TEXT))


def _random_transformer(spec: TransformerSpec) -> Weights:
    with on_meta():
        network = make_dit(spec)
    return _random(network)


def _random(network: nn.Module) -> Weights:
    """Numbers for a network on the meta device, so that each part of it matters; the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    slots = {name: slot for name, slot in network.state_dict().items() if name not in TIED}
    return {name: _random_weight(name, slot.shape, generator) for name, slot in slots.items()}


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if not name.endswith("weight"):
        return noise / 2
    return 1 + noise / 5 if len(shape) == 1 else noise / math.sqrt(math.prod(shape[1:]))


def _sample(folder: Path, name: str, weights: Weights, quantize: Quantize, *, config: JsonObject) -> Sample:
    """As real files have it: matrices of whole blocks are quantized, the rest is not."""
    part = "text_encoder" if name.startswith("text") else "transformer"
    stored = {key: _in_float32(weight) for key, weight in weights.items()}
    matrices = {key: weight for key, weight in weights.items() if weight.dim() == 2 and weight.shape[1] % _WIDTH == 0}
    stored |= {key: quantize(index, weight) for index, (key, weight) in enumerate(matrices.items())}
    plain = {key: _in_float32(one.plain) for key, one in stored.items()}
    return Sample(
        name=f"random {name}",
        stored=_write(folder / f"{name}.bin", part, stored, config=config),
        plain=_write(folder / f"{name}, plain.bin", part, plain, config=config),
    )


def _in_float32(weight: Tensor) -> Stored:
    return Stored(weight=_as_bytes(weight, "F32"), plain=weight)


def _in_blocks(index: int, weight: Tensor) -> Stored:
    """Random blocks with sensible scales, the types in turns: the numbers are other ones."""
    kind, places, size = _SCALES[index % len(_SCALES)]
    block, generator = BLOCK_TYPES[kind], torch.Generator().manual_seed(index)
    num_blocks = weight.numel() // block.numbers
    raw_NS = torch.randint(0, 256, (num_blocks, block.size_bytes), dtype=torch.uint8, generator=generator)
    for start in places:
        scale_N1 = size * (0.5 + torch.rand(num_blocks, 1, generator=generator))
        raw_NS[:, start : start + 2] = scale_N1.half().view(torch.uint8)
    stored = QuantizedWeight(raw_U8=raw_NS.flatten(), dtype_name=kind, shape=tuple(weight.shape))
    return Stored(weight=stored, plain=stored.plain(torch.float32))


def _in_8_bits(index: int, weight: Tensor) -> Stored:
    """In turns: float8 with one scale and without, int8 with a scale for each row, and that of rotated rows."""
    way = index % 4
    return _in_float8(weight, scaled=way == 0) if way < 2 else _in_int8(weight, rotated=_GROUP if way == 3 else 0)


def _in_float8(weight: Tensor, *, scaled: bool) -> Stored:
    scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max if scaled else torch.ones(())
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    stored = _as_bytes(numbers, "F8_E4M3", scale=scale if scaled else None)
    return Stored(weight=stored, plain=numbers.float() * scale)


def _in_int8(weight: Tensor, *, rotated: int) -> Stored:
    turn = functools.partial(turned, group=rotated or 1)  # its own inverse; in groups of one number nothing turns
    scale = turn(weight).abs().amax(1, keepdim=True) / torch.iinfo(torch.int8).max
    numbers = (turn(weight) / scale).round().to(torch.int8)
    stored = _as_bytes(numbers, "I8", scale=scale, rotated=rotated)
    return Stored(weight=stored, plain=turn(numbers.float() * scale))


def _as_bytes(numbers: Tensor, dtype_name: str, *, scale: Tensor | None = None, rotated: int = 0) -> QuantizedWeight:
    raw_U8 = numbers.contiguous().flatten().view(torch.uint8)
    shape = tuple(numbers.shape)
    return QuantizedWeight(raw_U8=raw_U8, dtype_name=dtype_name, shape=shape, scale=scale, rotated=rotated)


def _write(path: Path, part: str, tensors: Mapping[str, Stored], *, config: JsonObject) -> Component:
    """One file of these tensors, scales among them, and what an opened checkpoint would say of it."""
    entries: dict[str, TensorEntry] = {}
    with path.open("wb") as file:

        def put(name: str, weight: QuantizedWeight) -> TensorEntry:
            scale = None if weight.scale is None else put(f"{name}_scale", _in_float32(weight.scale).weight)
            offset, size_bytes = file.tell(), file.write(weight.raw_U8.numpy().data)
            return TensorEntry(
                name=name, dtype=weight.dtype_name, shape=weight.shape, file=path, offset=offset,
                size_bytes=size_bytes, scale=scale, rotated=weight.rotated,
            )  # fmt: skip

        for name, stored in tensors.items():
            entries[name] = put(name, stored.weight)
    return Component(
        name=part, folder=path.parent, described_by=path, class_name="", config=config, files=(path,), tensors=entries
    )
