"""Tells when a prompt asks the built-in model for something outside its world."""

import re
from itertools import pairwise

from frameloom.shapes.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, vocabulary

_SPINS = frozenset({"spinning", "spins", "rotating", "rotates"})
_WORDS_OF_EVERY_PROMPT = frozenset({"in", "at", "with", "and", "while", "toward", "towards", "background", "backdrop"})


def advice(prompt: str) -> str | None:
    """One friendly line if the prompt leaves the world of shapes, else None."""
    problem = _problem(re.findall(r"[a-z]+", prompt.lower()))
    if problem is None:
        return None
    motions = ", ".join(doing[0] for doing, _ in MOTIONS.values())
    return (
        f"The built-in model {problem}. It draws one {'/'.join(COLOURS)} {'/'.join(SHAPES)} that is {motions}, on a "
        f"{'/'.join(BACKGROUNDS)} background or gradient. For anything else use a real checkpoint: "
        "--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def _problem(words: list[str]) -> str | None:
    """What the prompt asks that the world of shapes lacks, as the end of a sentence."""
    unknown = [word for word in words if word not in vocabulary() and word not in _WORDS_OF_EVERY_PROMPT]
    if unknown:
        return f"does not know '{unknown[0]}'"
    shapes, colours = ({word for word in words if word in names} for names in (SHAPES, COLOURS))
    if not shapes:
        return f"needs one of its shapes ({', '.join(SHAPES)})"
    for before, word in pairwise(words):
        if word in ("background", "backdrop") and before in COLOURS:
            return f"has no {before} background"
    if len(shapes) > 1 or len(colours) > 1:
        return "draws one shape of one colour at a time"
    if shapes == {"circle"} and not _SPINS.isdisjoint(words):
        return "has no spinning circle (nobody could see it spin)"
    return None
