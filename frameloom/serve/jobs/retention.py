"""What is kept, and until when: expired jobs go, and with a quota those that ended first go before their time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from frameloom.serve.config import Keeping
from frameloom.serve.jobs.folder import DataFolder
from frameloom.serve.jobs.job import Job
from frameloom.serve.jobs.keeper import Keeper
from frameloom.settings import LOGGER_NAME

FRESH_S: Final = 600.0
"""So long after its end a job is kept whatever the quota: somebody is about to fetch its video."""
_LOG = logging.getLogger(f"{LOGGER_NAME}.serve")


class Retention:
    """Sweeps a data folder. `remove`: takes a job that has ended, row and files, and says whether it was there.

    Neither a job that waits nor one that runs is ever touched. `used_bytes`: of the folder at the last sweep.
    """

    def __init__(
        self,
        keeper: Keeper,
        folder: DataFolder,
        keeping: Keeping,
        *,
        clock: Callable[[], float],
        remove: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._keeper, self._folder, self._keeping = keeper, folder, keeping
        self._clock, self._remove = clock, remove
        self.used_bytes = 0

    async def sweep(self) -> list[str]:
        """Remove what is due; the ids of what was removed. Raises StoreError."""
        now = self._clock()
        expired = await self._keeper.do(lambda store: store.ended_before(now))
        removed = [job.id for job in expired if await self._remove(job.id)]
        if removed:
            _LOG.info("%d expired jobs were removed", len(removed))
        self.used_bytes = await asyncio.to_thread(self._folder.used_bytes)
        quota = self._keeping.quota_bytes
        if quota is not None and self.used_bytes > quota:
            removed += await self._down_to(quota, now)
        return removed

    async def _down_to(self, quota: int, now: float) -> list[str]:
        removed = []
        for job in await self._keeper.do(lambda store: store.ended()):
            if self.used_bytes <= quota:
                break
            if _is_fresh(job, now):
                continue
            taken = await asyncio.to_thread(self._folder.used_by, job.id)
            if await self._remove(job.id):
                removed.append(job.id)
                self.used_bytes -= taken
        if removed:
            _LOG.info("%d jobs were removed for the quota of %d bytes", len(removed), quota)
        return removed


def _is_fresh(job: Job, now: float) -> bool:
    return job.completed_at is not None and 0 <= now - job.completed_at < FRESH_S
