"""Compiled kernels for CPUs: built by the machine's own C++ compiler at first use, kept in the cache folder.

The sources are ops/*.cpp. A machine without a compiler is told once, and computes with torch alone.
"""

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
            "frameloom_norm_rotate": (*(_POINTER,) * 5, *(_INT,) * 4, _FLOAT, ctypes.c_int, ctypes.c_int),
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
    """Compile (once per machine and version of the source) and load the kernels of ops/`source`.cpp."""
    compiler = shutil.which("g++")
    if platform.system() != "Linux" or compiler is None:
        return Native(None, "no g++ on this machine" if compiler is None else f"not built on {platform.system()}")
    runtime = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
    if runtime is None:
        return Native(None, "this torch brings no OpenMP runtime to share")
    path = cache_folder() / f"{source}-{_fingerprint(compiler, source)}.so"
    try:
        if not path.exists():
            _compile(compiler, runtime, source, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return Native(None, f"g++ could not build it: {detail.strip().splitlines()[-1] if detail.strip() else error!r}")
    for name, arguments in _SIGNATURES[source].items():
        getattr(library, name).argtypes = arguments
    return Native(library, f"compiled by {compiler}")


def kernels(source: str = "vae") -> ctypes.CDLL:
    """The kernels, for code that runs only where `native` has them."""
    found = native(source)
    if found.library is None:
        raise InternalError(f"a compiled kernel was chosen although there is none: {found.reason}")
    return found.library


def address(x: Tensor) -> int:
    """Where the memory of a tensor begins."""
    return x.data_ptr()


def _fingerprint(compiler: str, source: str) -> str:
    """Changes with the source, the flags, the compiler, the CPU and the OpenMP runtime that torch brings."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = ((_FOLDER / f"{source}.cpp").read_text("utf-8"), *_FLAGS, version, *sorted(cpu_flags()), torch.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, runtime: Path, source: str, path: Path) -> None:
    """Build beside the final name and rename: two processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("compiling the CPU kernels of %s.cpp (once on this machine)", source)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        # Linked by hand to torch's own OpenMP runtime: -fopenmp at this step would bring in a second one.
        for command in (
            [compiler, *_FLAGS, "-c", str(_FOLDER / f"{source}.cpp"), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), str(runtime), "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        os.replace(linked, path)
