"""Goes on with a job: the engine is built again as it was, and what the journal has is not computed again."""

from typing import Any

from frameloom.engine.build import build_engine
from frameloom.engine.job import Job, find
from frameloom.engine.jobs import busy, is_locked
from frameloom.errors import RequestError
from frameloom.settings import launched
from frameloom.types import ProgressCallback


def to_resume(name: str | None) -> Job:
    """A job that can be gone on with, as `jobs.find` finds it. Raises RequestError."""
    job = find(name)
    if job.is_finished:
        raise RequestError(f"job {job.name} is finished, and its video is at {job.order.output}; start a new request")
    if launched() is None and is_locked(job.folder):  # of several ranks the first holds it
        raise RequestError(busy(job.folder))
    return job


def resume_job(
    name: str | None = None, *, anyway: bool = False, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """Finish the job of a name, or the newest unfinished one; returns as `Engine.generate_to` does.

    Raises RequestError or CheckpointError; `anyway` as in `Engine.finish`.
    """
    job = to_resume(name)
    origin = job.origin
    with build_engine(origin.model, origin.config, parts=origin.parts or None, variant=origin.variant) as engine:
        return engine.finish(job, progress=progress, anyway=anyway)
