"""`frameloom inspect` and `frameloom convert`: what files hold, and the same in another layout."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

import frameloom
from frameloom.cli.console import byte_bars, byte_lines, console_of, page, told_bytes
from frameloom.cli.ending import last_words
from frameloom.cli.options import JsonOption, QuietOption, VariantOption, with_parts


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Folder, weight file, LoRA or hub id; without one the built-in model.")
    ] = None,
    variant: VariantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint, a weight file or a LoRA holds, without loading it."""
    with byte_bars(console_of(quiet=as_json)) as on_bytes:
        facts = frameloom.describe(model, variant=variant, on_bytes=on_bytes)
    if as_json:
        print(json.dumps(facts))
        return
    if facts.get("kind") == "LoRA":
        _print_lora(facts)
        return
    console = page(160)
    table = Table()
    for heading in ("component", "what it is", "parameters", "dtypes", "size", "files"):
        table.add_column(heading, no_wrap=True)
    for part in facts["components"]:
        size, count = told_bytes(part["bytes"]), f"{part['parameters']:,}"
        table.add_row(part["name"], part["what"], count, ", ".join(part["dtypes"]), size, str(part["files"]))
    table.add_row("together", "", f"{facts['parameters']:,}", "", told_bytes(facts["bytes"]), "", style="bold")
    if "lacks" in facts:
        lacks = ", ".join(facts["lacks"]).replace("_", " ")
        console.print(f"{facts['model']}: part of a checkpoint, which also needs: {lacks}", soft_wrap=True)
        console.print(table)
        return
    console.print(f"{facts['model']}: {facts['pipeline']}, {facts['scheduler']}", soft_wrap=True)
    console.print(table)
    console.print("defaults: " + ", ".join(f"{key} {value!r}" for key, value in facts["defaults"].items()))


def _print_lora(facts: dict[str, Any]) -> None:
    console = page(160)
    ranks = ", ".join(map(str, facts["ranks"])) or "none"
    console.print(
        f"{facts['model']}: a LoRA of {facts['keys']} keys for {facts['modules']} modules in {facts['layers']} layers "
        f"({', '.join(facts['parts'])}), rank {ranks}, {', '.join(facts['dtypes'])}, {told_bytes(facts['bytes'])}",
        soft_wrap=True,
    )
    if facts["unknown_keys"]:
        console.print(f"keys of no known kind: {', '.join(facts['unknown_keys'])}", soft_wrap=True)


@with_parts
def convert(
    parts: dict[str, str],
    source: Annotated[str, typer.Argument(help="Folder, weight file or hub id; - for the parts alone.")],
    destination: Annotated[str, typer.Argument(help="A folder that is new, empty, or of an earlier run.")],
    to: Annotated[str, typer.Option(help="diffusers, original (the layout of Wan's own code) or single-file.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 for all but the VAE. Default: as stored.")
    ] = None,
    variant: VariantOption = "",
    quiet: QuietOption = False,
) -> None:
    """Write a checkpoint in another layout; the same command again goes on where it was ended."""
    console = console_of(quiet=quiet)
    again = "the same command goes on where it was ended"
    with last_words(lambda: again), byte_bars(console) as bars:
        files = frameloom.convert_model(
            None if source == "-" else source, destination, to=to, dtype=dtype, parts=parts, variant=variant,
            on_bytes=bars or byte_lines(console),
        )  # fmt: skip
    for file in files:
        console.print(f"{file}: {told_bytes(file.stat().st_size)}, read back", soft_wrap=True)
