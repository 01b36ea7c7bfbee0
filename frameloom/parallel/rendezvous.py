"""Where ranks meet: each says that it is here and what it was started with, rank 0 compares, then the group is made.

torchrun serves the store where they meet, or else rank 0 does. What is wrong is the same sentence on all ranks. Whoever
is lost later is found by the launcher (launch.py) within seconds; under torchrun a rank that hangs is found when an
exchange with it takes longer than EXCHANGE_S.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented, not exported

from frameloom.errors import RequestError
from frameloom.parallel.agreement import check_same
from frameloom.parallel.heart import is_lost
from frameloom.parallel.team import World
from frameloom.platform.base import Platform
from frameloom.platform.device import choose_device, platform_of
from frameloom.settings import Launched

EXCHANGE_S: Final = 600.0
"""How long a rank waits for another: ranks keep in step, but one may read its weights from a disk that is slower."""

_AGREED: Final = "agreed"
_POLL_S: Final = 0.05
_MARGIN_S: Final = 10.0  # rank 0 may have begun to wait so much later
_FAREWELL_S: Final = 2.0  # rank 0 serves the store until all have read why they cannot work together
_MAX_SHOWN: Final = 60  # characters of a fact in an error
_REMEDIES: Final[Mapping[str, str]] = {
    "frameloom": "install the same version everywhere",
    "torch": "install the same version everywhere",
    "model": "give every rank the same model",
}


def choose_local_device(name: str, place: Launched) -> tuple[torch.device, str]:
    """The device of this rank among those of its machine that `name` (auto, cpu, cuda, ...) means, and why.

    Raises RequestError where there are fewer devices than ranks, or `name` means a single one.
    """
    count = place.local_world_size
    device, why = choose_device(name)
    platform = platform_of(device)
    if count == 1 or platform.device_type == "cpu":
        return device, why
    if ":" in name:
        raise RequestError(f"device {name!r} is one, and {count} ranks need one each; use {name.partition(':')[0]!r}")
    here = platform.device_names()
    if len(here) < count:
        raise RequestError(
            f"{count} x {platform.hardware} were asked for and {len(here)} are here; use --gpus {len(here)}, "
            "or --device cpu for any number of ranks"
        )
    return choose_device(here[place.local_rank])[0], f"{why}; rank {place.rank} of {place.world_size}"


def join(place: Launched, *, device: torch.device, facts: Mapping[str, str], timeout_s: float = 60) -> World:
    """Meet the other ranks, compare `facts` (versions, model, request) and make the group that exchanges tensors.

    Raises RequestError on every rank, with one sentence, where ranks are missing after `timeout_s` or disagree; and on
    those that cannot reach the store. ConnectionError: rank 0 ended before all had met. Ranks that have met before
    compare their facts only.
    """
    if place.world_size == 1:
        return World(0, 1)
    if dist.is_initialized():
        world = World(dist.get_rank(), dist.get_world_size())
        for name, value in sorted(facts.items()):
            check_same(world.everyone, name, value)
        return world
    backend = _backend(platform_of(device))
    with _lost_words(place):
        store = meet(place, facts, timeout_s)
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index or 0)
        try:
            dist.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=EXCHANGE_S),
                device_id=None if device.type == "cpu" else device,
            )
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or is_lost(error):
                raise
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise RequestError(
                f"{backend} finds no way to the other ranks ({said}); check the network, and the name of the card in "
                "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME if it is set"
            ) from error
    return World(place.rank, place.world_size)


def leave() -> None:
    """Take the group apart, if there is one: what the process does afterwards waits for no other rank."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _backend(platform: Platform) -> str:
    if platform.collective is None:
        raise RequestError(
            f"torch has no way for ranks on {platform.title} to talk; use --device cpu, or a single rank"
        )
    return platform.collective


@contextlib.contextmanager
def _lost_words(place: Launched) -> Iterator[None]:
    """Torch's errors of a store that went away, as a ConnectionError: rank 0's own words are the ones to read."""
    try:
        yield
    except dist.DistError as error:
        where = f"{place.address}:{place.port}"
        raise ConnectionError(f"the store at {where} went away before all {place.world_size} ranks had met") from error


def meet(place: Launched, facts: Mapping[str, str], timeout_s: float) -> Store:
    """The store, once all ranks are here and agree. Raises RequestError as `join` does."""
    until = time.monotonic() + timeout_s
    store = PrefixStore(f"frameloom/{place.attempt}", _open_store(place, timeout_s))
    store.set(_here(place.rank), json.dumps(dict(facts)))
    if place.rank == 0:
        verdict = _missing_words(store, place, until, timeout_s) or _disagreement(store, place) or _AGREED
        store.set("verdict", verdict)
    elif _until(lambda: store.check(["verdict"]), until + _MARGIN_S):
        verdict = store.get("verdict").decode()
    else:  # rank 0 is not there to say it; torchrun's store is
        verdict = _missing_words(store, place, until, timeout_s) or "rank 0 did not answer; start all ranks again"
    if verdict != _AGREED:
        told = store.add("told", 1)
        if place.rank == 0 and not place.agent_store:
            present = sum(store.check([_here(rank)]) for rank in range(place.world_size))
            _until(lambda: told >= present or store.add("told", 0) >= present, time.monotonic() + _FAREWELL_S)
        raise RequestError(verdict)
    return store


def _here(rank: int) -> str:
    return f"here/{rank}"


def _open_store(place: Launched, timeout_s: float) -> Store:
    serves = place.rank == 0 and not place.agent_store
    if not serves:
        _reach(place, timeout_s)
    try:
        return TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=place.store_fd if serves else None,
        )
    except dist.DistNetworkError as error:
        if not serves:
            raise
        why = "is taken" if "EADDRINUSE" in str(error) else f"cannot be used ({error})"
        raise RequestError(f"port {place.port} (MASTER_PORT) {why}; choose another") from error


def _reach(place: Launched, timeout_s: float) -> None:
    """Wait until the store's port answers: torch's own attempts cannot be interrupted, and tell of every failure."""
    until = time.monotonic() + timeout_s
    why = "nothing answered"
    while time.monotonic() < until:
        try:
            socket.create_connection((place.address, place.port), timeout=max(0.1, until - time.monotonic())).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(2 * _POLL_S)
    raise RequestError(
        f"rank {place.rank} could not reach {place.address}:{place.port} within {timeout_s:.0f} s ({why}); see that "
        "rank 0 runs, and that MASTER_ADDR and MASTER_PORT name its machine and a port that is open"
    )


def _until(ready: Callable[[], bool], until: float) -> bool:
    """Wait until `ready`; torch's own waiting could not be interrupted."""
    while not (there := ready()) and time.monotonic() < until:
        time.sleep(_POLL_S)
    return there


def _missing_words(store: Store, place: Launched, until: float, timeout_s: float) -> str | None:
    """Who did not come, in a sentence; None once all are here."""
    everyone = range(place.world_size)
    if _until(lambda: store.check([_here(rank) for rank in everyone]), until):
        return None
    missing = [str(rank) for rank in everyone if not store.check([_here(rank)])]
    who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(missing[:-1])} and {missing[-1]}"
    return (
        f"{who} of {place.world_size} did not come within {timeout_s:.0f} s; see whether they were started, and "
        f"whether they reach {place.address}:{place.port}"
    )


def _disagreement(store: Store, place: Launched) -> str | None:
    """The first rank that was started with something else than rank 0, in a sentence."""
    told = [json.loads(store.get(_here(rank))) for rank in range(place.world_size)]
    for rank, theirs in enumerate(told):
        for name in dict.fromkeys([*told[0], *theirs]):
            if theirs.get(name) != told[0].get(name):
                remedy = _REMEDIES.get(name, "start every rank with the same command")
                return f"rank {rank} has {name} {_shown(theirs, name)} and rank 0 {_shown(told[0], name)}; {remedy}"
    return None


def _shown(facts: Mapping[str, str], name: str) -> str:
    text = facts.get(name, "(nothing)")
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
