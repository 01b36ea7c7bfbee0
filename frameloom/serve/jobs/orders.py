"""What a worker is told of a job."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from frameloom import wire
from frameloom.config import lora
from frameloom.serve.jobs.folder import Files
from frameloom.serve.jobs.job import Job

_PICTURES: Final = ("image", "last_image", "video", "control_video", "mask")


class OrderError(Exception):
    """A job cannot be made by this server any more: one sentence."""


def order_of(job: Job, folder: Path, files: Files, loras: Mapping[str, str]) -> wire.Run:
    """The order of an attempt. `loras`: those that are registered. Raises OrderError."""
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
        loras=tuple(_lora(name, strength, loras) for name, strength in job.ask.loras),
        quality=job.ask.quality,
        extends=extends,
    )


def with_paths(request: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A request whose pictures are named by absolute paths: they lie in the folder of a job."""
    found = dict(request)
    for name in (*_PICTURES, "extends"):
        if found.get(name) is not None:
            found[name] = str(folder / found[name])
    if found.get("references") is not None:
        found["references"] = [str(folder / name) for name in found["references"]]
    return found


def _lora(name: str, strength: float, loras: Mapping[str, str]) -> wire.Lora:
    if name not in loras:
        raise OrderError(f"LoRA {name!r} is not registered any more; ask for one of /v1/loras")
    known = lora(loras[name])
    path = Path(known.path).expanduser().absolute()
    return wire.Lora(path=str(path), strength=known.strength * strength, expert=known.expert)
