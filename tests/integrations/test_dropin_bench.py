"""`frameloom bench drop-in`: a small run gives the record that it promises, of random pipelines and of folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from frameloom.bench.drop_in import DropInCase, run_drop_in, share_of_gain
from frameloom.errors import RequestError
from frameloom.integrations.diffusers.samples.catalogue import SAMPLES, sample_of

SMALL: dict[str, Any] = {"widths": "small", "height": 32, "width": 64, "frames": 5, "rounds": 1, "device": "cpu"}


def test_a_record_says_how_much_faster_how_exact_how_much_memory_and_what_was_taken() -> None:
    size = {"height": 128, "width": 256, "frames": 9}
    record = run_drop_in(DropInCase(**SMALL | size, pipeline="WanPipeline (2.1)"))
    (found,) = record["pipelines"]
    assert found["pipeline"] == "WanPipeline (2.1)"
    assert 0 < found["speedup"]["low"] <= found["speedup"]["median"] <= found["speedup"]["high"]
    low, high = found["seconds_between"]["diffusers"]
    assert 0 < low <= found["seconds"]["diffusers"] <= high
    assert 0 < found["levels_apart"] <= 1
    assert {entry["component"] for entry in found["report"] if entry["taken"]} == {"vae", "transformer"}
    peaks = found["peak_bytes"]
    frame_bytes = 9 * 3 * 128 * 256 * 4
    assert 10 * frame_bytes < peaks["accelerated"] < peaks["diffusers"] - 10 * frame_bytes, "bands need less memory"
    decode = found["decode"]
    assert set(decode["seconds"]) == {"diffusers", "accelerated", "engine"}
    assert all(seconds > 0 for seconds in decode["seconds"].values())
    assert decode["share_of_gain"] == share_of_gain(decode["seconds"])
    assert record["machine"]["torch"]
    json.dumps(record)


@pytest.mark.parametrize(
    ("accelerated", "engine", "share"),
    [(6.0, 6.0, 1.0), (8.0, 6.0, 0.5), (10.0, 6.0, 0.0), (12.0, 6.0, -0.5), (5.0, 6.0, 1.25)],
)
def test_the_share_of_the_gain(accelerated: float, engine: float, share: float) -> None:
    assert share_of_gain({"diffusers": 10.0, "accelerated": accelerated, "engine": engine}) == share


@pytest.mark.parametrize("engine", [10.0, 11.0])
def test_where_the_engine_gains_nothing_there_is_no_share(engine: float) -> None:
    assert share_of_gain({"diffusers": 10.0, "accelerated": 9.0, "engine": engine}) is None


def test_a_pipeline_in_a_folder_is_compared_too(tmp_path: Path) -> None:
    sample = sample_of("QwenImagePipeline")
    case = DropInCase(**SMALL, model=str(tmp_path / "model"), peaks=False)
    sample.build(case.scale).save_pretrained(case.model)
    (found,) = run_drop_in(case)["pipelines"]
    assert found["pipeline"] == "QwenImagePipeline (model)"
    assert found["levels_apart"] <= 1
    assert found["decode"] is None
    assert found["peak_bytes"] == {}


def test_all_are_those_that_can_be_built_here() -> None:
    assert [s.name for s in DropInCase(pipeline="all").samples] == [s.name for s in SAMPLES if not s.missing]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"pipeline": "WanPipe"}, "there is no random pipeline 'WanPipe'; use one of WanPipeline"),
        ({"model": "/nowhere"}, "/nowhere holds no pipeline: it needs a model_index.json"),
        ({"widths": "wide"}, "full, small"),
        ({"allocator": "mine"}, "default, tuned"),
        ({"height": 48}, "use multiples of 32"),
        ({"frames": 8}, "one more than a multiple of 4"),
        ({"steps": 0}, "use 1 or more"),
        ({"rounds": 0}, "use 1 or more"),
        ({"exactness": "nearly"}, "nearly"),
    ],
)
def test_what_cannot_be_run_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        run_drop_in(DropInCase(**SMALL | {"peaks": False} | wrong))


def test_the_command_prints_a_table(run: Any) -> None:
    code, out, err = run("bench", "drop-in", "--widths", "small", "--size", "32x64x5", "--rounds", "1", "--no-peaks")
    assert code == 0, err
    shown = out + err
    assert "WanPipeline (2.1), 32x64x5, 2 steps" in shown
    assert "levels of 255 apart" in shown
    assert "vae taken" in shown
