"""`frameloom verify` on several ranks keeps its promises, finds a seam that is broken, and says so by its exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from frameloom import shapes
from frameloom.attention.blockwise import attend_block
from frameloom.config import parallel_plan
from frameloom.models.vace import VaceDiT
from frameloom.parallel import sequence, vae_split
from frameloom.settings import LOOPBACK, Launched
from frameloom.verify import parallel
from frameloom.verify.parallel import plans_for, verify_parallel
from frameloom.verify.samples import write_network
from frameloom.weights.source import open_parts

SAMPLES = ("first-and-last-image network", "VACE network")


def place_of(world) -> Launched:
    return Launched(
        rank=world.rank, world_size=world.size, local_rank=world.rank, local_world_size=world.size,
        address=LOOPBACK, port=1,
    )  # fmt: skip


def findings(world, model: Path, parts: list[str], plan: str = "auto"):
    """What this rank finds out about some parts of a checkpoint."""
    place = place_of(world)
    there = {name: part for name, part in open_parts(model).items() if name in parts}
    chosen = parallel_plan(plan, world.size)
    return list(verify_parallel(there, "model", place=place, device=torch.device("cpu"), plan=chosen))


def findings_of_samples(world, folder: Path, plan: str):
    """What this rank finds out about small networks with images and VACE, which each rank writes for itself."""
    place = place_of(world)
    own = folder / str(world.rank)
    own.mkdir()
    samples = {kind: write_network(own, kind) for kind in SAMPLES}
    chosen, device = parallel_plan(plan, world.size), torch.device("cpu")
    return list(verify_parallel({}, "none", samples=samples, place=place, device=device, plan=chosen))


def on_all(count: int, *arguments, function: Callable = findings):
    """The findings, which are the same on all ranks."""
    first, *others = run_ranks(count, function, *arguments)
    assert all([finding.name for finding in other] == [finding.name for finding in first] for other in others)
    assert all([finding.kept for finding in other] == [finding.kept for finding in first] for other in others)
    return first


def test_every_way_to_divide_a_picture_keeps_its_promise() -> None:
    found = on_all(2, shapes.PATH, ["vae"])
    assert len(found) == len({finding.name for finding in found}) == 2 * 2 * 2 * 3
    assert {finding.promise for finding in found} == {"the same bits"}
    assert [finding.name for finding in found if not finding.kept] == []


@pytest.mark.parametrize("kind", ["one expert", "per-token timesteps"])
def test_every_plan_of_two_ranks_keeps_its_promise(kind, checkpoint_of) -> None:
    found = on_all(2, checkpoint_of(kind), ["transformer"])
    plans = ["tp=2", "ring=2", "ulysses=2", "cfg=2", "ring=2 x fsdp=2", "ulysses=2 x fsdp=2", "cfg=2 x fsdp=2"]
    dtypes = ("float32", "bfloat16")
    assert {finding.name for finding in found} == {
        f"transformer of model, {plan}, {dtype}" for plan in plans for dtype in dtypes
    }
    assert [finding.name for finding in found if not finding.kept] == []
    assert {finding.name.split(", ")[1] for finding in found if finding.promise == "the same bits"} == {
        "cfg=2",
        "cfg=2 x fsdp=2",
    }


@pytest.mark.parametrize("plan", ["ulysses=2", "tp=2", "cfg=2,fsdp=2"])
def test_small_networks_with_images_and_vace_keep_their_promise(plan, tmp_path) -> None:
    found = on_all(2, tmp_path, plan, function=findings_of_samples)
    assert [finding.name.split(", ")[0] for finding in found] == [kind for kind in SAMPLES for _ in range(2)]
    assert [finding.name for finding in found if not finding.kept] == []


def test_a_product_that_was_asked_for_is_the_only_one_that_is_proved(checkpoint_of) -> None:
    found = on_all(4, checkpoint_of(), ["transformer"], "cfg=2,ring=2,fsdp=4")
    assert [(finding.name.split(", ")[1], finding.kept) for finding in found] == [("cfg=2 x ring=2 x fsdp=4", True)] * 2


def test_a_plan_that_is_not_possible_is_listed_with_the_reason(checkpoint_of) -> None:
    found = on_all(3, checkpoint_of(), ["transformer"], "tp=3")
    assert [finding.verdict for finding in found] == ["not here"] * 2
    assert "tp=3 does not divide both the" in found[0].note


def test_the_plans_of_four_ranks_are_all_their_products() -> None:
    plans = list(plans_for(4))
    assert {plan.num_ranks for plan in plans} == {4}
    assert sum(plan.fsdp == 1 for plan in plans) == 9
    assert all(plan.tp == 1 for plan in plans if plan.fsdp == 4)


def with_lost_keys(world, *arguments):
    """A ring that does not turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence, "attend_around", lambda q, k, v, **_: attend_block(q, k, v).out_BLHK)
        return findings(world, *arguments)


def test_keys_that_are_lost_break_the_promise(checkpoint_of) -> None:
    found = on_all(2, checkpoint_of(), ["transformer"], "ring=2", function=with_lost_keys)
    assert [finding.verdict for finding in found] == ["BROKEN"] * 2


def with_control_of_the_others(world, *arguments):
    """Where tokens are divided, each is beside its neighbour's control."""
    pass_blocks, all_tokens = VaceDiT._pass_blocks, 3 * 5 * 4

    def moved(self, x_BLD, step, prompts):
        own_BLD, control_BLD = x_BLD.chunk(2, dim=-1)
        if x_BLD.shape[1] < all_tokens:
            control_BLD = control_BLD.roll(1, 1)
        return pass_blocks(self, torch.cat((own_BLD, control_BLD), -1), step, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VaceDiT, "_pass_blocks", moved)
        return findings_of_samples(world, *arguments)


def test_a_control_beside_other_tokens_breaks_the_promise(tmp_path) -> None:
    found = on_all(2, tmp_path, "ulysses=2", function=with_control_of_the_others)
    assert {finding.name.split(", ")[0]: finding.verdict for finding in found} == dict(
        zip(SAMPLES, ("kept", "BROKEN"), strict=True)
    )


def without_neighbours(self, new, rows, columns):
    """In place of the neighbours' rows: zeros."""
    mine = rows[self._share.rows.index]
    own = new[:, :, :, mine.at(mine.own)].clone()
    new.zero_()
    new[:, :, :, mine.at(mine.own)] = own
    return lambda: None


def with_lost_rows(world, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_split.ShardState, "_swap", without_neighbours)
        return findings(world, *arguments)


def test_rows_that_are_lost_break_the_promise() -> None:
    found = on_all(2, shapes.PATH, ["vae"], function=with_lost_rows)
    broken = {finding.what.rpartition(", ")[2] for finding in found if finding.kept is False}
    assert broken == {"neighbours' rows are fetched"}
    assert all(finding.kept for finding in found if finding.what.endswith("cells around it"))


def with_a_stray(world, *arguments):
    """Rank 1 computes something else, which rank 0 would never see."""
    load = parallel._load_predictions

    def other(*args):
        compute = load(*args)
        return lambda: compute() + world.rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_load_predictions", other)
        return findings(world, *arguments)


def test_a_rank_with_other_bits_breaks_the_promise(checkpoint_of) -> None:
    found = on_all(2, checkpoint_of(), ["transformer"], "cfg=2", function=with_a_stray)
    assert [(finding.kept, finding.note) for finding in found] == [(False, "rank 1 has other bits than rank 0")] * 2


BROKEN = """
from frameloom.attention.blockwise import attend_block
from frameloom.cli import main
from frameloom.parallel import sequence

def lost(q, k, v, **_):
    return attend_block(q, k, v).out_BLHK

sequence.attend_around = lost
main()
"""


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=200)


def test_the_command_starts_its_ranks_and_one_of_them_speaks() -> None:
    done = command("-m", "frameloom", "verify", "--device", "cpu", "--gpus", "2", "--parallel", "cfg=2")
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[-1]) == (0, "every promise is kept"), done.stderr
    assert sum(line.startswith("kept") for line in lines) == 30
    assert "the same bits: the bits of one rank" in lines[-2]


def test_a_broken_promise_is_the_exit_code(tmp_path: Path, checkpoint_of) -> None:
    program = tmp_path / "broken.py"
    program.write_text(BROKEN, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    transformer = checkpoint_of() / "transformer" / "diffusion_pytorch_model.safetensors"  # a VAE would take longest
    done = command(
        *torchrun, "verify", "--device", "cpu", "--parallel", "ring=2", "--json", "--model", str(transformer)
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    networks = ("random first-and-last-image network", "random VACE network", f"transformer of {transformer.name}")
    broken = {f"{network}, ring=2, {dtype}" for network in networks for dtype in ("float32", "bfloat16")}
    assert set(json.loads(line)["broken"]) == broken
