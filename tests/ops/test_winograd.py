"""Winograd convolutions: where they apply, in blocks, and without a compiler."""

import pytest
import torch
import torch.nn.functional as F

from frameloom.errors import InternalError
from frameloom.ops import native as native_module
from frameloom.ops.native import Native, kernels, native
from frameloom.ops.winograd import PlainWinogradConv, WinogradConv, evaluation_matrix, refuses, refuses_plain

KINDS = [PlainWinogradConv, pytest.param(WinogradConv, marks=pytest.mark.skipif(not native().library, reason="no g++"))]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_blocks_of_tile_rows_meet_without_a_seam(kind: type[WinogradConv], rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 6, 5, 19, 11), torch.randn(4, 6, 3, 3, 3), torch.randn(4)
    conv = kind(weight, bias)
    conv.block_bytes = rows * 36 * 4 * 3 * (5 * 6 + 3 * 4)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), padding=(0, 1, 1))
    assert relative(conv(x, 1), expected) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_any_memory_order_is_taken_and_no_bias_is_none(kind: type[WinogradConv]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6, 3, 3, 3)
    wide = torch.randn(2, 6, 5, 9, 22)
    x = wide[..., ::2]
    expected = F.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
    assert relative(kind(weight, None)(x, 1), expected) <= 1e-6


def test_the_evaluation_of_a_constant_kernel_sums_to_its_polynomial() -> None:
    g = evaluation_matrix()
    assert torch.allclose(g[-1], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    # Rows of G times the values of x^k at the points interpolate: sum over points of p^k / scale is 0 below the degree.
    assert torch.allclose(g[:-1, 0].sum(), torch.zeros((), dtype=torch.float64), atol=1e-12)


def test_where_it_does_not_apply_it_says_why() -> None:
    assert refuses_plain(torch.zeros(1, 1, 3, 3, 3)) is None
    assert refuses_plain(torch.zeros(1, 1, 3, 1, 1)) == "it is for 3x3 kernels"
    assert refuses_plain(torch.zeros(1, 1, 3, 3)) == "it is for 3x3 kernels"
    assert "in float32 on a CPU, not in torch.float64" in refuses_plain(torch.zeros(1, 1, 3, 3, 3, dtype=torch.float64))


def test_without_a_compiler_the_reason_is_told_and_nothing_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module.shutil, "which", lambda _: None)
    found = native.__wrapped__()
    assert found == Native(None, "no g++ on this machine")
    monkeypatch.setattr("frameloom.ops.winograd.native", lambda: found)
    assert refuses(torch.zeros(1, 1, 3, 3, 3)) == "no g++ on this machine"
    monkeypatch.setattr(native_module, "native", lambda source: found)
    with pytest.raises(InternalError, match="no g"):
        kernels()


def test_a_compiler_that_fails_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'cannot do this' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(native_module.shutil, "which", lambda _: str(broken))
    monkeypatch.setenv("FRAMELOOM_CACHE", str(tmp_path / "cache"))
    found = native.__wrapped__()
    assert found.library is None
    assert "cannot do this" in found.reason
    assert list((tmp_path / "cache").iterdir()) == []
