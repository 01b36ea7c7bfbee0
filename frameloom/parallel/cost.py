"""What exchanges and computing cost: links, what a rank sends and computes, and the seconds that follow.

Seconds follow from a rate of computing and from links, and are a model: all ranks compute at one rate, and an exchange
takes what its busiest end takes. Of a step of the transformer: step_cost.py; of a pass through the VAE: pass_cost.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What one end sends per second, in one direction, and what every exchange costs besides."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """`inside`: of a rank within its machine. `between`: of a whole machine of `per_machine` ranks, to the others."""

    inside: Link
    between: Link | None = None
    per_machine: int | None = None

    def machine(self, rank: int) -> int:
        """Where a rank is."""
        return rank // self.per_machine if self.per_machine else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What one rank sends in all exchanges of one kind, and what it computes meanwhile. All ranks list the same."""

    kind: str
    sends: Mapping[int, int]  # bytes to each rank
    rounds: int
    behind_flops: float = 0

    @property
    def sent_bytes(self) -> int:
        """To all others together."""
        return sum(self.sends.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCost:
    """What one rank does in a step or in a pass."""

    flops: float
    exchanges: tuple[Exchange, ...]

    @property
    def sent_bytes(self) -> int:
        """In all exchanges."""
        return sum(exchange.sent_bytes for exchange in self.exchanges)


def predicted_s(costs: Sequence[RankCost], flops_per_s: float, network: Network) -> float:
    """Seconds until the last rank is done, where each computes so fast."""
    computing_s = max(cost.flops for cost in costs) / flops_per_s
    lists = zip(*(cost.exchanges for cost in costs), strict=True)
    return computing_s + sum(_waiting_s(each, flops_per_s, network) for each in lists)


def _waiting_s(of_ranks: Sequence[Exchange], flops_per_s: float, network: Network) -> float:
    """Of an exchange that all ranks make: until its busiest end is done, less what is computed meanwhile."""
    inside, between = [0] * (2 * len(of_ranks)), [0] * (2 * len(of_ranks))  # by sender, and by receiver
    for rank, exchange in enumerate(of_ranks):
        here = network.machine(rank)
        for peer, sent_bytes in exchange.sends.items():
            there = network.machine(peer)
            ends, busy = ((rank, peer), inside) if here == there else ((here, there), between)
            busy[2 * ends[0]] += sent_bytes
            busy[2 * ends[1] + 1] += sent_bytes
    rounds = max(exchange.rounds for exchange in of_ranks)
    seconds = 0.0
    for link, busy in ((network.inside, inside), (network.between, between)):
        if link is not None and any(busy):
            seconds = max(seconds, max(busy) / link.bytes_per_s + rounds * link.latency_s)
    return max(0.0, seconds - min(exchange.behind_flops for exchange in of_ranks) / flops_per_s)
