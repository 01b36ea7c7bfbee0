"""Windows, residences and previews on several ranks: what a single process makes, or one sentence."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_engine_ranks import load

import frameloom
from frameloom.errors import RequestError
from frameloom.memory.meter import peak_bytes
from frameloom.ops.quantized import Linear
from frameloom.ops.registry import relative_error
from frameloom.parallel.agreement import check_same_numbers
from frameloom.pipeline import preview

PROMPT = "a red circle"
SMALL = {"width": 64, "height": 32, "steps": 3, "seed": 5}
LONG = {**SMALL, "num_frames": 25, "window_frames": 13, "window_overlap": 4}
SHORT = {**SMALL, "num_frames": 5}
# Kernels are chosen by what is fastest at the moment, and round otherwise: here both sides take the reference's.
ALIKE = {"exactness": "bitwise", "rewrites": ["dit.guidance_batched=off"]}
PICTURE = np.random.default_rng(0).integers(0, 256, (25, 32, 64, 3), dtype=np.uint8)
GIVEN = {
    "one expert": {},
    "two experts": {},
    "per-token timesteps": {"image": PICTURE[0]},
    "vace": {"control_video": PICTURE, "mask": PICTURE, "references": [PICTURE[0]]},
}


def cache():
    return os.environ["FRAMELOOM_CACHE"]


def latents(engine, options):
    return engine.generate(PROMPT, output="latents", **options)


# --- windows ---


def windows_of_plans(world, model, cache, options, plans):
    """For each plan: whether the latents of a video in windows have the bits of one process, and how far they are."""
    with frameloom.load(model, device="cpu", **ALIKE) as alone:
        expected = world.everyone.broadcast(latents(alone, options))
    found = {}
    for plan in plans:
        with load(world, model, cache, parallel=plan, **ALIKE) as engine:
            made = latents(engine, options)
        found[plan] = torch.equal(made, expected), relative_error(made, expected)
    return found


@pytest.mark.parametrize("kind", GIVEN)
def test_a_video_in_windows_is_that_of_one_process(kind, checkpoint_of) -> None:
    plans = ("cfg=2", "ulysses=2", "ring=2", "tp=2") if kind == "one expert" else ("cfg=2", "ulysses=2")
    options = {**LONG, **GIVEN[kind]}
    for found in run_ranks(2, windows_of_plans, str(checkpoint_of(kind)), cache(), options, plans):
        for plan, (is_same, error) in found.items():
            assert error <= 1e-5, plan
            assert is_same or plan != "cfg=2"


# --- residences ---


def form(dit):
    """In which the weights of the blocks are held; None: as tensors that are there."""
    (found,) = {module.stored and module.stored.form for module in dit.blocks.modules() if isinstance(module, Linear)}
    return found


def residences_of_plans(world, model, cache, options, plans):
    """For each plan the digests of the latents, by the form in which the transformer holds its weights."""
    found = {}
    for plan in plans:
        found[plan] = {}
        for residence in ("transformer=resident", "transformer=streamed", "text=moved,transformer=moved"):
            loaded = load(
                world, model, cache, parallel=plan, residence=residence, exactness="bitwise", prompt_cache=False
            )
            with loaded as engine:
                digest = hashlib.sha256(latents(engine, options).numpy().tobytes()).hexdigest()
                found[plan][residence] = form(engine._open.experts[0]), digest
    return found


@pytest.mark.parametrize("kind", ["one expert", "two experts", "vace"])
def test_weights_that_come_and_go_make_the_bits_of_resident_ones_on_every_rank(kind, checkpoint_of) -> None:
    plans = ("cfg=2", "ulysses=2", "ring=2") if kind == "one expert" else ("cfg=2", "ulysses=2")
    options = {**SHORT, **({"control_video": PICTURE[:5]} if kind == "vace" else {})}
    first, second = run_ranks(2, residences_of_plans, str(checkpoint_of(kind)), cache(), options, plans)
    assert first == second
    for plan, made in first.items():
        assert [held for held, _ in made.values()] == [None, "streamed", "streamed"], plan
        assert len({digest for _, digest in made.values()}) == 1, plan


def refused(world, model, cache, plan, residence):
    try:
        load(world, model, cache, parallel=plan, residence=residence).close()
    except RequestError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("plan", "residence"),
    [("tp=2", "transformer=streamed"), ("ulysses=2,fsdp=2", "transformer=streamed"), ("cfg=2,fsdp=2", "text=moved")],
)
def test_divided_weights_that_should_come_and_go_are_refused_on_every_rank(plan, residence, checkpoint_of) -> None:
    for said in run_ranks(2, refused, str(checkpoint_of()), cache(), plan, residence):
        assert said.startswith(f"residence {residence} is not possible with weights that are divided over ranks (")
        assert said.endswith("leave it out, or divide by cfg, ulysses or ring")


def test_the_command_ends_with_that_sentence_said_once(checkpoint_of, tmp_path) -> None:
    words = ["generate", PROMPT, "--model", str(checkpoint_of()), "--device", "cpu", "-o", str(tmp_path / "a.mp4")]
    words += ["--gpus", "2", "--parallel", "tp=2", "--residence", "transformer=streamed"]
    done = subprocess.run([sys.executable, "-m", "frameloom", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("residence transformer=streamed is not possible with weights that are divided") == 1
    assert list(tmp_path.iterdir()) == []


# --- previews ---


def with_preview(world, model, cache, options, folder):
    """What the preview and the video are when rank 0 alone has a folder to draw in."""
    paths = [Path(folder) / str(world.rank) / name for name in ("sheet.png", "a.mp4", "b.mp4")]
    with pytest.MonkeyPatch.context() as patch, load(world, model, cache) as engine:
        patch.setattr(preview, "_LEAST_S", 0.0)
        patch.setattr(preview, "_COST", 0)
        engine.generate_to(paths[1], PROMPT, **options)
        engine.generate_to(paths[2], PROMPT, preview=paths[0] if world.rank == 0 else folder, **options)
    return [path.read_bytes() if path.exists() else None for path in paths]


@pytest.mark.parametrize("options", [SHORT, LONG], ids=["whole", "in windows"])
def test_the_first_rank_draws_the_preview_and_the_video_has_its_bytes(options, checkpoint_of, tmp_path) -> None:
    (tmp_path / "0").mkdir()
    first, second = run_ranks(2, with_preview, None, cache(), {**options, "width": 64, "height": 64}, str(tmp_path))
    sheet, plain, shown = first
    assert sheet.startswith(b"\x89PNG")
    assert plain == shown is not None
    assert second == [None, None, None]


# --- the same numbers ---


def told_of_numbers(world, change):
    """What is said of numbers that are others on rank 1, and how much memory the comparison takes."""
    x = torch.arange(4_000_000, dtype=torch.float32)
    if world.rank == 1:
        x[change] = x[change].flip(0)
    said = []

    def compare():
        try:
            check_same_numbers(world.everyone, "latents", x)
        except RequestError as error:
            said.append(str(error))

    return peak_bytes(compare) / x.nbytes, said


@pytest.mark.parametrize(("change", "is_told"), [([7, 7], False), ([0, -1], True), ([3_000_000, 3_000_001], True)])
def test_numbers_are_compared_to_the_last_without_a_copy_of_them(change, is_told) -> None:
    for copies, said in run_ranks(2, told_of_numbers, change):
        assert copies < 3
        assert said == ["rank 1 was given other latents than rank 0; give all ranks the same"] * is_told
