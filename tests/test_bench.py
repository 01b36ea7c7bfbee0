"""The paired benchmark: a small run of it gives the record that it promises."""

import json
import math

import pytest

from frameloom.bench.dit import DitCase, run_dit
from frameloom.bench.generate import GenerateCase, run_generate
from frameloom.bench.vae import CONFIGS, VaeCase, count_flops, run_vae
from frameloom.errors import RequestError


@pytest.fixture
def no_second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frameloom.bench.vae.peak_in_own_process", lambda module, case, name: 10**9)


def test_the_encoder_is_timed_too(no_second_process: None) -> None:
    record = run_vae(VaeCase(vae="tiny", direction="encode", height=32, width=48, frames=5, rounds=1))
    assert record["relative_error"] <= 1e-5


def test_a_record_says_how_much_faster_how_exact_and_on_what() -> None:
    record = run_vae(VaeCase(vae="tiny", height=32, width=48, frames=5, rounds=2))
    assert 0 < record["speedup"]["low"] <= record["speedup"]["median"] <= record["speedup"]["high"]
    assert record["relative_error"] <= 1e-5
    assert set(record["seconds"]) == set(record["peak_bytes"]) == {"ours", "diffusers"}
    assert all(peak > 100e6 for peak in record["peak_bytes"].values())
    assert math.isfinite(record["matmul_flops_per_s"])
    assert record["machine"]["torch"]
    json.dumps(record)


def test_operations_are_counted_as_published() -> None:
    """275.4 TFLOP for the Wan 2.1 decoder at 81 frames of 480x832, from its layers' shapes."""
    flops = count_flops(VaeCase(vae="2.1", height=480, width=832, frames=81))
    assert flops == pytest.approx(275.4e12, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"vae": "3.0"}, "use one of 2.1, 2.2, tiny"),
        ({"baseline": "best"}, "shipped, channels_last"),
        ({"direction": "both"}, "decode, encode"),
        ({"allocator": "mine"}, "default, tuned"),
        ({"rounds": 0}, "use 1 or more"),
        ({"height": 33, "width": 40}, "use multiples of 8"),
        ({"vae": "2.2", "height": 0}, "use multiples of 16"),
        ({"frames": 8}, "one more than a multiple of 4"),
        ({"dtype": "float16"}, "float32, bfloat16"),
    ],
)
def test_what_cannot_be_run_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        run_vae(VaeCase(**wrong))


def test_the_command_prints_a_table(run, no_second_process) -> None:
    size = ["--vae", "tiny", "--size", "32x32x5", "--rounds", "1"]
    code, out, _ = run("bench", "vae", *size)
    assert code == 0
    assert "times as fast" in out
    assert "peak memory" in out
    code, out, _ = run("bench", "vae", *size, "--json")
    assert json.loads(out)["case"]["vae"] == "tiny"


def test_a_size_that_is_none_is_one_sentence(run) -> None:
    code, _, err = run("bench", "vae", "--size", "480p")
    assert code == 2
    assert "write HEIGHTxWIDTHxFRAMES" in err


def test_the_configs_are_those_of_the_checkpoints() -> None:
    assert CONFIGS["2.1"]["base_dim"] == 96
    assert CONFIGS["2.2"]["decoder_base_dim"] == 256


def test_a_step_of_the_transformer_is_timed() -> None:
    record = run_dit(DitCase(dit="tiny", height=32, width=48, frames=5, rounds=1))
    assert record["relative_error"] <= 1e-5
    assert record["tokens"] == 2 * 2 * 3
    for shares in record["shares"].values():
        assert sum(shares.values()) == pytest.approx(1)
    assert any("attention." in decision for decision in record["decisions"])
    json.dumps(record)


def test_in_bfloat16_both_are_compared_with_float32() -> None:
    record = run_dit(DitCase(dit="tiny", height=32, width=48, frames=5, rounds=1, dtype="bfloat16", guided=False))
    errors = record["relative_error_to_float32"]
    assert 1e-4 < errors["ours"] <= 1.1 * errors["diffusers"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dit": "2B"}, "1.3B, 14B, 5B, tiny"),
        ({"layers": 0}, "use 1 or more"),
        ({"dit": "5B", "height": 48}, "use multiples of 32"),
        ({"baseline": "best"}, "shipped, compiled"),
    ],
)
def test_a_step_that_cannot_be_run_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        run_dit(DitCase(**wrong))


def test_a_whole_request_is_timed(checkpoint_of) -> None:
    case = GenerateCase(model=str(checkpoint_of()), prompt="a cat", size=(32, 48, 5), steps=2, guidance=3.0, rounds=1)
    record = run_generate(case)
    assert record["levels_apart"] <= 1
    assert set(record["stages"]) == {"text", "denoise", "decode"}
    json.dumps(record)
