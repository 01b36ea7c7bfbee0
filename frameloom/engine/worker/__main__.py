"""A worker of the server: `python -m frameloom.engine.worker SETUP`, one engine that makes one video at a time.

Its socket is a descriptor that it inherits. Torch-free up to the point where the engine is built: a server that is
gone by then is noticed. With several ranks this process starts them, watches them, and is the one that the server ends.
"""

import importlib
import logging
import os
import signal
import socket
import sys
import time
import traceback
from typing import Final, NoReturn

from frameloom.engine.worker.line import Line
from frameloom.engine.worker.log import keep_log
from frameloom.parallel.heart import Ending, Heart, is_lost
from frameloom.parallel.launch import run_ranks
from frameloom.parent import when_parent_dies
from frameloom.settings import LOGGER_NAME, Launched, ask_for_same_sums, launched
from frameloom.wire import Setup

log = logging.getLogger(LOGGER_NAME)

_NICE: Final = 10  # the server's own process goes first
_LAST_WORDS_S: Final = 1.0  # rank 0, which the server hears, may say better what another rank died of


def main() -> NoReturn:
    """Be a worker, one rank of it, or who starts its ranks, until the server wants no more."""
    when_parent_dies(signal.SIGKILL)
    setup, place = Setup.of(sys.argv[1]), launched()
    if setup.ranks > 1 and place is None:
        _launch(setup)
    os.nice(_NICE)
    ask_for_same_sums()
    heart = None
    if place is not None and place.heart_fd is not None:
        heart = Heart(place.heart_fd, tidies=False)
        heart.start()
    line = _line_of(setup, place)
    line.start()
    keep_log(line, first=place is None or place.rank == 0)
    _work(setup, line, place, heart)


def _work(setup: Setup, line: Line, place: Launched | None, heart: Heart | None) -> NoReturn:
    """Make videos. An interpreter that holds torch is not taken apart: that may wait for other ranks."""
    code = 1
    try:
        work = importlib.import_module("frameloom.engine.worker.orders").work  # torch comes with it
        code = work(setup, line)
    except Exception as error:
        lost, is_first = is_lost(error), place is None or place.rank == 0
        if is_first and not lost:
            log.error("the worker ends with %s: %s", type(error).__name__, error, exc_info=True)
        if heart is not None:
            time.sleep(0 if is_first else _LAST_WORDS_S)
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            trace = "" if lost or is_first else traceback.format_exc()
            heart.tell(Ending(code=1, message=said, trace=trace, lost=lost))
    sys.stderr.flush()
    os._exit(code)


def _line_of(setup: Setup, place: Launched | None) -> Line:
    """Of rank 0 to the server and to the others; of another rank to rank 0."""
    if place is not None and place.rank:
        return Line(socket.socket(fileno=setup.pairs[place.rank - 1][1]), beats=False)
    further = [socket.socket(fileno=pair[0]) for pair in setup.pairs]
    return Line(socket.socket(fileno=setup.socket), further=further, beats=True)


def _launch(setup: Setup) -> NoReturn:
    """Start the ranks, and end as they do."""
    lines = [socket.socketpair() for _ in range(setup.ranks - 1)]
    setup = setup.with_pairs([(here.fileno(), there.fileno()) for here, there in lines])

    def handed(number: int) -> list[int]:
        if number:
            return [setup.pairs[number - 1][1]]
        return [setup.socket, *(pair[0] for pair in setup.pairs)]

    outcome = run_ranks(setup.command(), setup.ranks, say=_say, handed=handed)
    if outcome.message:
        _say(f"{outcome.message}\n")
    os._exit(outcome.code)


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    main()
