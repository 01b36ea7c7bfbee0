"""Compiled chains of the denoiser. Slow: torch.compile and g++ run for most of a minute, once, in the first test."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch
import torch.jit

from frameloom.engine.compiled import CHAINS, COMPILED, CompiledChain, compiled_ops, refuses_compiled
from frameloom.errors import RequestError
from frameloom.ops import modulate
from frameloom.ops.dit_ops import Ops
from frameloom.ops.registry import BF16_SLACK, Sizes, relative_error

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@torch.inference_mode()
def test_compiled_chains_compute_what_their_references_do_and_are_kept_on_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FRAMELOOM_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)  # else programs are built to try each of them
    for dtype in COMPILED.dtypes:
        inputs = COMPILED.example(Sizes(), dtype, CPU)
        fast, reference = COMPILED.fast(*inputs), COMPILED.reference(*inputs)
        exact = COMPILED.reference(*COMPILED.example(Sizes(), torch.float32, CPU))
        assert fast.dtype == dtype
        if dtype == torch.float32:
            assert 0 < relative_error(fast, reference) <= COMPILED.tolerance  # 0: nothing was compiled
        else:
            assert relative_error(fast, exact) <= BF16_SLACK * relative_error(reference, exact)
    assert list((tmp_path / "compiled").rglob("*.so"))


def fails(*_: object, **__: object) -> None:
    raise RuntimeError("no such compiler\nand a long trace")


def chain(**options) -> CompiledChain:
    """A chain whose compiler fails."""
    made = CompiledChain("add_gated", modulate.add_gated, **options)
    made._compiled = fails
    return made


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.randn(2, 1, 8)


def test_where_nothing_can_be_compiled_the_reference_takes_over_and_says_so(caplog) -> None:
    x, branch, gate = inputs()
    made = chain()
    with caplog.at_level(logging.WARNING, "frameloom"):
        results = [made(x, branch, gate=gate) for _ in range(2)]
    assert all(torch.equal(result, modulate.add_gated(x, branch, gate=gate)) for result in results)
    assert made.failed
    assert caplog.messages == ["add_gated is computed without compilation, which failed: no such compiler"]


def test_compilation_that_was_asked_for_by_name_is_that_or_an_error() -> None:
    x, branch, gate = inputs()
    with pytest.raises(RequestError, match=r"dit.elementwise_compiled=on is not possible here.*\(no such compiler\)"):
        chain(insisted=True)(x, branch, gate=gate)


def test_a_failed_allocation_is_no_failed_compilation() -> None:
    x, branch, gate = inputs()
    made = chain()
    made._compiled = lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        made(x, branch, gate=gate)
    assert not made.failed


def test_nothing_is_compiled_where_memory_is_planned() -> None:
    x, branch, gate = (tensor.to("meta") for tensor in inputs())
    made = chain()
    assert made(x, branch, gate=gate).is_meta
    assert not made.failed


def test_products_of_matrices_are_left_as_they_are() -> None:
    ops = compiled_ops(Ops())
    assert all(isinstance(getattr(ops, name), CompiledChain) for name in CHAINS)
    assert replace(ops, **{name: getattr(Ops(), name) for name in CHAINS}) == Ops()


def test_platforms_without_a_compiler_are_refused_with_a_reason(monkeypatch) -> None:
    assert refuses_compiled("mps") == "torch.compile is not for mps"
    assert refuses_compiled("npu") == "torch.compile is not for npu"
    assert refuses_compiled("xpu") is None
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert refuses_compiled("cpu") == "no C++ compiler on this machine; install g++"
