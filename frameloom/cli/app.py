"""The `frameloom` command as a whole: its commands, its log, and its end.

Exit codes: 0 done, 1 our fault or a rank that died, 2 what was asked cannot be done (nothing was written),
130 interrupted, 143 terminated. With `--gpus` this process starts the ranks, which run the same command; rank 0 speaks.
"""

import io
import logging
import signal
import sys
from typing import Annotated, NoReturn

import typer

import frameloom
from frameloom.cli.bench import bench
from frameloom.cli.checks import doctor, verify
from frameloom.cli.ending import INTERRUPTED, INTERRUPTION, Ended, terminate
from frameloom.cli.files import convert, inspect
from frameloom.cli.generate import generate
from frameloom.cli.jobs import jobs, resume
from frameloom.cli.plan import plan
from frameloom.cli.ranks import end_rank, is_first, rank_ending
from frameloom.cli.serve import serve
from frameloom.errors import FrameloomError
from frameloom.parallel.heart import Ending, Heart
from frameloom.settings import LOGGER_NAME, ask_for_same_sums, launched, log_level

app = typer.Typer(
    help="Turn a prompt into a video with the Wan family of diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (generate, resume, jobs, serve, plan, inspect, convert, verify, doctor):
    app.command()(_command)
app.add_typer(bench, name="bench")


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"frameloom {frameloom.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> NoReturn:
    """Run the command; every error of ours is one line and an exit code."""
    place, heart = None, None
    ask_for_same_sums()
    try:
        place = launched()
        if place is not None and place.heart_fd is not None:
            heart = Heart(place.heart_fd, tidies=place.rank == 0)
            heart.start()
        ending = _run()
    except FrameloomError as error:
        ending = Ending(code=error.exit_code, message=str(error))
    except (KeyboardInterrupt, typer.Abort):
        ending = INTERRUPTION
    except Exception as error:
        if place is None:
            raise
        ending = rank_ending(error)
    if place is not None:
        end_rank(ending, place, heart)
    if ending.message:
        print(f"frameloom: {ending.message}", file=sys.stderr)
    sys.exit(ending.code)


def _run() -> Ending:
    """Run the command that the arguments name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Progress through a pipe arrives as it happens; a name that the terminal cannot show is still told.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    _set_up_log()
    signal.signal(signal.SIGTERM, terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, terminate)
    try:
        code = app(standalone_mode=False)
    except Ended as ended:
        return ended.ending
    except SystemExit as stop:  # how the parser ends where nobody reads the output any more
        return Ending(code=stop.code if isinstance(stop.code, int) else 1)
    except typer.Exit as done:
        return Ending(code=done.exit_code)
    except Exception as error:
        code = getattr(error, "exit_code", None)  # a usage error of the command line parser
        if code is None or not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # empty where no command was given: the help is already printed
        return Ending(code=code, message=f"{message}; see frameloom --help" if message else "")
    return INTERRUPTION if code == INTERRUPTED else Ending(code=code or 0)  # what the parser makes of Ctrl-C


def _set_up_log() -> None:
    quiet = any(flag in sys.argv for flag in ("--quiet", "-q", "--json")) or not is_first()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[frameloom] %(message)s"))
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(handler)
    logger.setLevel(log_level(quiet=quiet))
