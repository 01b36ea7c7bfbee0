"""The `frameloom` command: generate and inspect. The only place with exit codes, and the only one that prints.

Exit codes: 0 done, 1 our fault, 2 what was asked cannot be done (nothing was written), 130 interrupted.
"""

import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

import frameloom
from frameloom.config import check_request
from frameloom.errors import FrameloomError
from frameloom.pipeline.target import check_output
from frameloom.settings import LOGGER_NAME, log_level
from frameloom.shapes.advice import advice
from frameloom.types import GenerateRequest, Progress

app = typer.Typer(
    help="Turn a prompt into a video with the Wan family of diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 130
_STAGE_NAMES = {
    "text": "reading the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "encode": "encoding",
}

ModelOption = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of a checkpoint in Diffusers layout. Default: the built-in model."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON record on standard output, and no table.")]


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


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video should show.")],
    model: ModelOption = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="video.mp4, .gif or .webm (replaced if it exists), a new folder of PNG files, or a %04d.png pattern.",
        ),
    ] = "frameloom.mp4",
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 4k+1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns guidance off.")] = None,
    guidance_2: Annotated[float | None, typer.Option(help="Guidance scale of the low-noise expert.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file.")] = None,
    quality: Annotated[int | None, typer.Option(help="0 (smallest) to 100 (best) for mp4 and webm.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Generate a video from a prompt."""
    console = _console(quiet=quiet or as_json)
    options: dict[str, Any] = {
        "width": width,
        "height": height,
        "num_frames": frames,
        "steps": steps,
        "guidance_scale": guidance,
        "guidance_scale_2": guidance_2,
        "flow_shift": flow_shift,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "fps": fps,
    }
    check_request(GenerateRequest(prompt=prompt, **options))
    check_output(output, fps=fps, quality=quality)
    if model is None and (hint := advice(prompt)):
        console.print(hint, style="yellow")
    begun = time.perf_counter()
    with frameloom.load(model, device=device, dtype=dtype) as engine:
        loaded_s = time.perf_counter() - begun
        check_output(output, fps=engine.resolve(prompt, **options).fps)
        with _progress(console) as report:
            video = engine.generate(prompt, progress=report, **options)
    begun = time.perf_counter()
    saved = video.save(output) if quality is None else video.save(output, quality=quality)
    seconds = {"load": loaded_s, **(video.metadata or {})["seconds"], "encode": time.perf_counter() - begun}
    record = {"output": str(saved), **(video.metadata or {}), "seconds": seconds}
    if as_json:
        print(json.dumps(record))
    else:
        console.print(_timing_table(record))
        console.print(f"The video is at {saved}", style="bold", soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; without one the built-in model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint holds, without loading its weights."""
    facts = frameloom.describe(model)
    if as_json:
        print(json.dumps(facts))
        return
    width = None if sys.stdout.isatty() else 120  # a pipe has no width: wrap nothing
    console = Console(width=width, markup=False, highlight=False)
    table = Table()
    for heading in ("component", "class", "parameters", "dtypes", "size", "files"):
        table.add_column(heading, no_wrap=True)
    for part in facts["components"]:
        size, count = _bytes(part["bytes"]), f"{part['parameters']:,}"
        table.add_row(part["name"], part["class"], count, ", ".join(part["dtypes"]), size, str(part["files"]))
    table.add_row("together", "", f"{facts['parameters']:,}", "", _bytes(facts["bytes"]), "", style="bold")
    console.print(f"{facts['model']}: {facts['pipeline']}, {facts['scheduler']}", soft_wrap=True)
    console.print(table)
    console.print("defaults: " + ", ".join(f"{key} {value!r}" for key, value in facts["defaults"].items()))


def main() -> NoReturn:
    """Run the command; every error of ours is one line and an exit code."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Progress through a pipe arrives as it happens; a name that the terminal cannot show is still told.
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        _set_up_log()
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # the parser turns Ctrl-C into this return value
            _fail("interrupted; nothing was written", _INTERRUPTED)
        sys.exit(code or 0)
    except FrameloomError as error:
        _fail(str(error), error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing was written", _INTERRUPTED)
    except Exception as error:
        code = getattr(error, "exit_code", None)  # a usage error of the command line parser
        if code is None or not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if not message:  # no command was given: the help is already printed
            sys.exit(code)
        _fail(f"{message}; see frameloom --help", code)


def _fail(message: str, code: int) -> NoReturn:
    print(f"frameloom: {message}", file=sys.stderr)
    sys.exit(code)


def _set_up_log() -> None:
    quiet = any(flag in sys.argv for flag in ("--quiet", "-q", "--json"))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[frameloom] %(message)s"))
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(handler)
    logger.setLevel(log_level(quiet=quiet))


def _console(*, quiet: bool) -> Console:
    return Console(quiet=quiet, highlight=False, markup=False)  # a path in brackets is no markup


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """A progress callback: bars on a terminal, otherwise a line at the start and the end of each stage."""
    if not console.is_terminal or console.quiet:
        yield lambda news: _plain_line(console, news)
        return
    columns = (TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(news: Progress) -> None:
            if news.stage not in tasks:
                tasks[news.stage] = bars.add_task(_STAGE_NAMES[news.stage], total=news.total)
            bars.update(tasks[news.stage], completed=news.step)

        yield show


def _plain_line(console: Console, news: Progress) -> None:
    every = max(1, news.total // 5)
    if news.step == news.total or (news.step and news.step % every == 0):
        console.print(f"{_STAGE_NAMES[news.stage]}: {news.step}/{news.total}")


def _timing_table(record: dict[str, Any]) -> Table:
    table = Table("stage", "seconds", "")
    for stage, seconds in record["seconds"].items():
        note = f"{seconds / record['steps']:.3f} s/step" if stage == "denoise" else ""
        table.add_row(stage, f"{seconds:.2f}", note)
    table.add_row(
        "together",
        f"{sum(record['seconds'].values()):.2f}",
        f"peak memory {_bytes(record['peak_memory_bytes'])}",
    )
    return table


def _bytes(count: int) -> str:
    amount, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
