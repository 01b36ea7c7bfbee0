"""`frameloom verify` keeps its promises, and finds one that is broken."""

import dataclasses
import json

import pytest
import torch

import frameloom
from frameloom.engine.compiled import COMPILED
from frameloom.engine.rewrites import REWRITES
from frameloom.errors import CheckpointError
from frameloom.models.dit_block import Block
from frameloom.models.vace import VaceBlock
from frameloom.models.vae_rewrites import BUFFERS
from frameloom.ops import vae_rewrites as ops
from frameloom.ops.quantized import QuantizedWeight
from frameloom.ops.registry import Policy
from frameloom.verify import networks, verify, verify_rewrite, verify_samples
from frameloom.verify.samples import write_network, write_quantized
from frameloom.verify.stored import verify_stored
from frameloom.weights.tensors import Reader

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> set[str]:
    """Without the rewrite that takes most of a minute; tests/engine/test_compiled.py verifies it."""
    rewrites = tuple(rewrite for rewrite in REWRITES if rewrite is not COMPILED)
    monkeypatch.setattr("frameloom.verify.REWRITES", rewrites)
    return {rewrite.name for rewrite in rewrites}


@pytest.fixture
def no_rewrites(monkeypatch) -> None:
    """The networks of the checkpoint alone."""
    monkeypatch.setattr("frameloom.verify.REWRITES", ())
    monkeypatch.setattr("frameloom.verify.verify_samples", lambda *_: ())


@pytest.fixture
def kept_alone(no_rewrites, monkeypatch) -> None:
    """Of the checkpoint nothing but weights that stay as they are stored."""
    monkeypatch.setattr("frameloom.verify.attention_rewrites", lambda *_: ())
    monkeypatch.setattr("frameloom.verify.verify_networks", lambda *_: ())


def broken(findings) -> set[str]:
    return {finding.name for finding in findings if not finding.kept}


def test_every_promise_is_kept_here(quick) -> None:
    findings = list(verify())
    assert {finding.name.split()[0] for finding in findings} == quick | {"attention.native", "random"}
    assert [finding.name for finding in findings if finding.kept is False] == []
    assert all(finding.note for finding in findings if finding.kept is None)
    assert all(finding.speedup > 0 for finding in findings if finding.kept)


def test_the_vae_of_a_checkpoint_is_tried_in_every_way(checkpoint_of, no_rewrites) -> None:
    found = [finding for finding in verify(checkpoint_of()) if finding.name.startswith("VAE of")]
    assert len(found) == 12
    assert all(finding.kept for finding in found)
    assert {finding.name.split(", ")[1] for finding in found} == {"decode", "encode"}


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("one expert", 1), ("two experts", 2), ("per-token timesteps", 1), ("first and last image", 1), ("vace", 1)],
)
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


def test_small_networks_of_every_kind_are_tried_in_every_way(tmp_path) -> None:
    found = list(verify_samples(tmp_path, CPU))
    networks_tried = [finding.name.split(", ")[0] for finding in found]
    assert {name: networks_tried.count(name) for name in networks_tried} == dict.fromkeys(
        [
            "random image network",
            "random image network with CLIP",
            "random first-and-last-image network",
            "random VACE network",
            "random transformer in GGUF's blocks",
            "random text encoder in GGUF's blocks",
            "random transformer in 8 bits a number",
            "random text encoder in 8 bits a number",
        ],
        4,
    )
    assert broken(found) == set()


def test_small_quantized_networks_hold_every_way_of_storing(tmp_path) -> None:
    for sample in write_quantized(tmp_path):
        entries = [entry for entry in sample.stored.tensors.values() if entry.dtype != "F32"]
        ways = {(entry.dtype, entry.scale and entry.scale.shape != (), entry.rotated > 0) for entry in entries}
        of_blocks = {(kind, None, False) for kind in ("Q8_0", "Q4_K", "Q6_K", "IQ4_XS")}
        of_8_bits = {("F8_E4M3", False, False), ("F8_E4M3", None, False), ("I8", True, False), ("I8", True, True)}
        assert ways == (of_8_bits if "8 bits" in sample.name else of_blocks)


def without_a_hint(dit) -> None:
    """The last hint is made and not added."""
    block = dit.block_list[dit.spec.vace_layers[-1]]
    block.read = lambda *told: Block.read(block, *told)


def with_hints_alike(dit) -> None:
    """Every hint counts fully."""
    block = dit.blocks_beside[-1]
    block.hint = lambda control_BLD, _: VaceBlock.hint(block, control_BLD, 1.0)


def with_other_images(dit) -> None:
    dit.block_list[-1].attn2.add_v_proj.bias.add_(1e-3)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("VACE network", without_a_hint),
        ("VACE network", with_hints_alike),
        ("image network with CLIP", with_other_images),
        ("first-and-last-image network", with_other_images),
    ],
)
def test_a_hint_or_an_image_that_is_lost_is_found(kind, fault, tmp_path, monkeypatch) -> None:
    plain = networks.load_fast_dit

    def wrong(*args, **kwargs):
        fast = plain(*args, **kwargs)
        fault(fast.dit)
        return fast

    monkeypatch.setattr(networks, "load_fast_dit", wrong)
    assert len(broken(networks.verify_transformer(write_network(tmp_path, kind), kind, CPU))) == 4


def test_numbers_that_kept_weights_do_not_stand_for_are_found(tmp_path, monkeypatch) -> None:
    samples, plain = list(write_quantized(tmp_path)), QuantizedWeight.plain
    monkeypatch.setattr(QuantizedWeight, "plain", lambda self, dtype: plain(self, dtype) * 1.01)
    for sample in samples:
        found = broken(verify_stored(sample.stored, sample.name, CPU, plain=sample.plain))
        assert found == {f"{sample.name}, kept as stored, {dtype}" for dtype in ("float32", "bfloat16")}


def test_a_scale_that_is_read_wrongly_is_found_in_both_ways(tmp_path, monkeypatch) -> None:
    read = Reader._scale
    monkeypatch.setattr(Reader, "_scale", lambda self, entry: None if entry.scale is None else read(self, entry) * 2)
    for sample in write_quantized(tmp_path):
        found = broken(verify_stored(sample.stored, sample.name, CPU, plain=sample.plain))
        assert len(found) == (4 if "8 bits" in sample.name else 0)


def test_quantized_weights_of_a_checkpoint_are_tried_as_they_are_stored(float8_checkpoint, kept_alone) -> None:
    names = [f"{part} of model, kept as stored" for part in ("transformer", "text_encoder")]
    assert {finding.name: finding.kept for finding in verify(float8_checkpoint)} == {
        f"{name}, {dtype}": True for name in names for dtype in ("float32", "bfloat16")
    }


def test_plain_weights_have_nothing_to_keep(checkpoint_of, kept_alone) -> None:
    assert list(verify(checkpoint_of())) == []


def test_other_rows_of_a_kept_table_are_found(float8_checkpoint, kept_alone, monkeypatch) -> None:
    rows = QuantizedWeight.rows
    monkeypatch.setattr(QuantizedWeight, "rows", lambda self, ids, dtype: rows(self, ids.flip(-1), dtype))
    assert {name.split(" of ")[0] for name in broken(verify(float8_checkpoint))} == {"text_encoder"}


def test_kept_weights_that_do_not_fit_are_told(float8_checkpoint, kept_alone, monkeypatch) -> None:
    monkeypatch.setattr("frameloom.verify.stored.free_memory_bytes", lambda device: 1000)
    found = list(verify(float8_checkpoint))
    assert [(finding.kept, "GB are free" in finding.note) for finding in found] == [(None, True)] * 2


def test_the_command_takes_parts_from_elsewhere(run, checkpoint_of, float8_checkpoint, kept_alone) -> None:
    part = float8_checkpoint / "transformer"
    code, out, err = run("verify", "--model", checkpoint_of(), "--transformer", part, "--device", "cpu")
    assert code == 0, err
    assert [line.split()[:5] for line in out.splitlines()[1:-1]] == [
        ["kept", "transformer", "of", "model,", "kept"]
    ] * 2


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
        assert used == {"vae.buffers", "vae.repeats", "dit.prompt_once", "dit.shared_branches", "attention.sdpa"}
        assert "bitwise was asked for" in told["vae.conv_winograd_plain"].reason
    with frameloom.load(checkpoint_of()) as engine:
        assert sum(decision.used for decision in engine.decisions) >= 10


def test_the_default_policy_allows_rounding() -> None:
    assert Policy().exactness == "rounding"
