"""Timed choices are made once, kept, and cost nothing but time when they cannot be."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from frameloom.platform.tuning import Tuner

CPU = torch.device("cpu")


def ways():
    return {"slow": lambda: time.sleep(0.02), "fast": lambda: None}


def never():
    pytest.fail("it was measured again")


def test_the_fastest_way_is_found_once_and_remembered(tmp_path: Path) -> None:
    tuner = Tuner(CPU, tmp_path)
    assert tuner.best("a layer", ["slow", "fast"], ways) == "fast"
    assert tuner.best("a layer", ["slow", "fast"], never) == "fast"
    tuner.save()
    assert Tuner(CPU, tmp_path).best("a layer", ["fast", "slow"], never) == "fast"


def test_processes_that_start_together_choose_alike(tmp_path: Path, monkeypatch) -> None:
    measured = []

    def choose(name):
        tuner = Tuner(CPU, tmp_path)

        def seconds(ways):
            measured.append(name)
            time.sleep(0.2)
            return {way: float(way != name) for way in ("one", "other")}

        monkeypatch.setattr(tuner, "_seconds", seconds)
        return tuner.best("a layer", ["one", "other"], ways)

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(choose, ["one", "other"]))) == 1
    assert len(measured) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_choice_is_kept_before_it_is_used(tmp_path: Path) -> None:
    assert Tuner(CPU, tmp_path).best("a layer", ["slow", "fast"], ways) == "fast"
    assert Tuner(CPU, tmp_path).best("a layer", ["slow", "fast"], never) == "fast"


def test_other_names_or_keys_are_measured_anew(tmp_path: Path) -> None:
    tuner = Tuner(CPU, tmp_path)
    tuner.best("a layer", ["slow", "fast"], ways)
    assert tuner.best("a layer", ["slow"], lambda: {"slow": ways()["slow"]}) == "slow"
    assert tuner.best("another", ["slow", "fast"], ways) == "fast"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a layer | fast slow": 3}'])
def test_a_file_that_makes_no_sense_is_measured_over(tmp_path: Path, text: str) -> None:
    first = Tuner(CPU, tmp_path)
    first.best("a layer", ["slow", "fast"], ways)
    first.save()
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    again = Tuner(CPU, tmp_path)
    assert again.best("a layer", ["slow", "fast"], ways) == "fast"
    again.save()
    assert json.loads(path.read_text())["a layer | fast slow"] == "fast"


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    tuner = Tuner(CPU, tmp_path / "file")
    assert tuner.best("a layer", ["slow", "fast"], ways) == "fast"
    tuner.save()
    assert "measured choices are not kept" in caplog.text


def test_what_was_found_out_once_is_kept_and_a_damaged_entry_is_made_anew(tmp_path) -> None:
    made = []

    def make():
        made.append(1)
        return {"a": [1, 2]}

    for _ in range(2):
        tuner = Tuner(CPU, tmp_path)
        assert tuner.recall("key", make, lambda found: isinstance(found, dict)) == {"a": [1, 2]}
        tuner.save()
    assert len(made) == 1
    assert Tuner(CPU, tmp_path).recall("key", make, lambda found: found == "else") == {"a": [1, 2]}
    assert len(made) == 2


def test_of_ways_that_are_about_as_fast_the_first_is_taken(tmp_path: Path, monkeypatch) -> None:
    tuner = Tuner(CPU, tmp_path)
    monkeypatch.setattr(tuner, "_seconds", lambda ways: {"plain": 1.04, "other": 1.0, "third": 0.99 * 1.02})
    assert tuner.best("close", ("plain", "other", "third"), dict) == "plain"
    monkeypatch.setattr(tuner, "_seconds", lambda ways: {"plain": 1.2, "other": 1.0, "third": 1.01})
    assert tuner.best("apart", ("plain", "third", "other"), dict) == "third"
