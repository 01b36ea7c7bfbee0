"""A job: what was asked, with which model and options, and the journal of what was computed for it."""

import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from frameloom.engine.jobs import (
    DESCRIPTION,
    FINISHED,
    FORMAT,
    LOCK,
    busy,
    digest_of,
    folder_of,
    make_room,
    read_description,
)
from frameloom.engine.journal import Journal
from frameloom.errors import OutputError, RequestError
from frameloom.lock import Lock
from frameloom.pipeline.sinks import write_whole
from frameloom.settings import LOGGER_NAME, jobs_folder
from frameloom.types import PICTURES, EngineConfig, Lora, Pictures, ResolvedRequest

log = logging.getLogger(LOGGER_NAME)

INPUTS: Final = "inputs"
"""The entry of the pictures that were given."""
LATENTS: Final = "latents"
"""The entry of the latents that are decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """How an engine was made: as `frameloom.load` takes it, by how many ranks; and what its bits depend on, by name."""

    model: str | None
    parts: Mapping[str, str]
    config: EngineConfig
    variant: str = ""
    ranks: int = 1
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is to become of a request. `loras`: those that were set after the engine was made.

    `extends`: a video that the file begins with; the first frame that is made then is its last one, and left out.
    """

    output: str
    quality: int | None = None
    keeps_latents: bool = False
    loras: tuple[Lora, ...] = ()
    preview: str | None = None
    extends: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """A job on the disk. `lock`: held by this process since the job began."""

    folder: Path
    origin: Origin
    order: Order
    request: ResolvedRequest
    journal: Journal
    began: float
    lock: Lock | None = None

    @property
    def name(self) -> str:
        """What it is called."""
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        """Whether its video is whole, and in its place."""
        return (self.folder / FINISHED).exists()

    def held(self) -> Lock:
        """The lock, which is to be closed. Raises RequestError if another process has it, OutputError."""
        try:
            return self.lock or _lock(self.folder)
        except OSError as error:
            raise OutputError(
                f"the job {self.folder} cannot be written ({error.strerror}); make it writable, or resume a copy of it "
                "by its path"
            ) from error

    def finish(self, made: Mapping[str, Any]) -> None:
        """The video is in its place: let go of what was kept on the way."""
        try:
            write_whole(self.folder / FINISHED, json.dumps(dict(made)).encode())
            self.journal.forget(but=(LATENTS,) if self.order.keeps_latents else ())
        except OSError as error:
            log.warning("the job %s cannot be finished (%s), its video is whole", self.folder, error.strerror)


def begin(origin: Origin, order: Order, request: ResolvedRequest, folder: Path | None = None) -> Job:
    """A new job in a folder of the caller's, which is made; by default in a new one of the folder of jobs.

    Raises OutputError.
    """
    root = jobs_folder() if folder is None else folder.parent
    began = time.time()
    asked, pictures = _written(request)
    told = {"origin": _plain(asdict(origin)), "order": asdict(order), "request": asked, "began": began}
    digest = digest_of(told)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if folder is None:
            make_room(root)
            folder = _new_folder(root, began)
        else:
            folder.mkdir(exist_ok=True)
        journal = Journal(folder, digest)
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = undo.enter_context(closing(_lock(folder)))  # before anybody can see the job
            journal.put(INPUTS, pictures)
            description = {"format": FORMAT, "sha256": digest, **told}
            write_whole(folder / DESCRIPTION, json.dumps(description, indent=1).encode())
            undo.pop_all()
    except OSError as error:
        raise OutputError(
            f"no job can be kept in {root} ({error.strerror}); set FRAMELOOM_JOBS to a folder that has room and can be "
            "written"
        ) from error
    return Job(folder=folder, origin=origin, order=order, request=request, journal=journal, began=began, lock=lock)


def _new_folder(root: Path, began: float) -> Path:
    """One that nobody else has, named by the time."""
    second = time.strftime("%Y%m%d-%H%M%S", time.localtime(began))
    for number in itertools.count(int(began * 1e6 % 1e6)):
        folder = root / f"{second}-{number:06d}"
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def find(name: str | None) -> Job:
    """A job by its name, as `jobs.folder_of` finds it. Raises RequestError."""
    folder = folder_of(name)
    told, digest = read_description(folder)
    origin, config, order = dict(told["origin"]), dict(told["origin"]["config"]), dict(told["order"])
    for listed in (config, order):
        listed["loras"] = tuple(Lora(**one) for one in listed["loras"])
    journal = Journal(folder, digest)
    return Job(
        folder=folder,
        origin=Origin(**{**origin, "config": EngineConfig(**config)}),
        order=Order(**order),
        request=_request(told["request"], journal),
        journal=journal,
        began=told["began"],
    )


def _lock(folder: Path) -> Lock:
    """Raises RequestError if another process works on the job, OSError."""
    path = folder / LOCK
    try:
        return Lock(path)
    except BlockingIOError:
        raise RequestError(busy(folder)) from None


def check_unchanged(job: Job, facts: Mapping[str, str], *, anyway: bool) -> None:
    """Raise RequestError where a job began with other facts than these; `anyway` with the same weights will do."""
    then = job.origin.facts
    names = sorted(name for name in {*then, *facts} if then.get(name, "") != facts.get(name, ""))
    changed = [f"{name} was {then.get(name) or 'none'}, is {facts.get(name) or 'none'}" for name in names]
    weights = [change for change in changed if change.startswith(("model ", "LoRAs "))]
    if weights or (changed and not anyway):
        files, bits = "give it the files that it began with", "go back to that, or take other bits with --anyway"
        way_out = files if weights else bits
        raise RequestError(f"job {job.name} began with something else: {'; '.join(weights or changed)}; {way_out}")


def _written(request: ResolvedRequest) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A request as JSON, in which pictures are named; and the pictures."""
    given = {name: value for name in PICTURES if (value := getattr(request, name)) is not None}
    given |= {f"references.{index}": picture for index, picture in enumerate(request.references)}
    told = {
        field.name: getattr(request, field.name)
        for field in fields(request)
        if field.name not in (*PICTURES, "references")
    }
    told["pictures"] = {name: [shown.name, shown.fps] for name, shown in given.items()}
    return told, {name: torch.from_numpy(np.array(shown.frames)) for name, shown in given.items()}


def _request(told: Mapping[str, Any], journal: Journal) -> ResolvedRequest:
    """What `_written` wrote."""
    values: dict[str, Any] = dict(told)
    named = values.pop("pictures")
    kept = journal.read(INPUTS) if named else ({}, {})
    if kept is None:
        raise RequestError(f"{journal.folder} has lost the pictures that were given; start the request again")
    pictures: dict[str, Any] = {
        name: Pictures(name=shown_as, fps=fps, frames=kept[0][name].numpy()) for name, (shown_as, fps) in named.items()
    }
    pictures["references"] = tuple(pictures.pop(name) for name in list(pictures) if name.startswith("references."))
    listed = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ResolvedRequest(**{**values, **listed, **pictures})


def _plain(told: dict[str, Any]) -> dict[str, Any]:
    """As JSON will give it back."""
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


def absolute(source: str | os.PathLike[str]) -> str:
    """A path that is there, from the root; what names something else, such as a repository of the hub, as it is."""
    path = Path(os.path.expanduser(os.fspath(source)))
    return str(path.absolute()) if path.exists() else os.fspath(source)


def absolute_loras(loras: Sequence[Lora]) -> tuple[Lora, ...]:
    """The same of LoRAs."""
    return tuple(replace(lora, path=absolute(lora.path)) for lora in loras)
