"""Checks a request at the door and fills in what it leaves open. Torch-free."""

import difflib
import itertools
import logging
import math
import os.path
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from numbers import Integral, Real
from typing import Any, Protocol

from frameloom.errors import InternalError, RequestError
from frameloom.types import GenerateRequest, Lora, ParallelPlan, Pictures, Residence, ResolvedRequest, SizeRules

log = logging.getLogger(__name__)
DEFAULT_STRENGTH = 0.8  # of the reference, WanVideoToVideoPipeline
MAX_PIXELS = 8192  # per side: past it a mistyped digit is likelier than a wish
MAX_FRAMES = 10_001
MAX_STEPS = 1000  # the schedule has as many distinct timesteps
MAX_REFERENCES = 64  # each costs as much as a latent frame
MAX_LORA_STRENGTH = 20  # far past what any file is made for; more is a slip
_SHARE_OF_WINDOW = 0.2  # that the next one shares unless told otherwise: 16 frames of 81, 24 of 121

_PICTURES = ("image", "last_image", "video", "control_video", "mask")

# Per number of a request: its kind, the lowest and the highest value that any checkpoint could compute.
_LIMITS: Mapping[str, tuple[type[int] | type[float], float, float]] = {
    "width": (int, 1, MAX_PIXELS),
    "height": (int, 1, MAX_PIXELS),
    "num_frames": (int, 1, MAX_FRAMES),
    "steps": (int, 1, MAX_STEPS),
    "guidance_scale": (float, 0, 1000),
    "guidance_scale_2": (float, 0, 1000),
    "flow_shift": (float, 1e-3, 1000),
    "fps": (float, 0.1, 240),
    "seed": (int, 0, 2**63 - 1),
    "strength": (float, 0, 1),
    "control_strength": (float, 0, 20),
    "window_frames": (int, 1, MAX_FRAMES),
    "window_overlap": (int, 1, MAX_FRAMES),
}

_STREAMABLE = ("text", "transformer")  # the image encoder and the VAE are small beside them: always resident

# Whatever Python takes for a number: that it is too large, or none, is said better than that there is no such file.
_STRENGTH = r"(?i:[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?))"
_UNITS: Mapping[str, int] = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class GenerationDefaults(Protocol):
    """What a checkpoint answers where the request is silent."""

    @property
    def width(self) -> int:
        """Pixels."""
        ...

    @property
    def height(self) -> int:
        """Pixels."""
        ...

    @property
    def num_frames(self) -> int:
        """Frames."""
        ...

    @property
    def fps(self) -> float:
        """Frames per second."""
        ...

    @property
    def steps(self) -> int:
        """Denoising steps."""
        ...

    @property
    def guidance_scale(self) -> float:
        """Guidance scale."""
        ...

    @property
    def guidance_scale_2(self) -> float | None:
        """Guidance scale of the low-noise expert."""
        ...

    @property
    def flow_shift(self) -> float | None:
        """Shift of the noise schedule."""
        ...

    @property
    def negative_prompt(self) -> str:
        """Negative prompt."""
        ...


def memory_bytes(value: int | str) -> int | None:
    """Bytes of 6000000000, "6000000000", "6GB" or "1.5G"; None for "auto". Raises RequestError."""
    if value == "auto":
        return None
    match = re.fullmatch(r"([0-9]+|[0-9]+\.[0-9]+(?= ?[KMG])) ?([KMG]?B?)", str(value).strip().upper())
    count = float(match[1]) * _UNITS[match[2]] if match else 0
    if isinstance(value, bool) or not 1 <= count < 2**63:
        raise RequestError(f"a memory of {value!r} is not possible; write auto, or bytes such as 6000000000 or 6GB")
    return round(count)


def residences(text: str) -> dict[str, Residence]:
    """What "text=moved,transformer=streamed" asks for; nothing for "auto". Raises RequestError."""
    if text == "auto":
        return {}
    found: dict[str, Residence] = {}
    for part in str(text).split(","):
        name, _, where = part.strip().partition("=")
        if name not in _STREAMABLE or where not in list(Residence) or name in found:
            raise RequestError(
                f"residence {text!r} is not possible; write auto, or for {' and '.join(_STREAMABLE)} one of "
                f"{', '.join(Residence)} each, such as text=moved,transformer=streamed"
            )
        found[name] = Residence(where)
    return found


def lora(text: str) -> Lora:
    """The LoRA of "file.safetensors", "file.safetensors:0.8", "high:file.safetensors:0.8". Raises RequestError.

    What is before the path says which of two experts, what is after it how strongly, unless a file has that very name.
    """
    match = re.fullmatch(rf"(?:(high|low):)?(.*?[^:])(?::({_STRENGTH}))?", text.strip())
    if match is None:
        raise RequestError(f"LoRA {text!r} names no file; write FILE, FILE:0.8 or high:FILE:0.8")
    expert: Any
    expert, path, strength = match.groups()
    if strength is not None and os.path.exists(whole := os.path.expanduser(f"{path}:{strength}")):
        path, strength = whole, None
    return checked_lora(Lora(path=path, strength=1.0 if strength is None else float(strength), expert=expert))


def checked_lora(lora: Lora) -> Lora:
    """The same, if its values are possible. Raises RequestError."""
    strength = lora.strength
    if isinstance(strength, bool) or not isinstance(strength, Real) or not abs(strength) <= MAX_LORA_STRENGTH:
        raise RequestError(
            f"strength {strength!r} of LoRA '{lora.path}' is not possible; use a number from -{MAX_LORA_STRENGTH} to "
            f"{MAX_LORA_STRENGTH}, such as 0.8"
        )
    if lora.expert not in (None, "high", "low"):
        raise RequestError(f"expert {lora.expert!r} of LoRA '{lora.path}' is unknown; use 'high' or 'low', or none")
    return lora


def video_size(text: str) -> tuple[int, int, int]:
    """Height, width and frames of "HEIGHTxWIDTHxFRAMES". Raises RequestError."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
    if match is None:
        raise RequestError(f"size {text!r} is not possible; write HEIGHTxWIDTHxFRAMES, such as 480x832x81")
    return int(match[1]), int(match[2]), int(match[3])


def parallel_plan(text: str, num_ranks: int | None = None) -> ParallelPlan | None:
    """The plan of "cfg=2,ulysses=2,ring=2,tp=1,vae=8", or None for "auto"; what is not named is not divided.

    The VAE is divided over all ranks unless it is named. `num_ranks` None: as many as the plan asks for. Raises
    RequestError: what was asked, and the nearest plan for that many ranks.
    """
    if text.strip() == "auto":
        return None
    asked = dict(_assignments(text))
    plan = ParallelPlan(**asked)
    ranks = plan.num_ranks if num_ranks is None else num_ranks
    plan = ParallelPlan(**{"vae": ranks, **asked})
    wrong = None
    if plan.cfg > 2:
        wrong = f"cfg={plan.cfg} is not possible: there are two predictions, with and without the prompt"
    elif plan.num_ranks != ranks:
        axes = [f"{axis}={asked[axis]}" for axis in _AXES if axis in asked] or ["a step that is not divided"]
        wrong = f"{' x '.join(axes)} takes {_ranks(plan.num_ranks)}, and there are {ranks}"
    elif plan.vae > ranks:
        wrong = f"vae={plan.vae} is more than the {_ranks(ranks)} that there are"
    elif plan.fsdp not in (1, ranks):
        wrong = f"fsdp={plan.fsdp} is not possible: weights are divided over all {ranks} ranks or (fsdp=1) over none"
    elif plan.fsdp > 1 and plan.tp > 1:
        wrong = f"fsdp={plan.fsdp} and tp={plan.tp} do not go together: each divides the weights"
    if wrong is not None:
        raise RequestError(f"{wrong}; the nearest plan is {nearest_plan(plan, ranks)}")
    return plan


def nearest_plan(plan: ParallelPlan, num_ranks: int) -> ParallelPlan:
    """The possible plan for so many ranks that is most like `plan`."""
    whole = num_ranks if plan.fsdp > 1 else 1
    possible = [sizes for sizes in _products(num_ranks) if whole == 1 or sizes[_AXES.index("tp")] == 1]

    def unlike(sizes: tuple[int, ...]) -> tuple[float, ...]:
        """How much; of equals, the one that divides more by Ulysses, then by guidance, and less by matrix products."""
        cfg, ring, ulysses, tp = sizes
        return round(sum(map(_distance, sizes, _sizes(plan))), 9), tp, ring, -ulysses, -cfg

    best = min(possible, key=unlike)
    return ParallelPlan(**dict(zip(_AXES, best, strict=True)), fsdp=whole, vae=min(plan.vae, num_ranks))


_AXES = ("cfg", "ring", "ulysses", "tp")


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _assignments(text: str) -> Iterator[tuple[str, int]]:
    known, seen = [field.name for field in fields(ParallelPlan)], set()
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in known or not equals:
            near = difflib.get_close_matches(name, [*known, "auto"], n=1)
            hint = f"did you mean {near[0]}? " if near and near[0] != name else ""
            raise RequestError(f"{part.strip()!r} is no part of a plan; {hint}write auto, or such as ulysses=2,vae=2")
        if not re.fullmatch(r"[1-9]\d{0,4}", value):
            raise RequestError(f"{name}={value} is not possible; give a whole number from 1 on")
        if name in seen:
            raise RequestError(f"{name} is in the plan twice; name it once")
        seen.add(name)
        yield name, int(value)


def _sizes(plan: ParallelPlan) -> tuple[int, ...]:
    return tuple(asdict(plan)[axis] for axis in _AXES)


def _distance(size: int, wanted: int) -> float:
    return abs(math.log(size / wanted))


def _products(num_ranks: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of sizes of the axes."""
    divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
    for sizes in itertools.product([n for n in divisors if n <= 2], divisors, divisors, divisors):
        if math.prod(sizes) == num_ranks:
            yield sizes


def check_request(request: GenerateRequest) -> None:
    """Refuse what no checkpoint could compute, before one is opened. Raises RequestError as `resolve` does."""
    _prompts(request.prompt)
    for name in _LIMITS:
        if name != "control_strength":
            _limited(name, getattr(request, name))
    _control_strength(request.control_strength)
    _references(request.references)
    if request.last_image is not None and request.image is None:
        raise RequestError("a last image was given, and no image; give the first frame, too")
    if request.mask is not None and request.control_video is None:
        raise RequestError("a mask was given, and no control video; give the video that it is the mask of, too")
    if request.strength is not None and request.video is None:
        raise RequestError("a strength was given, and no video; give the video to start from, or leave it out")
    if request.windows is False and (request.window_frames, request.window_overlap) != (None, None):
        raise RequestError("windows are switched off, and their frames are given; leave one of them out")


def resolve(request: GenerateRequest, defaults: GenerationDefaults, rules: SizeRules) -> ResolvedRequest:
    """Fill in and check a request whose pictures are read: each is None or `Pictures`.

    Raises RequestError: one sentence with the value, what is possible, what to do.
    """
    check_request(request)
    prompts = _prompts(request.prompt)
    guidance_scale = _limited("guidance_scale", _or(request.guidance_scale, defaults.guidance_scale))
    image, last_image, video, control_video, mask = (
        None if (given := getattr(request, name)) is None else _pictures(given) for name in _PICTURES
    )
    followed = video or control_video
    width, height = _size(request, image or followed, defaults, rules)
    num_frames = _frames(_num_frames(request, followed, defaults, rules), rules.temporal)
    resolved = ResolvedRequest(
        prompts=prompts,
        negative_prompts=_negatives(_or(request.negative_prompt, defaults.negative_prompt), len(prompts)),
        width=_side("width", width, rules.width_multiple, rules.reason),
        height=_side("height", height, rules.height_multiple, rules.reason),
        num_frames=num_frames,
        steps=_limited("steps", _or(request.steps, defaults.steps)),
        guidance_scale=guidance_scale,
        guidance_scale_2=_second_scale(request, guidance_scale, defaults),
        flow_shift=_limited("flow_shift", _or(request.flow_shift, defaults.flow_shift)),
        fps=_limited("fps", _or(request.fps, _or(followed and followed.fps, defaults.fps))),
        seed=_limited("seed", _or(request.seed, 0)),
        image=image,
        last_image=last_image,
        video=_beginning(video, num_frames),
        strength=_limited("strength", _or(request.strength, DEFAULT_STRENGTH)) if video else None,
        control_video=_beginning(control_video, num_frames),
        mask=_beginning(mask, num_frames),
        references=tuple(map(_pictures, _references(request.references))),
        control_strength=_control_strength(request.control_strength),
        keeps_aspect=request.width is None or request.height is None,
        **_windows(request, num_frames, defaults, rules),
    )
    _check_pictures(resolved)
    return resolved


def _second_scale(request: GenerateRequest, first: float, defaults: GenerationDefaults) -> float | None:
    """The low-noise expert's scale; None where it is the first one's, which also decides whether there is guidance."""
    own = defaults.guidance_scale_2 if request.guidance_scale is None else None
    scale: float | None = _limited("guidance_scale_2", _or(request.guidance_scale_2, own))
    if first > 1 or scale is None:
        return scale
    if request.guidance_scale_2 is not None:
        log.warning("guidance scale 2 (%g) is not used: with a guidance scale of %g there is no guidance", scale, first)
    return None


def _pictures(pictures: object) -> Pictures:
    if not isinstance(pictures, Pictures):
        raise InternalError(f"a request came with {type(pictures).__name__} where pictures should have been read")
    return pictures


def _beginning(video: Pictures | None, num_frames: int) -> Pictures | None:
    return None if video is None else replace(video, frames=video.frames[:num_frames])


def _references(references: object) -> tuple[Any, ...]:
    """As many images as were given. Raises RequestError."""
    if references is None:
        return ()
    if not isinstance(references, (list, tuple)):
        raise RequestError(f"the reference images are {type(references).__name__}; give a list of images")
    if len(references) > MAX_REFERENCES:
        raise RequestError(f"{len(references)} reference images are too many; give up to {MAX_REFERENCES}")
    return tuple(references)


def _control_strength(given: object) -> float | tuple[float, ...]:
    """One number for all VACE layers, or one for each; 1 without any. Raises RequestError."""
    if isinstance(given, (list, tuple)):
        return tuple(_limited("control_strength", _or(strength, "None")) for strength in given)  # none may be left out
    strength: float = _limited("control_strength", _or(given, 1.0))
    return strength


def _check_pictures(request: ResolvedRequest) -> None:
    if request.last_image is not None and request.num_frames == 1:
        raise RequestError("one frame cannot be the first and the last; ask for 5 frames or more")
    if request.skipped_steps == request.steps:
        raise RequestError(
            f"strength {request.strength} leaves none of {request.steps} steps; use "
            f"{math.ceil(1000 / request.steps) / 1000} or more"
        )


def _size(
    request: GenerateRequest, shown: Pictures | None, defaults: GenerationDefaults, rules: SizeRules
) -> tuple[Any, Any]:
    """Width and height: as asked, or in the shape of what is shown, with the area of the defaults.

    Down to whole multiples, as the original code does; where one side is asked for the other follows.
    """
    if shown is None or None not in (request.width, request.height):
        return _or(request.width, defaults.width), _or(request.height, defaults.height)
    aspect, area = shown.width / shown.height, defaults.width * defaults.height
    if request.height is not None:
        return _whole(_limited("height", request.height) * aspect, rules.width_multiple), request.height
    if request.width is not None:
        return request.width, _whole(_limited("width", request.width) / aspect, rules.height_multiple)
    width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    return _whole(width, rules.width_multiple), _whole(height, rules.height_multiple)


def _whole(size: float, multiple: int) -> int:
    return max(1, round(size) // multiple) * multiple


def _num_frames(
    request: GenerateRequest, video: Pictures | None, defaults: GenerationDefaults, rules: SizeRules
) -> Any:
    """As asked; else the checkpoint's number, or what a video to follow has for it."""
    if video is None:
        return _or(request.num_frames, defaults.num_frames)
    there = len(video.frames)
    if request.num_frames is None:
        return 1 + (min(there, defaults.num_frames) - 1) // rules.temporal * rules.temporal
    if _limited("num_frames", request.num_frames) > there:
        raise RequestError(f"{video.name} has {there} frames, {request.num_frames} were asked for; ask for fewer")
    return request.num_frames


def _windows(
    request: GenerateRequest, num_frames: int, defaults: GenerationDefaults, rules: SizeRules
) -> dict[str, Any]:
    """The frames of a window, and how many neighbours share at least; nothing where the video is denoised whole."""
    if not (request.windows or request.window_frames or request.window_overlap):
        return {}
    step = rules.temporal
    frames = _frames(_or(request.window_frames, defaults.num_frames), step, what="frames in a window")
    most = frames - 1 - step  # every window sees the first frame of the video, and has something new
    if most < step:
        raise RequestError(f"windows of {frames} frames cannot share any; use {1 + 2 * step} or more")
    usual = min(most, max(2, round(frames * _SHARE_OF_WINDOW / step)) * step)
    overlap: int = _limited("window_overlap", _or(request.window_overlap, usual))
    if overlap % step or overlap > most:
        nearest = min(most, max(1, round(overlap / step)) * step)
        raise RequestError(
            f"windows of {frames} frames cannot share {overlap}: it is a multiple of {step} up to {most}; use {nearest}"
        )
    return {} if num_frames <= frames else {"window_frames": frames, "window_overlap": overlap}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _prompts(prompt: object) -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt) if isinstance(prompt, (list, tuple)) else None
    if prompts is None or not all(isinstance(text, str) for text in prompts):
        odd = prompt if prompts is None else next(text for text in prompts if not isinstance(text, str))
        raise RequestError(f"the prompt is {odd!r}; give a text, or a list of texts")
    if not prompts or not all(text.strip() for text in prompts):
        raise RequestError("the prompt is empty; say what the video should show, such as 'a red circle moving left'")
    return prompts


def _negatives(negative: object, count: int) -> tuple[str, ...]:
    if isinstance(negative, str):
        return (negative,) * count
    if not isinstance(negative, (list, tuple)) or not all(isinstance(text, str) for text in negative):
        raise RequestError(f"the negative prompt is {type(negative).__name__}; give a text, or one per prompt")
    if len(negative) != count:
        raise RequestError(f"{len(negative)} negative prompts for {count} prompts; give one for all, or one for each")
    return tuple(negative)


def _side(name: str, value: object, multiple: int, reason: str) -> int:
    size: int = _limited(name, value)
    if size % multiple == 0:
        return size
    below, above = size // multiple * multiple, (size // multiple + 1) * multiple
    choices = f"{below} or {above}" if below else f"{above}"
    raise RequestError(f"{name} {size} is not a multiple of {multiple} ({reason}); use {choices}")


def _frames(value: object, temporal: int, *, what: str = "frames") -> int:
    frames: int = _limited("num_frames", value)
    if (frames - 1) % temporal == 0:
        return frames
    below = 1 + (frames - 1) // temporal * temporal
    raise RequestError(
        f"{frames} {what} are not possible: the model makes {temporal}k+1; use {below} or {below + temporal}"
    )


def _limited(name: str, value: Any) -> Any:
    """`value` as the plain number its place in _LIMITS asks for (numpy's numbers too), or None for None."""
    if value is None:
        return None
    kind, low, high = _LIMITS[name]
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        noun = "whole number" if kind is int else "number"
        top = f"up to {high}" if high < 2**32 else "below 2^63"
        said = {"num_frames": "frames"}.get(name, name.replace("_", " "))
        given = value if isinstance(value, Real) else repr(value)
        raise RequestError(f"{said} {given} is not possible; use a {noun} from {low} {top}")
    return kind(value)
