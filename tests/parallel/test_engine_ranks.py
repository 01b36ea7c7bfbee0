"""Whole engines on several ranks: one video, the one that a single process makes."""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks

import frameloom
from frameloom.errors import RequestError
from frameloom.ops.registry import relative_error

SMALL = {"width": 32, "height": 96, "num_frames": 9, "steps": 3, "seed": 5}


@contextlib.contextmanager
def as_ranks(world, cache):
    """Frameloom in here takes this process for one of those that torchrun started; and without, for a single one."""
    place = {
        "RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.rank, "LOCAL_WORLD_SIZE": world.size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "FRAMELOOM_CACHE": cache,
    }  # fmt: skip
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def load(world, model, cache, **options):
    """An engine of all ranks."""
    with as_ranks(world, cache):
        return frameloom.load(model, device="cpu", **options)


def load_and_hash(world, model, cache, options, sizes, folder):
    """As `hashes`, of an engine of all ranks."""
    with load(world, model, cache, **options) as engine:
        return hashes(engine, sizes, Path(folder) / f"{world.rank}.mp4")


def hashes(engine, sizes, path: Path) -> list[str]:
    """For each size: of the file of decoded latents, and of what these frames are encoded to."""
    found = []
    for frames, height, width in sizes:
        channels = engine._pipeline.vae.spec.z_dim
        z = torch.randn(1, channels, frames, height, width, generator=torch.Generator().manual_seed(7))
        pixels = engine.decode(z)
        frameloom.Video(frames=pixels, fps=16).save(path)
        for data in (path.read_bytes(), engine.encode(pixels).numpy().tobytes()):
            found.append(hashlib.sha256(data).hexdigest())
    return found


OURS = ("conv3d_unfold", "conv_winograd", "conv_winograd_plain", "upsample_phases", "upsample_winograd")
CONTIGUOUS = "vae.channels_last=off"  # without kernels of ours
WAYS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32, contiguous": {"dtype": "float32", "rewrites": [CONTIGUOUS]},
    "bfloat16, contiguous": {"dtype": "bfloat16", "rewrites": [CONTIGUOUS]},
    "float32, the library's": {"dtype": "float32", "rewrites": [f"vae.{name}=off" for name in OURS]},
}


@pytest.mark.parametrize("kind", [None, "per-token timesteps"])
@pytest.mark.parametrize("way", WAYS)
def test_decoded_files_and_encoded_latents_are_the_same_bytes(kind, way: str, checkpoint_of, tmp_path) -> None:
    """Both VAEs; heights that do not divide, and fewer rows than ranks."""
    model, options = None if kind is None else str(checkpoint_of(kind)), WAYS[way]
    sizes = [(3, 7, 9), (2, 2, 11), (2, 15, 4)]
    kept = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a rank: with two, a convolution of 6 channels in that order rounds otherwise
    try:
        with frameloom.load(model, device="cpu", **options) as engine:
            expected = hashes(engine, sizes, tmp_path / "one.mp4")
    finally:
        torch.set_num_threads(kept)
    for count in (2, 3, 4) if "," not in way else (3,):
        cache = os.environ["FRAMELOOM_CACHE"]
        for found in run_ranks(count, load_and_hash, model, cache, options, sizes, str(tmp_path)):
            assert found == expected, count


def errors_of_plans(world, model, cache, plans):
    """Latents and frames of each plan against one process: relative error, and levels apart; and encoded again."""
    with frameloom.load(model, device="cpu") as alone:
        expected = world.everyone.broadcast(alone.generate("a red circle", output="latents", **SMALL))
        frames = world.everyone.broadcast(torch.from_numpy(alone.decode(expected))).numpy()
        encoded = alone.encode(frames)
    found = {}
    for plan in plans:
        with load(world, model, cache, parallel=plan) as engine:
            latents = engine.generate("a red circle", output="latents", **SMALL)
            apart = np.abs(engine.decode(expected).astype(int) - frames).max()
            found[plan] = (
                relative_error(latents, expected),
                int(apart),
                relative_error(engine.encode(frames), encoded),
            )
    return found


PLANS = {
    2: ["auto", "cfg=2", "ulysses=2", "ring=2", "tp=2", "ulysses=2,fsdp=2", "cfg=2,vae=1"],
    4: [
        "auto",
        "cfg=2,tp=2",
        "cfg=2,ulysses=2",
        "ulysses=2,ring=2",
        "ring=2,tp=2",
        "cfg=2,ring=2,fsdp=4",
        "ring=4,vae=3",
    ],
}


@pytest.mark.parametrize("kind", ["one expert", "two experts", "per-token timesteps"])
@pytest.mark.parametrize("count", PLANS)
def test_every_plan_makes_the_video_of_one_process(count: int, kind, checkpoint_of) -> None:
    plans = PLANS[count] if kind == "one expert" else PLANS[count][:3]
    for found in run_ranks(count, errors_of_plans, str(checkpoint_of(kind)), os.environ["FRAMELOOM_CACHE"], plans):
        for plan, (of_latents, levels, of_encoded) in found.items():
            assert of_latents <= 1e-5, plan
            assert levels <= 1, plan
            assert of_encoded <= 1e-5, plan


def batch(world, cache):
    prompts = ["a red circle", "a blue star"]
    small = {**SMALL, "width": 32, "height": 32}
    with frameloom.load(device="cpu") as alone:
        expected = [video.frames for video in alone.generate(prompts, **small)]
    with load(world, None, cache, parallel="ulysses=2") as engine:
        made = [video.frames for video in engine.generate(prompts, **small)]
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(made, expected, strict=True))


def test_several_prompts_on_several_ranks() -> None:
    assert max(run_ranks(2, batch, os.environ["FRAMELOOM_CACHE"])) <= 1


def refused(world, cache, plan):
    try:
        load(world, None, cache, parallel=plan).close()
    except RequestError as error:
        return str(error)
    return None


def test_plans_that_a_checkpoint_or_the_ranks_cannot_take_are_one_sentence() -> None:
    cache = os.environ["FRAMELOOM_CACHE"]
    assert "the nearest plan is" in run_ranks(2, refused, cache, "ulysses=3")[0]
    assert "fsdp=2 and tp=2 do not go together" in run_ranks(2, refused, cache, "tp=2,fsdp=2")[1]


def different_requests(world, cache):
    with load(world, None, cache) as engine:
        try:
            engine.generate("a red circle", **{**SMALL, "seed": world.rank})
        except RequestError as error:
            return str(error)
    return None


def test_ranks_that_are_asked_for_different_videos_refuse() -> None:
    for said in run_ranks(2, different_requests, os.environ["FRAMELOOM_CACHE"]):
        assert said == "rank 1 was given another seed than rank 0; start all with the same command"


def different_inputs(world, cache):
    said = []
    with load(world, None, cache) as engine:
        for call, given in (
            (engine.decode, torch.full((1, engine._pipeline.vae.spec.z_dim, 1, 4, 4), float(world.rank))),
            (engine.encode, np.full((1, 32, 32, 3), world.rank, np.uint8)),
        ):
            try:
                call(given)
            except RequestError as error:
                said.append(str(error))
    return said


def test_ranks_that_are_given_different_latents_or_frames_refuse() -> None:
    for said in run_ranks(2, different_inputs, os.environ["FRAMELOOM_CACHE"]):
        assert said == [
            f"rank 1 was given other {x} than rank 0; give all ranks the same" for x in ("latents", "frames")
        ]


def out_of_memory(world, cache):
    with load(world, None, cache, vae_memory="1MB") as engine:
        engine.decode(torch.zeros(1, engine._pipeline.vae.spec.z_dim, 3, 8, 8))


def test_too_little_memory_is_said_before_anything_is_decoded() -> None:
    with pytest.raises(RankError, match="needs at least"):
        run_ranks(2, out_of_memory, os.environ["FRAMELOOM_CACHE"])
