"""Options that several commands have."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

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


HeightOption = Annotated[int | None, typer.Option(help="Height in pixels.")]
FramesOption = Annotated[int | None, typer.Option(help="Number of frames, 4k+1.")]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns guidance off.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
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


MemoryOption = Annotated[
    str, typer.Option(help="What all may take: auto, or bytes such as 24GB; weights then come as they are needed.")
]


ResidenceOption = Annotated[
    str, typer.Option(help="Where weights are: auto, or such as text=moved,transformer=streamed (or resident).")
]


WindowsOption = Annotated[
    bool | None, typer.Option(help="Denoise more frames than the model was trained on in windows (lossy), blended.")
]


WindowFramesOption = Annotated[int | None, typer.Option(help="Frames of a window; by default what it knows.")]


WindowOverlapOption = Annotated[int | None, typer.Option(help="Frames that neighbours share at least.")]


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


def with_parts(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options --transformer, --vae and so on, and hand them over as its argument `parts`."""
    signature = inspect.signature(command)
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
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
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    with_options.__signature__ = signature.replace(parameters=[*parameters, *options])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *options)}
    return with_options
