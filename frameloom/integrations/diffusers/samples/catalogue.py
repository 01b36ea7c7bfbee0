"""All random pipelines: every class that carries a VAE or a transformer of Wan, and their neighbours."""

import json
from dataclasses import replace
from pathlib import Path

from frameloom.errors import RequestError
from frameloom.integrations.diffusers.samples import images, neighbours, wan
from frameloom.integrations.diffusers.samples.sample import Sample

SAMPLES: tuple[Sample, ...] = (*wan.SAMPLES, *neighbours.SAMPLES, *images.SAMPLES)


def sample_of(name: str) -> Sample:
    """The sample of a name, or the first of a pipeline's class. Raises RequestError."""
    for sample in SAMPLES:
        if name in (sample.name, sample.pipeline):
            return sample
    raise RequestError(f"there is no random pipeline {name!r}; use one of {', '.join(s.name for s in SAMPLES)}")


def sample_in(folder: str) -> Sample:
    """The pipeline in a folder, as Diffusers saves them, with the request of its class. Raises RequestError."""
    index = Path(folder) / "model_index.json"
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RequestError(f"{folder} holds no pipeline: it needs a model_index.json that names its class") from None
    return replace(sample_of(str(named)), kind=Path(folder).name, folder=folder)
