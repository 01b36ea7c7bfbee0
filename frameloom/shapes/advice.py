"""Tells when a prompt asks the built-in model for something outside its world."""

import re

from frameloom.shapes.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, vocabulary

_WORDS_OF_EVERY_PROMPT = frozenset({"in", "at", "with", "and", "while", "toward", "towards", "background", "backdrop"})


def advice(prompt: str) -> str | None:
    """One friendly line if the prompt leaves the world of shapes, else None."""
    words = re.findall(r"[a-z]+", prompt.lower())
    unknown = [word for word in words if word not in vocabulary() and word not in _WORDS_OF_EVERY_PROMPT]
    if not unknown and any(word in SHAPES for word in words):
        return None
    missing = f"does not know '{unknown[0]}'" if unknown else f"needs one of its shapes ({', '.join(SHAPES)})"
    motions = ", ".join(doing[0] for doing, _ in MOTIONS.values())
    return (
        f"The built-in model {missing}. It draws one {'/'.join(COLOURS)} {'/'.join(SHAPES)} that is {motions}, on a "
        f"{'/'.join(BACKGROUNDS)} background or gradient. For anything else use a real checkpoint: "
        "--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )
