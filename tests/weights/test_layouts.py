"""The same random weights in every layout that users have make the same latents; quantized ones those of their numbers."""

import pytest
import torch
from layout_files import LAYOUTS, build_model
from PIL import Image

import frameloom

KINDS = {
    "text, 3 heads": {"heads": 3},
    "text, 10 heads": {"heads": 10, "layers": 1},
    "image, two experts": {"heads": 2, "kind": "two experts"},
    "image, CLIP": {"heads": 2, "kind": "image"},
    "per-token timesteps": {"heads": 2, "kind": "per-token timesteps"},
}


def latents_of(opened, *, with_image=False, **options):
    """Latents of two steps in float32, by the reference's own arithmetic."""
    model, parts = opened
    options = {"device": "cpu", "dtype": "float32", "exactness": "bitwise", **options}
    asked = {"width": 64, "height": 64, "num_frames": 5, "steps": 2, "guidance_scale": 4.0, "seed": 3}
    if with_image:
        asked["image"] = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    with frameloom.load(model, parts=parts or None, **options) as engine:
        return engine.generate("a red circle", output="latents", **asked)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A model of a kind, and its latents from the folder that Diffusers writes."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("model")
            model = build_model(folder, **KINDS[kind])
            model.pipeline.save_pretrained(str(folder / "whole"))
            made[kind] = model, latents_of((folder / "whole", {}), with_image=not kind.startswith("text"))
        return made[kind]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_makes_the_same_latents(kind, layout, model_of, tmp_path):
    model, wanted = model_of(kind)
    opened = LAYOUTS[layout](model, tmp_path)
    assert torch.equal(latents_of(opened, with_image=not kind.startswith("text")), wanted)
