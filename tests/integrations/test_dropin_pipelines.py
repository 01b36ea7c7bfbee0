"""Every class of pipeline: accelerated as it was, the same twice, and restored to the bit; and the table of them."""

import pytest
from drop_in_table import BEGIN, DOCS, END, HEAD, prove, row_of

from frameloom.integrations.diffusers.samples.catalogue import SAMPLES
from frameloom.integrations.diffusers.samples.sample import Sample, Scale

HERE = [sample for sample in SAMPLES if not sample.missing]


def rows_in_docs() -> dict[str, str]:
    table = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert table.lstrip("\n").startswith(HEAD)
    lines = table.split(HEAD)[1].splitlines(keepends=True)
    return {line.split("|")[1].strip(): line for line in lines}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("sample", HERE, ids=lambda sample: sample.name)
def test_a_pipeline_makes_the_same_pictures_accelerated_and_the_very_same_restored(sample: Sample) -> None:
    proof = prove(sample, Scale())
    assert proof.spread > 0.03, "frames that are nearly grey show no error"
    assert proof.report.taken
    assert proof.levels <= 1
    assert proof.second_is_equal
    assert proof.restored_is_equal
    assert proof.weights_are_equal
    assert proof.classes_are_equal
    if not sample.needs:  # else the table may say that it was made without that library
        assert row_of(sample, proof.report, "").split("|")[1:5] == rows_in_docs()[sample.name].split("|")[1:5]


def test_the_table_has_a_row_for_each_pipeline_and_no_other() -> None:
    assert list(rows_in_docs()) == [sample.name for sample in SAMPLES]
