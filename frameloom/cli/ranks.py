"""The command as several processes: who starts the others, who speaks, and how one of them ends."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from rich.console import Console

from frameloom.cli.ending import Ended, way_on
from frameloom.errors import RequestError
from frameloom.parallel.heart import Ending, Heart, is_lost
from frameloom.parallel.launch import count_ranks, run_ranks
from frameloom.pipeline.target import OutputTarget
from frameloom.settings import Launched, launched


def is_first() -> bool:
    """Whether this process speaks and writes: rank 0, or the only one."""
    place = launched()
    return place is None or place.rank == 0


def share(
    gpus: int | None,
    parallel: str,
    *,
    target: OutputTarget | None = None,
    since: float = 0.0,
    further: Sequence[str] = (),
) -> None:
    """Where several ranks are asked for and this is none of them: start them, and end as they do; see `run_ranks`.

    `target`: what they write, for a job that has begun `since`. `further`: arguments besides those of this command.
    """
    place = launched()
    count = count_ranks(gpus, parallel, place)
    if place is not None or count == 1:
        return
    # As the installed command does, ranks import nothing from the working folder, unless `python -m` began it all.
    safe = [] if sys.path[0] == _working_folder() else ["-P"]
    command = [sys.executable, *safe, "-m", "frameloom", *sys.argv[1:], *further]
    outcome = run_ranks(command, count, say=_say_error, tidy=target.remove_partials if target else None)
    if outcome.code and sys.stdout.isatty():
        Console().show_cursor()  # which the bars of a rank that was killed had hidden
    message = outcome.message
    if outcome.code and target and "frameloom resume" not in message:
        message = "; ".join(filter(None, (message, way_on(target, since))))
    raise Ended(Ending(code=outcome.code, message=message))


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise RequestError("the working folder has been removed; change to one that exists") from None


def _say_error(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def rank_ending(error: Exception) -> Ending:
    """How a rank ends that failed in a way nobody expected, or because another rank is gone."""
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    if is_lost(error):
        return Ending(code=1, message=f"lost contact with the other ranks ({said})", lost=True)
    return Ending(code=1, message=f"failed with {type(error).__name__}: {said}", trace=traceback.format_exc())


def end_rank(ending: Ending, place: Launched, heart: Heart | None) -> NoReturn:
    """End a rank at once: taking an interpreter apart may wait for other ranks. The launcher tells what went wrong."""
    if heart is not None:
        heart.tell(ending)
    elif ending.message:
        _say_error(f"{ending.trace}frameloom: rank {place.rank}: {ending.message}\n")
    with suppress(OSError):  # whoever read this may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(ending.code)
