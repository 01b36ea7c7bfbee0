"""`frameloom plan`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import frameloom
from frameloom.cli.console import page, told_bytes, told_seconds
from frameloom.cli.options import (
    DtypeOption,
    ExactnessOption,
    FramesOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    ParallelOption,
    ResidenceOption,
    RewriteOption,
    StepsOption,
    VaeMemoryOption,
    VariantOption,
    WindowFramesOption,
    WindowOverlapOption,
    WindowsOption,
    with_parts,
)
from frameloom.errors import RequestError
from frameloom.types import EngineConfig

MOST_GPUS = 256

if TYPE_CHECKING:
    from frameloom.memory.plan import Plan


@with_parts
def plan(
    parts: dict[str, str],
    model: Annotated[
        str | None,
        typer.Argument(
            help="As --model, or the name of a published model such as wan2.2-t2v-a14b: nothing is fetched."
        ),
    ] = None,
    of_model: Annotated[str | None, typer.Option("--model", help="The same as the argument.")] = None,
    variant: VariantOption = "",
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    height: HeightOption = None,
    frames: FramesOption = None,
    windows: WindowsOption = None,
    window_frames: WindowFramesOption = None,
    window_overlap: WindowOverlapOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    device: Annotated[
        str, typer.Option(help="auto, a device that is here (cuda:1), or one that is not: H100, 4090, T4, M3 Max, ...")
    ] = "auto",
    gpus: Annotated[int, typer.Option(help="So many of them.")] = 1,
    memory: Annotated[str, typer.Option(help="What may be used of the device: auto, or bytes such as 24GB.")] = "auto",
    residence: ResidenceOption = "auto",
    host_memory: Annotated[
        str, typer.Option(help="What may be used of its host: auto, or bytes such as 32GB; a CPU has --memory alone.")
    ] = "auto",
    dtype: DtypeOption = "auto",
    quantized: Annotated[str, typer.Option(help="Quantized weights: keep or expand.")] = "keep",
    preset: Annotated[str | None, typer.Option(help="lightning: 4 steps without guidance.")] = None,
    exactness: ExactnessOption = "rounding",
    rewrite: RewriteOption = None,
    vae_memory: VaeMemoryOption = "auto",
    parallel: ParallelOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say what a request would take, and how it is arranged to fit, before anything of it is computed."""
    if model is not None and of_model is not None:
        raise RequestError(f"two models were given, {model!r} and {of_model!r}; give one")
    if not 1 <= gpus <= MOST_GPUS:
        raise RequestError(f"{gpus} devices cannot be planned; use 1 to {MOST_GPUS}")
    config = EngineConfig(
        dtype=dtype, quantized=quantized, preset=preset, exactness=exactness, rewrites=tuple(rewrite or ()),
        vae_memory=vae_memory, parallel=parallel, residence=residence,
    )  # fmt: skip
    found = frameloom.plan(
        model or of_model, parts=parts or None, device=device, gpus=gpus, memory=memory, host_memory=host_memory,
        config=config, variant=variant, width=width, height=height, num_frames=frames, steps=steps,
        guidance_scale=guidance, windows=windows, window_frames=window_frames, window_overlap=window_overlap,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.record()))
    else:
        _print_plan(found)


def _print_plan(plan: "Plan") -> None:
    console = page(120)
    console.print(f"{plan.model}: {plan.request}, on {plan.device}", style="bold", soft_wrap=True)
    table = Table("stage", "peak of the device", "of its host", "time")
    for stage in plan.stages:
        host = told_bytes(stage.host_bytes) if stage.host_bytes else ""
        table.add_row(stage.stage, told_bytes(stage.device_bytes), host, told_seconds(stage.seconds))
    there = f"of {told_bytes(plan.memory_bytes)}"
    table.add_row(
        "together", f"{told_bytes(plan.arranged.device_bytes)} {there}", "", told_seconds(plan.arranged.seconds)
    )
    console.print(table)
    for choice in plan.choices:
        console.print(f"{choice.what}: {choice.chosen} ({choice.reason})", soft_wrap=True)
    console.print(f"seconds by {plan.rates}", soft_wrap=True)
    if plan.cheaper is not None:
        less, longer = plan.cheaper.device_bytes, told_seconds(plan.cheaper.seconds)
        console.print(f"with less memory: {plan.cheaper}: {told_bytes(less)}, {longer}", soft_wrap=True)
    if plan.refusal:
        console.print(f"it does not fit: {plan.refusal}", style="red", soft_wrap=True)
