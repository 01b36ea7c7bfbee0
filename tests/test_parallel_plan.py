"""What --parallel may say, and the nearest possible plan where it may not."""

import pytest

from frameloom.config import nearest_plan, parallel_plan
from frameloom.errors import RequestError
from frameloom.types import ParallelPlan


def test_a_plan_is_read_and_written() -> None:
    plan = parallel_plan("cfg=2, ulysses=2,ring=2,tp=1,vae=8", 8)
    assert plan == ParallelPlan(cfg=2, ulysses=2, ring=2, vae=8)
    assert parallel_plan(str(plan), 8) == plan
    assert parallel_plan("auto", 8) is None


def test_without_a_number_of_ranks_the_plan_says_how_many() -> None:
    plan = parallel_plan("cfg=2,tp=3")
    assert plan is not None
    assert (plan.num_ranks, plan.vae) == (6, 6)


@pytest.mark.parametrize(
    ("text", "ranks", "said"),
    [
        ("ulysses=3", 4, "ulysses=3 takes 3 ranks, and there are 4; the nearest plan is cfg=1,ring=1,ulysses=4,tp=1"),
        ("cfg=3", 3, "cfg=3 is not possible: there are two predictions"),
        ("cfg=2,ulysses=2", 8, "cfg=2 x ulysses=2 takes 4 ranks, and there are 8; the nearest plan is"),
        ("ulysses=2,vae=4", 2, "vae=4 is more than the 2 ranks that there are"),
        ("ulysses=4,fsdp=2", 4, "fsdp=2 is not possible"),
        ("ulises=2", 2, "did you mean ulysses?"),
        ("ulysses", 2, "'ulysses' is no part of a plan"),
        ("", 2, "'' is no part of a plan"),
        ("tp=0", 2, "tp=0 is not possible; give a whole number from 1 on"),
        ("tp=-1", 2, "tp=-1 is not possible"),
        ("tp=2,tp=2", 2, "tp is in the plan twice"),
        (
            "vae=2",
            2,
            "a step that is not divided takes 1 rank, and there are 2; the nearest plan is cfg=1,ring=1,ulysses=2",
        ),
        ("fsdp=2", 2, "takes 1 rank, and there are 2; the nearest plan is cfg=1,ring=1,ulysses=2,tp=1,fsdp=2"),
        ("tp=2,fsdp=2", 2, "fsdp=2 and tp=2 do not go together"),
    ],
)
def test_an_impossible_plan_is_one_sentence(text: str, ranks: int, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        parallel_plan(text, ranks)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ranks", range(1, 25))
def test_the_nearest_plan_is_possible(ranks: int) -> None:
    for wish in (
        ParallelPlan(cfg=2, ring=3, vae=9),
        ParallelPlan(ulysses=5),
        ParallelPlan(tp=7, fsdp=2),
        ParallelPlan(fsdp=3),
    ):
        near = nearest_plan(wish, ranks)
        assert near.num_ranks == ranks
        assert parallel_plan(str(near), ranks) == near
