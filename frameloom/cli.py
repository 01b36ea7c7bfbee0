"""The `frameloom` command: generate and inspect. The only place with exit codes, and the only one that prints.

Exit codes: 0 done, 1 our fault or a rank that died, 2 what was asked cannot be done (nothing was written),
130 interrupted, 143 terminated. With `--gpus` this process starts the ranks, which run the same command; rank 0 speaks.
"""

import functools
import inspect as inspection
import io
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

import frameloom
from frameloom.config import check_request, memory_bytes, residences, video_size
from frameloom.errors import FrameloomError, RequestError
from frameloom.parallel.heart import Ending, Heart, is_lost
from frameloom.parallel.launch import count_ranks, run_ranks
from frameloom.pipeline.target import OutputTarget, check_output
from frameloom.settings import LOGGER_NAME, Launched, ask_for_same_sums, launched, log_level
from frameloom.shapes.advice import advice
from frameloom.types import EngineConfig, GenerateRequest, Progress

if TYPE_CHECKING:
    from frameloom.memory.plan import Plan

app = typer.Typer(
    help="Turn a prompt into a video with the Wan family of diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 130
_INTERRUPTION = Ending(code=_INTERRUPTED, message="interrupted; nothing was written")
_TERMINATION = Ending(code=128 + signal.SIGTERM, message="terminated; nothing was written")
_SECONDS_BETWEEN_LINES = 10.0
_STAGE_NAMES = {
    "text": "reading the prompt",
    "image": "reading pictures",
    "denoise": "denoising",
    "decode": "decoding",
    "encode": "encoding",
}

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="A checkpoint: a folder (Diffusers' layout or the original one), a weight file, or "
        "owner/name\\[@revision] of the hub. Default: the built-in model."
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda, rocm, npu, musa, xpu or mps; one of several by its number: cuda:1.")
]
ExactnessOption = Annotated[
    str, typer.Option(help="What a rewrite may change: bitwise (nothing), rounding, or lossy (the picture).")
]
RewriteOption = Annotated[
    list[str] | None, typer.Option(help="Switch one rewrite: NAME=on or NAME=off. May be given several times.")
]
CompileOption = Annotated[
    str, typer.Option("--compile", help="torch.compile: auto (where it is known to pay), on or off.")
]
AttentionOption = Annotated[
    str, typer.Option(help="auto, or a backend by its name: that one or an error; `frameloom doctor` lists them.")
]
VaeMemoryOption = Annotated[
    str, typer.Option(help="What the VAE may take besides its weights: auto, or bytes such as 6GB.")
]
GpusOption = Annotated[
    int | None, typer.Option(help="Share the work over so many devices of this machine (with --device cpu: processes).")
]
ParallelOption = Annotated[
    str, typer.Option(help="How to share: auto, or such as cfg=2,ulysses=2,ring=1,tp=1,vae=4: their product is --gpus.")
]
VariantOption = Annotated[
    str, typer.Option(help="Which weight files in Diffusers layout, such as fp16. Default: those without, or the only.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON record on standard output, and no table.")]


# The components that may be taken from elsewhere, and what each option says.
_PARTS = {
    "transformer": "Take the transformer from this file (safetensors, GGUF, .pth), folder, or owner/name/file.",
    "transformer_2": "The low-noise expert; found by its name beside --transformer.",
    "text_encoder": "Take the text encoder from this file or folder.",
    "vae": "Take the VAE from this file or folder.",
    "image_encoder": "Take the image encoder (CLIP) from this file or folder.",
    "tokenizer": "Folder of a tokenizer, where no other part brings one.",
}


def _with_parts(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options --transformer, --vae and so on, and hand them over as its argument `parts`."""
    signature = inspection.signature(command)
    options = [
        inspection.Parameter(
            name,
            inspection.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, typer.Option("--" + name.replace("_", "-"), help=says)],
        )
        for name, says in _PARTS.items()
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        sources = {name: given.pop(name) for name in _PARTS}
        command(parts={name: source for name, source in sources.items() if source is not None}, **given)

    own = [parameter for name, parameter in signature.parameters.items() if name != "parts"]
    parameters = [parameter.replace(kind=inspection.Parameter.KEYWORD_ONLY) for parameter in own]
    with_options.__signature__ = signature.replace(parameters=[*parameters, *options])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *options)}
    return with_options


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
@_with_parts
def generate(
    parts: dict[str, str],
    prompt: Annotated[str, typer.Argument(help="What the video should show.")],
    model: ModelOption = None,
    variant: VariantOption = "",
    quantized: Annotated[
        str, typer.Option(help="Quantized weights: keep them as they are stored, or expand them (faster, more memory).")
    ] = "keep",
    lora: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA: FILE, FILE:0.8 or high:FILE:0.8 (low: for the other expert). Several are added up."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="lightning: 4 steps without guidance, for models and LoRAs distilled for it.")
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="video.mp4, .gif or .webm (replaced if it exists), a new folder of PNG files, or a %04d.png pattern.",
        ),
    ] = "frameloom.mp4",
    image: Annotated[str | None, typer.Option(help="The first frame: a PNG, JPEG, WebP, GIF, BMP or TIFF.")] = None,
    last_image: Annotated[str | None, typer.Option(help="The last frame.")] = None,
    video: Annotated[str | None, typer.Option(help="A video to start from, see --strength.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --video is made anew, up to 1 (all); 0.8 by default.")
    ] = None,
    control_video: Annotated[str | None, typer.Option(help="With VACE: a video to follow.")] = None,
    mask: Annotated[
        str | None, typer.Option(help="Of --control-video, a video: white is made anew, black is kept.")
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="With VACE: an image of what to show. May be given several times.")
    ] = None,
    control_strength: Annotated[
        list[float] | None,
        typer.Option(help="How much all that counts: once, or once for each VACE layer; 1 by default."),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels; of pictures their shape decides.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 4k+1.")] = None,
    windows: Annotated[
        bool | None,
        typer.Option(help="Denoise more frames than the model was trained on in windows (lossy), blended."),
    ] = None,
    window_frames: Annotated[int | None, typer.Option(help="Frames of a window; by default what it knows.")] = None,
    window_overlap: Annotated[int | None, typer.Option(help="Frames that neighbours share at least.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns guidance off.")] = None,
    guidance_2: Annotated[float | None, typer.Option(help="Guidance scale of the low-noise expert.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file.")] = None,
    quality: Annotated[int | None, typer.Option(help="0 (smallest) to 100 (best) for mp4 and webm.")] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    exactness: ExactnessOption = "rounding",
    rewrite: RewriteOption = None,
    compilation: CompileOption = "auto",
    attention: AttentionOption = "auto",
    vae_memory: VaeMemoryOption = "auto",
    memory: Annotated[
        str, typer.Option(help="What all may take: auto, or bytes such as 24GB; weights then come as they are needed.")
    ] = "auto",
    residence: Annotated[
        str, typer.Option(help="Where weights are: auto, or such as text=moved,transformer=streamed (or resident).")
    ] = "auto",
    prompt_cache: Annotated[
        bool, typer.Option(help="Keep what the text encoder made of prompts in the cache folder.")
    ] = True,
    gpus: GpusOption = None,
    parallel: ParallelOption = "auto",
    journal: Annotated[bool, typer.Option(help="Keep what is computed, for `frameloom resume`.")] = True,
    keep_latents: Annotated[bool, typer.Option("--keep-latents", help="Keep the latents when all is done.")] = False,
    preview: Annotated[
        str | None, typer.Option(help="A PNG file that shows, while denoising, what the video is becoming.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say which rewrites are used, and why.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Generate a video from a prompt."""
    first = _is_first(launched())
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
        "image": frameloom.read_image(image) if image is not None else None,
        "last_image": frameloom.read_image(last_image) if last_image is not None else None,
        "video": video,
        "strength": strength,
        "control_video": control_video,
        "mask": mask,
        "references": [frameloom.read_image(path) for path in reference] if reference else None,
        "control_strength": _one_or_each(control_strength),
        "windows": windows,
        "window_frames": window_frames,
        "window_overlap": window_overlap,
    }
    check_request(GenerateRequest(prompt=prompt, **options))
    target = check_output(output, fps=fps, quality=quality) if first else None
    memory_bytes(vae_memory)
    memory_bytes(memory)
    residences(residence)
    before = target.written() if target else ()
    since = time.time()
    with _last_words(functools.partial(_fate, target, before, since)):
        _share(gpus, parallel, target=target, since=since)
        if model is None and not parts and (hint := advice(prompt)):
            console.print(hint, style="yellow")
        config: dict[str, Any] = {
            "quantized": quantized, "preset": preset, "dtype": dtype, "exactness": exactness,
            "rewrites": rewrite or (), "compilation": compilation, "vae_memory": vae_memory, "parallel": parallel,
            "memory": memory, "residence": residence, "prompt_cache": prompt_cache,
        }  # fmt: skip
        foreseen = _foreseen(model, parts, options, EngineConfig(**config), device=device, variant=variant)
        begun = time.perf_counter()
        with _byte_bars(console) as on_bytes:
            engine = frameloom.load(
                model, parts=parts, variant=variant, loras=lora or (), device=device, attention=attention,
                on_bytes=on_bytes, **config,
            )  # fmt: skip
        with engine:
            loaded_s = time.perf_counter() - begun
            if explain:
                for decision in engine.decisions:
                    console.print(str(decision), soft_wrap=True)
            with _progress(console) as report:
                if quality is not None:
                    options["quality"] = quality
                made = engine.generate_to(
                    output, prompt, progress=report, job=journal, keep_latents=keep_latents, preview=preview, **options
                )
    if not first:
        return
    record = {**made, "seconds": {"load": loaded_s, **made["seconds"]}}
    if foreseen is not None:
        record["foreseen"] = frameloom.compare_plan(foreseen, made)
    if explain:
        record["rewrites"] = [str(decision) for decision in engine.decisions]
    _print_made(record, console, as_json=as_json)


def _foreseen(
    model: str | None,
    parts: dict[str, str],
    options: dict[str, Any],
    config: EngineConfig,
    *,
    device: str,
    variant: str,
) -> "Plan | None":
    """The plan of a request, by the first rank; None where only what must be fetched or read first would tell.

    Raises RequestError for what does not fit, before any weight is read.
    """
    place = launched()
    of_videos = options["video"] is not None or options["control_video"] is not None
    sources = [*parts.values(), *([] if model is None else [model])]
    if not _is_first(place) or of_videos or not all(os.path.exists(os.path.expanduser(source)) for source in sources):
        return None
    gpus = 1 if place is None else place.world_size
    request = {name: value for name, value in options.items() if value is not None and name != "seed"}
    plan = frameloom.plan(
        model,
        parts=parts or None,
        device=device,
        gpus=gpus,
        config=config,
        variant=variant,
        here_only=True,
        memory=config.memory,
        **request,
    )
    if plan.refusal:
        raise RequestError(plan.refusal)
    return plan


def _print_made(record: dict[str, Any], console: Console, *, as_json: bool) -> None:
    """What became of a request."""
    if as_json:
        print(json.dumps(record))
    else:
        console.print(_timing_table(record))
        console.print(f"The video is at {record['output']}", style="bold", soft_wrap=True)


@app.command()
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
    console = _console(quiet=quiet or as_json)
    console.print(f"going on with {begun.name}: {begun.request.prompts[0]}", soft_wrap=True)
    ranks = begun.origin.ranks if begun.origin.ranks > 1 else None
    with _last_words(functools.partial(_fate, target, target.written(), begun.began)):
        names = [] if job is not None else [begun.name]  # all ranks the same
        _share(ranks, begun.origin.config.parallel, target=target, since=begun.began, further=names)
        with _progress(console) as report:
            made = frameloom.resume(begun.name, anyway=anyway, progress=report)
    if _is_first(launched()):
        _print_made(made, console, as_json=as_json)


@app.command()
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
        table.add_row(job["name"], job["state"], _bytes(job["bytes"]), job["prompt"], job["output"])
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


@app.command()
@_with_parts
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
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 4k+1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns guidance off.")] = None,
    device: Annotated[
        str, typer.Option(help="auto, a device that is here (cuda:1), or one that is not: H100, 4090, T4, M3 Max, ...")
    ] = "auto",
    gpus: Annotated[int, typer.Option(help="So many of them.")] = 1,
    memory: Annotated[str, typer.Option(help="What may be used of the device: auto, or bytes such as 24GB.")] = "auto",
    host_memory: Annotated[
        str, typer.Option(help="What may be used of its host: auto, or bytes such as 32GB.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
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
    if gpus < 1:
        raise RequestError(f"{gpus} devices compute nothing; use 1 or more")
    config = EngineConfig(
        dtype=dtype, quantized=quantized, preset=preset, exactness=exactness, rewrites=tuple(rewrite or ()),
        vae_memory=vae_memory, parallel=parallel,
    )  # fmt: skip
    found = frameloom.plan(
        model or of_model, parts=parts or None, device=device, gpus=gpus, memory=memory, host_memory=host_memory,
        config=config, variant=variant, width=width, height=height, num_frames=frames, steps=steps,
        guidance_scale=guidance,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.record()))
    else:
        _print_plan(found)


def _print_plan(plan: "Plan") -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
    console.print(f"{plan.model}: {plan.request}, on {plan.device}", style="bold", soft_wrap=True)
    table = Table("stage", "peak of the device", "of its host", "time")
    for stage in plan.stages:
        host = _bytes(stage.host_bytes) if stage.host_bytes else ""
        table.add_row(stage.stage, _bytes(stage.device_bytes), host, _duration(stage.seconds))
    there = f"of {_bytes(plan.memory_bytes)}"
    table.add_row("together", f"{_bytes(plan.arranged.device_bytes)} {there}", "", _duration(plan.arranged.seconds))
    console.print(table)
    for choice in plan.choices:
        console.print(f"{choice.what}: {choice.chosen} ({choice.reason})", soft_wrap=True)
    console.print(f"seconds by {plan.rates}", soft_wrap=True)
    if plan.cheaper is not None:
        less, longer = plan.cheaper.device_bytes, _duration(plan.cheaper.seconds)
        console.print(f"with less memory: {plan.cheaper}: {_bytes(less)}, {longer}", soft_wrap=True)
    if plan.refusal:
        console.print(f"it does not fit: {plan.refusal}", style="red", soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds >= 0.05 else f"{1000 * seconds:.1f} ms"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@app.command()
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Folder, weight file, LoRA or hub id; without one the built-in model.")
    ] = None,
    variant: VariantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint, a weight file or a LoRA holds, without loading it."""
    with _byte_bars(_console(quiet=as_json)) as on_bytes:
        facts = frameloom.describe(model, variant=variant, on_bytes=on_bytes)
    if as_json:
        print(json.dumps(facts))
        return
    if facts.get("kind") == "LoRA":
        _print_lora(facts)
        return
    width = None if sys.stdout.isatty() else 160  # a pipe has no width: cut nothing off
    console = Console(width=width, markup=False, highlight=False)
    table = Table()
    for heading in ("component", "what it is", "parameters", "dtypes", "size", "files"):
        table.add_column(heading, no_wrap=True)
    for part in facts["components"]:
        size, count = _bytes(part["bytes"]), f"{part['parameters']:,}"
        table.add_row(part["name"], part["what"], count, ", ".join(part["dtypes"]), size, str(part["files"]))
    table.add_row("together", "", f"{facts['parameters']:,}", "", _bytes(facts["bytes"]), "", style="bold")
    if "lacks" in facts:
        lacks = ", ".join(facts["lacks"]).replace("_", " ")
        console.print(f"{facts['model']}: part of a checkpoint, which also needs: {lacks}", soft_wrap=True)
        console.print(table)
        return
    console.print(f"{facts['model']}: {facts['pipeline']}, {facts['scheduler']}", soft_wrap=True)
    console.print(table)
    console.print("defaults: " + ", ".join(f"{key} {value!r}" for key, value in facts["defaults"].items()))


def _print_lora(facts: dict[str, Any]) -> None:
    console = Console(markup=False, highlight=False)
    ranks = ", ".join(map(str, facts["ranks"])) or "none"
    console.print(
        f"{facts['model']}: a LoRA of {facts['keys']} keys for {facts['modules']} modules in {facts['layers']} layers "
        f"({', '.join(facts['parts'])}), rank {ranks}, {', '.join(facts['dtypes'])}, {_bytes(facts['bytes'])}",
        soft_wrap=True,
    )
    if facts["unknown_keys"]:
        console.print(f"keys of no known kind: {', '.join(facts['unknown_keys'])}", soft_wrap=True)


@app.command()
@_with_parts
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
    console = _console(quiet=quiet)
    again = "the same command goes on where it was ended"
    with _last_words(lambda: again), _byte_bars(console) as bars:
        files = frameloom.convert_model(
            None if source == "-" else source, destination, to=to, dtype=dtype, parts=parts, variant=variant,
            on_bytes=bars or _byte_lines(console),
        )  # fmt: skip
    for file in files:
        console.print(f"{file}: {_bytes(file.stat().st_size)}, read back", soft_wrap=True)


@app.command()
@_with_parts
def verify(
    parts: dict[str, str],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    gpus: GpusOption = None,
    parallel: ParallelOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prove on this machine that the fast ways, and weights kept quantized, compute what the reference does.

    Exit code 1 if one does not. With several devices: that they compute together what one of them computes alone.
    """
    _share(gpus, parallel)
    findings = []
    console = _console(quiet=as_json)
    console.print(
        f"{'':<9}{'rewrite':<44}{'max abs':>8}{'relative':>10}{'PSNR':>8}{'speed':>8}  promise", soft_wrap=True
    )
    with _byte_bars(console) as on_bytes:
        found = frameloom.verify_model(model, parts=parts, device=device, parallel=parallel, on_bytes=on_bytes)
        for finding in found:  # one by one: some take minutes
            findings.append(finding)
            console.print(_finding_line(finding), soft_wrap=True)
    broken = [finding.name for finding in findings if finding.kept is False]
    if as_json and _is_first(launched()):
        print(json.dumps({"findings": [finding.record() for finding in findings], "broken": broken}))
    else:
        console.print(f"{len(broken)} promises are broken: {', '.join(broken)}" if broken else "every promise is kept")
    if broken:
        raise typer.Exit(1)


def _finding_line(finding: Any) -> str:
    """A finding of `verify` in one line."""
    start = f"{finding.verdict:<9}{finding.name:<44}"
    if finding.kept is None:
        return f"{start}{finding.note}"
    numbers = f"{finding.max_abs:>8.1e}{finding.relative:>10.1e}{finding.psnr_db:>5.0f} dB{finding.speedup:>7.2f}x"
    return f"{start}{numbers}  {finding.promise}" + (f": {finding.note}" if finding.note else "")


@app.command()
def doctor(device: DeviceOption = "auto", as_json: JsonOption = False) -> None:
    """Say what this machine has, what it lacks, what that costs, and how to get it."""
    findings = frameloom.diagnose(device)
    if as_json:
        print(json.dumps({"findings": [finding.record() for finding in findings]}))
        return
    table = Table("part", "here", "what was found", "what it costs, and what to do")
    for finding in findings:
        advice_given = "; ".join(filter(None, (finding.costs, finding.hint)))
        table.add_row(finding.part, "yes" if finding.found else "no", finding.what, advice_given)
    Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)


bench = typer.Typer(help="Paired timings against the reference implementation.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("vae")
def bench_vae(
    vae: Annotated[str, typer.Option(help="2.1, 2.2 or tiny: the config; weights are random.")] = "2.1",
    direction: Annotated[str, typer.Option(help="decode or encode.")] = "decode",
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTHxFRAMES in pixels.")] = "240x320x17",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    baseline: Annotated[str, typer.Option(help="shipped, or channels_last weights and input.")] = "shipped",
    allocator: Annotated[str, typer.Option(help="default or tuned, for both sides.")] = "tuned",
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that warms up.")] = 3,
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
        rows["peak memory"] = [_bytes(record["peak_bytes"][side]) for side in _SIDES]
    _print_comparison(f"Wan {vae} {direction}, {size}, {dtype}, {allocator} allocator", record, rows)


@bench.command("dit")
def bench_dit(
    dit: Annotated[str, typer.Option(help="1.3B, 14B, 5B or tiny: the config; weights are random.")] = "1.3B",
    layers: Annotated[int | None, typer.Option(help="Only so many layers; all by default.")] = None,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTHxFRAMES in pixels.")] = "240x416x17",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    guided: Annotated[bool, typer.Option(help="With and without the prompt, as guidance needs it.")] = True,
    baseline: Annotated[str, typer.Option(help="shipped, or compiled by torch.compile.")] = "shipped",
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that warms up.")] = 3,
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
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns guidance off.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that warms up.")] = 3,
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


@bench.command("parallel")
def bench_parallel(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks to compare; 1 is the measure of the others.")] = "1,2",
    stages: Annotated[str, typer.Option(help="denoise (one step), decode (one video), or both.")] = "denoise,decode",
    dit: Annotated[str, typer.Option(help="1.3B, 14B, 5B or tiny: the config; weights are random.")] = "1.3B",
    layers: Annotated[int | None, typer.Option(help="Only so many layers; all by default.")] = None,
    vae: Annotated[str, typer.Option(help="2.1, 2.2 or tiny: the config; weights are random.")] = "2.1",
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTHxFRAMES in pixels.")] = "240x416x17",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    guided: Annotated[bool, typer.Option(help="With and without the prompt, as guidance needs it.")] = True,
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
    if record_to is not None or not _is_first(place):
        return
    if as_json or place is not None:  # under torchrun there is no number of ranks to compare with
        print(json.dumps(record))
        return
    for stage, rows in record["stages"].items():
        what = f"Wan {dit}, one step" if stage == "denoise" else f"Wan VAE {vae}, decode"
        _print_scaling(f"{what}, {size}, {dtype}, {record['threads']} threads a rank", rows)
    if max(row["ranks"] for row in rows) * record["threads"] > record["cores"]:
        _console(quiet=False).print(f"more threads than the {record['cores']} cores: no measure of scaling")


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
            _bytes(max(row["sent_bytes"])),
            _bytes(max(row["peak_bytes"])),
        )
    _console(quiet=False).print(table)


def _print_comparison(title: str, record: dict[str, Any], rows: dict[str, list[str]]) -> None:
    """What a paired benchmark found: a column for each side, then the ratio, the error and the decisions."""
    console = _console(quiet=False)
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


_SHARES = ("linear", "attention", "other")
_SIDES = ("ours", "diffusers")


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
        ending = _INTERRUPTION
    except Exception as error:
        if place is None:
            raise
        ending = _rank_ending(error)
    if place is not None:
        _end_rank(ending, place, heart)
    if ending.message:
        print(f"frameloom: {ending.message}", file=sys.stderr)
    sys.exit(ending.code)


def _run() -> Ending:
    """Run the command that the arguments name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Progress through a pipe arrives as it happens; a name that the terminal cannot show is still told.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    _set_up_log()
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, _terminate)
    try:
        code = app(standalone_mode=False)
    except _Ended as ended:
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
    return _INTERRUPTION if code == _INTERRUPTED else Ending(code=code or 0)  # what the parser makes of Ctrl-C


class _Ended(SystemExit):
    """The command ends here, in this way; what was begun is tidied away as after an interrupt."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.code)
        self.ending = ending


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the tidying
    raise _Ended(_TERMINATION)


@contextmanager
def _last_words(became: Callable[[], str]) -> Iterator[None]:
    """Who is interrupted or terminated in here says what became of the output."""
    try:
        yield
    except KeyboardInterrupt:
        raise _Ended(Ending(code=_INTERRUPTED, message=f"interrupted; {became()}")) from None
    except _Ended as ended:
        if ended.ending is not _TERMINATION:
            raise
        raise _Ended(Ending(code=_TERMINATION.code, message=f"terminated; {became()}")) from None


def _fate(target: OutputTarget | None, before: tuple[int, ...], since: float) -> str:
    """What became of the output, and of what was computed for it."""
    if target is None:
        return "nothing was written"
    is_there = target.written() not in ((), before)
    if is_there:
        return f"the video had been written to {target.path}"
    return "; ".join(filter(None, ("nothing was written", _way_on(target, since))))


def _way_on(target: OutputTarget, since: float) -> str:
    """How to go on with what was computed, where any of it is kept."""
    job = frameloom.job_left_for(str(target.path), since=since)
    return f"`frameloom resume {job}` goes on from what was computed" if job else ""


def _share(
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
        message = "; ".join(filter(None, (message, _way_on(target, since))))
    raise _Ended(Ending(code=outcome.code, message=message))


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise RequestError("the working folder has been removed; change to one that exists") from None


def _say_error(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _rank_ending(error: Exception) -> Ending:
    """How a rank ends that failed in a way nobody expected, or because another rank is gone."""
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    if is_lost(error):
        return Ending(code=1, message=f"lost contact with the other ranks ({said})", lost=True)
    return Ending(code=1, message=f"failed with {type(error).__name__}: {said}", trace=traceback.format_exc())


def _end_rank(ending: Ending, place: Launched, heart: Heart | None) -> NoReturn:
    """End a rank at once: taking an interpreter apart may wait for other ranks. The launcher tells what went wrong."""
    if heart is not None:
        heart.tell(ending)
    elif ending.message:
        _say_error(f"{ending.trace}frameloom: rank {place.rank}: {ending.message}\n")
    with suppress(OSError):  # whoever read this may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(ending.code)


def _is_first(place: Launched | None) -> bool:
    """Whether this process speaks and writes: rank 0, or the only one."""
    return place is None or place.rank == 0


def _set_up_log() -> None:
    quiet = any(flag in sys.argv for flag in ("--quiet", "-q", "--json")) or not _is_first(launched())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[frameloom] %(message)s"))
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(handler)
    logger.setLevel(log_level(quiet=quiet))


def _console(*, quiet: bool) -> Console:
    return Console(
        quiet=quiet or not _is_first(launched()), highlight=False, markup=False
    )  # a path in brackets is no markup


def _one_or_each(numbers: list[float] | None) -> float | list[float] | None:
    """What an option that was given once means for all, and given several times for each."""
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers or None


@contextmanager
def _byte_bars(console: Console) -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback for the bytes of files that shows bars; None where there is no terminal: then the log tells."""
    if not console.is_terminal or console.quiet:
        yield None
        return
    columns = (TextColumn("{task.description:>28}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bars = Bars(*columns, console=console)
    tasks: dict[str, TaskID] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in tasks:
            bars.start()
            tasks[name] = bars.add_task(name, total=total)
        bars.update(tasks[name], completed=done, total=total)

    try:
        yield show
    finally:
        bars.stop()


def _byte_lines(console: Console) -> Callable[[str, int, int], None]:
    """The same in lines: one at the end of each file, and one every ten seconds."""
    told_s = time.monotonic()

    def tell(name: str, done: int, total: int) -> None:
        nonlocal told_s
        if done < total and time.monotonic() < told_s + _SECONDS_BETWEEN_LINES:
            return
        told_s = time.monotonic()
        console.print(f"{name}: {_bytes(done)}" + (f" of {_bytes(total)}" if done < total else ""))

    return tell


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
    """Seconds by stage, beside those that were foreseen."""
    foreseen = record.get("foreseen")
    table = Table("stage", "seconds", *(["foreseen"] if foreseen else []), "")
    for stage, seconds in record["seconds"].items():
        note = f"{seconds / len(record['step_seconds']):.3f} s/step" if stage == "denoise" else ""
        before = [_seconds_or_nothing(foreseen["seconds"].get(stage))] if foreseen else []
        table.add_row(stage, f"{seconds:.2f}", *before, note)
    peak = f"peak memory {_bytes(record['peak_memory_bytes'])}"
    before = [f"{sum(foreseen['seconds'].values()):.2f}"] if foreseen else []
    peak += f", foreseen {_bytes(foreseen['peak_memory_bytes'])}" if foreseen else ""
    table.add_row("together", f"{sum(record['seconds'].values()):.2f}", *before, peak)
    return table


def _seconds_or_nothing(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


def _bytes(count: int) -> str:
    amount, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
