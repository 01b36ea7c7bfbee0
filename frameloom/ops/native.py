"""Compiled kernels for CPUs: built by the machine's own C++ compiler at first use, kept in the cache folder.

The sources are ops/*.cpp. A machine without a compiler is told once, and computes with torch alone.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from frameloom.errors import InternalError
from frameloom.platform.host import cpu_flags
from frameloom.settings import LOGGER_NAME, cache_folder

log = logging.getLogger(LOGGER_NAME)

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c++17")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_FLOAT = ctypes.c_float
# Per source: the arguments of its functions, which return a number: 0, or why they failed.
_SIGNATURES: Mapping[str, Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "vae": {
            "frameloom_norm_silu": (_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT, _INT),
            "frameloom_winograd_input": (_POINTER, *(_INT,) * 9, _POINTER),
            "frameloom_winograd_output": (_POINTER, _POINTER, *(_INT,) * 5, _POINTER, *(_INT,) * 3),
            "frameloom_upsample_input": (_POINTER, *(_INT,) * 9, _POINTER),
            "frameloom_upsample_output": (_POINTER, _POINTER, *(_INT,) * 5, _POINTER, *(_INT,) * 3),
        },
        "dit": {
            "frameloom_add_norm": (*(_POINTER,) * 5, *(_INT,) * 3, _FLOAT, ctypes.c_int, ctypes.c_int),
            "frameloom_norm_rotate": (*(_POINTER,) * 4, *(_INT,) * 4, _FLOAT, ctypes.c_int, ctypes.c_int),
        },
        "attention": {"frameloom_attention": (*(_POINTER,) * 6, *(_INT,) * 6, _FLOAT, ctypes.c_int)},
    }
)


@dataclass(frozen=True, slots=True)
class Native:
    """The loaded library, or None and why there is none."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def native(source: str = "vae") -> Native:
    """Compile (once per machine and version of the source) and load the kernels of ops/`source`.cpp.

    A kept library that cannot be loaded is built anew; where the cache folder cannot be written, one is built for this
    process. Whatever is wrong with a compiler becomes the reason, which is logged once.
    """
    compiler = shutil.which("g++")
    if platform.system() != "Linux" or compiler is None:
        return Native(None, "no g++ on this machine" if compiler is None else f"not built on {platform.system()}")
    runtime = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
    if runtime is None:
        return Native(None, "this torch brings no OpenMP runtime to share")
    try:
        return Native(_library(compiler, runtime, source), f"compiled by {compiler}")
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        reason = f"the kernels of {source}.cpp could not be built by {compiler} ({_last_words(error)})"
        log.warning("%s; computing with torch alone, which is slower", reason)
        return Native(None, reason)


def kernels(source: str = "vae") -> ctypes.CDLL:
    """The kernels, for code that runs only where `native` has them."""
    found = native(source)
    if found.library is None:
        raise InternalError(f"a compiled kernel was chosen although there is none: {found.reason}")
    return found.library


def address(x: Tensor, dtype: torch.dtype | None = None) -> int:
    """Where the memory of a tensor begins. Raises InternalError for one that is not of `dtype`, where that is given."""
    if dtype is not None and x.dtype != dtype:
        raise InternalError(f"a compiled kernel for {dtype} was given {x.dtype}; switch torch.autocast off around it")
    return x.data_ptr()


def _library(compiler: str, runtime: Path, source: str) -> ctypes.CDLL:
    """The kept library, or one that is built now. Raises what a broken compiler or a full disk makes it raise."""
    path = cache_folder() / f"{source}-{_fingerprint(compiler, source)}.so"
    if _is_whole(path):
        with contextlib.suppress(OSError, AttributeError):
            return _loaded(path, source)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = _compile(compiler, runtime, source, Path(folder))
            path.with_suffix(".sha256").write_text(_digest(built), encoding="ascii")
            os.replace(built, path)
        return _loaded(path, source)
    except OSError as error:
        log.warning("compiled kernels are not kept: %s", error)
    with tempfile.TemporaryDirectory() as folder:  # loaded, a file may go
        return _loaded(_compile(compiler, runtime, source, Path(folder)), source)


def _is_whole(path: Path) -> bool:
    """Whether a library is there as it was built: loading half of one ends the process."""
    try:
        return path.with_suffix(".sha256").read_text(encoding="ascii") == _digest(path)
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _loaded(path: Path, source: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES[source].items():
        getattr(library, name).argtypes = arguments
    return library


def _fingerprint(compiler: str, source: str) -> str:
    """Changes with the source, the flags, the compiler, the CPU and the OpenMP runtime that torch brings."""
    parts = (
        (_FOLDER / f"{source}.cpp").read_text("utf-8"),
        *_FLAGS,
        repr(_version(compiler)),
        *sorted(cpu_flags()),
        torch.__version__,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=30).stdout


def _compile(compiler: str, runtime: Path, source: str, folder: Path) -> Path:
    """Build into a folder."""
    log.info("compiling the CPU kernels of %s.cpp (once on this machine)", source)
    compiled, linked = folder / "kernels.o", folder / "kernels.so"
    # Linked by hand to torch's own OpenMP runtime: -fopenmp at this step would bring in a second one.
    for command in (
        [compiler, *_FLAGS, "-c", str(_FOLDER / f"{source}.cpp"), "-o", str(compiled)],
        [compiler, "-shared", str(compiled), str(runtime), "-o", str(linked)],
    ):
        subprocess.run(command, capture_output=True, check=True, timeout=120)
    return linked


def _last_words(error: Exception) -> str:
    """The last line of what a compiler said, or else the error."""
    said = getattr(error, "stderr", None) or str(error).encode()
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else repr(error)
