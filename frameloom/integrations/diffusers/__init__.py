"""A live Diffusers pipeline, computed by the networks here; the only room that imports Diffusers."""

import re
from importlib import metadata

from frameloom.errors import RequestError

OLDEST = (0, 40)
"""The first release whose networks are those that are taken over here."""


def _check() -> None:
    """Say what to install, before an import says what is missing. Raises RequestError."""
    ask = "run pip install 'frameloom[diffusers]'"
    try:
        version = metadata.version("diffusers")
    except metadata.PackageNotFoundError:
        raise RequestError(f"this needs Diffusers, which is not installed; {ask}") from None
    found = tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RequestError(f"Diffusers {version} is too old to be accelerated; {oldest} is the oldest; {ask}")


_check()
