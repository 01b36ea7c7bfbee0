"""`frameloom serve`: what it is told is checked, and the door is opened, before the server itself is loaded."""

import importlib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from frameloom.cli.console import page
from frameloom.cli.options import (
    AttentionOption,
    CompileOption,
    DeviceOption,
    DtypeOption,
    ExactnessOption,
    MemoryOption,
    ModelOption,
    ParallelOption,
    ResidenceOption,
    RewriteOption,
    VaeMemoryOption,
    VariantOption,
    with_parts,
)
from frameloom.config import duration_s, lora, memory_bytes, parallel_plan, residences
from frameloom.errors import RequestError
from frameloom.serve.config import Keeping, Limits, Patience, ServeConfig
from frameloom.serve.door import open_door, refuse_strangers
from frameloom.serve.keys import key_of_secret, read_keys
from frameloom.serve.logs import logging_to
from frameloom.settings import api_key, data_folder, launched, log_level
from frameloom.types import EngineConfig

_OURS: Final = "frameloom-shapes"
_EXTRA: Final = (
    "fastapi",
    "starlette",
    "pydantic",
    "uvicorn",
    "h11",
    "python_multipart",
    "msgspec",
    "prometheus_client",
)
_MOST_WORKERS: Final = 64
_MOST_TOGETHER: Final = 16


@with_parts
def serve(
    parts: dict[str, str],
    model: ModelOption = None,
    variant: VariantOption = "",
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: the last part of --model.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than those of this machine alone need --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: a free one, which is said.")] = 8000,
    data_dir: Annotated[
        str | None,
        typer.Option(help="Where jobs and videos are kept. Default: FRAMELOOM_DATA, else your state folder."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help='A file of API keys, in TOML: \\[alice] and below it secret = "...".')
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes with an engine each; so many jobs run at a time.")] = 1,
    gpus_per_worker: Annotated[int, typer.Option(help="Devices over which a worker shares one video.")] = 1,
    batch: Annotated[
        int,
        typer.Option(
            help="Small videos at most that a worker makes together where that is faster; then bits may differ by "
            "rounding from those of a run alone."
        ),
    ] = 1,
    lora_file: Annotated[
        list[str] | None,
        typer.Option("--lora", help="A LoRA that clients may ask for: NAME=FILE or NAME=FILE:0.8. May be repeated."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="lightning: 4 steps without guidance.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    exactness: ExactnessOption = "rounding",
    rewrite: RewriteOption = None,
    compilation: CompileOption = "auto",
    attention: AttentionOption = "auto",
    quantized: Annotated[str, typer.Option(help="Quantized weights: keep or expand.")] = "keep",
    vae_memory: VaeMemoryOption = "auto",
    memory: MemoryOption = "auto",
    residence: ResidenceOption = "auto",
    parallel: ParallelOption = "auto",
    allow_url: Annotated[
        list[str] | None,
        typer.Option(help="Fetch pictures from this host when a request names a URL; * for all public ones."),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Jobs that may wait.")] = 100,
    max_queue_seconds: Annotated[float, typer.Option(help="Seconds of work that may wait, for each worker.")] = 14_400,
    max_queue_per_key: Annotated[int, typer.Option(help="Jobs of one key that may wait.")] = 50,
    ttl: Annotated[str, typer.Option(help="How long videos are kept after they are done: 12h, 7d.")] = "7d",
    quota: Annotated[str, typer.Option(help="What the data folder may hold, such as 200GB; auto: no bound.")] = "auto",
    reserve: Annotated[str, typer.Option(help="What stays free on its disk; below it jobs are refused.")] = "256MB",
    deadline: Annotated[
        str | None, typer.Option(help="When a job that names none is given up, from its acceptance on: 30m, 2h.")
    ] = None,
    grace: Annotated[str, typer.Option(help="What a running job is given when the server is asked to end.")] = "20s",
    insecure_public: Annotated[
        bool, typer.Option("--insecure-public", help="Listen to the network without keys: anybody may ask.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Try everything that the server needs, say what is wrong, and end.")
    ] = False,
    log: Annotated[str, typer.Option(help="Lines of the log: text, or json for machines.")] = "text",
) -> None:
    """Serve a video API that OpenAI's clients speak, and a page for people; see docs/serve.md."""
    if launched() is not None:
        raise RequestError("`frameloom serve` starts its own ranks; start it by itself, with --gpus-per-worker")
    if log not in ("text", "json"):
        raise RequestError(f"log {log!r} is unknown; use text or json")
    memory_bytes(vae_memory), memory_bytes(memory), residences(residence)
    for option, source in [("model", model), *parts.items()]:
        if source is not None:
            _check_source(f"--{option.replace('_', '-')}", source)
    config = ServeConfig(
        data=_data(data_dir),
        model=model,
        variant=variant,
        parts=parts,
        name=_name(name, model, parts),
        engine=EngineConfig(
            device=device, dtype=dtype, exactness=exactness, rewrites=rewrite or (), compilation=compilation,
            attention=attention, vae_memory=vae_memory, parallel=parallel, quantized=quantized, preset=preset,
            memory=memory, residence=residence,
        ),
        loras=_loras(lora_file or ()),
        host=host,
        port=_whole("port", port, 0, 65_535),
        workers=_whole("workers", workers, 1, _MOST_WORKERS),
        gpus_per_worker=_whole("gpus-per-worker", gpus_per_worker, 1, _MOST_WORKERS),
        batch=_whole("batch", batch, 1, _MOST_TOGETHER),
        keys_file=keys.absolute() if keys else None,
        is_public=insecure_public,
        url_hosts=_hosts(allow_url or ()),
        limits=Limits(
            queued=_whole("max-queue", max_queue, 1, 1_000_000),
            queued_by_key=_whole("max-queue-per-key", max_queue_per_key, 1, 1_000_000),
            queued_s=_seconds("max-queue-seconds", max_queue_seconds),
        ),
        keeping=Keeping(
            ttl_s=duration_s(ttl), quota_bytes=memory_bytes(quota), reserve_bytes=memory_bytes(reserve) or 0
        ),
        patience=Patience(deadline_s=duration_s(deadline) if deadline else None, grace_s=duration_s(grace)),
    )  # fmt: skip
    parallel_plan(parallel, gpus_per_worker)
    with logging_to(style="json" if log == "json" else "text", level=log_level()):
        config = _with_keys(config)
        raise typer.Exit(_check(config) if check else _serve(config))


def _serve(config: ServeConfig) -> int:
    refuse_strangers(config)
    door = open_door(config.host, config.port)  # first: what follows takes a moment, and a taken port is told at once
    code: int = _loaded("frameloom.serve.main").run(config, door, say=_say)
    return code


def _say(text: str) -> None:
    """One line in one write, also where standard output is not buffered: the log may go to the same file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _check(config: ServeConfig) -> int:
    failed = False
    table = Table("part", "", "what was found")
    for finding in _loaded("frameloom.serve.check").check(config):
        failed |= not finding.is_well
        table.add_row(finding.part, "ok" if finding.is_well else "fails", finding.what)
    page(120).print(table)
    return int(failed)


def _loaded(module: str) -> Any:
    """A module that needs the libraries of the extra `serve`. Raises RequestError where one is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        raise RequestError(
            f"the server needs {error.name}, which is not installed; pip install 'frameloom[serve]'"
        ) from None


def _with_keys(config: ServeConfig) -> ServeConfig:
    if config.keys_file is not None:
        return replace(config, keys=read_keys(config.keys_file))
    return replace(config, keys=(key_of_secret(secret),)) if (secret := api_key()) else config


def _name(name: str | None, model: str | None, parts: dict[str, str]) -> str:
    if name is None:
        source = model if model is not None else next(iter(parts.values()), None)
        name = _OURS if source is None else Path(source.partition("@")[0]).name or _OURS
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:/@-]{0,127}", name):
        raise RequestError(f"name {name!r} is not possible; use up to 128 letters, digits and ._:/@-, such as wan2.1")
    return name


def _data(given: str | None) -> Path:
    """The data folder. An empty name, as of a variable that is not set, is none."""
    if given is not None and not given.strip():
        raise RequestError("--data-dir is empty; name a folder, or leave it out")
    return (data_folder() if given is None else Path(given).expanduser()).absolute()


def _check_source(option: str, source: str) -> None:
    """Raise RequestError for what is neither there nor an id of the hub; what is in it, a worker finds out."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)+(@[\w./-]+)?", source)
    if not source or not (Path(source).expanduser().exists() or is_id):
        raise RequestError(f"{option} {source!r} is neither a file or folder that is there nor owner/name of the hub")


def _loras(texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
            raise RequestError(f"LoRA {text!r} has no name; write NAME=FILE or NAME=FILE:0.8, without spaces in NAME")
        if name in found:
            raise RequestError(f"two LoRAs are called {name!r}; give each its own name")
        path = Path(lora(source).path).expanduser()
        if not path.exists():
            raise RequestError(f"LoRA {name!r}: there is no file '{path}'")
        found[name] = source
    return found


def _hosts(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name != "*" and not re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", name):
            raise RequestError(f"host {name!r} is no name; write such as images.example.com, or * for all public ones")
    return tuple(name.lower() for name in names)


def _whole(option: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise RequestError(f"--{option} {value} is not possible; use a whole number from {low} to {high}")
    return value


def _seconds(option: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise RequestError(f"--{option} {value:g} is not possible; use seconds, more than 0")
    return value
