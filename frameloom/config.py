"""What options say in words: memory, residences, LoRAs, sizes, and how several ranks share the work. Torch-free."""

import difflib
import itertools
import math
import os.path
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from numbers import Real
from typing import Any

from frameloom.errors import RequestError
from frameloom.types import Lora, ParallelPlan, Residence

MAX_LORA_STRENGTH = 20  # far past what any file is made for; more is a slip
_STREAMABLE = ("text", "transformer")  # the image encoder and the VAE are small beside them: always resident

# Whatever Python takes for a number: that it is too large, or none, is said better than that there is no such file.
_STRENGTH = r"(?i:[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?))"
_UNITS: Mapping[str, int] = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SECONDS: Mapping[str, int] = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def memory_bytes(value: int | str) -> int | None:
    """Bytes of 6000000000, "6000000000", "6GB" or "1.5G"; None for "auto". Raises RequestError."""
    if value == "auto":
        return None
    match = re.fullmatch(r"([0-9]+|[0-9]+\.[0-9]+(?= ?[KMG])) ?([KMG]?B?)", str(value).strip().upper())
    count = float(match[1]) * _UNITS[match[2]] if match else 0
    if isinstance(value, bool) or not 1 <= count < 2**63:
        raise RequestError(f"a memory of {value!r} is not possible; write auto, or bytes such as 6000000000 or 6GB")
    return round(count)


def duration_s(text: str) -> float:
    """Seconds of "90", "90s", "15m", "12h" or "7d". Raises RequestError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?) ?([smhd]?)", text.strip().lower())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < seconds <= 100 * 365 * _SECONDS["d"]:
        raise RequestError(f"a time of {text!r} is not possible; write seconds, or such as 90s, 15m, 12h or 7d")
    return seconds


def residences(text: str) -> dict[str, Residence]:
    """What "text=moved,transformer=streamed" asks for; nothing for "auto". Raises RequestError."""
    if text == "auto":
        return {}
    found: dict[str, Residence] = {}
    for part in str(text).split(","):
        name, _, where = part.strip().partition("=")
        if name not in _STREAMABLE or where not in list(Residence) or name in found:
            raise RequestError(
                f"residence {text!r} is not possible; write auto, or for {' and '.join(_STREAMABLE)} one of "
                f"{', '.join(Residence)} each, such as text=moved,transformer=streamed"
            )
        found[name] = Residence(where)
    return found


def lora(text: str) -> Lora:
    """The LoRA of "file.safetensors", "file.safetensors:0.8", "high:file.safetensors:0.8". Raises RequestError.

    What is before the path says which of two experts, what is after it how strongly, unless a file has that very name.
    """
    match = re.fullmatch(rf"(?:(high|low):)?(.*?[^:])(?::({_STRENGTH}))?", text.strip())
    if match is None:
        raise RequestError(f"LoRA {text!r} names no file; write FILE, FILE:0.8 or high:FILE:0.8")
    expert: Any
    expert, path, strength = match.groups()
    if strength is not None and os.path.exists(whole := os.path.expanduser(f"{path}:{strength}")):
        path, strength = whole, None
    return checked_lora(Lora(path=path, strength=1.0 if strength is None else float(strength), expert=expert))


def checked_lora(lora: Lora) -> Lora:
    """The same, if its values are possible. Raises RequestError."""
    strength = lora.strength
    if isinstance(strength, bool) or not isinstance(strength, Real) or not abs(strength) <= MAX_LORA_STRENGTH:
        raise RequestError(
            f"strength {strength!r} of LoRA '{lora.path}' is not possible; use a number from -{MAX_LORA_STRENGTH} to "
            f"{MAX_LORA_STRENGTH}, such as 0.8"
        )
    if lora.expert not in (None, "high", "low"):
        raise RequestError(f"expert {lora.expert!r} of LoRA '{lora.path}' is unknown; use 'high' or 'low', or none")
    return lora


def video_size(text: str) -> tuple[int, int, int]:
    """Height, width and frames of "HEIGHTxWIDTHxFRAMES". Raises RequestError."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
    if match is None:
        raise RequestError(f"size {text!r} is not possible; write HEIGHTxWIDTHxFRAMES, such as 480x832x81")
    return int(match[1]), int(match[2]), int(match[3])


def parallel_plan(text: str, num_ranks: int | None = None) -> ParallelPlan | None:
    """The plan of "cfg=2,ulysses=2,ring=2,tp=1,vae=8", or None for "auto"; what is not named is not divided.

    The VAE is divided over all ranks unless it is named. `num_ranks` None: as many as the plan asks for. Raises
    RequestError: what was asked, and the nearest plan for that many ranks.
    """
    if text.strip() == "auto":
        return None
    asked = dict(_assignments(text))
    plan = ParallelPlan(**asked)
    ranks = plan.num_ranks if num_ranks is None else num_ranks
    plan = ParallelPlan(**{"vae": ranks, **asked})
    wrong = None
    if plan.cfg > 2:
        wrong = f"cfg={plan.cfg} is not possible: there are two predictions, with and without the prompt"
    elif plan.num_ranks != ranks:
        axes = [f"{axis}={asked[axis]}" for axis in _AXES if axis in asked] or ["a step that is not divided"]
        wrong = f"{' x '.join(axes)} takes {_ranks(plan.num_ranks)}, and there are {ranks}"
    elif plan.vae > ranks:
        wrong = f"vae={plan.vae} is more than the {_ranks(ranks)} that there are"
    elif plan.fsdp not in (1, ranks):
        wrong = f"fsdp={plan.fsdp} is not possible: weights are divided over all {ranks} ranks or (fsdp=1) over none"
    elif plan.fsdp > 1 and plan.tp > 1:
        wrong = f"fsdp={plan.fsdp} and tp={plan.tp} do not go together: each divides the weights"
    if wrong is not None:
        raise RequestError(f"{wrong}; the nearest plan is {nearest_plan(plan, ranks)}")
    return plan


def nearest_plan(plan: ParallelPlan, num_ranks: int) -> ParallelPlan:
    """The possible plan for so many ranks that is most like `plan`."""
    whole = num_ranks if plan.fsdp > 1 else 1
    possible = [sizes for sizes in _products(num_ranks) if whole == 1 or sizes[_AXES.index("tp")] == 1]

    def unlike(sizes: tuple[int, ...]) -> tuple[float, ...]:
        """How much; of equals, the one that divides more by Ulysses, then by guidance, and less by matrix products."""
        cfg, ring, ulysses, tp = sizes
        return round(sum(map(_distance, sizes, _sizes(plan))), 9), tp, ring, -ulysses, -cfg

    best = min(possible, key=unlike)
    return ParallelPlan(**dict(zip(_AXES, best, strict=True)), fsdp=whole, vae=min(plan.vae, num_ranks))


_AXES = ("cfg", "ring", "ulysses", "tp")


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _assignments(text: str) -> Iterator[tuple[str, int]]:
    known, seen = [field.name for field in fields(ParallelPlan)], set()
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in known or not equals:
            near = difflib.get_close_matches(name, [*known, "auto"], n=1)
            hint = f"did you mean {near[0]}? " if near and near[0] != name else ""
            raise RequestError(f"{part.strip()!r} is no part of a plan; {hint}write auto, or such as ulysses=2,vae=2")
        if not re.fullmatch(r"[1-9]\d{0,4}", value):
            raise RequestError(f"{name}={value} is not possible; give a whole number from 1 on")
        if name in seen:
            raise RequestError(f"{name} is in the plan twice; name it once")
        seen.add(name)
        yield name, int(value)


def _sizes(plan: ParallelPlan) -> tuple[int, ...]:
    return tuple(asdict(plan)[axis] for axis in _AXES)


def _distance(size: int, wanted: int) -> float:
    return abs(math.log(size / wanted))


def _products(num_ranks: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of sizes of the axes."""
    divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
    for sizes in itertools.product([n for n in divisors if n <= 2], divisors, divisors, divisors):
        if math.prod(sizes) == num_ranks:
            yield sizes
