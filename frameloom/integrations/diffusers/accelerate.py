"""Behind `frameloom.accelerate` and `restore`: looks at each component, and asks who here can take it over."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from frameloom.engine.rewrites import policy_of
from frameloom.errors import RequestError
from frameloom.integrations.diffusers.conditioning import take_conditioning
from frameloom.integrations.diffusers.ltx2 import take_ltx2
from frameloom.integrations.diffusers.prompts import take_text_encoder
from frameloom.integrations.diffusers.report import Entry, Report
from frameloom.integrations.diffusers.swap import check_uncovered, is_swapped, unswap
from frameloom.integrations.diffusers.transformers import take_transformer
from frameloom.integrations.diffusers.vae import take_vae
from frameloom.ops.registry import Exactness, Policy
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)

_EXACTNESS: tuple[Exactness, ...] = ("bitwise", "rounding")  # nothing here makes another picture

Take = Callable[[str, nn.Module, Policy], Entry | None]
"""Takes a component over, or says why it is left; None where it is nothing of its kind. Changes nothing it leaves."""
TakePipe = Callable[[DiffusionPipeline, Policy], Entry | None]
"""Likewise for what a pipeline does itself."""
_TAKES: Mapping[str, Sequence[Take]] = MappingProxyType(
    {"vae": (take_vae,), "transformer": (take_transformer, take_ltx2), "text_encoder": (take_text_encoder,)}
)
_TAKES_PIPES: Mapping[str, Sequence[TakePipe]] = MappingProxyType({"vae": (take_conditioning,)})


def accelerate_pipeline(
    pipe: DiffusionPipeline, exactness: str, *, vae: bool, transformer: bool, text_encoder: bool
) -> Report:
    """Compute a live pipeline's VAE and transformers by the networks here, on its own weights. Returns what was done.

    `pipe`: a pipeline of Diffusers, modular or not, or components of one by their names. `exactness`: "bitwise" or
    "rounding". What cannot be taken over stays as it is, and the report says why. A component that is taken already
    stays taken. Raises RequestError for a pipeline of which nothing is known. After an error it is as it was.
    """
    policy = _policy(exactness)
    wanted = {"vae": vae, "transformer": transformer, "text_encoder": text_encoder}
    _check_wanted(wanted)
    modules = _modules(pipe)
    if isinstance(pipe, Mapping) and not modules:
        raise RequestError("none of the components given is a network: there is nothing to take over")
    takes = [take for name, is_wanted in wanted.items() if is_wanted for take in _TAKES[name]]
    takes_pipe = [take for name in wanted if wanted[name] for take in _TAKES_PIPES.get(name, ())]
    with _given_back_on_error(pipe):
        entries = [entry for name, module in modules.items() if (entry := _taken(name, module, policy, takes))]
        entries += _pipe_taken(pipe, policy, takes_pipe)
    if not entries:
        raise RequestError(
            f"{_named(pipe)} has no {_told(wanted)} that can be taken over and is as it was; what can: a VAE or a "
            "transformer of Wan, or one that is built like them"
        )
    report = Report(tuple(entries))
    for entry in report.entries:
        log.info("%s %s: %s", entry.component, "taken" if entry.taken else "left", entry.what)
    return report


def restore_pipeline(pipe: DiffusionPipeline) -> None:
    """Give a pipeline its own ways to compute back, bit for bit; nothing where nothing was taken.

    Raises RequestError, and changes nothing, where a class was put on top of one of ours since.
    """
    parts = _parts(pipe)
    for each in parts:
        check_uncovered(each)
    for each in parts:
        unswap(each)


@contextlib.contextmanager
def _given_back_on_error(pipe: Any) -> Iterator[None]:
    """What was taken when an error came, or an interrupt, is given back; but for what was taken before."""
    untouched = [part for part in _parts(pipe) if not is_swapped(part)]
    try:
        yield
    except BaseException:
        for each in untouched:
            unswap(each)
        raise


def _parts(pipe: Any) -> list[Any]:
    """All that may be taken: a pipeline, and every module of its components."""
    return [pipe, *(module for component in _modules(pipe).values() for module in component.modules())]


def _taken(name: str, module: nn.Module, policy: Policy, takes: Sequence[Take]) -> Entry | None:
    kind = type(module).__name__
    if is_swapped(module):
        return Entry(component=name, kind=kind, taken=True, what="it was taken before")
    if any(base.__name__ == "FSDPModule" for part in module.modules() for base in type(part).__mro__):
        return Entry(component=name, kind=kind, taken=False, what="its weights are sharded by FSDP2")
    return next((entry for take in takes if (entry := take(name, module, policy)) is not None), None)


def _pipe_taken(pipe: DiffusionPipeline, policy: Policy, takes: Sequence[TakePipe]) -> list[Entry]:
    if is_swapped(pipe):
        return [Entry(component="pipeline", kind=type(pipe).__name__, taken=True, what="it was taken before")]
    return [entry for take in takes if (entry := take(pipe, policy)) is not None]


def _policy(exactness: str) -> Policy:
    if exactness not in _EXACTNESS:
        raise RequestError(f"exactness {exactness!r} is unknown in a pipeline; use one of {', '.join(_EXACTNESS)}")
    return policy_of(exactness, ())


def _check_wanted(wanted: Mapping[str, object]) -> None:
    for name, is_wanted in wanted.items():
        if not isinstance(is_wanted, bool):
            raise RequestError(f"{name} is {is_wanted!r}; use True or False")
    if not any(wanted.values()):
        raise RequestError("nothing is to be taken over; let one of vae, transformer and text_encoder be True")


def _named(pipe: object) -> str:
    return "what is given" if isinstance(pipe, Mapping) else type(pipe).__name__


def _told(wanted: Mapping[str, bool]) -> str:
    return " or ".join(name.replace("_", " ") for name, is_wanted in wanted.items() if is_wanted)


def _modules(pipe: Any) -> dict[str, nn.Module]:
    """The components that are networks. Raises RequestError for what has no components."""
    parts = pipe if isinstance(pipe, Mapping) else getattr(pipe, "components", None)
    if not isinstance(parts, Mapping):
        told = f"the class {pipe.__name__}" if isinstance(pipe, type) else f"a {type(pipe).__name__}"
        raise RequestError(
            f"{told} is no pipeline; give a pipeline of Diffusers, or components of one by their names, such as "
            '{"vae": vae}'
        )
    for name in parts:
        if not isinstance(name, str):
            raise RequestError(f'components are given by their names, such as {{"vae": vae}}, and {name!r} is none')
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
