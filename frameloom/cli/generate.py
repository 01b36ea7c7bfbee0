"""`frameloom generate`."""

import functools
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

import frameloom
from frameloom.cli.console import byte_bars, console_of, progress_of
from frameloom.cli.ending import fate, last_words
from frameloom.cli.made import print_made
from frameloom.cli.options import (
    AttentionOption,
    CompileOption,
    DeviceOption,
    DtypeOption,
    ExactnessOption,
    FramesOption,
    GpusOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    MemoryOption,
    ModelOption,
    ParallelOption,
    QuietOption,
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
from frameloom.cli.ranks import is_first, share
from frameloom.config import memory_bytes, residences
from frameloom.errors import RequestError
from frameloom.pipeline.target import check_output, check_sheet
from frameloom.request import check_request
from frameloom.settings import launched
from frameloom.shapes.advice import advice
from frameloom.types import EngineConfig, GenerateRequest

if TYPE_CHECKING:
    from frameloom.memory.plan import Plan


@with_parts
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
    height: HeightOption = None,
    frames: FramesOption = None,
    windows: WindowsOption = None,
    window_frames: WindowFramesOption = None,
    window_overlap: WindowOverlapOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    guidance_2: Annotated[float | None, typer.Option(help="Guidance scale of the low-noise expert.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file.")] = None,
    quality: Annotated[int | None, typer.Option(help="0 (smallest) to 100 (best) for mp4 and webm.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    exactness: ExactnessOption = "rounding",
    rewrite: RewriteOption = None,
    compilation: CompileOption = "auto",
    attention: AttentionOption = "auto",
    vae_memory: VaeMemoryOption = "auto",
    memory: MemoryOption = "auto",
    residence: ResidenceOption = "auto",
    prompt_cache: Annotated[
        bool, typer.Option(help="Keep what the text encoder made of prompts in the cache folder.")
    ] = True,
    gpus: GpusOption = None,
    parallel: ParallelOption = "auto",
    journal: Annotated[bool, typer.Option(help="Keep what is computed, for `frameloom resume`.")] = True,
    keep_latents: Annotated[bool, typer.Option("--keep-latents", help="Keep the latents when all is done.")] = False,
    preview: Annotated[
        str | None, typer.Option(help="A .png that shows what the video is becoming, or an .apng, in which it moves.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say which rewrites are used, and why.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Generate a video from a prompt."""
    first, console = is_first(), console_of(quiet=quiet or as_json)
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
    if target and preview is not None:
        check_sheet(preview, target)
    memory_bytes(vae_memory)
    memory_bytes(memory)
    residences(residence)
    config: dict[str, Any] = {
        "quantized": quantized, "preset": preset, "dtype": dtype, "exactness": exactness, "rewrites": rewrite or (),
        "compilation": compilation, "vae_memory": vae_memory, "parallel": parallel, "memory": memory,
        "residence": residence, "prompt_cache": prompt_cache,
    }  # fmt: skip
    before = target.written() if target else ()
    since = time.time()
    with last_words(functools.partial(fate, target, before, since)):
        share(gpus, parallel, target=target, since=since)
        if model is None and not parts and (hint := advice(prompt)):
            console.print(hint, style="yellow")
        foreseen = _foreseen(model, parts, options, EngineConfig(**config), device=device, variant=variant)
        if foreseen is not None and launched() is None:  # several ranks find out together
            config["residence"] = foreseen.arranged.layout.asked
            if not foreseen.arranged.layout.is_resident:
                console.print(f"{foreseen.arranged.layout}: {foreseen.choices[0].reason}", soft_wrap=True)
        begun = time.perf_counter()
        with byte_bars(console) as on_bytes:
            engine = frameloom.load(
                model, parts=parts, variant=variant, loras=lora or (), device=device, attention=attention,
                on_bytes=on_bytes, **config,
            )  # fmt: skip
        with engine:
            loaded_s = time.perf_counter() - begun
            reasons = [str(decision) for decision in engine.decisions] if explain else []
            for reason in reasons:
                console.print(reason, soft_wrap=True)
            with progress_of(console) as report:
                made = engine.generate_to(
                    output, prompt, quality=quality, progress=report, job=journal, keep_latents=keep_latents,
                    preview=preview, **options,
                )  # fmt: skip
    if first:
        record = {**made, "seconds": {"load": loaded_s, **made["seconds"]}}
        if foreseen is not None:
            record["foreseen"] = frameloom.compare_plan(foreseen, made)
        if explain:
            record["rewrites"] = reasons
        print_made(record, console, as_json=as_json)


def _foreseen(
    model: str | None,
    parts: dict[str, str],
    options: dict[str, Any],
    config: EngineConfig,
    *,
    device: str,
    variant: str,
) -> "Plan | None":
    """The plan of a request, by the first rank; None where the size is that of a video which has not been read yet.

    Raises RequestError for what does not fit, before any weight is read.
    """
    place = launched()
    of_videos = options["video"] is not None or options["control_video"] is not None
    of_unknown_size = of_videos and None in (options["width"], options["height"], options["num_frames"])
    if not is_first() or of_unknown_size:
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
        **request,
    )
    if plan.refusal:
        raise RequestError(plan.refusal)
    return plan


def _one_or_each(numbers: list[float] | None) -> float | list[float] | None:
    """What an option that was given once means for all, and given several times for each."""
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers or None
