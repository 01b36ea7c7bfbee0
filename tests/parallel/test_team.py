"""What ranks exchange: unequal parts, any dtype, and the count of bytes."""

import pytest
import torch
from ranks import RankError, run_ranks

from frameloom.parallel.team import Team


def numbers(*shape: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def collects(world, dtype):
    team = world.everyone
    shapes = [(rank, 3) for rank in range(world.size)]  # rank 0 has nothing
    parts = team.collect(numbers(*shapes[world.rank], rank=world.rank, dtype=dtype), shapes)
    return [torch.equal(part, numbers(*shapes[r], rank=r, dtype=dtype)) for r, part in enumerate(parts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_unequal_parts_are_collected_in_order(count: int, dtype: torch.dtype) -> None:
    assert run_ranks(count, collects, dtype) == [[True] * count] * count


def gives_first(world):
    team = world.everyone
    before = team.sent_bytes
    got = team.give_first(torch.full((world.rank + 1,), float(world.rank)), [(r + 1,) for r in range(world.size)])
    return None if got is None else [part.tolist() for part in got], team.sent_bytes - before


def test_the_first_gets_what_each_has_and_the_others_send_it_once() -> None:
    first, *others = run_ranks(3, gives_first)
    assert first == ([[0.0], [1.0] * 2, [2.0] * 3], 0)
    assert others == [(None, 8), (None, 12)]


def scatters(world):
    parts = [torch.full((world.rank + 1, p), 10.0 * world.rank + p) for p in range(world.size)]
    got = world.everyone.begin_scatter_all(parts, [(r + 1, world.rank) for r in range(world.size)])()
    return all(bool((part == 10.0 * r + world.rank).all()) for r, part in enumerate(got)), [list(p.shape) for p in got]


def test_everyone_sends_something_else_to_everyone() -> None:
    for rank, (right, shapes) in enumerate(run_ranks(4, scatters)):
        assert right
        assert shapes == [[r + 1, rank] for r in range(4)]


def scatters_twice_at_once(world):
    shapes = [(r + 1, world.rank) for r in range(world.size)]
    sends = [[torch.full((world.rank + 1, p), 10.0 * r + p) for p in range(world.size)] for r in (world.rank, 7)]
    waits = [world.everyone.begin_scatter_all(parts, shapes) for parts in sends]
    first, second = (wait() for wait in waits)
    here = world.everyone.begin_scatter_all(sends[0], shapes)()
    return [torch.equal(a, b) for a, b in zip(first, here, strict=True)], {
        float(x) for y in second for x in y.flatten()
    }


def test_messages_under_way_together_are_not_mixed_up() -> None:
    for rank, (same, others) in enumerate(run_ranks(3, scatters_twice_at_once)):
        assert same == [True] * 3
        assert others == ({70.0 + rank} if rank else set())


def adds_and_agrees(world):
    team = world.everyone
    half = torch.full((5,), 1 + 2**-7 * world.rank, dtype=torch.bfloat16)
    return team.add_up(half).tolist(), team.agree({"of": world.rank}), team.least(7 - world.rank)


def test_sums_are_wide_and_values_are_those_of_the_first() -> None:
    assert run_ranks(3, adds_and_agrees) == [([3 + 3 * 2**-7] * 5, {"of": 0}, 5)] * 3


def divides(world):
    half = world.divide([(0, 2), (1, 3)])
    pair = world.divide([(0, 1), (2, 3)])
    return half.collect(torch.tensor([world.rank]), [(1,)] * 2), pair.agree(world.rank), half.ranks


def test_ranks_form_teams() -> None:
    for rank, (there, first, ranks) in enumerate(run_ranks(4, divides)):
        assert ranks == (rank % 2, rank % 2 + 2)
        assert [int(x) for x in there] == list(ranks)
        assert first == rank // 2 * 2


def strided(world):
    world.everyone.exchange({}, {1 - world.rank: torch.empty(4, 4).T})


def test_what_does_not_lie_in_plain_memory_is_refused() -> None:
    with pytest.raises(RankError, match="cannot be exchanged"):
        run_ranks(2, strided)


def test_one_process_is_a_team_that_sends_nothing() -> None:
    x = torch.randn(3)
    alone = Team((0,), 0, None)
    assert torch.equal(alone.collect(x, [(3,)])[0], x)
    assert alone.agree("a") == "a"
    assert torch.equal(alone.add_up(x), x)
    assert alone.sent_bytes == 0
