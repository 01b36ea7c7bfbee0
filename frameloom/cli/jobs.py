"""`frameloom resume` and `frameloom jobs`: what runs that ended early have left."""

import functools
import json
from typing import Annotated

import typer
from rich.table import Table

import frameloom
from frameloom.cli.console import console_of, page, progress_of, told_bytes
from frameloom.cli.ending import fate, last_words
from frameloom.cli.made import print_made
from frameloom.cli.options import JsonOption, QuietOption
from frameloom.cli.ranks import is_first, share
from frameloom.pipeline.target import check_output


def resume(
    job: Annotated[str | None, typer.Argument(help="Name of a job; without one the newest unfinished one.")] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Go on though versions, device or kernels are others: bits may be, too.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go on with a job that ended early; the video is what it would have been, bit by bit."""
    begun = frameloom.job_to_resume(job)
    target = check_output(begun.order.output)
    console = console_of(quiet=quiet or as_json)
    console.print(f"going on with {begun.name}: {begun.request.prompts[0]}", soft_wrap=True)
    ranks = begun.origin.ranks if begun.origin.ranks > 1 else None
    with last_words(functools.partial(fate, target, target.written(), begun.began)):
        names = [] if job is not None else [str(begun.folder)]  # all ranks the same
        share(ranks, begun.origin.config.parallel, target=target, since=begun.began, further=names)
        with progress_of(console) as report:
            made = frameloom.resume(str(begun.folder), anyway=anyway, progress=report)
    if is_first():
        print_made(made, console, as_json=as_json)


def jobs(
    forget: Annotated[
        list[str] | None, typer.Option(help="Remove this job and what it has kept. May be given several times.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the jobs: what has begun, what is finished, and what `frameloom resume` would go on with."""
    for name in forget or ():
        frameloom.forget_job(name)
    found = frameloom.jobs()
    if as_json:
        print(json.dumps({"jobs": found}))
        return
    table = Table("job", "state", "size", "prompt", "output")
    for job in found:
        table.add_row(job["name"], job["state"], told_bytes(job["bytes"]), job["prompt"], job["output"])
    page(160).print(table)
