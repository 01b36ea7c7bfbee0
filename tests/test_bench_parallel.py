"""The scaling benchmark: a small run of it starts real ranks and gives the record that it promises."""

import json
import os

import pytest

from frameloom.bench.parallel import ParallelCase, run_parallel
from frameloom.errors import RequestError

SMALL = ("--dit", "tiny", "--vae", "tiny", "--size", "64x48x9", "--rounds", "1", "--device", "cpu")


def test_a_record_says_how_long_how_much_was_sent_and_what_was_predicted(run) -> None:
    code, out, err = run("bench", "parallel", "--ranks", "1,2", *SMALL, "--parallel", "ulysses=2", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert set(record["stages"]) == {"denoise", "decode"}
    for rows in record["stages"].values():
        alone, both = rows
        assert [alone["ranks"], both["ranks"]] == [1, 2]
        assert alone["sent_bytes"] == [0]
        assert both["sent_bytes"] == both["predicted_sent_bytes"]
        assert max(both["sent_bytes"]) > 0  # with margins the first rank sends nothing
        assert alone["efficiency"] == 1
        assert both["predicted"]["seconds"] > alone["seconds"]["median"] / 2
        assert both["link"]["bytes_per_s"] > 0
        assert all(peak > 100e6 for peak in both["peak_bytes"])
        assert len(both["seconds"]["all"]) == 2
    assert record["stages"]["denoise"][1]["plan"]["ulysses"] == 2
    assert record["machine"]["torch"]


def test_the_command_prints_a_table_and_what_it_is_worth(run) -> None:
    code, out, _ = run(
        "bench", "parallel", "--ranks", "1,2", *SMALL, "--stages", "denoise", "--threads", os.cpu_count()
    )
    assert code == 0
    assert "efficiency" in out
    assert "one step, 64x48x9" in out
    assert "no measure of scaling" in out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"ranks": (2, 4)}, "use 1 and others up to 64, such as 1,2,4"),
        ({"ranks": (1, 0)}, "ranks 1,0 are not possible"),
        ({"stages": ("train",)}, "use denoise or decode, or both"),
        ({"layers": 0}, "0 layers compute nothing"),
        ({"threads": 0}, "0 threads compute nothing"),
        ({"dit": "2B"}, "1.3B, 14B, 5B, tiny"),
        ({"height": 40}, "use multiples of 16"),
        ({"rounds": 0}, "use 1 or more"),
        ({"ranks": (1, 2, 4), "parallel": "ulysses=2"}, "ulysses=2 takes 2 ranks, and there are 4"),
        ({"parallel": "ulysses=2,fsdp=2"}, "fsdp=2 is not measured here; leave fsdp out"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        run_parallel(ParallelCase(**wrong))


def test_a_plan_that_the_network_does_not_allow_is_told_in_its_ranks_words() -> None:
    case = ParallelCase(dit="tiny", height=32, width=32, frames=5, parallel="tp=3", ranks=(1, 3), stages=("denoise",))
    with pytest.raises(RequestError, match="tp=3 does not divide"):
        run_parallel(case)
