"""What a server does first with what the end of a former one has left."""

import asyncio
import logging

from frameloom.serve.config import MAX_ATTEMPTS
from frameloom.serve.jobs.dispatch import Desk, exhausted, sentence
from frameloom.serve.jobs.folder import DataFolder
from frameloom.serve.jobs.job import Job, JobStore
from frameloom.settings import LOGGER_NAME

_LOG = logging.getLogger(f"{LOGGER_NAME}.serve")


async def recover(desk: Desk) -> list[Job]:
    """The jobs that wait; those that were interrupted wait again, or have failed. Raises StoreError, OSError.

    Folders of jobs that the store does not know, and what was half made of others, are removed.
    """

    def stand(store: JobStore) -> tuple[list[Job], list[Job], list[Job]]:
        interrupted = [_interrupted(store, job, desk) for job in store.running()]
        return [job for job in interrupted if job is not None], store.waiting(), store.ended()

    interrupted, waiting, ended = await desk.keeper.do(stand)
    for job in interrupted:
        _tell(desk, job)
    removed = await asyncio.to_thread(_cleared, desk.folder, waiting, ended)
    if removed:
        _LOG.info("%d folders that belong to no job were removed", len(removed))
    return waiting


def _interrupted(store: JobStore, job: Job, desk: Desk) -> Job | None:
    """Requeued, or failed where it was to end or has had its attempts."""
    if not job.cancelled and job.attempts < MAX_ATTEMPTS:
        store.requeue(job.id, job.fence, counts=True)
    else:
        error = sentence("cancelled") if job.cancelled else exhausted(job.attempts, [])
        store.fail(job.id, job.fence, error, now=desk.clock(), expires_at=desk.expiry())
    return store.get(job.id)


def _tell(desk: Desk, job: Job) -> None:
    desk.witness.lost(job, "interrupted")
    known = {"job": job.id, "fence": job.fence, "attempt": job.attempts}
    if job.error is None:
        _LOG.warning("attempt %d was interrupted by the end of the server; it waits again", job.attempts, extra=known)
    else:
        _LOG.warning("failed: %s", job.error.message, extra={**known, "code": job.error.code})
        desk.witness.ended(job)


def _cleared(folder: DataFolder, waiting: list[Job], ended: list[Job]) -> list[str]:
    removed = folder.sweep({job.id for job in (*waiting, *ended)})
    for job in ended:
        folder.tidy(job.id, job.fence if job.result else None)
    return removed
