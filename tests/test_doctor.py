"""`frameloom doctor` sees what is here, says what is missing and what that costs, and survives what is broken."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import frameloom
from frameloom import doctor
from frameloom.ops.native import Native
from frameloom.platform.accel import NPU
from frameloom.platform.base import Detection, Verdict
from frameloom.platform.cuda import CUDA
from frameloom.platform.device import DTYPES, PLATFORMS
from frameloom.platform.host import CPU

RESULTS = Path(__file__).parents[1] / "benchmarks/results/vae-cpu-2026-11-21.json"


@pytest.fixture(scope="module")
def findings():
    return {finding.part: finding for finding in frameloom.diagnose("cpu")}


def test_every_part_is_looked_at(findings):
    parts = {platform.name for platform in PLATFORMS} | set(DTYPES)
    parts |= {"device", "memory", "python", "torch", "packages", "C++ compiler", "triton", "torch.compile"}
    parts |= {"collectives", "allocator", "cache folder", "attention sdpa"}
    assert parts <= findings.keys()


def test_what_is_missing_comes_with_its_cost_and_a_hint(findings):
    for finding in findings.values():
        assert finding.what
        if not finding.found and finding.part in {platform.name for platform in PLATFORMS}:
            assert finding.costs
            assert finding.hint


def test_what_this_process_proves_is_found(findings):
    assert all(findings[part].found for part in ("cpu", "float32", "attention sdpa", "python", "torch", "packages"))
    free, total = map(float, re.findall(r"[\d.]+", findings["memory"].what))
    assert 0 < free <= total
    assert findings["cuda"].what == CUDA.detect().reason
    assert os.environ["FRAMELOOM_CACHE"] in findings["cache folder"].what


def test_a_missing_compiler_costs_what_was_measured(monkeypatch):
    monkeypatch.setattr(doctor, "native", lambda: Native(None, "no g++ on this machine"))
    finding = doctor._compiler(CPU)
    assert (finding.found, finding.what) == (False, "no g++ on this machine")
    assert "install g++" in finding.hint
    assert doctor._compiler(CUDA).costs == "nothing on this device"
    records = json.loads(RESULTS.read_text())
    decode = {name: record["seconds"]["ours"] for name, record in records.items() if "seconds" in record}
    without = decode["decode 2.1 without a compiler, default allocator"]
    default, tuned = decode["decode 2.1, default allocator"], decode["decode 2.1, tuned allocator"]
    assert f"{without / default:.1f} times as long ({without:.1f} s for {default:.1f})" in finding.costs
    assert f"{default / tuned:.1f} times as long" in doctor._OTHER_ALLOCATOR
    assert f"({default:.1f} s for {tuned:.1f})" in doctor._OTHER_ALLOCATOR


def test_versions_outside_of_the_tested_range_are_told():
    inside = doctor._version("torch", "2.12.1+cpu", doctor._numbers("2.12.1+cpu"), ((2, 11), (2, 13)))
    assert (inside.found, inside.costs, inside.hint) == (True, "", "")
    newer = doctor._version("torch", "2.14.0", doctor._numbers("2.14.0"), ((2, 11), (2, 13)))
    assert (newer.found, newer.hint) == (True, "use torch 2.11 to 2.13")
    assert "not tested" in newer.costs
    assert not doctor._version("torch", "2.9.0", doctor._numbers("2.9.0"), ((2, 11), (2, 13))).found


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch):
    asked = ["torch>=2.11", "numpy>=99.1", "no-such-package>=1", 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: asked)
    old, missing = doctor._lacking_packages()
    assert re.fullmatch(r"numpy is [\d.]+, and 99.1 is asked for", old)
    assert missing == "no-such-package is missing"


def test_what_is_meant_for_a_device_and_cannot_be_used_comes_with_a_hint():
    wish, lacking = Verdict(usable=True, reason="good"), Verdict(usable=False, reason="triton is not installed")
    finding = doctor._verdict("triton", wish, lacking, "pip install triton")
    assert (finding.found, finding.what, finding.hint) == (False, "triton is not installed", "pip install triton")
    assert "not measured" in finding.costs
    unmeant = doctor._verdict("triton", CPU.triton, CPU.triton_here(), "pip install triton")
    assert (unmeant.found, unmeant.costs, unmeant.hint) == (False, "", "")


def test_a_cache_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x" * 3_000_000)
    assert doctor._cache(tmp_path).what == f"{tmp_path}: 3.0 MB"
    assert doctor._cache(tmp_path / "new" / "folder").found
    assert not (tmp_path / "new").exists()
    refused = doctor._cache(tmp_path / "file" / "folder")
    assert (refused.found, refused.hint) == (False, "set FRAMELOOM_CACHE to a folder that can be written")


def test_attention_for_other_hardware_comes_without_a_hint_and_for_this_with_one():
    on_cpu = {finding.part: finding for finding in doctor._attention(CPU)}
    on_npu = {finding.part: finding for finding in doctor._attention(NPU)}
    assert not on_cpu["attention npu_fusion"].found
    assert (on_cpu["attention npu_fusion"].costs, on_cpu["attention npu_fusion"].hint) == ("", "")
    assert "torch_npu" in on_npu["attention npu_fusion"].hint


# --- the command ---


def test_the_table_fits_and_says_all_that_was_found(run, findings):
    code, out, _ = run("doctor")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 120
    for part in findings:
        assert part in out
    words = re.sub(r"[│\s]+", "", out)
    assert "torch_npuisnotinstalled" in words
    assert "pipinstalltorch" in words


def test_json_is_one_record_of_every_finding(run):
    code, out, err = run("doctor", "--device", "cpu", "--json")
    assert (code, err) == (0, "")
    records = json.loads(out)["findings"]
    assert {frozenset(record) for record in records} == {frozenset(("part", "found", "what", "costs", "hint"))}
    assert records[0] == {
        "part": "device",
        "found": True,
        "what": "cpu: asked for",
        "costs": "",
        "hint": "",
    }


def test_a_device_that_is_not_here_is_exit_code_2_and_the_reason(run):
    code, out, err = run("doctor", "--device", "npu")
    assert (code, out) == (2, "")
    assert err.startswith("frameloom: device 'npu' is not on this machine (torch_npu is not installed); use cpu")
    assert run("doctor", "--device", "tpu")[0] == 2


def test_a_torch_that_cannot_be_loaded_is_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('Failed to load the backend extension: torch_npu.')")
    done = subprocess.run(
        [sys.executable, "-m", "frameloom", "doctor"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "torch cannot be loaded (Failed to load the backend extension: torch_npu.)" in done.stderr
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stderr


def test_a_platform_that_is_found_has_no_cost(monkeypatch):
    monkeypatch.setattr(type(CUDA), "detect", lambda self: Detection(found=True, reason="found H200"))
    finding = doctor._platform(CUDA)
    assert (finding.found, finding.what, finding.costs, finding.hint) == (True, "found H200", "", "")
