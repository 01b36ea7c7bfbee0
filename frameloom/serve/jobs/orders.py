"""What a worker is told of a job."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from frameloom import wire
from frameloom.serve.config import ServeConfig
from frameloom.serve.jobs.folder import Files
from frameloom.serve.jobs.job import Job
from frameloom.types import PICTURES, Lora


def order_of(job: Job, folder: Path, files: Files, config: ServeConfig) -> wire.Run:
    """The order of an attempt. Raises RequestError for LoRAs that this server has not any more."""
    request = dict(with_paths(job.ask.request, folder))
    extends = request.pop("extends", None)
    return wire.Run(
        job=job.id,
        fence=job.fence,
        request=request,
        output=str(files.video),
        thumbnail=str(files.thumbnail),
        sheet=str(files.sheet),
        preview=str(files.preview),
        journal=str(files.journal),
        loras=tuple(_lora(name, scale, config) for name, scale in job.ask.loras),
        quality=job.ask.quality,
        extends=extends,
    )


def with_paths(request: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A request whose pictures are named by absolute paths: they lie in the folder of a job."""
    found = dict(request)
    for name in (*PICTURES, "extends"):
        if found.get(name) is not None:
            found[name] = str(folder / found[name])
    if found.get("references") is not None:
        found["references"] = [str(folder / name) for name in found["references"]]
    return found


def _lora(name: str, scale: float, config: ServeConfig) -> Lora:
    found = config.lora(name, scale)
    return replace(found, path=str(Path(found.path).expanduser().absolute()))
