"""Who goes next, how much may wait, and how long things take as learned."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_workers import CARD

from frameloom.serve.config import Limits, ServeConfig
from frameloom.serve.jobs.job import Ask, Job
from frameloom.serve.jobs.known import Known
from frameloom.serve.jobs.line import Bounds, WaitingLine
from frameloom.serve.jobs.speed import Speed, progress_of, units_of
from frameloom.serve.service import RefusedError

ASKS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.floats(0.0, 500.0, allow_nan=False)), max_size=30
)


def job(number: int, key: str = "a", priority: int = 0, work_s: float = 10.0) -> Job:
    ask = Ask(key=key, kind="create", model="m", request={}, priority=priority, work_s=work_s)
    return Job(id=f"j{number}", ask=ask, status="queued", created_at=0.0)


def line_of(jobs: list[Job]) -> WaitingLine:
    line = WaitingLine()
    for one in jobs:
        line.add(one)
    return line


def emptied(line: WaitingLine) -> list[str]:
    order = []
    while (first := line.first()) is not None:
        line.begin(first)
        order.append(first)
    return order


@settings(deadline=None)
@given(ASKS)
def test_all_go_once_by_priority_and_each_key_in_its_order(asks):
    jobs = [job(number, *ask) for number, ask in enumerate(asks)]
    by_id = {one.id: one for one in jobs}
    line = line_of(jobs)
    foretold = list(line.order())
    assert list(line.order().values()) == list(range(len(jobs)))
    order = emptied(line)
    assert order == foretold  # positions are the truth as long as nobody else comes
    assert sorted(order) == sorted(by_id)
    priorities = [by_id[name].ask.priority for name in order]
    assert priorities == sorted(priorities, reverse=True)
    for key in "abc":
        for priority in range(3):
            mine = [name for name in order if (by_id[name].ask.key, by_id[name].ask.priority) == (key, priority)]
            assert mine == sorted(mine, key=lambda name: int(name[1:]))


def test_who_goes_with_another_lets_nobody_else_wait_longer():
    line = line_of([job(1, "a"), job(2, "a"), job(3, "b", work_s=100.0), job(4, "b"), job(5, "c"), job(6, "c")])
    line.begin("j1")
    line.begin("j3", in_turn=False)
    line.add(job(7, "d"))  # begins where the turn is, and not where b is, who has had 100 s
    assert emptied(line) == ["j5", "j7", "j2", "j6", "j4"]


@settings(deadline=None)
@given(
    st.lists(st.floats(1.0, 100.0), min_size=1, max_size=15), st.lists(st.floats(1.0, 100.0), min_size=1, max_size=15)
)
def test_while_two_keys_wait_neither_gets_more_work_than_one_job_ahead(mine, others):
    jobs = [job(number, "a", work_s=work_s) for number, work_s in enumerate(mine)]
    jobs += [job(100 + number, "b", work_s=work_s) for number, work_s in enumerate(others)]
    by_id = {one.id: one for one in jobs}
    begun, left = Counter(), Counter(one.ask.key for one in jobs)
    for name in emptied(line_of(jobs)):
        ask = by_id[name].ask
        if min(left["a"], left["b"]) > 0:
            assert abs(begun["a"] - begun["b"]) <= max(*mine, *others) + 1e-6
        begun[ask.key] += ask.work_s
        left[ask.key] -= 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "begin", "drop", "again"]), st.sampled_from("abc")), max_size=60))
def test_whatever_comes_and_goes_nobody_is_lost_or_starved(moves):
    line, waits, runs, count = WaitingLine(), {}, {}, 0
    for move, key in moves:
        if move == "add":
            waits[f"j{count}"] = one = job(count, key)
            line.add(one)
            count += 1
        elif move == "begin" and (first := line.first()) is not None:
            line.begin(first)
            runs[first] = waits.pop(first)
        elif move == "drop" and waits:
            name = next(iter(waits))
            del waits[name]
            line.forget(name)
        elif move == "again" and runs:
            name, one = runs.popitem()
            waits[name] = one
            line.add(one)
        assert set(line.order()) == set(waits)
        assert line.count() == len(waits)
        assert line.count("a") == sum(one.ask.key == "a" for one in waits.values())
        assert line.work_s == pytest.approx(10.0 * len(waits))
    assert sorted(emptied(line)) == sorted(waits)


def test_who_was_away_saves_up_no_turns():
    line = line_of([job(number, "a") for number in range(20)])
    for _ in range(10):
        line.begin(line.first())
    for number in range(20, 30):
        line.add(job(number, "b"))
    keys = ["b" if int(name[1:]) >= 20 else "a" for name in line.order()]
    assert keys[:6] in (["a", "b"] * 3, ["b", "a"] * 3)


def test_a_job_that_waits_again_goes_before_the_others_of_its_key():
    line = line_of([job(0), job(1)])
    line.begin("j0")
    line.add(job(0))
    assert line.first() == "j0"
    assert line.before_s("j1") == 10.0


def refusal(line: WaitingLine, key="a", work_s=0.0, *, running_s=0.0, workers=1, **limits):
    bounds = Bounds(limits=Limits(**limits), workers=workers, queued_by_key={"narrow": 0})
    try:
        bounds.check(line, key, work_s, running_s=running_s)
    except RefusedError as error:
        return error.code, error.retry_s
    return None


@settings(deadline=None)
@given(ASKS, st.floats(0.0, 1e6), st.floats(0.0, 1e6), st.integers(1, 8))
def test_when_to_come_again_is_between_a_second_and_two_minutes(asks, work_s, running_s, workers):
    line = line_of([job(number, *ask) for number, ask in enumerate(asks)])
    found = refusal(
        line, work_s=work_s, running_s=running_s, workers=workers, queued=10, queued_by_key=5, queued_s=1000.0
    )
    if line.count() < 10 and line.count("a") < 5 and line.work_s + running_s + work_s < 1000.0 * workers:
        assert found is None
    if found is not None:
        assert found[0] in ("queue_full", "key_queue_full")
        assert isinstance(found[1], int)
        assert 1 <= found[1] <= 120


def test_bounds():
    line = line_of([job(number) for number in range(3)])
    assert refusal(line, queued=4, queued_by_key=4) is None
    assert refusal(line, queued=3, running_s=40.0, workers=2) == ("queue_full", 20)
    assert refusal(line, queued_by_key=3) == ("key_queue_full", 10)
    assert refusal(line, "b", queued_by_key=3) is None
    assert refusal(line, "narrow") == ("key_queue_full", 10)
    assert refusal(line, "b", 20.0, queued_s=45.0) == ("queue_full", 5)
    assert refusal(line, "b", 20.0, queued_s=45.0, workers=2) is None
    assert refusal(WaitingLine(), work_s=1e9, queued_s=10.0) is None  # alone it is never too much
    with line.expecting(job(9, "b")):
        assert refusal(line, queued=4) == ("queue_full", 10)
        assert line.count("b") == 1
    assert line.count() == 3


def test_speed_is_learned_and_kept():
    speed = Speed()
    assert speed.seconds(10.0, None, None) == 0.0
    usual = units_of({}, CARD)
    assert usual == 64 * 32 * 9 * 4 * 2
    assert speed.seconds(usual * 3, CARD, 2.0) == pytest.approx(6.0)
    for seconds in (1.0, 1.0, 50.0):  # one of them was disturbed
        speed.learn(usual, seconds)
    speed.learn(usual, 0.0)
    assert speed.seconds(usual * 3, CARD, 2.0) == pytest.approx(3.0)
    assert Speed(speed.text).seconds(usual, None, None) == pytest.approx(1.0)
    for broken in ("", "{}", "[1,", '["a"]', "null"):
        assert Speed(broken).seconds(usual, None, None) == 0.0


def test_an_extension_teaches_no_speed(tmp_path):
    known = Known(ServeConfig(data=tmp_path))
    known.card = CARD
    made = job(1)
    known.learn(made, 2.0)
    assert known.work_s({}) == pytest.approx(2.0)
    for _ in range(9):  # its frames and those that it goes on from, made in the time of its own
        extended = replace(made.ask, request={"extends": "inputs/extends.mp4"}, resolved={"num_frames": 17})
        known.learn(replace(made, ask=extended), 2.0)
    assert known.work_s({}) == pytest.approx(2.0)


def test_units_of_work():
    assert units_of({}, None) == 0.0
    assert units_of({"guidance_scale": 1.0}, CARD) == units_of({}, CARD) / 2
    assert units_of({"video": "inputs/video.mp4", "strength": 0.5}, CARD) == units_of({}, CARD) / 2
    assert units_of({"width": None, "steps": 8}, CARD) == units_of({}, CARD) * 2


@settings(deadline=None)
@given(
    st.sampled_from(["text", "image", "denoise", "decode", "encode", "other"]), st.integers(0, 99), st.integers(0, 99)
)
def test_progress_stays_below_a_hundred_until_the_end(stage, step, total):
    assert 0 <= progress_of(stage, step, total) <= 99
