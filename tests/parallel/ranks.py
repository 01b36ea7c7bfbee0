"""Real processes for tests: ranks that talk by gloo, started once for each number of them and asked to run functions.

    run_ranks(3, check_something, argument)      # -> what each of 3 ranks returned, in order

The function is a module's own (not nested, not a lambda): it is called as `function(world, *arguments)` in each rank.
An exception in a rank fails the test with its traceback; a rank that does not answer fails it too. After either, new
processes are started.
"""

import atexit
import multiprocessing
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 120  # seconds; a test that needs more is too long


class RankError(AssertionError):
    """A function failed on a rank."""


def _serve(rank: int, count: int, port: int, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    from frameloom.parallel.team import World

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    world = World(rank, count)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(world, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class _Pool:
    """`count` processes, from the first call on."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.count, port, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes.clear()
        self.pipes.clear()

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        if not self.processes:
            self.start()
        done = False
        try:
            for pipe in self.pipes:
                pipe.send((function, arguments))
            results = [self._answer(rank, pipe) for rank, pipe in enumerate(self.pipes)]
            done = True
            return results
        finally:
            if not done:
                self.stop()

    def _answer(self, rank: int, pipe: Any) -> Any:
        if not pipe.poll(TIMEOUT):
            raise RankError(f"rank {rank} of {self.count} gave no answer within {TIMEOUT} s")
        fine, result = pipe.recv()
        if not fine:
            raise RankError(f"rank {rank} of {self.count}:\n{result}")
        return result


_POOLS = {count: _Pool(count) for count in (2, 3, 4)}
for _pool in _POOLS.values():
    atexit.register(_pool.stop)


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returned on each of `count` ranks."""
    return _POOLS[count].run(function, arguments)
