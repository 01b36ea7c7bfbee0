"""Gives every component its residence: which weights stay in their files, through which stream they come, who lets go.

The networks never hear of it: a linear layer whose weight is away holds one that is asked for at each call.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from frameloom.engine.blueprint import Blueprint
from frameloom.engine.ranks import Ranks
from frameloom.errors import RequestError
from frameloom.memory.residency import (
    Arrangement,
    Chain,
    Components,
    Footprint,
    arrange,
    as_asked,
    chain_of_dit,
    chain_of_text_encoder,
)
from frameloom.memory.stream import Stream, Unit, streamed
from frameloom.models.encoders import build_text_encoder, text_encoder_keeps_fp32
from frameloom.models.meta import on_meta
from frameloom.models.umt5 import Umt5Encoder
from frameloom.models.vace import make_dit
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.quantized import HeldTable, HeldWeight
from frameloom.platform.device import free_memory_bytes
from frameloom.settings import LOGGER_NAME
from frameloom.types import Residence, Stage
from frameloom.weights.checkpoint import Component
from frameloom.weights.header import TensorEntry
from frameloom.weights.load import Leave, Quantized, held_bytes
from frameloom.weights.tensors import is_quantized, rows_are_whole
from frameloom.weights.windows import TableWindow, window

log = logging.getLogger(LOGGER_NAME)

_SMALL = ("vae", "image_encoder")  # resident always


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Residents:
    """Where everything is. `text`, `transformer`: the streams of what is not resident; experts share one."""

    arrangement: Arrangement
    device: torch.device
    text: Stream | None = None
    transformer: Stream | None = None

    @contextmanager
    def during(self, stage: Stage) -> Iterator[None]:
        """A stage of a request: what came for it is let go after it."""
        try:
            yield
        finally:
            stream = {"text": self.text, "denoise": self.transformer}.get(stage)
            if stream is not None:
                stream.release()

    def leave_dit(self, dit: WanDiT, dtype: torch.dtype) -> Leave | None:
        """What of a transformer is left in its files while it is loaded; None: nothing."""
        if self.transformer is None:
            return None
        chain = chain_of_dit(dit).arranged(self.arrangement.transformer)
        return leaving(chain, self.transformer, self.device, lambda _: dtype)

    def leave_text_encoder(self, encoder: Umt5Encoder, dtype: torch.dtype) -> Leave | None:
        """The same of the text encoder."""
        if self.text is None:
            return None
        chain = chain_of_text_encoder(encoder).arranged(self.arrangement.text)
        keeps = text_encoder_keeps_fp32(dtype)
        return leaving(chain, self.text, self.device, lambda name: torch.float32 if keeps(name) else dtype)


def leaving(chain: Chain, stream: Stream, device: torch.device, dtype_of: Callable[[str], torch.dtype]) -> Leave:
    """What `load_module` leaves of a chain in its files, to come through the stream in the dtype of each."""
    units = [Unit() for _ in chain.units]
    unit_of = {name: unit for unit, names in zip(units, chain.units, strict=True) for name in names}
    stream.add(units, cycle_from=chain.cycle_from, slots=chain.slots)

    def leave(name: str, entry: TensorEntry) -> HeldWeight | HeldTable | None:
        if name in chain.tables and rows_are_whole(entry):
            return TableWindow(window=window(entry, torch.device("cpu")))
        if name not in unit_of:
            return None
        return streamed(stream, unit_of[name], name, window(entry, device), device=device, dtype=dtype_of(name))

    return leave


def settle(
    plan: Blueprint, asked: Mapping[str, Residence], memory: int | None, *, quantized: Quantized, ranks: Ranks
) -> Residents:
    """Decide where everything is, the same on all ranks. `memory`: what this machine may take; None: what is free.

    On a CPU without a bound everything is resident: plain weights lie in their mapped files. Raises RequestError for
    weights that are divided over ranks and should come and go.
    """
    asked, bound = _with_divided(asked, ranks), _bound(memory, ranks)
    arrangement = as_asked(asked) if bound is None else arrange(_components(plan, quantized), asked, bound)
    text, transformer = arrangement.text, arrangement.transformer
    log.info("text encoder %s, transformer %s: %s", text, transformer, arrangement.reason)
    if quantized == "expand" and {text, transformer} != {Residence.RESIDENT}:
        log.info("quantized weights that are not resident stay as they are stored")
    streams = [None if where is Residence.RESIDENT else Stream(ranks.device) for where in (text, transformer)]
    return Residents(arrangement=arrangement, device=ranks.device, text=streams[0], transformer=streams[1])


def _with_divided(asked: Mapping[str, Residence], ranks: Ranks) -> dict[str, Residence]:
    """What is asked for, and what is divided over ranks and thereby resident."""
    divided = {"transformer": ranks.plan.tp * ranks.plan.fsdp > 1, "text": ranks.plan.fsdp > 1}
    for name, is_divided in divided.items():
        if is_divided and asked.get(name, Residence.RESIDENT) is not Residence.RESIDENT:
            raise RequestError(
                f"residence {name}={asked[name]} is not possible with weights that are divided over ranks "
                f"({ranks.plan}); leave it out, or divide by cfg, ulysses or ring"
            )
    return {**asked, **{name: Residence.RESIDENT for name, is_divided in divided.items() if is_divided}}


def _bound(memory: int | None, ranks: Ranks) -> int | None:
    """Bytes that this rank may take of its device's memory; None: as many as it likes."""
    if memory is not None:
        return memory // ranks.sharing_memory
    if ranks.device.type == "cpu":
        return None
    return ranks.world.everyone.least(free_memory_bytes(ranks.device))


def _components(plan: Blueprint, quantized: Quantized) -> Components:
    parts = plan.checkpoint.components
    part = parts["text_encoder"]
    encoder = build_text_encoder(part.config, where=str(part.described_by))
    sizes = _sizes(part, plan.dtype, quantized, text_encoder_keeps_fp32(plan.dtype))
    text = Footprint.of(encoder, chain_of_text_encoder(encoder), sizes)
    experts = []
    for part, spec in zip(plan.transformers, plan.experts, strict=True):
        with on_meta():
            dit = make_dit(spec)
        sizes = _sizes(part, plan.dtype, quantized, WanDiT.keep_in_fp32)
        experts.append(Footprint.of(dit, chain_of_dit(dit), sizes))
    small = sum(held_bytes(parts[name], plan.vae_dtype, quantized) for name in _SMALL if name in parts)
    return Components(text=text, experts=experts, others_bytes=small)


def _sizes(
    part: Component, dtype: torch.dtype, quantized: Quantized, keeps: Callable[[str], bool]
) -> Callable[[str, Tensor], int]:
    """What parameters take once they are loaded."""

    def size_bytes(name: str, value: Tensor) -> int:
        entry = part.tensors.get(name)
        if quantized == "keep" and entry is not None and is_quantized(entry):
            return entry.size_bytes
        return value.numel() * (torch.float32 if keeps(name) else dtype).itemsize

    return size_bytes
