"""What a model is asked for and can do, as the server tells it to clients."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from frameloom.engine.engine import Engine
from frameloom.pipeline.latent_colours import colours_of
from frameloom.types import SizeRules
from frameloom.wire import Card

_SMALL_ON_CPU: Final = 512
"""Tokens of the denoiser. Measured with the built-in model (benchmarks/batching.py): batches of two and four took 0.62
to 0.91 of the processor time of one by one at 320 tokens, and 1.10 at 900."""


def card_of(engine: Engine, name: str) -> Card:
    """The card of an engine, under the name that clients call its model by."""
    pipeline, facts = engine.pipeline, engine.facts
    takes, rules = pipeline.takes, pipeline.size_rules
    defaults = {key: value for key, value in asdict(engine.defaults).items() if key != "dtype"}
    starts_from = () if "control_video" in takes.possible or "image" in takes.needed else ("video",)
    return Card(
        model=name,
        defaults=defaults,
        width_multiple=rules.width_multiple,
        height_multiple=rules.height_multiple,
        temporal=rules.temporal,
        takes=(*takes.possible, *starts_from),
        needs_image="image" in takes.needed,
        previews=colours_of(pipeline.vae.spec) is not None,
        device=facts.get("device", str(pipeline.device)),
        dtype=facts.get("dtype", ""),
        torch=str(facts.get("torch", "")),  # a text of its own kind, which no message takes
        ranks=1 if engine.team is None else engine.team.size,
        experts=len(pipeline.experts),
        small_tokens=_SMALL_ON_CPU if pipeline.device.type == "cpu" else _usual_tokens(defaults, rules),
    )


def _usual_tokens(defaults: Mapping[str, Any], rules: SizeRules) -> int:
    """Of a video of the model's usual size: past it a request fills an accelerator by itself."""
    across, down = defaults["width"] // rules.width_multiple, defaults["height"] // rules.height_multiple
    tokens: int = across * down * (1 + (defaults["num_frames"] - 1) // rules.temporal)
    return tokens
