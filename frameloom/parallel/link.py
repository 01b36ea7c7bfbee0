"""How fast ranks talk, and how fast one computes: measured here, for choices between the two."""

import time

import torch
from torch import Tensor

from frameloom.parallel.cost import Link
from frameloom.parallel.team import Team
from frameloom.platform.device import timed

_SMALL, _LARGE = 64, 1 << 20  # bytes of a message
_ROUNDS = 8  # of messages, which others on the machine delay
_PRODUCTS = 2
_SIDE = 1024  # of the matrices that are multiplied


def measure_link(team: Team) -> Link:
    """The slowest of the links from each rank to the next, all in use at once. Every rank must call this."""
    latency_s = _slowest_s(team, _SMALL)
    seconds = _slowest_s(team, _LARGE)
    sending_s = seconds - latency_s if seconds > 2 * latency_s else seconds  # a delayed small one says nothing
    return Link(bytes_per_s=_LARGE / sending_s, latency_s=latency_s)


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a matrix product."""
    x = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    return 2 * _SIDE**3 / min(timed(lambda: x @ x, device) for _ in range(_PRODUCTS))


def _slowest_s(team: Team, count: int) -> float:
    """Seconds that a message takes: the best of some rounds, on the rank where it takes longest."""
    message = torch.zeros(count, dtype=torch.uint8, device=team.device)
    best_s = min(_round_s(team, message) for _ in range(_ROUNDS))
    return -team.least(-round(best_s * 1e9)) / 1e9


def _round_s(team: Team, message: Tensor) -> float:
    begun = time.perf_counter()
    following, before = (team.index + 1) % team.size, (team.index - 1) % team.size
    team.exchange({following: message}, {before: torch.empty_like(message)}).wait()
    if message.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begun
