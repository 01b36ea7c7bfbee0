"""The world of shapes: what is drawn is what the reader reads and what the caption says."""

import numpy as np
import pytest

from frameloom.models.encoders import TEXT_LENGTH
from frameloom.models.tokenizer import build_tokenizer
from frameloom.shapes.advice import advice
from frameloom.shapes.reader import read_clip
from frameloom.shapes.tokens import pieces
from frameloom.shapes.world import (
    COLOURS,
    HELD_OUT_WORDINGS,
    MOTIONS,
    SHAPES,
    TRAINING_WORDINGS,
    Scene,
    combinations,
    describe,
    is_held_out,
    is_visible,
    random_scene,
    render,
)


def test_the_world_is_as_large_as_promised():
    assert len(COLOURS) >= 6
    assert len(MOTIONS) >= 6
    assert len(SHAPES) >= 4
    held_out = [c for c in combinations() if is_held_out(c)]
    assert 30 <= len(held_out) <= len(combinations()) / 4
    for position, names in enumerate((COLOURS, SHAPES, MOTIONS)):  # every word is trained on, in other company
        assert {c[position] for c in combinations() if not is_held_out(c)} == set(names)


def test_held_out_scenes_never_meet_training():
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert not is_held_out(random_scene(rng).combination)
        assert is_held_out(random_scene(rng, held_out=True).combination)
    assert not set(TRAINING_WORDINGS) & set(HELD_OUT_WORDINGS)


def test_a_clip_depends_on_its_generator_alone():
    scene = random_scene(np.random.default_rng(3))
    first, second = (render(scene, np.random.default_rng(4)) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (17, 64, 64, 3)
    assert first.dtype == np.uint8
    assert not np.array_equal(first, render(scene, np.random.default_rng(5)))


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reader_reads_the_truth(shape, motion):
    if not is_visible(shape, motion):
        return
    rng = np.random.default_rng(11)
    for colour in list(COLOURS)[::3]:
        background = random_scene(rng).background
        scene = Scene(colour=colour, shape=shape, motion=motion, background=background)
        reading = read_clip(render(scene, rng))
        assert (reading.colour, reading.shape, reading.motion) == scene.combination


def test_the_reader_is_not_fooled_by_noise_or_emptiness():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    assert read_clip(noise).motion is None
    assert read_clip(np.full((17, 64, 64, 3), 200, np.uint8)).shape is None
    still = np.repeat(render(random_scene(rng), rng)[:1], 17, axis=0)
    assert read_clip(still).motion is None


def test_a_reversed_clip_reads_as_the_opposite_motion():
    rng = np.random.default_rng(1)
    for motion, opposite in (("left", "right"), ("up", "down"), ("growing", "shrinking")):
        scene = Scene(colour="red", shape="star", motion=motion, background=("white",))
        assert read_clip(render(scene, rng)[::-1]).motion == opposite


def test_every_caption_is_known_to_the_tokenizer_and_short():
    tokenizer, rng = build_tokenizer(pieces()), np.random.default_rng(0)
    letters = {piece for piece, score in pieces() if len(piece) == 1 and piece.isalnum()}
    for wordings in (TRAINING_WORDINGS, HELD_OUT_WORDINGS):
        for _ in range(200):
            text = describe(random_scene(rng), rng, wordings=wordings)
            tokens = tokenizer.pieces(text)
            assert not letters & set(tokens), (text, tokens)
            assert "<unk>" not in tokens
            assert len(tokens) < 32 < TEXT_LENGTH


def test_advice_speaks_only_outside_the_world():
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert advice(describe(random_scene(rng), rng)) is None
        assert advice(describe(random_scene(rng), rng, wordings=HELD_OUT_WORDINGS).capitalize()) is None
    for prompt in ("a cat walks on grass", "a red zebra spinning", "moving left"):
        assert "--model" in advice(prompt)
    assert "'cat'" in advice("a cat walks on grass")
    assert "green background" in advice("a red star on a green background")
    assert "one shape" in advice("a red circle and a blue square")
    assert "spinning circle" in advice("a spinning circle")
    assert advice("a red circle") is None
