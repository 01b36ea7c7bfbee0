"""Every rewrite against its reference, over sizes that hypothesis draws; and the page that is written from them."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.engine.compiled import COMPILED
from frameloom.engine.rewrites import REWRITES
from frameloom.errors import RequestError
from frameloom.ops import triton_norm_silu
from frameloom.ops.norm_silu import norm_silu
from frameloom.ops.registry import BF16_SLACK, EXACTNESS, Policy, Rewrite, Sizes, document, make_policy, relative_error

QUICK = [rewrite for rewrite in REWRITES if rewrite is not COMPILED]  # that one: tests/engine/test_compiled.py
NAMES = [rewrite.name for rewrite in REWRITES]
CASES = [(rewrite, dtype) for rewrite in QUICK for dtype in rewrite.dtypes]
sizes = st.builds(
    Sizes,
    batch=st.integers(1, 2),
    in_channels=st.integers(1, 20),
    out_channels=st.integers(1, 20),
    frames=st.integers(1, 5),
    height=st.integers(2, 13),
    width=st.integers(3, 14),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize(("rewrite", "dtype"), CASES, ids=lambda value: getattr(value, "name", str(value)))
@settings(max_examples=10, deadline=None, derandomize=True)
@given(sizes=sizes)
@torch.inference_mode()
def test_a_rewrite_computes_what_its_reference_does(rewrite: Rewrite, dtype: torch.dtype, sizes: Sizes) -> None:
    cpu = torch.device("cpu")
    arguments = rewrite.example(sizes, dtype, cpu)
    if reason := rewrite.refuses(*arguments):
        pytest.skip(reason)
    fast, reference = rewrite.fast(*arguments), rewrite.reference(*arguments)
    assert fast.shape == reference.shape
    assert fast.dtype == reference.dtype
    if rewrite.exactness == "bitwise":
        assert torch.equal(fast, reference)
    elif dtype == torch.float32:
        assert relative_error(fast, reference) <= rewrite.tolerance
    else:
        exact = rewrite.reference(*rewrite.example(sizes, torch.float32, cpu))
        # On a handful of numbers one that rounds up instead of down is more than a tenth: two roundings are allowed.
        floor = 0.0 if exact.numel() >= 1000 else 2.0**-7
        assert relative_error(fast, exact) <= max(BF16_SLACK * relative_error(reference, exact), floor)


def test_names_are_distinct_and_say_their_room() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(name.startswith(("vae.", "dit.")) for name in NAMES)
    assert {rewrite.exactness for rewrite in REWRITES} <= set(EXACTNESS)


def test_the_page_is_what_the_registry_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "rewrites.md"
    assert page.read_text(encoding="utf-8") == document(REWRITES), "python -m frameloom.verify > docs/rewrites.md"


def test_a_policy_allows_its_class_and_what_lies_below() -> None:
    by_name = {rewrite.name: rewrite for rewrite in REWRITES}
    bitwise, rounding = Policy(exactness="bitwise"), Policy()
    assert bitwise.refuses(by_name["vae.buffers"]) is None
    assert bitwise.refuses(by_name["vae.chunks"]) == "it is rounding, and bitwise was asked for"
    assert rounding.refuses(by_name["vae.chunks"]) is None
    forced = make_policy("bitwise", ["vae.chunks=on", "vae.buffers=off"], NAMES)
    assert forced.refuses(by_name["vae.chunks"]) is None
    assert forced.refuses(by_name["vae.buffers"]) == "switched off by name"


@pytest.mark.parametrize(
    ("exactness", "rewrites", "words"),
    [
        ("exact", [], "bitwise, rounding, lossy"),
        ("rounding", ["vae.conv_winogrd=on"], "did you mean 'vae.conv_winograd'"),
        ("rounding", ["vae.bands"], "write vae.bands=on or vae.bands=off"),
        ("rounding", ["vae.bands=maybe"], "neither on nor off"),
        ("rounding", ["vae.bands=on", "vae.bands=off"], "both on and off"),
        ("rounding", "vae.bands=on", "no list of texts"),
        ("rounding", None, "no list of texts"),
        ("rounding", [3], "no list of texts"),
        ("rounding", ["x=on"], "known are dit.add_gated_native"),
    ],
)
def test_a_word_that_means_nothing_is_refused(exactness: str, rewrites: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        make_policy(exactness, rewrites, NAMES)


def test_the_norm_in_triton_is_launched_on_the_device_of_its_input(monkeypatch):
    launched, kernel, current = [], triton_norm_silu._kernel, []

    @contextlib.contextmanager
    def on_device_of(x):
        current.append(x)
        yield
        current.pop()

    class Watched:
        def __getitem__(self, grid):
            launched.append(list(current))
            return kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", on_device_of)
    monkeypatch.setattr(triton_norm_silu, "_kernel", Watched())
    x = torch.randn(2, 6, 1, 3, 4).contiguous(memory_format=torch.channels_last_3d)
    gamma = torch.rand(6, 2)[:, 0]
    made = triton_norm_silu.norm_silu_triton(x, gamma)
    assert relative_error(made, norm_silu(x, gamma)) <= 1e-6
    assert [[each is x for each in inside] for inside in launched] == [[True], [True]]
