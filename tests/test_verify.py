"""`frameloom verify` keeps its promises, and finds one that is broken."""

import dataclasses
import json

import pytest
import torch

import frameloom
from frameloom.engine.compiled import COMPILED
from frameloom.engine.rewrites import REWRITES
from frameloom.errors import CheckpointError
from frameloom.models.vae_rewrites import BUFFERS
from frameloom.ops import vae_rewrites as ops
from frameloom.ops.registry import Policy
from frameloom.verify import networks, verify, verify_rewrite

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> set[str]:
    """Without the rewrite that takes most of a minute; tests/engine/test_compiled.py verifies it."""
    rewrites = tuple(rewrite for rewrite in REWRITES if rewrite is not COMPILED)
    monkeypatch.setattr("frameloom.verify.REWRITES", rewrites)
    return {rewrite.name for rewrite in rewrites}


@pytest.fixture
def no_rewrites(monkeypatch) -> None:
    """The networks alone."""
    monkeypatch.setattr("frameloom.verify.REWRITES", ())


def test_every_promise_is_kept_here(quick) -> None:
    findings = list(verify())
    assert {finding.name.split()[0] for finding in findings} == quick | {"attention.native"}
    assert [finding.name for finding in findings if finding.kept is False] == []
    assert all(finding.note for finding in findings if finding.kept is None)
    assert all(finding.speedup > 0 for finding in findings if finding.kept)


def test_the_vae_of_a_checkpoint_is_tried_in_every_way(checkpoint_of) -> None:
    found = [finding for finding in verify(checkpoint_of()) if finding.name.startswith("VAE of")]
    assert len(found) == 12
    assert all(finding.kept for finding in found)
    assert {finding.name.split(", ")[1] for finding in found} == {"decode", "encode"}


@pytest.mark.parametrize(("kind", "parts"), [("one expert", 1), ("two experts", 2), ("per-token timesteps", 1)])
def test_the_transformers_of_a_checkpoint_are_tried_in_every_way(kind, parts, checkpoint_of, no_rewrites) -> None:
    found = [finding for finding in verify(checkpoint_of(kind)) if finding.name.startswith("transformer")]
    assert len(found) == 4 * parts
    assert all(finding.kept for finding in found)


def test_a_transformer_that_computes_something_else_is_found(checkpoint_of, no_rewrites, monkeypatch) -> None:
    plain = networks.load_fast_dit

    def wrong(*args, **kwargs):
        fast = plain(*args, **kwargs)
        fast.dit.proj_out.bias.add_(1e-3)
        return fast

    monkeypatch.setattr(networks, "load_fast_dit", wrong)
    found = {finding.name: finding.kept for finding in verify(checkpoint_of())}
    assert {name.split(" of ")[0] for name, kept in found.items() if not kept} == {"transformer"}


def test_a_transformer_that_does_not_fit_is_told(checkpoint_of, no_rewrites, monkeypatch) -> None:
    monkeypatch.setattr(networks, "free_memory_bytes", lambda device: 1000)
    (found,) = [finding for finding in verify(checkpoint_of()) if finding.name.startswith("transformer")]
    assert found.kept is None
    assert "in float32 its weights take 0.0 GB" in found.note


def test_a_folder_of_nothing_says_what_it_lacks(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"no model_index.json and no weight files; give a checkpoint"):
        next(verify(tmp_path))


def test_a_folder_that_holds_a_vae_alone_will_do(checkpoint_of, no_rewrites) -> None:
    found = [finding for finding in verify(checkpoint_of() / "vae") if finding.name.startswith("VAE of vae")]
    assert len(found) == 12
    assert all(finding.kept for finding in found)


def test_a_folder_that_holds_another_network_is_refused(checkpoint_of, no_rewrites) -> None:
    with pytest.raises(CheckpointError, match="it is one part of a checkpoint: give the parent"):
        next(verify(checkpoint_of() / "transformer"))


@pytest.mark.parametrize("rewrite", [ops.PHASES, BUFFERS], ids=lambda rewrite: rewrite.name)
def test_a_result_that_differs_breaks_the_promise(rewrite) -> None:
    wrong = dataclasses.replace(rewrite, fast=lambda *a: rewrite.reference(*a) * 1.0001)
    finding = verify_rewrite(wrong, torch.float32, CPU)
    assert finding.kept is False
    assert finding.verdict == "BROKEN"


def test_numbers_that_are_none_break_the_promise() -> None:
    wrong = dataclasses.replace(ops.PHASES, fast=lambda *a: ops.PHASES.reference(*a) * float("nan"))
    assert verify_rewrite(wrong, torch.float32, CPU).kept is False


def test_where_a_rewrite_does_not_apply_the_reason_is_told() -> None:
    elsewhere = dataclasses.replace(ops.PHASES, refuses=lambda *_: "not on Sundays")
    finding = verify_rewrite(elsewhere, torch.float32, CPU)
    assert (finding.kept, finding.verdict, finding.note) == (None, "not here", "not on Sundays")


def test_the_command_prints_a_table_and_exits_with_1_when_a_promise_is_broken(run, monkeypatch) -> None:
    monkeypatch.setattr("frameloom.verify.REWRITES", (ops.POINTWISE,))
    code, out, _ = run("verify", "--json")
    record = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (code, record["broken"]) == (0, [])
    wrong = dataclasses.replace(ops.POINTWISE, fast=lambda *a: ops.POINTWISE.reference(*a) + 1)
    monkeypatch.setattr("frameloom.verify.REWRITES", (wrong,))
    code, out, _ = run("verify")
    assert code == 1
    assert "BROKEN" in out
    assert "2 promises are broken: vae.pointwise_linear float32" in out


def test_the_engine_tells_what_it_decided(checkpoint_of) -> None:
    with frameloom.load(checkpoint_of(), exactness="bitwise") as engine:
        told = {decision.name: decision for decision in engine.decisions}
        assert set(told) == {*(rewrite.name for rewrite in REWRITES), "attention.sdpa"}
        used = {name for name, decision in told.items() if decision.used}
        assert used == {"vae.buffers", "dit.prompt_once", "dit.shared_branches", "attention.sdpa"}
        assert "bitwise was asked for" in told["vae.conv_winograd_plain"].reason
    with frameloom.load(checkpoint_of()) as engine:
        assert sum(decision.used for decision in engine.decisions) >= 10


def test_the_default_policy_allows_rounding() -> None:
    assert Policy().exactness == "rounding"
