"""The tokenizer of the built-in model: one piece per word of its world, and single characters for everything else."""

import string
from pathlib import Path

from frameloom.models import tokenizer
from frameloom.shapes.world import vocabulary

_SPACE = "▁"  # T5 marks the beginning of a word with it
_WORD, _CHARACTER = -1.0, -10.0  # log-likelihoods: a word is always cheaper than its letters


def pieces() -> list[tuple[str, float]]:
    """Every token with its score; the first three are padding, end and unknown, as in every T5 vocabulary."""
    words = vocabulary()
    capitalised = [word.capitalize() for word in words]
    characters = [_SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    known = [(_SPACE + word, _WORD) for word in dict.fromkeys([*words, *capitalised])]
    return special + known + [(character, _CHARACTER) for character in characters]


def write_tokenizer(folder: Path) -> None:
    """Save the tokenizer as transformers does, so that any Wan pipeline can read it."""
    tokenizer.write_tokenizer(tokenizer.build_tokenizer(pieces()), folder)
