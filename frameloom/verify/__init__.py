"""Proves on this machine that the fast ways compute what the reference does.

The command line prints the findings as a table; a finding whose `kept` is False is a broken promise.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from frameloom.engine.rewrites import REWRITES
from frameloom.platform.device import choose_device, platform_of
from frameloom.verify.finding import Finding
from frameloom.verify.networks import verify_networks
from frameloom.verify.rewrites import attention_rewrites, verify_rewrite
from frameloom.weights.source import open_parts


def verify(model: str | os.PathLike[str] | None = None, *, device: str = "auto") -> Iterator[Finding]:
    """Every rewrite and attention backend on example inputs, then, with a `model`, its transformers and its VAE.

    The folder of a VAE alone will do. Raises CheckpointError or RequestError.
    """
    where, _ = choose_device(device)
    parts, name = ({}, "") if model is None else (open_parts(model), Path(os.fspath(model)).name)
    for rewrite in (*REWRITES, *attention_rewrites(platform_of(where).name)):
        for dtype in rewrite.dtypes:
            yield verify_rewrite(rewrite, dtype, where)
    yield from verify_networks(parts, name, where)
