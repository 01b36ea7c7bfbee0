"""Kernels built at first use: whatever is wrong with the compiler or the cache folder, there is an answer."""

import stat

import pytest
import torch

import frameloom
from frameloom.errors import InternalError, RequestError
from frameloom.ops.native import address, native
from frameloom.settings import cache_folder

build = native.__wrapped__  # without the memory of what was built before
needs_compiler = pytest.mark.skipif(native().library is None, reason=native().reason)
BROKEN = {
    "fails": b"#!/bin/sh\necho 'no such thing' >&2\nexit 1\n",
    "says nothing": b"#!/bin/sh\nexit 0\n",
    "no script": b"\x00\x01\x02 this is no program",
    "no interpreter": b"#!/nowhere/sh\n",
    "speaks in bytes": b"#!/bin/sh\nprintf '\\377\\376' >&2\nexit 1\n",
    "makes a file of nonsense": b'#!/bin/sh\nfor f; do :; done\ncase $f in -*) ;; *) echo nonsense > "$f";; esac\n',
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_compiler_is_a_reason_and_one_warning(script, tmp_path, monkeypatch, caplog) -> None:
    compiler = tmp_path / "g++"
    compiler.write_bytes(script)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("FRAMELOOM_CACHE", str(tmp_path / "cache"))
    found = build("vae")
    assert found.library is None
    assert "could not be built" in found.reason
    assert caplog.text.count("computing with torch alone") == 1


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"nonsense", None], ids=["emptied", "overwritten", "cut off"])
def test_a_damaged_library_is_built_anew(damage, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FRAMELOOM_CACHE", str(tmp_path))
    assert build("dit").library is not None
    (path,) = tmp_path.glob("dit-*.so")
    content = path.read_bytes()
    path.unlink()  # this process goes on using what it has loaded
    path.write_bytes(content[:5000] if damage is None else damage)
    assert build("dit").library is not None
    assert len(path.read_bytes()) > 5000
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".sha256", ".so"]


@needs_compiler
def test_without_a_folder_to_write_to_a_library_serves_this_process(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FRAMELOOM_CACHE", str(tmp_path / "file"))
    assert build("dit").library is not None
    assert "compiled kernels are not kept" in caplog.text


def test_a_cache_folder_of_an_unknown_user_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setenv("FRAMELOOM_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(RequestError, match="whose home is unknown; set FRAMELOOM_CACHE"):
        cache_folder()


def test_memory_of_another_dtype_is_not_handed_to_a_kernel() -> None:
    with pytest.raises(InternalError, match=r"was given torch\.bfloat16"):
        address(torch.zeros(2, dtype=torch.bfloat16), torch.float32)


def test_autocast_outside_changes_nothing() -> None:
    with frameloom.load(device="cpu", dtype="float32") as engine:
        z = torch.randn(1, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        frames = engine.decode(z)
        latents = engine.encode(frames)
        made = engine.generate("a red circle", steps=2, output="latents")
        with torch.autocast("cpu", torch.bfloat16):
            assert (engine.decode(z) == frames).all()
            assert torch.equal(engine.encode(frames), latents)
            assert torch.equal(engine.generate("a red circle", steps=2, output="latents"), made)
