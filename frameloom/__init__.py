"""Frameloom: a small, exact engine that turns a prompt into a video with the Wan family of diffusion models.

import frameloom
with frameloom.load() as engine:
    engine.generate("a red circle moving left").save("out.mp4")
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from frameloom import shapes
from frameloom.errors import (
    CheckpointError,
    FrameloomError,
    InputError,
    InternalError,
    OutputError,
    RequestError,
)
from frameloom.settings import ask_for_same_sums
from frameloom.types import EngineConfig, GenerateRequest

if TYPE_CHECKING:
    from pathlib import Path

    from frameloom.doctor import Finding as MachineFinding
    from frameloom.engine.engine import Engine
    from frameloom.engine.job import Job
    from frameloom.integrations.diffusers.report import Report
    from frameloom.memory.plan import Plan
    from frameloom.pipeline.media import Video
    from frameloom.types import ImageInput, Lora, Pictures, Progress, ProgressCallback
    from frameloom.verify.finding import Finding

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Engine",
    "FrameloomError",
    "InputError",
    "InternalError",
    "Lora",
    "OutputError",
    "Progress",
    "RequestError",
    "Video",
    "accelerate",
    "bench_dit",
    "bench_drop_in",
    "bench_generate",
    "bench_parallel",
    "bench_vae",
    "compare_plan",
    "convert_model",
    "describe",
    "diagnose",
    "forget_job",
    "job_left_for",
    "job_to_resume",
    "jobs",
    "load",
    "plan",
    "read_image",
    "restore",
    "resume",
    "shapes",
    "vae",
    "verify_model",
]

# Looked up on first use: `import frameloom` and every error at the door answer without loading torch.
_LAZY = {
    "Engine": "frameloom.engine.engine",
    "Lora": "frameloom.types",
    "Progress": "frameloom.types",
    "Video": "frameloom.pipeline.media",
    "accelerate_pipeline": "frameloom.integrations.diffusers.accelerate",
    "restore_pipeline": "frameloom.integrations.diffusers.accelerate",
    "build_engine": "frameloom.engine.build",
    "convert_model": "frameloom.weights.convert",
    "all_jobs": "frameloom.engine.jobs",
    "Place": "frameloom.engine.plan",
    "compare": "frameloom.engine.plan",
    "make_plan": "frameloom.engine.plan",
    "describe_checkpoint": "frameloom.engine.describe",
    "examine": "frameloom.doctor",
    "forget": "frameloom.engine.jobs",
    "image_of": "frameloom.pipeline.images",
    "left_for": "frameloom.engine.jobs",
    "resume_job": "frameloom.engine.resume",
    "to_resume": "frameloom.engine.resume",
    "verify": "frameloom.verify",
    "run_dit": "frameloom.bench.dit",
    "DitCase": "frameloom.bench.dit",
    "run_drop_in": "frameloom.bench.drop_in",
    "DropInCase": "frameloom.bench.drop_in",
    "run_generate": "frameloom.bench.generate",
    "GenerateCase": "frameloom.bench.generate",
    "run_parallel": "frameloom.bench.parallel",
    "ParallelCase": "frameloom.bench.parallel",
    "run_vae": "frameloom.bench.vae",
    "VaeCase": "frameloom.bench.vae",
}


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    exactness: str = "rounding",
    rewrites: Sequence[str] = (),
    compilation: str = "auto",
    attention: str = "auto",
    vae_memory: int | str = "auto",
    parallel: str = "auto",
    quantized: str = "keep",
    loras: "Sequence[Lora | str]" = (),
    preset: str | None = None,
    memory: int | str = "auto",
    residence: str = "auto",
    prompt_cache: bool = True,
    variant: str = "",
    on_bytes: Callable[[str, int, int], None] | None = None,
) -> "Engine":
    """Load a checkpoint: a folder, a weight file, or a hub id; without an argument the built-in model.

    `parts`: components from elsewhere, such as {"transformer": "wan.gguf", "vae": "wan_2.1_vae.safetensors"}; names are
    transformer, transformer_2, text_encoder, vae, image_encoder and tokenizer, and all that are needed are a model.
    `variant`: such as "fp16", of the weight files in Diffusers layout; by default those without, or the only one.
    `on_bytes` is told of a download: the repository, the bytes that are done, and of how many; without it the log is.
    The other options are explained in `frameloom.types.EngineConfig`; `Engine.set_loras` exchanges LoRAs between
    requests. Use the engine in a `with` statement, or call its `close`. Raises CheckpointError or RequestError, each
    one sentence.
    """
    ask_for_same_sums()
    config = EngineConfig(
        device=device, dtype=dtype, exactness=exactness, rewrites=rewrites, compilation=compilation,
        attention=attention, vae_memory=vae_memory, parallel=parallel, quantized=quantized, loras=loras, preset=preset,
        memory=memory, residence=residence, prompt_cache=prompt_cache,
    )  # fmt: skip
    engine: Engine = _lazy("build_engine")(
        _named(model, parts), config, parts=parts, variant=variant, on_bytes=on_bytes
    )
    return engine


def convert_model(
    model: str | os.PathLike[str] | None,
    destination: str | os.PathLike[str],
    *,
    to: str,
    dtype: str | None = None,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    variant: str = "",
    on_bytes: Callable[[str, int, int], None] | None = None,
) -> "list[Path]":
    """Write a checkpoint, as `load` takes it, into a folder: to="diffusers", "original" or "single-file".

    `dtype`: float32, bfloat16 or float16 for all but the VAE, None as stored. A second call goes on where the first was
    ended; every file is read back. `on_bytes` is told the file, or the repository it comes from, the bytes of it that
    are done, and of how many. `parts` and `variant`: as in `load`. Returns the weight files. Raises CheckpointError,
    OutputError or RequestError.
    """
    files: list[Path] = _lazy("convert_model")(
        _named(model, parts), destination, to=to, dtype=dtype, parts=parts, variant=variant, on_bytes=on_bytes
    )
    return files


def describe(
    model: str | os.PathLike[str] | None = None,
    *,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    variant: str = "",
    on_bytes: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """What is in a checkpoint or weight file, without loading it: components, parameters, dtypes, bytes, defaults.

    Also of a file that is part of a checkpoint, and of a LoRA. `parts`, `variant` and `on_bytes`: as in `load`.
    """
    facts: dict[str, Any] = _lazy("describe_checkpoint")(_named(model), parts=parts, variant=variant, on_bytes=on_bytes)
    return facts


def plan(
    model: str | os.PathLike[str] | None = None,
    *,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    device: str = "auto",
    gpus: int = 1,
    memory: int | str = "auto",
    host_memory: int | str = "auto",
    config: EngineConfig | None = None,
    variant: str = "",
    here_only: bool = False,
    **request: Any,
) -> "Plan":
    """What a request would take, before anything of it is computed, and the arrangement in which it fits.

    `model` as `load` takes it, of which only descriptions are read, or the name of a published model such as
    "wan2.2-t2v-a14b", for which nothing is fetched. `device`: auto or a platform that is here, or a device that is not,
    such as "H100"; `gpus` of them. `memory`, `host_memory`: bytes, or texts such as "24GB", instead of what there is.
    `config`: how the engine would be built. `here_only`: a device that is here, and nothing cheaper is looked for.
    `request`: fields of types.GenerateRequest. Raises CheckpointError or RequestError; what does not fit is told by
    `fits` and `refusal`.
    """
    ask_for_same_sums()
    place = _lazy("Place")(device=device, gpus=gpus, memory=memory, host_memory=host_memory)
    wanted = GenerateRequest(**{"prompt": "a video", **request})
    found: Plan = _lazy("make_plan")(
        _named(model, parts), wanted, config or EngineConfig(), place=place, parts=parts, variant=variant,
        here_only=here_only,
    )  # fmt: skip
    return found


def compare_plan(plan: "Plan", made: Mapping[str, Any]) -> dict[str, Any]:
    """What was foreseen of a request that `Engine.generate_to` then made: seconds by stage, and the peak of memory.

    How fast it was is kept, and plans on this machine are the better for it.
    """
    told: dict[str, Any] = _lazy("compare")(plan, made)
    return told


def accelerate(
    pipe: Any, exactness: str = "rounding", *, vae: bool = True, transformer: bool = True, text_encoder: bool = False
) -> "Report":
    """Compute a live Diffusers pipeline's VAE and transformers by the networks here, on its own weights.

    `pipe`: a pipeline, modular or not, or components of one by their names. `exactness`: "rounding" or "bitwise".
    `text_encoder`: prompts that came before are remembered. Returns what was taken over, what it holds, and why the
    rest was not; printed it is a table. Raises RequestError where nothing is known, which stays as it was, and where
    Diffusers is not here.
    """
    report: Report = _lazy("accelerate_pipeline")(
        pipe, exactness, vae=vae, transformer=transformer, text_encoder=text_encoder
    )
    return report


def restore(pipe: Any) -> None:
    """Give a pipeline that was accelerated its own ways to compute back, bit for bit; others stay as they are.

    Raises RequestError, before anything is changed, where a class was put on top since, as FSDP2 does.
    """
    _lazy("restore_pipeline")(pipe)


def resume(
    job: str | None = None, *, anyway: bool = False, progress: "ProgressCallback | None" = None
) -> dict[str, Any]:
    """Go on with a job that ended early, by its name or folder; without one the newest that is not finished.

    The video is, bit by bit, what it would have been. `anyway`: go on though versions, device or kernels are others.
    Returns as `Engine.generate_to` does. Raises RequestError or CheckpointError.
    """
    made: dict[str, Any] = _lazy("resume_job")(job, anyway=anyway, progress=progress)
    return made


def jobs() -> list[dict[str, Any]]:
    """What is known of every job in the folder of jobs, oldest first."""
    found: list[dict[str, Any]] = _lazy("all_jobs")()
    return found


def job_left_for(output: str, *, since: float) -> str | None:
    """The name of the job that a run for an absolute output path has left unfinished, begun since a time; or None."""
    name: str | None = _lazy("left_for")(output, since=since)
    return name


def job_to_resume(name: str | None = None) -> "Job":
    """The job of a name, or the newest unfinished one. Raises RequestError for one that cannot be gone on with."""
    job: Job = _lazy("to_resume")(name)
    return job


def forget_job(name: str) -> None:
    """Remove a job and what it has kept. Raises RequestError."""
    _lazy("forget")(name)


def read_image(source: "ImageInput") -> "Pictures":
    """An image as requests take it, read and checked once: from a path, a Pillow image, or uint8 RGB (H, W, 3).

    Raises InputError, one sentence.
    """
    pictures: Pictures = _lazy("image_of")(source)
    return pictures


def verify_model(
    model: str | os.PathLike[str] | None = None,
    *,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    device: str = "auto",
    parallel: str = "auto",
    on_bytes: Callable[[str, int, int], None] | None = None,
) -> "Iterator[Finding]":
    """Compare every rewrite, and the model's networks in every way they have, with the reference, on this machine.

    `parts` and `on_bytes`: as `load` takes them. In processes that torchrun started: all ways to share the model over
    them, or those of the plan `parallel`.
    """
    ask_for_same_sums()
    findings: Iterator[Finding] = _lazy("verify")(
        _named(model, parts), parts=parts, device=device, parallel=parallel, on_bytes=on_bytes
    )
    return findings


def bench_vae(**case: Any) -> dict[str, Any]:
    """Time the VAE against Diffusers'; the fields of `frameloom.bench.vae.VaeCase` by name."""
    record: dict[str, Any] = _lazy("run_vae")(_lazy("VaeCase")(**case))
    return record


def bench_dit(**case: Any) -> dict[str, Any]:
    """Time a denoising step against Diffusers'; the fields of `frameloom.bench.dit.DitCase` by name."""
    record: dict[str, Any] = _lazy("run_dit")(_lazy("DitCase")(**case))
    return record


def bench_generate(model: str | os.PathLike[str] | None = None, **case: Any) -> dict[str, Any]:
    """Time whole requests against Diffusers'; the fields of `frameloom.bench.generate.GenerateCase` by name."""
    record: dict[str, Any] = _lazy("run_generate")(_lazy("GenerateCase")(model=str(_named(model)), **case))
    return record


def bench_drop_in(**case: Any) -> dict[str, Any]:
    """Time pipelines accelerated and as they come; the fields of `frameloom.bench.drop_in.DropInCase` by name."""
    record: dict[str, Any] = _lazy("run_drop_in")(_lazy("DropInCase")(**case))
    return record


def bench_parallel(**case: Any) -> dict[str, Any]:
    """Time a step and a decode over several ranks; the fields of `frameloom.bench.parallel.ParallelCase` by name."""
    record: dict[str, Any] = _lazy("run_parallel")(_lazy("ParallelCase")(**case))
    return record


def diagnose(device: str = "auto") -> "list[MachineFinding]":
    """What this machine has for the device, what it lacks, and what that costs. Raises RequestError."""
    try:
        examine = _lazy("examine")
    except (ImportError, OSError, RuntimeError) as error:  # how torch fails when it, or an extension of it, is broken
        raise RequestError(
            f"torch cannot be loaded ({error}); install it again, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 if an "
            "extension of it is to blame"
        ) from error
    findings: list[MachineFinding] = examine(device)
    return findings


@overload
def _named(model: str | os.PathLike[str] | None) -> str | os.PathLike[str]: ...
@overload
def _named(
    model: str | os.PathLike[str] | None, parts: Mapping[str, str | os.PathLike[str]] | None
) -> str | os.PathLike[str] | None: ...
def _named(
    model: str | os.PathLike[str] | None, parts: Mapping[str, str | os.PathLike[str]] | None = None
) -> str | os.PathLike[str] | None:
    """The model to open; only None means the built-in one, an empty name (an unset variable) does not.

    None also where parts are given: they are put together by themselves.
    """
    if model is None:
        return None if parts else shapes.PATH
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise CheckpointError(f"{model!r} names no model; give a folder, a hub id, or nothing for the built-in model")
    return model


def __getattr__(name: str) -> Any:
    if name in _LAZY and name in __all__:
        return _lazy(name)
    if name == "vae":  # a module, which needs torch
        return importlib.import_module("frameloom.vae")
    raise AttributeError(f"module 'frameloom' has no attribute {name!r}")


def _lazy(name: str) -> Any:
    return getattr(importlib.import_module(_LAZY[name]), name)
