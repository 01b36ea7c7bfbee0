"""The server as a process: puts the service behind the routes, listens, and ends when it is asked to."""

import asyncio
import gc
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Final

import uvicorn

from frameloom.errors import FrameloomError, RequestError
from frameloom.serve.api.app import make_app
from frameloom.serve.api.site import Site
from frameloom.serve.config import ServeConfig
from frameloom.serve.door import address_of, is_loopback
from frameloom.serve.jobs.core import Core
from frameloom.serve.jobs.folder import DataFolderError
from frameloom.serve.keys import read_keys
from frameloom.serve.metrics import Metrics
from frameloom.serve.protocol import CONNECTIONS, HEAD_BYTES, KEEP_ALIVE_S, PatientProtocol
from frameloom.serve.workers.pool import Pool
from frameloom.settings import LOGGER_NAME

_LOG: Final = logging.getLogger(LOGGER_NAME)
_ANSWERS_S: Final = 3
"""What answers that are under way are given when all else has ended."""


def run(config: ServeConfig, door: socket.socket, *, say: Callable[[str], object]) -> int:
    """Serve until a signal ends it; returns the exit code. `say` gets one line when clients are answered.

    SIGTERM and Ctrl-C: no new jobs are taken, running ones are given the grace, then everything ends; a second signal
    ends the grace. SIGHUP reads the keys again. Raises FrameloomError for what keeps the server from starting.
    """
    _raise_open_files()
    gc.freeze()  # what was imported stays: looking through it again and again would make answers wait
    with door:
        try:
            asyncio.run(_serve(config, door, say))
        except DataFolderError as error:
            raise RequestError(str(error)) from None
    return 0


async def _serve(config: ServeConfig, door: socket.socket, say: Callable[[str], object]) -> None:
    metrics = Metrics()
    core = Core(config, Pool(config), witness=metrics)
    app = make_app(core, config, metrics=metrics)
    site: Site = app.state.site
    server = _Server(_http(app), started=partial(_tell_start, config, address_of(door), say))
    ends = _Ends(core.hasten)
    with _signals(ends, partial(_read_keys_again, config, site) if config.keys_file else None):
        await core.start()
        serving = asyncio.create_task(server.serve(sockets=[door]))
        try:
            await ends.wait(serving)
        finally:
            await core.stop()
            site.closing.set()
            server.should_exit = True
            await serving
    _LOG.info("the server has ended")


def _http(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_ANSWERS_S,
        h11_max_incomplete_event_size=HEAD_BYTES,
        backlog=socket.SOMAXCONN,
    )


class _Server(uvicorn.Server):
    """Uvicorn's, which says when it answers, and leaves signals to others."""

    def __init__(self, config: uvicorn.Config, *, started: Callable[[], object]) -> None:
        super().__init__(config)
        self._say_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._say_started()

    def capture_signals(self) -> Any:
        """Not here."""
        return nullcontext()


class _Ends:
    """Hears the signals that end the server: the first asks for it, the second calls `hasten`."""

    def __init__(self, hasten: Callable[[], None]) -> None:
        self._hasten, self._asked = hasten, asyncio.Event()

    def hear(self, number: int) -> None:
        """A signal came."""
        name = signal.Signals(number).name
        if self._asked.is_set():
            _LOG.info("%s once more: what runs is given no more time", name)
            self._hasten()
        else:
            _LOG.info("%s: no new jobs are taken, what runs is given its grace", name)
            self._asked.set()

    async def wait(self, serving: "asyncio.Task[None]") -> None:
        """Return when a signal came; or when what serves has ended by itself, which nobody wanted."""
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait((asked, serving), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()


@contextmanager
def _signals(ends: _Ends, read_keys_again: Callable[[], None] | None) -> Iterator[None]:
    """Hear SIGTERM, Ctrl-C and SIGHUP until the end of the block. Without keys to read a hang-up ends the server."""
    loop, numbers = asyncio.get_running_loop(), [signal.SIGTERM, signal.SIGINT]
    if read_keys_again is not None:
        loop.add_signal_handler(signal.SIGHUP, read_keys_again)
    elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, ends.hear, number)
    try:
        yield
    finally:
        for number in (*numbers, signal.SIGHUP):  # what is left takes a moment, and is not to be disturbed
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def _read_keys_again(config: ServeConfig, site: Site) -> None:
    """The keys of the file, from now on; those from before where the file is wrong."""
    assert config.keys_file is not None
    try:
        keys = read_keys(config.keys_file)
    except FrameloomError as error:
        _LOG.error("SIGHUP: the keys stay as they were: %s", error)
        return
    site.doorkeeper.keys = keys
    _LOG.info("SIGHUP: %d keys: %s", len(keys), ", ".join(key.name for key in keys))


def _tell_start(config: ServeConfig, url: str, say: Callable[[str], object]) -> None:
    """One line for people and programs, and one for the log."""
    if not config.keys and not is_loopback(config.host):
        _LOG.warning("ANYBODY who reaches %s may make videos and see all others': --insecure-public without keys", url)
    say(f"frameloom serves {config.name} at {url} (the page is there, the API below {url}/v1)")
    _LOG.info("serving; data in %s", config.data, extra={"url": url})


def _raise_open_files() -> None:
    """As many open files as the system allows: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, 4 * CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
