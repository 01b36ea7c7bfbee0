"""Proves on this machine that the fast ways, and those of several ranks, compute what the reference does.

The command line prints the findings as a table; a finding whose `kept` is False is a broken promise.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from frameloom.config import parallel_plan
from frameloom.engine.ranks import own_device
from frameloom.engine.rewrites import REWRITES
from frameloom.platform.device import platform_of
from frameloom.settings import launched
from frameloom.verify.finding import Finding
from frameloom.verify.networks import verify_networks
from frameloom.verify.parallel import verify_parallel
from frameloom.verify.rewrites import attention_rewrites, verify_rewrite
from frameloom.weights.source import open_parts


def verify(
    model: str | os.PathLike[str] | None = None, *, device: str = "auto", parallel: str = "auto"
) -> Iterator[Finding]:
    """Every rewrite and attention backend on example inputs, then, with a `model`, its transformers and its VAE.

    The folder of a VAE alone will do. Of several ranks, which all must call this alike: the model in every way to share
    it over them, or by the plan `parallel`, and nothing that one rank proves alone. Raises CheckpointError or
    RequestError.
    """
    place = launched()
    plan = parallel_plan(parallel, 1 if place is None else place.world_size)
    where, _ = own_device(device, place)
    parts, name = ({}, "") if model is None else (open_parts(model), Path(os.fspath(model)).name)
    if place is not None and place.world_size > 1:
        yield from verify_parallel(parts, name, place=place, device=where, plan=plan)
        return
    for rewrite in (*REWRITES, *attention_rewrites(platform_of(where).name)):
        for dtype in rewrite.dtypes:
            yield verify_rewrite(rewrite, dtype, where)
    yield from verify_networks(parts, name, where)
