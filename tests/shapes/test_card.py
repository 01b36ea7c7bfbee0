"""The card states what the evaluation measured, and the model in the package is the one that was measured."""

import json

import pytest

import frameloom
from frameloom.shapes.evaluate import ATTRIBUTES, trials
from frameloom.shapes.reader import read_clip

RECORD = json.loads((frameloom.shapes.PATH / "evaluation.json").read_text(encoding="utf-8"))


def test_the_card_states_the_measured_shares():
    card = (frameloom.shapes.PATH / "README.md").read_text(encoding="utf-8")
    for name, shares in RECORD["shares"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert [f"{shares[attribute]:.1%}" in row for attribute in ATTRIBUTES] == [True] * 3
    assert f"{RECORD['psnr_db']:.1f} dB" in card
    assert f"seed {RECORD['seed']}" in card


def test_the_model_follows_prompts_it_never_saw():
    """What a model in the package owes its users: colour and motion in 95 of 100 prompts, shape in 90."""
    assert RECORD["prompts"] == 200
    for attribute, bar in {"colour": 0.95, "motion": 0.95, "shape": 0.90}.items():
        assert RECORD["shares"]["all"][attribute] >= bar
    assert RECORD["psnr_db"] >= 35


@pytest.mark.slow
def test_the_shipped_model_repeats_its_evaluation():
    """Another CPU rounds otherwise, and a borderline clip may then read differently: one in eight is allowed for."""
    misses = {miss["seed"]: tuple(miss["read"]) for miss in RECORD["misses"]}
    agreed = 0
    with frameloom.load() as engine:
        for trial in trials(RECORD["prompts"], seed=RECORD["seed"])[:8]:
            reading = read_clip(engine.generate(trial.prompt, seed=trial.seed).frames)
            recorded = misses.get(trial.seed, trial.scene.combination)
            agreed += (reading.colour, reading.shape, reading.motion) == recorded
    assert agreed >= 7
