"""One request on the built-in model in every way: the same file bit for bit, or a picture no eye can tell apart."""

import hashlib

import numpy as np
import pytest

import frameloom
from frameloom.memory import vae as plan

PROMPT = "a red circle moving left on a white background"
OPTIONS = {"seed": 0, "steps": 6}
BITWISE = ("vae.buffers", "dit.prompt_once", "dit.shared_branches")


def written(folder, **loading) -> str:
    """sha256 of the MP4."""
    with frameloom.load(device="cpu", dtype="float32", **loading) as engine:
        made = engine.generate_to(folder / "video.mp4", PROMPT, **OPTIONS)
    with open(made["output"], "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    off = [f"{name}=off" for name in BITWISE]
    return written(tmp_path_factory.mktemp("reference"), exactness="bitwise", rewrites=off)


@pytest.mark.parametrize("switched_on", [(), *((name,) for name in BITWISE[:2]), BITWISE], ids=str)
def test_the_file_is_the_same_with_bitwise_rewrites_on_or_off(reference, tmp_path, switched_on) -> None:
    off = [f"{name}=off" for name in BITWISE if name not in switched_on]
    assert written(tmp_path, exactness="bitwise", rewrites=off) == reference


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_the_picture_is_the_same_whatever_the_chunks(monkeypatch, steps) -> None:
    """Chunks are of class `rounding`: a library sums in another order for another number of frames."""
    frames = {}
    for count in (2, steps):
        monkeypatch.setattr(plan, "_CPU_CHUNKS", (count,))
        with frameloom.load(device="cpu", dtype="float32") as engine:
            frames[count] = engine.generate(PROMPT, **OPTIONS).frames.astype(int)
    apart = np.abs(frames[2] - frames[steps])
    assert apart.max() <= 1
    assert (apart > 0).mean() <= 1e-4


def test_the_file_is_the_same_in_every_run(tmp_path) -> None:
    assert written(tmp_path) == written(tmp_path)


def test_with_every_rounding_rewrite_no_level_is_off_by_more_than_one() -> None:
    frames = []
    for exactness in ("bitwise", "rounding"):
        with frameloom.load(device="cpu", dtype="float32", exactness=exactness) as engine:
            assert sum(decision.used for decision in engine.decisions) > (10 if exactness == "rounding" else 2)
            frames.append(engine.generate(PROMPT, **OPTIONS).frames.astype(int))
    apart = frames[0] - frames[1]
    assert np.abs(apart).max() <= 1
    assert 10 * np.log10(255**2 / max(np.mean(apart**2), 1e-12)) >= 50
    assert frames[0].std() > 20  # a flat picture would agree with anything
