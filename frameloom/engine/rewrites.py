"""All rewrites that there are, and what a user allows of them."""

from collections.abc import Iterable
from dataclasses import replace

from frameloom.engine.compiled import COMPILED
from frameloom.errors import RequestError
from frameloom.models.dit_rewrites import DIT_REWRITES
from frameloom.models.vae_rewrites import VAE_REWRITES
from frameloom.ops.registry import Policy, make_policy
from frameloom.pipeline.windows import WINDOWS

REWRITES = (*VAE_REWRITES, *DIT_REWRITES, WINDOWS, COMPILED)
_COMPILE = {"auto": None, "on": True, "off": False}


def policy_of(exactness: str, rewrites: Iterable[str], *, compilation: str = "auto") -> Policy:
    """The policy of `--exactness`, of every `--rewrite` and of `--compile`. Raises RequestError on an unknown word."""
    policy = make_policy(exactness, rewrites, [rewrite.name for rewrite in REWRITES])
    if compilation not in _COMPILE:
        raise RequestError(f"compile {compilation!r} is unknown; use one of {', '.join(_COMPILE)}")
    wish = _COMPILE[compilation]
    if wish is None:
        return policy
    if policy.forced.get(COMPILED.name, wish) is not wish:
        raise RequestError(f"compile {compilation} contradicts the rewrite {COMPILED.name}; leave one of them out")
    return replace(policy, forced={**policy.forced, COMPILED.name: wish})
