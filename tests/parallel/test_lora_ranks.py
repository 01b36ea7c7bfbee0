"""Adapters beside weights that ranks divide: what one process computes with them, and gone without a trace."""

import contextlib
import os
from pathlib import Path

import pytest
import test_vace_ranks
import torch
from adapter_kinds import KINDS, a_difference, a_dora, a_dora_of_columns, a_lora, for_all
from ranks import run_ranks
from safetensors.torch import save_file
from test_engine_ranks import load
from test_tensor import CASES, fast_choices, in_pieces_choices, predictions, random_dit

import frameloom
from frameloom.errors import InputError, RequestError
from frameloom.models.adapters import merge
from frameloom.models.adapters_beside import attach, detach
from frameloom.models.dit_fast import DitChoices, install
from frameloom.ops.native import native
from frameloom.ops.registry import relative_error
from frameloom.parallel.tensor import divide, join
from frameloom.parallel.weights import read_when_used, shard_dit

CASE = CASES["image"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    native("dit")  # else every rank would, at the same time


def heads_divided(dit, team, choices):
    divide(dit, team)
    install(dit, choices)
    join(dit, team)


def weights_divided(dit, team, choices):
    shard_dit(dit, team, torch.device("cpu"))
    install(dit, choices)
    read_when_used(dit)


WAYS = {
    "tp": (heads_divided, DitChoices()),
    "tp, fast": (heads_divided, fast_choices()),
    "fsdp": (weights_divided, DitChoices()),
    "fsdp, in pieces": (weights_divided, in_pieces_choices()),
}


def random_sets():
    """Each kind alone, then several at once."""
    dit = random_dit(CASE.spec)
    alone = [[for_all(dit, make)] for make in KINDS]
    return [*alone, [for_all(dit, make, strength=0.4) for make in (a_lora, a_dora, a_difference, a_dora_of_columns)]]


@torch.inference_mode()
def errors(world, way):
    """Of each set against one process with merged weights; and whether the base is back afterwards."""
    divides, choices = WAYS[way]
    dit, found = random_dit(CASE.spec), []
    divides(dit, world.everyone, choices)
    before = predictions(dit, CASE)
    for sets in random_sets():
        whole = random_dit(CASE.spec)
        whole.load_state_dict({name: merge(sets, name, value) for name, value in whole.state_dict().items()})
        attach(dit, sets)
        now = predictions(dit, CASE)
        assert relative_error(now, before) > 0.01
        found.append(relative_error(now, predictions(whole, CASE)))
    detach(dit)
    return found, torch.equal(predictions(dit, CASE), before)


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_equals_merged_weights_of_one_process_and_leaves_no_trace(way):
    for found, is_back in run_ranks(2, errors, way):
        assert max(found) < TOLERANCE, found
        assert is_back


@torch.inference_mode()
def errors_of_vace(world, way):
    divides, choices = WAYS[way]
    dit, whole = test_vace_ranks.random_dit(), test_vace_ranks.random_dit()
    sets = [for_all(dit, make, strength=0.4) for make in (a_lora, a_dora, a_difference)]
    whole.load_state_dict({name: merge(sets, name, value) for name, value in whole.state_dict().items()})
    divides(dit, world.everyone, choices)
    attach(dit, sets)
    return relative_error(test_vace_ranks.predictions(dit), test_vace_ranks.predictions(whole))


@pytest.mark.parametrize("way", ["tp, fast", "fsdp"])
def test_the_blocks_of_vace_have_theirs(way):
    assert max(run_ranks(2, errors_of_vace, way)) < TOLERANCE


SMALL = {"width": 32, "height": 64, "num_frames": 5, "steps": 2, "seed": 5, "output": "latents"}
PLANS = ("tp=2", "ulysses=2,fsdp=2", "cfg=2", "ring=2")


def write_lora(path, seed, *, dora):
    """A LoRA of layers divided by columns and by rows, of their biases, of norms and of what is not divided."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) / 4

    tensors = {"transformer.patch_embedding.diff_b": random(32), "transformer.proj_out.lora_A.weight": random(2, 32)}
    tensors["transformer.proj_out.lora_B.weight"] = random(16, 2)
    for block in (0, 1):
        root = f"transformer.blocks.{block}"
        tensors |= {f"{root}.attn1.norm_q.diff": random(32), f"{root}.attn2.norm_k.diff": random(32)}
        for layer in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.2"):
            inputs = 48 if layer == "ffn.net.2" else 32
            tensors |= {
                f"{root}.{layer}.lora_A.weight": random(2, inputs),
                f"{root}.{layer}.lora_B.weight": random(32, 2),
            }
            tensors[f"{root}.{layer}.diff_b"] = random(32)
            if dora:
                tensors[f"{root}.{layer}.lora_magnitude_vector"] = 1 + random(32).abs()
    save_file(tensors, path)
    return str(path)


def exchanged(world, model, cache, loras, plan):
    """Of each list of LoRAs, exchanged between requests, against one process that was loaded with them; and whether
    what they were set beside is back to the bit."""
    with load(world, model, cache, parallel=plan, loras=loras[0]) as engine:
        before = engine.generate("a red circle", **SMALL)
        found = []
        for given in loras[1:]:
            engine.set_loras(given)
            found.append(engine.generate("a red circle", **SMALL))
        engine.set_loras([])
        is_back = torch.equal(engine.generate("a red circle", **SMALL), before)
    expected = []
    for given in loras[1:]:
        with frameloom.load(model, device="cpu", loras=[*loras[0], *given]) as alone:
            expected.append(world.everyone.broadcast(alone.generate("a red circle", **SMALL)))
    assert min(relative_error(one, before) for one in expected) > 1e-3
    return [relative_error(one, other) for one, other in zip(found, expected, strict=True)], is_back


@pytest.mark.parametrize("plan", PLANS)
def test_an_engine_of_several_ranks_exchanges_loras(plan, checkpoint_of, tmp_path):
    first, second, third = (write_lora(tmp_path / f"{i}.safetensors", i, dora=i == 1) for i in range(3))
    loras = [[third], [f"high:{first}:0.5"], [first, f"low:{second}:0.7"], [second]]
    model = str(checkpoint_of("two experts"))
    for found, is_back in run_ranks(2, exchanged, model, os.environ["FRAMELOOM_CACHE"], loras, plan):
        assert max(found) < TOLERANCE, found
        assert is_back


def refused(world, model, cache, folder):
    """What each rank says of a LoRA that another rank has otherwise, or not at all; and whether all go on as before."""
    said = []
    with load(world, model, cache, parallel="tp=2") as engine, contextlib.chdir(Path(folder) / str(world.rank)):
        before = engine.generate("a red circle", **SMALL)
        for name in ("other.safetensors", "missing.safetensors"):
            with pytest.raises(InputError) as error:
                engine.set_loras([name])
            said.append(str(error.value))
        with pytest.raises(RequestError) as error:
            load(world, model, cache, parallel="tp=2", loras=["other.safetensors"])
        return [*said, str(error.value)], torch.equal(engine.generate("a red circle", **SMALL), before)


def test_ranks_that_have_another_lora_under_a_name_refuse_and_none_waits(checkpoint_of, tmp_path):
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        write_lora(tmp_path / str(rank) / "other.safetensors", rank, dora=True)
    write_lora(tmp_path / "0" / "missing.safetensors", 0, dora=False)
    model, another = str(checkpoint_of()), "rank 1 was given another LoRA file than rank 0"
    first, second = run_ranks(2, refused, model, os.environ["FRAMELOOM_CACHE"], str(tmp_path))
    for said, goes_on in (first, second):
        assert goes_on
        assert said[0].startswith(another)
        assert said[2].startswith(another)
    assert first[0][1].startswith(another)
    assert "missing.safetensors" in second[0][1]
