"""Requests with pictures on several ranks: the video of one process, and no other pictures on another rank."""

import os

import numpy as np
import pytest
from ranks import run_ranks
from test_engine_ranks import load

import frameloom
from frameloom.errors import RequestError
from frameloom.ops.registry import relative_error

SMALL = {"width": 32, "height": 64, "num_frames": 5, "steps": 2, "seed": 5, "output": "latents"}
PICTURES = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
GIVEN = {
    "first and last image": {"image": PICTURES[0], "last_image": PICTURES[1]},
    "per-token timesteps": {"image": PICTURES[0]},
    "one expert": {"video": PICTURES, "strength": 0.6},
    "vace": {"control_video": PICTURES, "mask": PICTURES, "references": [PICTURES[0]], "control_strength": [1.5, 0.25]},
}
PLANS = ("cfg=2", "ulysses=2", "ring=2", "tp=2", "ulysses=2,fsdp=2")


def errors_of_plans(world, model, cache, given, plans):
    with frameloom.load(model, device="cpu") as alone:
        expected = world.everyone.broadcast(alone.generate("a red circle", **SMALL, **given))
    found = {}
    for plan in plans:
        with load(world, model, cache, parallel=plan) as engine:
            found[plan] = relative_error(engine.generate("a red circle", **SMALL, **given), expected)
    return found


@pytest.mark.parametrize("kind", GIVEN)
def test_every_plan_makes_the_video_of_one_process(kind, checkpoint_of) -> None:
    plans = PLANS if kind == "first and last image" else PLANS[:2]
    for found in run_ranks(
        2, errors_of_plans, str(checkpoint_of(kind)), os.environ["FRAMELOOM_CACHE"], GIVEN[kind], plans
    ):
        for plan, error in found.items():
            assert error <= 1e-5, plan


def another_image(world, model, cache):
    with load(world, model, cache) as engine:
        try:
            engine.generate("a red circle", image=PICTURES[world.rank], **SMALL)
        except RequestError as error:
            return str(error)
    return None


def test_ranks_that_are_given_other_images_refuse(checkpoint_of) -> None:
    for said in run_ranks(2, another_image, str(checkpoint_of("image")), os.environ["FRAMELOOM_CACHE"]):
        assert said == "rank 1 was given another image than rank 0; start all with the same command"
