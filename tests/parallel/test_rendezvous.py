"""Where ranks meet: whoever is missing, disagrees or cannot be reached is told in one sentence, by all."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from frameloom.errors import RequestError
from frameloom.parallel import launch
from frameloom.parallel.rendezvous import choose_local_device, join, meet
from frameloom.settings import LOOPBACK, Launched

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


def place(rank: int, world_size: int, port: int) -> Launched:
    return Launched(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, address=LOOPBACK, port=port
    )


def refused(world, world_size: int, port: int, facts, timeout_s: float) -> str:
    with pytest.raises(RequestError) as error:
        meet(place(world.rank, world_size, port), facts[world.rank], timeout_s)
    return str(error.value)


def test_a_rank_that_disagrees_is_named_by_all() -> None:
    facts = [{"frameloom": "0.1.0", "model": "a"}, {"frameloom": "0.1.0", "model": "b"}, {"frameloom": "0.2.0"}]
    words = "rank 1 has model b and rank 0 a; give every rank the same model"
    assert run_ranks(3, refused, 3, free_port(), facts, 30) == [words] * 3
    words = "rank 1 has frameloom 0.2.0 and rank 0 0.1.0; install the same version everywhere"
    assert run_ranks(2, refused, 2, free_port(), facts[1:], 30) == [words] * 2


def test_what_is_long_is_cut() -> None:
    facts = [{"request": "a" * 1000}, {}]
    words = f"rank 1 has request (nothing) and rank 0 {'a' * 57}...; start every rank with the same command"
    assert run_ranks(2, refused, 2, free_port(), facts, 30) == [words] * 2


def test_missing_ranks_are_named_by_those_who_came() -> None:
    port = free_port()
    words = "ranks 2 and 3 of 4 did not come within 1 s; see whether they were started, and whether they reach"
    assert run_ranks(2, refused, 4, port, [{}] * 4, 1) == [f"{words} {LOOPBACK}:{port}"] * 2


def test_a_store_that_cannot_be_reached_is_told_with_its_address() -> None:
    port = free_port()
    with pytest.raises(RequestError, match=f"rank 1 could not reach {LOOPBACK}:{port} within 1 s .Connection refused"):
        join(place(1, 2, port), device=CPU, facts={}, timeout_s=1)


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = int(other.getsockname()[1])
        with pytest.raises(RequestError, match=rf"port {port} \(MASTER_PORT\) is taken; choose another"):
            join(place(0, 2, port), device=CPU, facts={}, timeout_s=1)


def test_one_rank_meets_nobody() -> None:
    assert join(place(0, 1, 1), device=CPU, facts={}).size == 1


def test_a_cpu_has_room_for_every_rank() -> None:
    assert choose_local_device("cpu", place(3, 64, 1)) == (CPU, "asked for")


# What a rank of a real run does, from the launcher's descriptors to its end.
RANK = """
import os, signal, sys
from frameloom.cli.ranks import end_rank, rank_ending
from frameloom.parallel.heart import Ending, Heart
from frameloom.settings import launched

place = launched()
heart = None
if place.heart_fd is not None:
    heart = Heart(place.heart_fd, tidies=place.rank == 0)
    heart.start()
import torch
from frameloom.parallel.rendezvous import choose_local_device, join, leave

try:
    world = join(place, device=torch.device("cpu"), facts={"frameloom": "0.1.0"})
    if sys.argv[1] == "killed" and place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    total = world.everyone.add_up(torch.tensor([world.rank + 1.0]))
    leave()
    print(world.size, total.tolist(), file=sys.stderr)
    ending = Ending(code=0)
except Exception as error:
    ending = rank_ending(error)
end_rank(ending, place, heart)
"""


def test_ranks_meet_on_the_launchers_socket_and_part() -> None:
    said: list[str] = []
    assert launch.run_ranks([sys.executable, "-c", RANK, "well"], 2, say=said.append).code == 0
    assert "".join(said) == "2 [3.0]\n"


def test_those_who_lose_a_killed_rank_tell_no_story_of_their_own() -> None:
    said: list[str] = []
    outcome = launch.run_ranks([sys.executable, "-c", RANK, "killed"], 2, say=said.append)
    assert outcome.message.startswith("rank 1 was killed by SIGKILL")
    assert said == []


def test_ranks_meet_at_the_store_of_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text(RANK, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(program), "well"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[3.0]") == 2  # both write at once, perhaps into one line
