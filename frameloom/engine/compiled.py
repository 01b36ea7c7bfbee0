"""Compiles the chains of elementwise operations of a denoiser, for platforms that have no kernels of ours.

The code that torch.compile generates is kept in the cache folder. Shapes are dynamic: a chain is compiled anew for
another dtype, another kind of modulation, and where a size is 1, not for another video.
"""

import functools
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from frameloom.errors import RequestError
from frameloom.ops.dit_ops import Compiler, Ops
from frameloom.ops.dit_rewrites import EPS, modulated_example, rotary_example
from frameloom.ops.registry import Rewrite, Sizes
from frameloom.platform.device import is_memory_error
from frameloom.settings import LOGGER_NAME, keep_compiled_code

log = logging.getLogger(LOGGER_NAME)
CHAINS = ("norm_scale_shift", "add_gated", "add_norm", "norm_rotate")
_PLAIN_PLATFORMS = ("mps", "npu")
_COMPILERS = ("g++", "clang++")


class CompiledChain:
    """A function compiled at its first call. Where that fails, the function itself takes over, with one line in the
    log; if it was insisted on, RequestError.
    """

    def __init__(self, name: str, plain: Callable[..., Any], *, insisted: bool = False) -> None:
        self.failed = False
        self._name, self._plain, self._insisted = name, plain, insisted

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        log.info("compiling %s with torch: up to a minute for each kind of input, once on this machine", self._name)
        return torch.compile(self._plain, dynamic=True)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the function; on the meta device, where memory is planned, as it is without compilation."""
        if self.failed or x.is_meta:
            return self._plain(x, *args, **kwargs)
        try:
            return self._compiled(x, *args, **kwargs)
        except RuntimeError as error:  # what the compiler raises is one
            if is_memory_error(error):
                raise
            self._give_up(error)
        return self._plain(x, *args, **kwargs)

    def _give_up(self, error: RuntimeError) -> None:
        reason = str(error).strip().partition("\n")[0] or repr(error)
        if self._insisted:
            raise RequestError(
                f"rewrite {COMPILED.name}=on is not possible here: {self._name} cannot be compiled ({reason}); "
                f"leave it out"
            ) from error
        log.warning("%s is computed without compilation, which failed: %s", self._name, reason)
        self.failed = True


def compiled_ops(ops: Ops, insisted: bool = False) -> Ops:
    """The same with its elementwise chains compiled; patch embedding and feed-forward are matrix products."""
    keep_compiled_code()
    chains: dict[str, Any] = {
        name: CompiledChain(name, getattr(ops, name), insisted=insisted) for name in CHAINS
    }  # fmt: skip
    return replace(ops, **chains)


def refuses_compiled(platform_name: str) -> str | None:
    """Why nothing is compiled on a platform; None where it may be."""
    if platform_name in _PLAIN_PLATFORMS:
        return f"torch.compile is not for {platform_name}"
    if platform_name == "cpu" and not any(shutil.which(compiler) for compiler in _COMPILERS):
        return f"no C++ compiler on this machine; install {_COMPILERS[0]}"
    return None


@functools.cache
def _compiled() -> Ops:
    return compiled_ops(Ops(), insisted=True)


def _every_chain(ops: Ops, streams: tuple[Any, ...], rotary: tuple[Any, ...]) -> Tensor:
    """The results of all chains, side by side."""
    x, branch, gate, scale, shift, weight, bias = streams
    turned = ops.norm_rotate(rotary[0], rotary[1], EPS, *rotary[2:])
    results = (
        ops.norm_scale_shift(x, EPS, scale=scale, shift=shift),
        ops.add_gated(x, branch, gate=gate),
        *ops.add_norm(x, branch, EPS, gate=gate, weight=weight, bias=bias),
        *ops.add_norm(x, branch, EPS, scale=scale, shift=shift),
        turned,
    )
    return torch.cat([result.flatten() for result in results])


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Two videos of two frames or more, with modulations of the same kinds: one compilation serves all."""
    sizes = replace(sizes, batch=max(2, sizes.batch), frames=max(2, sizes.frames), seed=0)
    return modulated_example(2, 3)(sizes, dtype, device), rotary_example(sizes, dtype, device)


COMPILED = Rewrite(
    name="dit.elementwise_compiled",
    exactness="rounding",
    replaces="norms, modulations, gated sums and rotations of the denoiser, an operation at a time",
    reference=lambda *inputs: _every_chain(Ops(), *inputs),
    fast=lambda *inputs: _every_chain(_compiled(), *inputs),
    refuses=lambda streams, _: refuses_compiled(streams[0].device.type),
    example=_example,
    because="the compiler fuses the operations, sums in another order, and leaves out roundings in between",
    dtypes=(torch.float32, torch.bfloat16),
)
COMPILER = Compiler(rewrite=COMPILED, apply=compiled_ops, refuses=refuses_compiled)
