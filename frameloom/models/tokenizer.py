"""The tokenizer of a checkpoint: data for the tokenizers library, from a tokenizer.json or from a bare vocabulary."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from frameloom.errors import CheckpointError

PADDING, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Texts to token numbers. `pad_id` fills texts up."""

    backend: tokenizers.Tokenizer
    pad_id: int

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str], *, length: int) -> tuple[Tensor, Tensor]:
        """ids and mask (B, length), both int64: longer texts are cut, the mask is 0 where shorter ones have ended."""
        self.backend.enable_truncation(max_length=length)
        self.backend.enable_padding(length=length, pad_id=self.pad_id, pad_token=self.backend.id_to_token(self.pad_id))
        found = self.backend.encode_batch(list(texts))
        return torch.tensor([text.ids for text in found]), torch.tensor([text.attention_mask for text in found])

    def pieces(self, text: str) -> list[str]:
        """The pieces that a text is cut into, the end among them."""
        self.backend.no_truncation()
        self.backend.no_padding()
        tokens: list[str] = self.backend.encode(text).tokens
        return tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """A sentencepiece unigram model, as far as T5 uses it. A piece's place is its token number.

    `scores`: logarithms of probabilities. `types`: sentencepiece's, CONTROL and USER_DEFINED among them. `charsmap`:
    its compiled rules of normalising characters, empty for none.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    charsmap: bytes
    unknown_id: int
    end_id: int
    pad_id: int


CONTROL, USER_DEFINED = 3, 4  # types of pieces that a text is first searched for, before it is normalised


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint: nothing is fetched, no code is run. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; save the tokenizer again with transformers 5")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        name = _padding(folder / "tokenizer_config.json")
        pad_id = None if name is None else backend.token_to_id(name)
    except Exception as error:  # the library raises bare Exception on a damaged file
        raise CheckpointError(f"{folder} cannot be read ({type(error).__name__}: {error}); download it again") from None
    if pad_id is None:
        lacks = "pad_token" if name is None else f"pad_token {name!r}"
        raise CheckpointError(f"the tokenizer in {folder} has no {lacks}, which fills prompts up; download it again")
    return Tokenizer(backend=backend, pad_id=pad_id)


def build_tokenizer(pieces: Sequence[tuple[str, float]]) -> Tokenizer:
    """A T5 tokenizer of the given pieces and scores; the first three are padding, end and unknown."""
    backend = _t5(pieces, unknown_id=2, end=END)
    backend.add_special_tokens([PADDING, END, UNKNOWN])
    return Tokenizer(backend=backend, pad_id=0)


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer that transformers makes of the same sentencepiece file for T5: what Wan's reference counts with.

    Characters that no piece has are unknown, also where the vocabulary has pieces for single bytes: the reference does
    not use them. Raises CheckpointError on a vocabulary that the library refuses.
    """
    pieces, scores = vocabulary.pieces, vocabulary.scores
    try:
        backend = _t5(
            list(zip(pieces, scores, strict=True)), unknown_id=vocabulary.unknown_id, end=pieces[vocabulary.end_id]
        )
        if vocabulary.charsmap:
            backend.normalizer = normalizers.Precompiled(vocabulary.charsmap)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the vocabulary cannot be used ({error}); download its file again") from None
    always = {vocabulary.pad_id, vocabulary.end_id, vocabulary.unknown_id}
    backend.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind == CONTROL or number in always)
            for number, (piece, kind) in enumerate(zip(pieces, vocabulary.types, strict=True))
            if kind in (CONTROL, USER_DEFINED) or number in always
        ]
    )
    return Tokenizer(backend=backend, pad_id=vocabulary.pad_id)


def _t5(pieces: Sequence[tuple[str, float]], *, unknown_id: int, end: str) -> tokenizers.Tokenizer:
    """Words are cut at white space, begin with a mark, and a text ends with `end`."""
    backend = tokenizers.Tokenizer(models.Unigram(list(pieces), unk_id=unknown_id, byte_fallback=False))
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, backend.token_to_id(end))]
    )
    return backend


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save a tokenizer of `build_tokenizer` as transformers does, so that any Wan pipeline can read it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend.no_truncation()
    tokenizer.backend.no_padding()
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {
        "backend": "tokenizers", "eos_token": END, "extra_ids": 0, "extra_special_tokens": [],
        "model_max_length": 1000000000000000019884624838656, "pad_token": PADDING,
        "tokenizer_class": "T5Tokenizer", "unk_token": UNKNOWN,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _padding(config: Path) -> str | None:
    """The name of the padding token, which some files describe with more than its name; None where they say none."""
    said = json.loads(config.read_text("utf-8")).get("pad_token", PADDING) if config.is_file() else PADDING
    if said is None:
        return None
    return str(said["content"] if isinstance(said, dict) else said)
