"""The store as the event loop uses it: all calls in one thread, one after the other."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from frameloom.serve.jobs.job import JobStore, StoreError
from frameloom.settings import LOGGER_NAME

T = TypeVar("T")
_PAUSES_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
_LOG = logging.getLogger(f"{LOGGER_NAME}.serve")


class Keeper:
    """Calls a store, which its thread opens, uses and closes."""

    def __init__(self, opened: Callable[[], JobStore]) -> None:
        self._opened = opened
        self._store: JobStore | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def open(self) -> None:
        """Open the store. Raises StoreError."""
        try:
            self._store = await asyncio.get_running_loop().run_in_executor(self._thread, self._opened)
        except BaseException:
            self._thread.shutdown()
            raise

    async def do(self, call: Callable[[JobStore], T]) -> T:
        """What a call of the store returns. Raises StoreError, and what the call raises."""
        store = self._store
        if store is None:
            raise StoreError("the store of jobs is closed: the server ends")
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: call(store))

    async def insist(self, call: Callable[[JobStore], T], *, what: str) -> T:
        """As `do`, again and again until the store can: what is said here has happened, and has to be kept."""
        tried = 0
        while True:
            try:
                return await self.do(call)
            except StoreError as error:
                pause_s = _PAUSES_S[min(tried, len(_PAUSES_S) - 1)]
                _LOG.error("%s cannot be kept, tried again in %g s: %s", what, pause_s, error)
                tried += 1
            await asyncio.sleep(pause_s)

    async def close(self) -> None:
        """Close the store after the calls that are under way; later ones are refused."""
        store, self._store = self._store, None
        if store is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, store.close)
        self._thread.shutdown()
