"""Proves on this machine that the fast ways, and those of several ranks, compute what the reference does.

The command line prints the findings as a table; a finding whose `kept` is False is a broken promise.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from frameloom.config import parallel_plan
from frameloom.engine.ranks import own_device
from frameloom.engine.rewrites import REWRITES
from frameloom.platform.device import platform_of
from frameloom.settings import launched
from frameloom.verify.finding import Finding
from frameloom.verify.networks import verify_networks, verify_transformer
from frameloom.verify.parallel import verify_parallel
from frameloom.verify.rewrites import attention_rewrites, verify_rewrite
from frameloom.verify.samples import SPECS, write_network, write_quantized
from frameloom.verify.stored import verify_stored
from frameloom.weights.checkpoint import Component
from frameloom.weights.hub_fetch import OnBytes
from frameloom.weights.source import Source, open_checkpoint, open_parts

_QUANTIZED = ("transformer", "transformer_2", "text_encoder")
_OVER_RANKS = ("first-and-last-image network", "VACE network")


def verify(
    model: Source | None = None,
    *,
    parts: Mapping[str, Source] | None = None,
    device: str = "auto",
    parallel: str = "auto",
    on_bytes: OnBytes | None = None,
) -> Iterator[Finding]:
    """Every rewrite and attention backend on example inputs, small networks of every kind, and quantized ones.

    Then, with a `model`, its transformers and its VAE, and its quantized weights as they are stored: a folder or file
    of some of them will do. `parts` and `on_bytes`: as `open_checkpoint` takes them; the parts must make a whole
    checkpoint. Of several ranks, which all must call this alike: the model and small networks in every way to share
    them over the ranks, or by the plan `parallel`, and nothing that one rank proves alone. Raises CheckpointError or
    RequestError.
    """
    place = launched()
    plan = parallel_plan(parallel, 1 if place is None else place.world_size)
    where, _ = own_device(device, place)
    components, name = _opened(model, parts, on_bytes)
    with TemporaryDirectory(prefix="frameloom-verify-") as folder:
        if place is not None and place.world_size > 1:
            samples = {f"random {kind}": write_network(Path(folder), kind) for kind in _OVER_RANKS}
            yield from verify_parallel(components, name, samples=samples, place=place, device=where, plan=plan)
            return
        for rewrite in (*REWRITES, *attention_rewrites(platform_of(where).name)):
            for dtype in rewrite.dtypes:
                yield verify_rewrite(rewrite, dtype, where)
        yield from verify_samples(Path(folder), where)
    yield from verify_networks(components, name, where)
    for part in _QUANTIZED:
        if part in components:
            yield from verify_stored(components[part], f"{part} of {name}", where)


def verify_samples(folder: Path, device: torch.device) -> Iterator[Finding]:
    """Small random networks, which are written into a folder: those of other kinds, and quantized ones."""
    for kind in SPECS:
        yield from verify_transformer(write_network(folder, kind), f"random {kind}", device)
    for sample in write_quantized(folder):
        yield from verify_stored(sample.stored, sample.name, device, plain=sample.plain)


def _opened(
    model: Source | None, parts: Mapping[str, Source] | None, on_bytes: OnBytes | None
) -> tuple[Mapping[str, Component], str]:
    """What is there of a model, and how it is called."""
    if parts:
        checkpoint = open_checkpoint(model, parts=parts, on_bytes=on_bytes)
        return checkpoint.components, Path(checkpoint.name).name
    return ({}, "") if model is None else (open_parts(model, on_bytes=on_bytes), Path(os.fspath(model)).name)
