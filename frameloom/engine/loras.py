"""LoRAs of an engine: merged into plain weights as they are read, computed beside weights that stay quantized, and
exchanged between requests.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from frameloom.config import checked_lora
from frameloom.config import lora as parsed_lora
from frameloom.errors import FrameloomError, RequestError
from frameloom.models.adapters import Adapters, merge
from frameloom.models.adapters_beside import attach
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.vace import make_dit
from frameloom.models.wan_dit import WanDiT
from frameloom.parallel.agreement import check_same
from frameloom.parallel.team import Team
from frameloom.types import Expert, Lora
from frameloom.weights.checkpoint import Component
from frameloom.weights.fingerprint import fingerprint_of_files
from frameloom.weights.load import Quantized
from frameloom.weights.lora import read_loras
from frameloom.weights.tensors import is_quantized

Take = Callable[[str, Tensor], Tensor]


def loras_of(given: Sequence[Lora | str]) -> tuple[Lora, ...]:
    """LoRAs, or texts such as "high:style.safetensors:0.8". Raises RequestError."""
    if isinstance(given, str) or not all(isinstance(one, Lora | str) for one in given):
        raise RequestError(
            f"LoRAs {given!r} are no list of files; write ['FILE:0.8'], or a list of frameloom.types.Lora"
        )
    return tuple(parsed_lora(one) if isinstance(one, str) else checked_lora(one) for one in given)


def adapters_of_experts(specs: Sequence[TransformerSpec], loras: Sequence[Lora]) -> list[list[Adapters]]:
    """What LoRAs change in each of one or two transformers; of two, the first is for high noise.

    Raises CheckpointError or RequestError as `read_loras` does.
    """
    experts: tuple[Expert | None, ...] = (None,) if len(specs) == 1 else ("high", "low")
    return [_adapters_for(spec, loras, expert) for spec, expert in zip(specs, experts, strict=True)]


def _adapters_for(spec: TransformerSpec, loras: Sequence[Lora], expert: Expert | None) -> list[Adapters]:
    if not loras:
        return []
    with on_meta():
        shapes = {name: tuple(value.shape) for name, value in make_dit(spec).state_dict().items()}
    return read_loras(loras, shapes, expert=expert)


def read_alike(team: Team | None, read: Callable[[], list[list[Adapters]]]) -> list[list[Adapters]]:
    """What `read` reads, if every rank reads the same: else ranks would compute with parts of different files.

    Where it fails on some rank it fails on all, so that none waits for another.
    """
    if team is None:
        return read()
    try:
        found = read()
    except FrameloomError:
        with suppress(RequestError):  # the others get that, this one its own error
            check_same(team, "LoRA file", "")
        raise
    check_same(team, "LoRA file", contents_of(found))
    return found


def contents_of(adapters: Sequence[Sequence[Adapters]]) -> str:
    """Tells LoRAs of the same files with other numbers from these: sixteen hexadecimal digits; "" of none."""
    files = [Path(one.name) for sets in adapters for one in sets]
    return fingerprint_of_files(files) if files else ""


def merging(sets: Sequence[Adapters], take: Take | None) -> Take | None:
    """What is kept of each tensor as it is read: what `take` keeps of it, once the adapters are merged into it."""
    if not sets:
        return take

    def merged_part(name: str, whole: Tensor) -> Tensor:
        tensor = merge(sets, name, whole)
        return tensor if take is None else take(name, tensor)

    return merged_part


def exchange(
    experts: Sequence[WanDiT], before: Sequence[Sequence[Adapters]], after: Sequence[Sequence[Adapters]]
) -> None:
    """Give each expert its adapters in place of those before. If one refuses, all have those before again."""
    try:
        for dit, sets in zip(experts, after, strict=True):
            attach(dit, sets)
    except Exception:
        for dit, sets in zip(experts, before, strict=True):
            attach(dit, sets)
        raise


def beside(component: Component, adapters: Sequence[Adapters], quantized: Quantized) -> Sequence[Adapters]:
    """Those of the adapters that are computed beside the weights: all where these stay quantized, else none."""
    stays = quantized == "keep" and any(is_quantized(entry) for entry in component.tensors.values())
    return adapters if stays else ()
