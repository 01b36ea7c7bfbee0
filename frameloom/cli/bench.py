"""`frameloom bench`."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

import frameloom
from frameloom.cli.console import console_of, told_bytes
from frameloom.cli.options import (
    AttentionOption,
    CompileOption,
    DeviceOption,
    ExactnessOption,
    GuidanceOption,
    JsonOption,
    ModelOption,
    ParallelOption,
    RewriteOption,
    StepsOption,
    VaeMemoryOption,
)
from frameloom.cli.ranks import is_first
from frameloom.config import memory_bytes, video_size
from frameloom.settings import launched

bench = typer.Typer(help="Paired timings against the reference implementation.", no_args_is_help=True)
_SHARES = ("linear", "attention", "other")
_SIDES = ("ours", "diffusers")

_VaeOption = Annotated[str, typer.Option(help="2.1, 2.2 or tiny: the config; weights are random.")]
_DitOption = Annotated[str, typer.Option(help="1.3B, 14B, 5B or tiny: the config; weights are random.")]
_LayersOption = Annotated[int | None, typer.Option(help="Only so many layers; all by default.")]
_SizeOption = Annotated[str, typer.Option(help="HEIGHTxWIDTHxFRAMES in pixels.")]
_DtypeOption = Annotated[str, typer.Option(help="float32 or bfloat16.")]
_GuidedOption = Annotated[bool, typer.Option(help="With and without the prompt, as guidance needs it.")]
_RoundsOption = Annotated[int, typer.Option(help="Timed rounds, after one that warms up.")]


@bench.command("vae")
def bench_vae(
    vae: _VaeOption = "2.1",
    direction: Annotated[str, typer.Option(help="decode or encode.")] = "decode",
    size: _SizeOption = "240x320x17",
    dtype: _DtypeOption = "float32",
    baseline: Annotated[str, typer.Option(help="shipped, or channels_last weights and input.")] = "shipped",
    allocator: Annotated[str, typer.Option(help="default or tuned, for both sides.")] = "tuned",
    rounds: _RoundsOption = 3,
    device: DeviceOption = "auto",
    exactness: ExactnessOption = "rounding",
    rewrite: RewriteOption = None,
    vae_memory: VaeMemoryOption = "auto",
    peaks: Annotated[bool, typer.Option(help="Also measure the peak memory, in one more run of each side.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Time the VAE against diffusers.AutoencoderKLWan with the same weights, both in turns."""
    height, width, frames = video_size(size)
    record = frameloom.bench_vae(
        vae=vae, direction=direction, height=height, width=width, frames=frames, dtype=dtype, baseline=baseline,
        allocator=allocator, rounds=rounds, device=device, exactness=exactness, rewrites=tuple(rewrite or ()),
        memory_bytes=memory_bytes(vae_memory), peaks=peaks,
    )  # fmt: skip
    if as_json:
        print(json.dumps(record))
        return
    rows = {"of the matmul rate": [f"{record['fraction_of_peak'][side]:.0%}" for side in _SIDES]}
    if peaks:
        rows["peak memory"] = [told_bytes(record["peak_bytes"][side]) for side in _SIDES]
    _print_comparison(f"Wan {vae} {direction}, {size}, {dtype}, {allocator} allocator", record, rows)


@bench.command("dit")
def bench_dit(
    dit: _DitOption = "1.3B",
    layers: _LayersOption = None,
    size: _SizeOption = "240x416x17",
    dtype: _DtypeOption = "float32",
    guided: _GuidedOption = True,
    baseline: Annotated[str, typer.Option(help="shipped, or compiled by torch.compile.")] = "shipped",
    rounds: _RoundsOption = 3,
    device: DeviceOption = "auto",
    exactness: ExactnessOption = "rounding",
    rewrite: RewriteOption = None,
    compilation: CompileOption = "auto",
    attention: AttentionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time a denoising step against diffusers.WanTransformer3DModel with the same weights, both in turns."""
    height, width, frames = video_size(size)
    record = frameloom.bench_dit(
        dit=dit, layers=layers, height=height, width=width, frames=frames, dtype=dtype, guided=guided,
        baseline=baseline, device=device, rounds=rounds, exactness=exactness, rewrites=tuple(rewrite or ()),
        compilation=compilation, attention=attention,
    )  # fmt: skip
    if as_json:
        print(json.dumps(record))
        return
    rows = {"of the matmul rate": [f"{record['fraction_of_peak'][side]:.0%}" for side in _SIDES]}
    rows |= {f"time in {part}": [f"{record['shares'][side][part]:.0%}" for side in _SIDES] for part in _SHARES}
    kind = "guided step" if guided else "step"
    _print_comparison(f"Wan {dit}, one {kind}, {size}, {record['tokens']} tokens, {dtype}", record, rows)


@bench.command("generate")
def bench_generate(
    model: ModelOption = None,
    prompt: Annotated[str, typer.Option(help="What the video should show.")] = "a red circle moving left",
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTHxFRAMES in pixels; the checkpoint's by default.")
    ] = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    dtype: _DtypeOption = "float32",
    rounds: _RoundsOption = 3,
    device: DeviceOption = "auto",
    exactness: ExactnessOption = "rounding",
    rewrite: RewriteOption = None,
    compilation: CompileOption = "auto",
    attention: AttentionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time a whole request against diffusers.WanPipeline on the same checkpoint, both in turns."""
    record = frameloom.bench_generate(
        model, prompt=prompt, size=video_size(size) if size else None, steps=steps, guidance=guidance, dtype=dtype,
        rounds=rounds, device=device, exactness=exactness, rewrites=tuple(rewrite or ()), compilation=compilation,
        attention=attention,
    )  # fmt: skip
    if as_json:
        print(json.dumps(record))
        return
    rows = {stage: [f"{seconds:.2f}", ""] for stage, seconds in record["stages"].items()}
    rows["levels of 255 apart"] = [str(record["levels_apart"]), ""]
    _print_comparison(f"{record['what']}, {dtype}", record, rows)


@bench.command("drop-in")
def bench_drop_in(
    pipeline: Annotated[str, typer.Option(help="A class of Diffusers, one of its kinds, or all.")] = "WanPipeline",
    model: Annotated[str | None, typer.Option(help="A pipeline's folder instead, as Diffusers saves it.")] = None,
    widths: Annotated[str, typer.Option(help="full or small: of the VAEs of random pipelines.")] = "full",
    size: _SizeOption = "256x320x17",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 2,
    rounds: _RoundsOption = 3,
    allocator: Annotated[str, typer.Option(help="default or tuned, for both sides.")] = "tuned",
    device: DeviceOption = "auto",
    exactness: ExactnessOption = "rounding",
    peaks: Annotated[bool, typer.Option(help="Also measure the peak memory, in one more run of each side.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Time Diffusers' pipelines accelerated by frameloom.accelerate and as they come, both in turns."""
    height, width, frames = video_size(size)
    record = frameloom.bench_drop_in(
        pipeline=pipeline, model=model, widths=widths, height=height, width=width, frames=frames, steps=steps,
        rounds=rounds, allocator=allocator, device=device, exactness=exactness, peaks=peaks,
    )  # fmt: skip
    if as_json:
        print(json.dumps(record))
        return
    for found in record["pipelines"]:
        _print_drop_in(f"{found['pipeline']}, {size}, {steps} steps", found)


@bench.command("parallel")
def bench_parallel(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks to compare; 1 is the measure of the others.")] = "1,2",
    stages: Annotated[str, typer.Option(help="denoise (one step), decode (one video), or both.")] = "denoise,decode",
    dit: _DitOption = "1.3B",
    layers: _LayersOption = None,
    vae: _VaeOption = "2.1",
    size: _SizeOption = "240x416x17",
    dtype: _DtypeOption = "float32",
    guided: _GuidedOption = True,
    parallel: ParallelOption = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Of each rank on a CPU; by default the most have one core.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Starts of every number of ranks, in turns.")] = 3,
    device: DeviceOption = "auto",
    record_to: Annotated[str | None, typer.Option(hidden=True, help="Where ranks that were started tell.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a denoising step and a decode over several ranks, beside what the cost model predicts."""
    height, width, frames = video_size(size)
    record = frameloom.bench_parallel(
        ranks=tuple(int(text) if text.isdigit() else 0 for text in ranks.split(",")), stages=tuple(stages.split(",")),
        dit=dit, layers=layers, vae=vae, height=height, width=width, frames=frames, dtype=dtype, guided=guided,
        parallel=parallel, device=device, threads=threads, rounds=rounds, record_to=record_to,
    )  # fmt: skip
    place = launched()
    if record_to is not None or not is_first():
        return
    if as_json or place is not None:  # under torchrun there is no number of ranks to compare with
        print(json.dumps(record))
        return
    for stage, rows in record["stages"].items():
        what = f"Wan {dit}, one step" if stage == "denoise" else f"Wan VAE {vae}, decode"
        _print_scaling(f"{what}, {size}, {dtype}, {record['threads']} threads a rank", rows)
    if max(row["ranks"] for row in rows) * record["threads"] > record["cores"]:
        console_of(quiet=False).print(f"more threads than the {record['cores']} cores: no measure of scaling")


def _print_scaling(title: str, rows: list[dict[str, Any]]) -> None:
    """What a scaling benchmark found: a row for each number of ranks."""
    columns = ("ranks", "seconds", "efficiency", "predicted", "sent per rank", "peak memory per rank")
    table = Table(*columns, title=title)
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            str(row["ranks"]),
            f"{seconds['median']:.3g} ({seconds['low']:.3g} to {seconds['high']:.3g})",
            f"{row['efficiency']:.0%}",
            f"{row['predicted']['seconds']:.3g} s, {row['predicted']['efficiency']:.0%}",
            told_bytes(max(row["sent_bytes"])),
            told_bytes(max(row["peak_bytes"])),
        )
    console_of(quiet=False).print(table)


def _print_drop_in(title: str, found: dict[str, Any]) -> None:
    """What was found of one pipeline: seconds and memory of both sides, the ratio, the error and what was taken."""
    console = console_of(quiet=False)
    table = Table("", "accelerated", "diffusers", title=title)
    sides = ("accelerated", "diffusers")
    between = [f"{low:.3g} to {high:.3g}" for low, high in (found["seconds_between"][side] for side in sides)]
    table.add_row("median seconds", *(f"{found['seconds'][side]:.3g}" for side in sides))
    table.add_row("between", *between)
    if found["peak_bytes"]:
        table.add_row("peak memory", *(told_bytes(found["peak_bytes"][side]) for side in sides))
    decode = found["decode"]
    if decode:
        table.add_row("decoding alone", *(f"{decode['seconds'][side]:.3g}" for side in sides))
    console.print(table)
    speedup = found["speedup"]
    told = f"{speedup['median']:.2f} times as fast ({speedup['low']:.2f} to {speedup['high']:.2f})"
    console.print(f"{told}, {found['levels_apart']:.2g} levels of 255 apart", style="bold")
    if decode and decode["share_of_gain"] is not None:
        seconds = decode["seconds"]["engine"]
        console.print(f"decoding has {decode['share_of_gain']:.0%} of the gain of the engine here ({seconds:.3g} s)")
    for entry in found["report"]:
        console.print(f"{entry['component']} {'taken' if entry['taken'] else 'left'}: {entry['what']}", soft_wrap=True)


def _print_comparison(title: str, record: dict[str, Any], rows: dict[str, list[str]]) -> None:
    """What a paired benchmark found: a column for each side, then the ratio, the error and the decisions."""
    console = console_of(quiet=False)
    table = Table("", *_SIDES, title=title)
    table.add_row("median seconds", *(f"{record['seconds'][side]:.3g}" for side in _SIDES))
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    speedup = record["speedup"]
    console.print(
        f"{speedup['median']:.2f} times as fast ({speedup['low']:.2f} to {speedup['high']:.2f})", style="bold"
    )
    how = record.get("passage") or record.get("guidance")
    console.print(f"relative error {record['relative_error']:.1e}" + (f"; {how}" if how else ""), soft_wrap=True)
    for decision in record["decisions"]:
        console.print(decision, soft_wrap=True)
