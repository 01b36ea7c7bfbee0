"""The tokenizer inside weight files: ComfyUI's text encoders hold a sentencepiece model as a tensor, GGUF files a list.

A sentencepiece model is a protobuf message (sentencepiece_model.proto); of it are read the pieces, the numbers of the
special ones, and the normalizer's compiled table. Everything is bounded and checked: a wrong table would make the
tokenizers library read past its end, which it answers with a crash.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frameloom.errors import CheckpointError
from frameloom.models.tokenizer import Tokenizer, Vocabulary, load_tokenizer, tokenizer_of
from frameloom.weights.checkpoint import Component
from frameloom.weights.header import TensorEntry

MAX_BYTES = 64 * 2**20  # of a sentencepiece model; UMT5's has 4.5 MB
MAX_PIECES = 2**20  # UMT5 has 256,384

_UNIGRAM = 1  # model_type of the trainer's settings
_NORMAL, _LAST_TYPE = 1, 6
_FLOAT = struct.Struct("<f")


class _DamagedError(Exception):
    """What is wrong, in a few words; becomes a CheckpointError that names the file."""


def read_vocabulary(source: TensorEntry | Mapping[str, Any] | Path) -> Vocabulary:
    """The vocabulary of a tensor that holds a sentencepiece model, of GGUF metadata, or of a spiece.model file.

    Raises CheckpointError if it is damaged, absurdly large or of another kind than T5's.
    """
    try:
        vocabulary = _of_gguf(source) if isinstance(source, Mapping) else _of_sentencepiece(source)
        _check(vocabulary)
    except _DamagedError as error:
        where = source.file if isinstance(source, TensorEntry) else "GGUF" if isinstance(source, Mapping) else source
        raise CheckpointError(f"the tokenizer in {where} cannot be used: {error}; download the file again") from None
    return vocabulary


def tokenizer_in(component: Component) -> Tokenizer:
    """The tokenizer of a checkpoint: in a weight file, a tokenizer.json, or a spiece.model. Raises CheckpointError."""
    sentencepiece = component.folder / "spiece.model"
    if component.vocabulary is not None:
        return tokenizer_of(read_vocabulary(component.vocabulary))
    if sentencepiece.is_file() and not (component.folder / "tokenizer.json").is_file():
        return tokenizer_of(read_vocabulary(sentencepiece))
    return load_tokenizer(component.folder)


# --- GGUF ---


def _of_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """The keys of llama.cpp's T5 files; their token types are sentencepiece's."""
    if metadata.get("tokenizer.ggml.model") != "t5":
        raise _DamagedError(f"it is of the kind {metadata.get('tokenizer.ggml.model')!r}, and Wan's is 't5'")
    pieces = _list(metadata, "tokens", str)
    return Vocabulary(
        pieces=pieces,
        scores=tuple(map(float, _list(metadata, "scores", (int, float)))),
        types=_list(metadata, "token_type", int) or (_NORMAL,) * len(pieces),
        charsmap=bytes(number & 0xFF for number in _list(metadata, "precompiled_charsmap", int)),
        unknown_id=_number(metadata, "unknown_token_id", 2),
        end_id=_number(metadata, "eos_token_id", 1),
        pad_id=_number(metadata, "padding_token_id", 0),
    )


def _list(metadata: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> tuple[Any, ...]:
    found = metadata.get(f"tokenizer.ggml.{key}", ())
    if not isinstance(found, Sequence | np.ndarray) or isinstance(found, str | bytes) or len(found) > MAX_BYTES:
        raise _DamagedError(f"its {key} are no list")
    plain = found.tolist() if isinstance(found, np.ndarray) else found
    if not all(isinstance(value, kind) for value in plain):
        raise _DamagedError(f"its {key} are of the wrong kind")
    return tuple(plain)


def _number(metadata: Mapping[str, Any], key: str, usual: int) -> int:
    value = metadata.get(f"tokenizer.ggml.{key}", usual)
    if type(value) is not int:
        raise _DamagedError(f"its {key} is {value!r}")
    return value


# --- sentencepiece ---


def _of_sentencepiece(source: TensorEntry | Path) -> Vocabulary:
    pieces: list[tuple[str, float, int]] = []
    trainer: Mapping[int, int | bytes] = {}
    normalizer: Mapping[int, int | bytes] = {}
    for field, value in _fields(_bytes_of(source)):
        if field == 1:
            pieces.append(_piece(value))
        elif field == 2:
            trainer = dict(_fields(_message(value)))
        elif field == 3:
            normalizer = dict(_fields(_message(value)))
        if len(pieces) > MAX_PIECES:
            raise _DamagedError(f"it has more than {MAX_PIECES} pieces")
    if trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise _DamagedError("it is no unigram model, as T5's are")
    texts, scores, types = zip(*pieces, strict=True) if pieces else ((), (), ())
    return Vocabulary(
        pieces=texts,
        scores=scores,
        types=types,
        charsmap=_message(normalizer.get(2, b"")),
        unknown_id=_signed(trainer.get(40, 0)),
        end_id=_signed(trainer.get(42, 2)),
        pad_id=_signed(trainer.get(43, -1)),
    )


def _bytes_of(source: TensorEntry | Path) -> bytes:
    path, offset = (source, 0) if isinstance(source, Path) else (source.file, source.offset)
    size = source.stat().st_size if isinstance(source, Path) else source.size_bytes
    if size > MAX_BYTES:
        raise _DamagedError(f"it has {size} bytes, more than {MAX_BYTES}")
    if isinstance(source, TensorEntry) and source.dtype not in ("U8", "I8"):
        raise _DamagedError(f"'{source.name}' holds {source.dtype}, not bytes")
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _piece(value: int | bytes) -> tuple[str, float, int]:
    """Text, score and type of one piece."""
    message = _message(value)
    if (plain := _plain_piece(message)) is not None:
        return plain
    text, score, kind = b"", 0.0, _NORMAL
    for field, part in _fields(message):
        if field == 1:
            text = _message(part)
        elif field == 2 and isinstance(part, bytes) and len(part) == 4:
            (score,) = _FLOAT.unpack(part)
        elif field == 3:
            kind = _signed(part)
    return _decoded(text), score, kind


def _plain_piece(message: bytes) -> tuple[str, float, int] | None:
    """The same of nothing but a short text and a score, which nearly all of UMT5's 256,384 are: much faster."""
    if (
        len(message) < 7
        or message[0] != 0x0A
        or message[-5] != 0x15
        or message[1] != len(message) - 7
        or message[1] > 127
    ):
        return None
    (score,) = _FLOAT.unpack_from(message, len(message) - 4)
    return _decoded(message[2:-5]), score, _NORMAL


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise _DamagedError("a piece is no UTF-8 text") from None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: their numbers, and numbers (varints) or bytes (everything else)."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            number, position = _varint(data, position)
            yield tag >> 3, number
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _DamagedError("it is no sentencepiece model")
        end = position + size
        if end > len(data):
            raise _DamagedError("it is cut off")
        yield tag >> 3, data[position:end]
        position = end


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    if position < len(data) and data[position] < 0x80:
        return data[position], position + 1
    value = 0
    for count in range(10):
        if position >= len(data):
            raise _DamagedError("it is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position
    raise _DamagedError("it is no sentencepiece model")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _DamagedError("it is no sentencepiece model")
    return value


def _signed(value: int | bytes) -> int:
    """A protobuf int32, which is stored in 64 bits of two's complement."""
    if not isinstance(value, int):
        raise _DamagedError("it is no sentencepiece model")
    return value - 2**64 if value >= 2**63 else value


# --- what must hold of any vocabulary ---


def _check(vocabulary: Vocabulary) -> None:
    count = len(vocabulary.pieces)
    if not 0 < count <= MAX_PIECES or len(vocabulary.scores) != count or len(vocabulary.types) != count:
        raise _DamagedError(f"it has {count} pieces, {len(vocabulary.scores)} scores, {len(vocabulary.types)} types")
    for name in ("unknown_id", "end_id", "pad_id"):
        if not 0 <= getattr(vocabulary, name) < count:
            raise _DamagedError(f"its {name} is {getattr(vocabulary, name)}, and it has {count} pieces")
    if len(set(vocabulary.pieces)) != count or "" in vocabulary.pieces:
        raise _DamagedError("a piece is empty or there twice")
    if not all(map(math.isfinite, vocabulary.scores)):
        raise _DamagedError("a score is no finite number")
    if not all(_NORMAL <= kind <= _LAST_TYPE for kind in vocabulary.types):
        raise _DamagedError("a piece is of an unknown type")
    if vocabulary.charsmap:
        _check_charsmap(vocabulary.charsmap)


def _check_charsmap(data: bytes) -> None:
    """The table is a trie (its bytes in four, then 32-bit units) and the texts it leads to, each ended by a zero.

    A unit leads to 256 others, by exclusive or; if its bit 8 is set, the first of them is the place of a text. Where it
    leads must exist. Units with the highest bit, places of texts, lead nowhere: no character matches them.
    """
    damaged = _DamagedError("its table of characters is damaged")
    size = int.from_bytes(data[:4], "little")
    if size == 0 or size % 1024 or 4 + size > len(data):
        raise damaged
    units = np.frombuffer(data, "<u4", count=size // 4, offset=4)
    leads = units >> 31 == 0
    leads[0] = True  # the root is followed without a look at it
    first = np.arange(len(units), dtype=np.uint32) ^ (units >> 10 << ((units & (1 << 9)) >> 6))
    if (first[leads] >= len(units)).any():
        raise damaged
    places = units[first[leads & (units >> 8 & 1 == 1)]] & 0x7FFFFFFF
    try:
        data[4 + size :].decode()
    except UnicodeDecodeError:
        raise damaged from None
    texts = np.frombuffer(data, np.uint8, offset=4 + size)
    if (places >= len(texts)).any() or (texts[places] & 0xC0 == 0x80).any():  # the latter: within a character
        raise damaged
