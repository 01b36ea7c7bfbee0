"""How the command ends, and what it says then of the output and of what was computed."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import frameloom
from frameloom.parallel.heart import Ending
from frameloom.pipeline.target import OutputTarget

INTERRUPTED: Final = 130
"""The exit code of what Ctrl-C has ended."""
INTERRUPTION: Final = Ending(code=INTERRUPTED, message="interrupted; nothing was written")
"""How it ends outside of `last_words`."""
_TERMINATION: Final = Ending(code=128 + signal.SIGTERM, message="terminated; nothing was written")


class Ended(SystemExit):
    """The command ends here, in this way; what was begun is tidied away as after an interrupt."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.code)
        self.ending = ending


def terminate(*_: object) -> NoReturn:
    """End as SIGTERM asks for: a handler of signals."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the tidying
    raise Ended(_TERMINATION)


@contextmanager
def last_words(became: Callable[[], str]) -> Iterator[None]:
    """Who is interrupted or terminated in here says what became of the output."""
    try:
        yield
    except KeyboardInterrupt:
        raise Ended(Ending(code=INTERRUPTED, message=f"interrupted; {became()}")) from None
    except Ended as ended:
        if ended.ending is not _TERMINATION:
            raise
        raise Ended(Ending(code=_TERMINATION.code, message=f"terminated; {became()}")) from None


def fate(target: OutputTarget | None, before: tuple[int, ...], since: float) -> str:
    """What became of the output, and of what was computed for it."""
    if target is None:
        return "nothing was written"
    is_there = target.written() not in ((), before)
    if is_there:
        return f"the video had been written to {target.path}"
    return "; ".join(filter(None, ("nothing was written", way_on(target, since))))


def way_on(target: OutputTarget, since: float) -> str:
    """How to go on with what was computed, where any of it is kept."""
    job = frameloom.job_left_for(str(target.path), since=since)
    return f"`frameloom resume {job}` goes on from what was computed" if job else ""
