"""What may be computed in another way than the reference, how exact it is, and the user's say in it.

A rewrite is a pair of callables that compute the same function, the inputs to prove it on, and the reason for the
tolerance. `frameloom verify` and one generated test run every one of them; docs/rewrites.md is printed from them.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from frameloom.errors import RequestError

Exactness = Literal["bitwise", "rounding", "lossy"]
EXACTNESS: tuple[Exactness, ...] = get_args(Exactness)
ROUNDING_FP32 = 1e-5  # relative L2 error that the class `rounding` promises in float32
BF16_SLACK = 1.1  # in bfloat16 it may lose a tenth more than the reference itself loses


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The sizes that example inputs are made of."""

    batch: int = 1
    in_channels: int = 16
    out_channels: int = 16
    frames: int = 3
    height: int = 9
    width: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewrite:
    """One thing that may be computed differently.

    `reference` and `fast` take what `example(sizes, dtype, device)` returns. `refuses` takes the same and says why the
    fast way does not apply, or None.
    """

    name: str
    exactness: Exactness
    replaces: str
    reference: Callable[..., Tensor]
    fast: Callable[..., Tensor]
    refuses: Callable[..., str | None]
    example: Callable[[Sizes, torch.dtype, torch.device], tuple[Any, ...]]
    tolerance: float = ROUNDING_FP32
    because: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Whether a rewrite is used, where, and why."""

    name: str
    used: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {'on' if self.used else 'off'}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What the user allows: a class of exactness, and single rewrites that must be on or off."""

    exactness: Exactness = "rounding"
    forced: Mapping[str, bool] = field(default_factory=dict)

    def refuses(self, rewrite: Rewrite) -> str | None:
        """Why the user's wishes rule a rewrite out, or None."""
        wish = self.forced.get(rewrite.name)
        if wish is False:
            return "switched off by name"
        if wish is None and EXACTNESS.index(rewrite.exactness) > EXACTNESS.index(self.exactness):
            return f"it is {rewrite.exactness}, and {self.exactness} was asked for"
        return None

    def insists(self, rewrite: Rewrite) -> bool:
        """Whether the user named it: then a rewrite that does not apply is an error."""
        return self.forced.get(rewrite.name) is True

    def decide(self, rewrite: Rewrite, refusal: str | None, reason: str = "it applies") -> Decision:
        """On for this `reason`, unless the user or `refusal` is against it. RequestError if the user insisted on it."""
        refusal = self.refuses(rewrite) or refusal
        if refusal is not None and self.insists(rewrite):
            raise RequestError(f"rewrite {rewrite.name}=on is not possible here: {refusal}; leave it out")
        return Decision(name=rewrite.name, used=refusal is None, reason=refusal or reason)


def make_policy(exactness: str, rewrites: Iterable[str], known: Iterable[str]) -> Policy:
    """The policy of `--exactness` and of every `--rewrite NAME=on|off`. Raises RequestError on an unknown word."""
    if exactness not in EXACTNESS:
        raise RequestError(f"exactness {exactness!r} is unknown; use one of {', '.join(EXACTNESS)}")
    names = sorted(known)
    forced: dict[str, bool] = {}
    listed = None if isinstance(rewrites, str) or not isinstance(rewrites, Iterable) else list(rewrites)
    if listed is None or not all(isinstance(text, str) for text in listed):
        raise RequestError(f"rewrites {rewrites!r} are no list of texts; write ['NAME=on', 'NAME=off']")
    for text in listed:
        name, _, value = text.partition("=")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(names)}"
            raise RequestError(f"rewrite '{name}' is unknown; {hint}")
        if value not in ("on", "off"):
            raise RequestError(f"rewrite {text!r} says neither on nor off; write {name}=on or {name}=off")
        if forced.get(name, value == "on") is not (value == "on"):
            raise RequestError(f"rewrite '{name}' is both on and off; leave one of them out")
        forced[name] = value == "on"
    return Policy(exactness=exactness, forced=forced)


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Relative L2 error, in float64."""
    a, b = result.double(), reference.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def document(rewrites: Iterable[Rewrite]) -> str:
    """The page docs/rewrites.md: every rewrite with what it replaces, its promise and the reason for it."""
    lines = [
        "# What may be computed differently",
        "",
        "Written by `python -m frameloom.verify > docs/rewrites.md`; `frameloom verify` proves it on your machine.",
        "",
        "- `bitwise`: the same bits as the reference on the same device.",
        f"- `rounding`: the same function in another order of rounding; float32 within {ROUNDING_FP32:g} relative",
        f"  error, bfloat16 within {BF16_SLACK:g} times the reference's own error.",
        "- `lossy`: another function; never on by default.",
        "",
        "`--exactness` sets what may be used (default `rounding`), `--rewrite NAME=on|off` switches one, `--explain`",
        "tells what was chosen and why.",
        "",
        "| rewrite | exactness | replaces | why the results may differ | dtypes |",
        "|---|---|---|---|---|",
    ]
    for rewrite in rewrites:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in rewrite.dtypes)
        cells = (f"`{rewrite.name}`", rewrite.exactness, rewrite.replaces, rewrite.because, dtypes)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
