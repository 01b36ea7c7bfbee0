"""LoRAs of an engine: merged when it is loaded, exchanged between requests, each for its expert."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import frameloom
from frameloom.engine.loras import merging
from frameloom.errors import CheckpointError, RequestError
from frameloom.models.adapters import Adapter, Adapters, Product, merge
from frameloom.types import Lora

SIZE = {"width": 64, "height": 32, "num_frames": 5, "steps": 3}


@pytest.fixture
def lora(tmp_path):
    """Writes a LoRA of the text's keys and of a norm."""

    def write(name="style.safetensors", *, seed=0):
        generator = torch.Generator().manual_seed(seed)
        root = "diffusion_model.blocks.1"
        tensors = {
            f"{root}.cross_attn.k.lora_down.weight": torch.randn(2, 32, generator=generator),
            f"{root}.cross_attn.k.lora_up.weight": torch.randn(32, 2, generator=generator),
            f"{root}.norm3.diff_b": torch.randn(32, generator=generator),
        }
        save_file(tensors, tmp_path / name)
        return str(tmp_path / name)

    return write


def latents(engine):
    return engine.generate("a red circle", output="latents", **SIZE)


def opened(folder, loras=()):
    return frameloom.load(folder, loras=loras, exactness="bitwise")


def loaded(folder, loras=()):
    with opened(folder, loras) as engine:
        return latents(engine)


def close(a, b):
    return float((a - b).norm() / b.norm()) < 1e-5


def test_a_lora_is_merged_when_the_engine_is_loaded_or_exchanged_between_requests(checkpoint_of, lora):
    one, other = lora(), lora("other.safetensors", seed=1)
    with opened(checkpoint_of()) as engine:
        before = latents(engine)
        engine.set_loras([Lora(path=one, strength=0.5)])
        first = latents(engine)
        engine.set_loras([f"{one}:0.5", other])
        both = latents(engine)
        engine.set_loras([])
        assert torch.equal(latents(engine), before)
    assert not close(first, before)
    assert not close(both, first)
    assert close(first, loaded(checkpoint_of(), [f"{one}:0.5"]))
    assert close(both, loaded(checkpoint_of(), [f"{one}:0.5", other]))


def test_a_video_says_what_it_was_made_with(checkpoint_of, lora, tmp_path, run):
    one, other = lora(), lora("other.safetensors", seed=1)
    with opened(checkpoint_of("two experts"), [f"high:{one}:0.5"]) as engine:
        engine.set_loras([other])
        video = engine.generate("a red circle", **SIZE)
    assert video.metadata["loras"] == [f"high:{one}:0.5", f"{other}:1"]
    words = ["--model", checkpoint_of(), "--lora", f"{one}:0.5", "--lora", other, "-o", tmp_path / "a.mp4", "--json"]
    code, out, _ = run("generate", "a red circle", *words, "--frames", 5, "--steps", 2, "--width", 64, "--height", 32)
    assert code == 0
    assert json.loads(out)["loras"] == [f"{one}:0.5", f"{other}:1"]


def test_what_was_merged_stays_when_others_are_exchanged(checkpoint_of, lora):
    one, other = lora(), lora("other.safetensors", seed=1)
    with opened(checkpoint_of(), [one]) as engine:
        merged = latents(engine)
        engine.set_loras([other])
        assert close(latents(engine), loaded(checkpoint_of(), [one, other]))
        engine.set_loras([])
        assert torch.equal(latents(engine), merged)


def test_each_of_two_experts_has_its_own(checkpoint_of, lora):
    high, low = lora("high_noise.safetensors"), lora("low_noise.safetensors", seed=1)
    folder = checkpoint_of("two experts")
    results = [loaded(folder, given) for given in ([], [high], [low], [high, low], [f"low:{high}"])]
    for index, result in enumerate(results):
        assert not any(close(result, other) for other in results[:index])
    with opened(folder) as engine:
        engine.set_loras([high, low])
        assert close(latents(engine), results[3])


def quantized(folder, source):
    """A copy of a checkpoint, some weights of its transformers in float8."""
    shutil.copytree(source, folder)
    for file in folder.glob("transformer*/*.safetensors"):
        kept = load_file(file)
        for name in kept:
            if name.endswith((".to_k.weight", ".to_q.weight", "ffn.net.2.weight")):
                kept[name] = kept[name].to(torch.float8_e4m3fn)
        save_file(kept, file)
    return folder


def test_beside_weights_that_stay_quantized_it_is_as_exact_as_merged_into_plain_ones(checkpoint_of, lora, tmp_path):
    folder, one, other = quantized(tmp_path / "quantized", checkpoint_of()), lora(), lora("other.safetensors", seed=1)
    with frameloom.load(folder, dtype="float32", exactness="bitwise", loras=[one]) as engine:
        first = latents(engine)
        engine.set_loras([other])
        both = latents(engine)
        engine.set_loras([])
        assert torch.equal(latents(engine), first)
    for result, given in ((first, [one]), (both, [one, other])):
        with frameloom.load(folder, dtype="float32", exactness="bitwise", loras=given, quantized="expand") as engine:
            assert close(result, latents(engine))
    assert not close(first, both)


def parts_of(kind):
    """What a file of a kind has for a layer of 32 x 32."""

    def random(*shape):
        return torch.randn(shape) / 4

    return {
        "dora": {"lora_A.weight": random(2, 32), "lora_B.weight": random(32, 2), "dora_scale": 1 + random(32, 1).abs()},
        "loha": {f"hada_w{i}_{x}": random(*shape) for i in (1, 2) for x, shape in (("a", (32, 2)), ("b", (2, 32)))},
        "lokr": {"lokr_w1": random(4, 4), "lokr_w2_a": random(8, 2), "lokr_w2_b": random(2, 8)},
        "difference": {"diff": random(32, 32)},
    }[kind]


def test_every_kind_for_either_expert_beside_quantized_weights(checkpoint_of, tmp_path):
    torch.manual_seed(0)
    folder, files = quantized(tmp_path / "quantized", checkpoint_of("two experts")), {}
    for kind in ("dora", "loha", "lokr", "difference"):
        layers = (f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn1.to_q", "attn1.to_k", "attn2.to_k"))
        tensors = {f"diffusion_model.{layer}.{part}": x for layer in layers for part, x in parts_of(kind).items()}
        files[kind] = str(tmp_path / f"{kind}.safetensors")
        save_file(tensors, files[kind])
    sets = [[f"high:{files['dora']}:0.5"], [f"low:{files['loha']}"], [f"high:{files['lokr']}", files["difference"]]]
    sets.append([*files.values()])
    options = {"dtype": "float32", "rewrites": ["dit.guidance_batched=off"]}
    with frameloom.load(folder, **options) as engine:
        results = [latents(engine)]
        for given in sets:
            engine.set_loras(given)
            results.append(latents(engine))
        engine.set_loras([])
        assert torch.equal(latents(engine), results[0])
    for result, given in zip(results, [[], *sets], strict=True):
        with frameloom.load(folder, **options, loras=given, quantized="expand") as engine:
            assert close(result, latents(engine))
    assert not any(close(result, results[0]) for result in results[1:])


def test_a_lora_that_is_refused_changes_nothing(checkpoint_of, lora, tmp_path):
    one = lora()
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(8, 8)}, tmp_path / "misfit.safetensors")
    with opened(checkpoint_of()) as engine:
        engine.set_loras([one])
        before = latents(engine)
        for given, error, said in (
            ([str(tmp_path / "misfit.safetensors")], CheckpointError, "none of the 1 keys"),
            ([f"high:{one}"], RequestError, "has but one"),
            ([f"{one}:99"], RequestError, "strength 99"),
            ([Lora(path=one, strength=math.nan)], RequestError, "strength nan"),
            (one, RequestError, "no list of files"),
            ([None], RequestError, "no list of files"),
        ):
            with pytest.raises(error, match=said):
                engine.set_loras(given)
            assert torch.equal(latents(engine), before)
    with pytest.raises(RequestError, match="closed"):
        engine.set_loras([])


@pytest.mark.parametrize("way", [{}, {"exactness": "bitwise"}])
def test_strengths_add_up_and_nothing_of_a_lora_is_the_base_itself(way, checkpoint_of, lora):
    one = lora()
    with frameloom.load(checkpoint_of(), **way) as engine:
        before = latents(engine)
        results = {}
        for given in ((f"{one}:0",), (one, one), (f"{one}:2",), (f"{one}:-1", one), (f"{one}:-1",), ()):
            engine.set_loras(given)
            results[given] = latents(engine)
    assert torch.equal(results[f"{one}:0",], before)
    assert torch.equal(results[()], before)
    assert close(results[one, one], results[f"{one}:2",])
    assert close(results[f"{one}:-1", one], before)
    assert not close(results[f"{one}:-1",], before)
    with frameloom.load(checkpoint_of(), loras=[f"{one}:0"], **way) as engine:
        assert torch.equal(latents(engine), before)


def test_loras_are_not_exchanged_in_the_middle_of_a_video(checkpoint_of, lora):
    one = lora()
    with opened(checkpoint_of()) as engine:
        before = latents(engine)
        with pytest.raises(RequestError, match="in the middle of a video; set them before it or after it"):
            engine.generate("a red circle", progress=lambda _: engine.set_loras([one]), **SIZE)
        assert torch.equal(latents(engine), before)
        engine.set_loras([one])
        assert not close(latents(engine), before)


def test_adapters_are_merged_into_the_whole_of_a_tensor_before_a_rank_takes_its_part():
    weight = torch.randn(6, 4)
    difference = Adapter(factors=Product(a=torch.randn(6, 4)))
    sets = [Adapters(name="", strength=0.5, changes={"x": difference}, num_keys=1)]
    take = merging(sets, lambda name, whole: whole[4:].clone())
    assert torch.equal(take("x", weight), merge(sets, "x", weight)[4:])
    assert torch.equal(take("y", weight), weight[4:])
    assert merging([], None) is None
