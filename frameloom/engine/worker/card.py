"""What a model is asked for and can do, as the server tells it to clients."""

from dataclasses import asdict

from frameloom.engine.engine import Engine
from frameloom.pipeline.latent_colours import colours_of
from frameloom.wire import Card


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
    )
