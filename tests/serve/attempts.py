"""Real workers for tests: a pool on an event loop of its own thread, and orders for it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from frameloom.serve.config import ServeConfig
from frameloom.serve.workers.pool import Pauses, Pool, PoolWorker
from frameloom.serve.workers.worker import Outcome
from frameloom.wire import Foreseen, News, Run

REQUEST = {"prompt": "a red circle moving left", "num_frames": 9, "steps": 4, "seed": 5}
LIMIT_S = 120.0  # of anything; a machine that is busy needs some of it


def order_in(folder: Path, *, fence: int = 1, request: dict[str, Any] | None = None, **further: Any) -> Run:
    """An order whose files go to a folder named as its job."""
    folder.mkdir(parents=True, exist_ok=True)
    return Run(
        job=folder.name,
        fence=fence,
        request=REQUEST if request is None else request,
        output=str(folder / f"video-{fence}.mp4"),
        thumbnail=str(folder / f"thumbnail-{fence}.jpg"),
        sheet=str(folder / f"sheet-{fence}.jpg"),
        preview=str(folder / "preview.png"),
        journal=str(folder / "journal"),
        **further,
    )


class Workshop:
    """A pool that tests call from their own thread; `first` is its first worker."""

    def __init__(self, config: ServeConfig, *, pauses: Pauses | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.pool = self.do(_made(config, pauses))

    @property
    def first(self) -> PoolWorker:
        return self.pool.all[0]

    def do(self, coroutine: Any) -> Any:
        """What a coroutine returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(LIMIT_S)

    def ready(self) -> None:
        """Wait until the first worker is."""
        self.do(self.first.ready())

    def run(self, order: Run, on_news: Callable[[News], object] = lambda _: None) -> Outcome:
        """What becomes of an order."""
        return self.do(_ready_run(self.first, order, on_news))

    def foresee(self, request: dict[str, Any]) -> Foreseen | None:
        return self.do(self.first.foresee(request))

    def close(self) -> None:
        self.do(self.pool.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _made(config: ServeConfig, pauses: Pauses | None) -> Pool:
    pool = Pool(config, pauses=pauses)
    await pool.start()
    return pool


async def _ready_run(worker: PoolWorker, order: Run, on_news: Callable[[News], None]) -> Outcome:
    await worker.ready()
    return await worker.run(order, on_news)


@contextlib.contextmanager
def workshop(data: Path, *, pauses: Pauses | None = None, **config: Any) -> Iterator[Workshop]:
    """A pool, from here to the end of the block."""
    made = Workshop(ServeConfig(data=data, **config), pauses=pauses)
    try:
        yield made
    finally:
        made.close()


def until(what: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """Wait for something to be true, and return it."""
    end = time.monotonic() + limit_s
    while not (found := what()):
        assert time.monotonic() < end, f"not within {limit_s} s"
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    """All that a process has started, and what these have."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                child = int(path.parent.name)
                found += [child, *children(child)]
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
