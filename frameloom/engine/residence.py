"""Gives every component its residence: which weights stay in their files, through which stream they come, who lets go.

The networks never hear of it: a linear layer whose weight is away holds one that is asked for at each call.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from frameloom.config import memory_bytes, residences
from frameloom.engine.blueprint import Blueprint
from frameloom.engine.machine import machine_of
from frameloom.engine.plan import Planner
from frameloom.engine.ranks import Ranks
from frameloom.engine.workload import SizedRequest
from frameloom.errors import RequestError
from frameloom.memory.layout import Layout, held_in
from frameloom.memory.meter import amount
from frameloom.memory.residency import Chain, chain_of_dit, chain_of_text_encoder
from frameloom.memory.stream import Stream, Unit, streamed
from frameloom.models.encoders import text_encoder_keeps_fp32
from frameloom.models.umt5 import Umt5Encoder
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.quantized import HeldTable, HeldWeight
from frameloom.platform.device import free_memory_bytes
from frameloom.settings import LOGGER_NAME
from frameloom.types import EngineConfig, GenerateRequest, Residence, Stage
from frameloom.weights.header import TensorEntry
from frameloom.weights.load import Leave
from frameloom.weights.tensors import rows_are_whole
from frameloom.weights.windows import TableWindow, window

log = logging.getLogger(LOGGER_NAME)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Residents:
    """Where everything is. `text`, `transformer`: the streams of what is not resident; experts share one.

    `vae_bytes`: what the VAE may take besides its weights; None: a share of what is free.
    """

    layout: Layout
    device: torch.device
    vae_bytes: int | None = None
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
        chain = chain_of_dit(dit).arranged(self.layout.transformer)
        return leaving(chain, self.transformer, self.device, lambda _: dtype)

    def leave_text_encoder(self, encoder: Umt5Encoder, dtype: torch.dtype) -> Leave | None:
        """The same of the text encoder."""
        if self.text is None:
            return None
        chain = chain_of_text_encoder(encoder).arranged(self.layout.text)
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


def settle(plan: Blueprint, config: EngineConfig, ranks: Ranks) -> Residents:
    """Decide where everything is, the same on all ranks, by the memory that may be taken, or that is free.

    There has to be room for a video as the checkpoint is documented for. On a CPU without a bound everything is
    resident: plain weights lie in their mapped files. Raises RequestError for weights that are divided over ranks and
    should come and go.
    """
    asked, bound = _with_divided(residences(config.residence), ranks), _bound(memory_bytes(config.memory), ranks)
    layout, reason = Layout(**asked), "asked for" if asked else "no bound was given for the memory"
    vae_bytes = memory_bytes(config.vae_memory)
    if bound is not None and (len(asked) < 2 or config.memory != "auto"):
        wanted = replace(config, residence=_text(asked), parallel=str(ranks.plan))
        told, reason, room = ranks.agreed(lambda: _planned(plan, wanted, bound, ranks))
        layout = Layout(**residences(told))
        if vae_bytes is None and config.memory != "auto":  # what is free is asked anew by every video
            vae_bytes = room
    text, transformer = layout.text, layout.transformer
    log.info("text encoder %s, transformer %s: %s", text, transformer, reason)
    if config.quantized == "expand" and not layout.is_resident:
        log.info("quantized weights that are not resident stay as they are stored")
    streams = [None if where is Residence.RESIDENT else Stream(ranks.device) for where in (text, transformer)]
    return Residents(layout=layout, device=ranks.device, vae_bytes=vae_bytes, text=streams[0], transformer=streams[1])


def _planned(plan: Blueprint, config: EngineConfig, bound: int, ranks: Ranks) -> tuple[str, str, int]:
    """The first layout in which a video fits as the checkpoint is documented for, or the smallest; why; the VAE's room.

    The room is what is left in the bound beside the weights while frames are decoded.
    """
    machine = machine_of(str(ranks.device), memory=bound, only_here=True)
    planner = Planner(plan, machine, config, gpus=ranks.world.size, here_only=True)
    asked = residences(config.residence)
    layout, why = Layout(**asked), "asked for"
    if len(asked) < 2:
        found = planner.plan(SizedRequest.of(GenerateRequest(prompt="a video"), plan))
        layout = found.arranged.layout
        why = f"{found.request} take {amount(found.arranged.device_bytes)} of {amount(bound)}"
        why += "" if found.fits else ", which is more, and no layout takes less"
    held = held_in("decode", planner.foresight.weights(encodes=False, with_image=False), layout)
    return layout.asked, why, max(1, bound - machine.base_bytes - held)


def _text(asked: Mapping[str, Residence]) -> str:
    return ",".join(f"{name}={where}" for name, where in asked.items()) or "auto"


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
