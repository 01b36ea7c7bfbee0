"""Tensors that stay in their files: the right numbers, in memory for as long as somebody holds them."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from quantized_files import in_blocks, numbers, plain, scaled, write

from frameloom.errors import CheckpointError
from frameloom.weights.tensors import read_tensor
from frameloom.weights.windows import TableWindow, window

CPU = torch.device("cpu")
ODD = plain(torch.ones(3, dtype=torch.bfloat16))  # what follows begins at byte 6


def entry_of(path, stored):
    return write(path, {"first": ODD, "x": stored, "last": ODD}).tensors["x"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7), (300, 200), ()], ids=str)
def test_a_window_shows_the_numbers_that_reading_gives(tmp_path, dtype, shape):
    entry = entry_of(tmp_path / "x", plain(torch.randn(shape).to(dtype)))
    seen = window(entry, CPU)
    assert (seen.dtype, seen.shape, seen.quantized) == (dtype, entry.shape, None)
    for at_once in (True, False):
        assert torch.equal(seen.look(at_once=at_once), read_tensor(entry))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "I8", "F8_E4M3"])
def test_of_quantized_weights_it_shows_the_bytes_and_knows_their_meaning(tmp_path, kind):
    weight = torch.randn(6, 256)
    stored = in_blocks(weight, kind) if kind.startswith("Q") else scaled(weight, kind, by_row=True)
    seen = window(entry_of(tmp_path / "x", stored), CPU)
    assert (seen.dtype, seen.shape) == (torch.uint8, (len(stored.data),))
    found = dataclasses.replace(seen.quantized, raw_U8=seen.look()).plain(torch.float32)
    assert torch.equal(found, read_tensor(seen.entry))
    assert torch.allclose(found, numbers(stored))
    rows = TableWindow(window=seen).rows(torch.tensor([[4, 0], [4, 5]]), torch.bfloat16)
    assert torch.equal(rows, found[[4, 0, 4, 5]].bfloat16().view(2, 2, 256))


def test_rows_of_a_plain_table_are_those_of_the_whole(tmp_path):
    table = torch.randn(50, 8, dtype=torch.bfloat16)
    rows = TableWindow(window=window(entry_of(tmp_path / "x", plain(table)), CPU))
    assert torch.equal(rows.rows(torch.tensor([3, 49, 3]), torch.float32), table[[3, 49, 3]].float())


def test_large_tensors_at_places_for_their_numbers_compute_where_they_lie(tmp_path):
    large, small = torch.zeros(300, 200), torch.zeros(3, 200)
    lies = {"large": write(tmp_path / "a", {"x": plain(large)}), "small": write(tmp_path / "b", {"x": plain(small)})}
    assert window(lies["large"].tensors["x"], CPU).computes
    assert not window(lies["small"].tensors["x"], CPU).computes
    assert not window(entry_of(tmp_path / "c", plain(large)), CPU).computes  # at byte 6


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what is mapped")
def test_nothing_is_mapped_any_more_when_nobody_holds_what_was_seen(tmp_path):
    def is_mapped():
        return str(tmp_path / "x") in Path("/proc/self/maps").read_text("utf-8")

    lies = window(write(tmp_path / "x", {"x": plain(torch.randn(300, 200))}).tensors["x"], CPU)
    assert not is_mapped()
    seen = lies.look()
    part = seen[3]
    del seen
    assert is_mapped()
    del part
    assert not is_mapped()


def test_a_file_that_became_shorter_or_is_gone_is_told(tmp_path):
    path = tmp_path / "x"
    lies = window(write(path, {"x": plain(torch.randn(300, 200))}).tensors["x"], CPU)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"x cannot be mapped for 'x' .*; download it again, or keep"):
        lies.look()
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        lies.look()
