"""All random pipelines: every class that carries a VAE or a transformer of Wan, and their neighbours."""

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
