"""The stages of a request, one function each: noise, denoise, decode, encode. They hold no model and no state.

Shapes: B prompts, C latent channels, T frames, H height, W width; latents are float32, normalised as the sampler sees
them. Reference: Diffusers' WanPipeline, in its order of operations and of rounding.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from frameloom.errors import InternalError
from frameloom.models.dit_fast import LoopChoices
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import Frames, Passage
from frameloom.models.wan_dit import FrameTimes, Prompt, WanDiT
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.precision import own_precision
from frameloom.pipeline.conditions import Condition
from frameloom.pipeline.keep import FORGETS, Keeper
from frameloom.platform.device import is_memory_error
from frameloom.sampling.flow import Sampler, SamplerState
from frameloom.sampling.guidance import ExpertSwitch, guide
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)

StepCallback = Callable[[int], None]
_TOGETHER = 4  # latent frames at most that pass the decoder at a time
PLAINLY = LoopChoices()  # as the reference pipeline
FROM_TEXT = Condition()
Result = TypeVar("Result")


def initial_noise(shape: tuple[int, ...], seed: int | Sequence[int], device: torch.device) -> Tensor:
    """Standard normal latents float32, drawn on the CPU so that a seed means the same noise on every machine.

    The draw equals Diffusers' with `torch.Generator("cpu").manual_seed(seed)`; of several seeds each draws the noise of
    one sample of `shape`, the same as for that sample alone.
    """
    if not isinstance(seed, int):
        return torch.cat([initial_noise((1, *shape[1:]), own, device) for own in seed])
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)


class Predict(Protocol):
    """What predicts the steps of one video."""

    def __call__(self, expert: WanDiT, x_BCTHW: Tensor, timestep: Tensor | FrameTimes, /) -> list[Tensor]:
        """Return the velocity under each of the prompts' branches."""
        ...


class MakePredictor(Protocol):
    """Who predicts under the branches of the guidance, which have a text each and the image in common."""

    def __call__(self, texts: Sequence[Tensor], choices: LoopChoices, image_BNE: Tensor | None = None, /) -> Predict:
        """Return what predicts the steps of one video."""
        ...


class Predictor:
    """The velocities of a step, one per branch. Keeps what the current expert read of the prompts."""

    def __init__(self, texts: Sequence[Tensor], choices: LoopChoices, image_BNE: Tensor | None = None, /) -> None:
        self._texts, self._choices, self._image = texts, choices, image_BNE
        self._together = choices.guidance_batched and len(texts) > 1
        self._expert: WanDiT | None = None
        self._read: list[Prompt] = []

    def __call__(self, expert: WanDiT, x_BCTHW: Tensor, timestep: Tensor | FrameTimes, /) -> list[Tensor]:
        """Where memory runs out in a batch of both branches, they are computed in turn from then on."""
        try:
            return self._predict(expert, x_BCTHW, timestep)
        except (MemoryError, RuntimeError) as error:
            if not self._together or not is_memory_error(error):
                raise
        log.warning("memory ran out with both branches of the guidance in one batch; going on with one after the other")
        self._together, self._expert = False, None
        return self._predict(expert, x_BCTHW, timestep)

    def _predict(self, expert: WanDiT, x_BCTHW: Tensor, timestep: Tensor | FrameTimes) -> list[Tensor]:
        if not self._choices.prompt_once:
            return [expert(x_BCTHW, timestep, text, self._image) for text in self._texts]
        if expert is not self._expert:
            self._read = []  # those of the other expert go first
            texts, image = self._texts, self._image
            if self._together:
                image = None if image is None else torch.cat([image] * len(texts))
                texts = [torch.cat(list(texts))]
            self._read = [expert.read_prompt(text, image) for text in texts]
            self._expert = expert
        if self._together:
            (both,) = expert.velocities(x_BCTHW, timestep, self._read)
            return list(both.chunk(len(self._texts)))
        if self._choices.shared_branches:
            return expert.velocities(x_BCTHW, timestep, self._read)
        return [velocity for prompt in self._read for velocity in expert.velocities(x_BCTHW, timestep, [prompt])]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompts:
    """Text features (B, S, E), and those of what the video should not show; `negative_BSE` None: no guidance.

    `condition`: the pictures that are given, too. `make_predictor`: who predicts under these branches; the seam for
    guidance that is divided.
    """

    text_BSE: Tensor
    negative_BSE: Tensor | None
    condition: Condition = FROM_TEXT
    make_predictor: MakePredictor = Predictor

    @property
    def branches(self) -> list[Tensor]:
        """What the network reads in every step."""
        return [self.text_BSE] if self.negative_BSE is None else [self.text_BSE, self.negative_BSE]


@torch.inference_mode()
def denoise(
    experts: Sequence[WanDiT],
    begin: Callable[[], Tensor],
    prompts: Prompts,
    *,
    sampler: Sampler,
    switch: ExpertSwitch,
    per_token: bool,
    on_step: StepCallback,
    choices: LoopChoices = PLAINLY,
    keeper: Keeper = FORGETS,
) -> Tensor:
    """Walk the sampler's schedule from noise to latents, or from where `keeper` has seen it last.

    `begin`: makes the noise, which nobody else holds. `per_token`: the network takes one timestep per token (TI2V-5B).
    Nothing in a step waits for the device. While the network computes there are the latents and the sampler's history,
    and nothing else of their size is held here.
    """
    device, condition = prompts.text_BSE.device, prompts.condition
    latents_BCTHW, state = _start(begin, sampler, keeper, device)
    predict = prompts.make_predictor(prompts.branches, choices, condition.image_BNE)
    patch = experts[0].spec.patch_size
    times = sampler.schedule.timesteps.to(device)  # all at once: a copy of one number would wait for the device
    for index, t in enumerate(sampler.schedule.timesteps):
        if index < state.step:
            continue
        which, scale = switch.for_timestep(t)
        if per_token and not choices.distinct_timesteps:
            timestep: Tensor | FrameTimes = condition.token_times(times[index], latents_BCTHW.shape, patch=patch)
        else:
            timestep = condition.frame_times(times[index], latents_BCTHW.shape, patch=patch[0])
        latents_BCTHW, state = sampler.step(
            _velocity(predict, experts[which], latents_BCTHW, timestep, condition=condition, scale=scale),
            latents_BCTHW,
            state,
        )
        keeper.walk(latents_BCTHW, state)
        on_step(index + 1)
    return condition.kept(latents_BCTHW)


def _start(
    begin: Callable[[], Tensor], sampler: Sampler, keeper: Keeper, device: torch.device
) -> tuple[Tensor, SamplerState]:
    """The latents and the state that the first step to be computed takes."""
    if (walked := keeper.walked()) is None:
        return begin(), sampler.start()
    latents_BCTHW, state = walked
    return latents_BCTHW.to(device), state.to(device)


def _velocity(
    predict: Predict,
    expert: WanDiT,
    latents_BCTHW: Tensor,
    timestep: Tensor | FrameTimes,
    *,
    condition: Condition,
    scale: float,
) -> Tensor:
    """The velocity of a step; those of the branches are gone when the sampler begins."""
    with own_precision(latents_BCTHW.device):
        velocities = predict(expert, condition.shown(latents_BCTHW), timestep)
    return velocities[0] if len(velocities) == 1 else guide(velocities[0], velocities[1], scale)


@torch.inference_mode()
def decode(
    vae: WanVAE, latents_BCTHW: Tensor, passages: Iterator[Passage], on_frames: StepCallback, *, skipped: int = 0
) -> Iterator[Frames]:
    """Yield uint8 frames (B, t, H, W, 3) as they leave the decoder; the float video is never whole.

    `skipped`: so many frames are there already and are not yielded. `on_frames` gets the number of frames that are out.
    Where memory runs out, the next passage goes on from there. Latents that are no numbers, and what the decoder makes
    of them, are told in a warning: the frames before them are good, the others black. An InternalError if there is no
    good frame. Of a picture that passes in parts, frames are yielded where they are collected, and nothing elsewhere.
    """
    if spoilt := _spoilt(latents_BCTHW):
        log.warning("%d of %d values of the latents are no finite numbers", spoilt, latents_BCTHW.numel())
    weight = next(vae.parameters())
    done, is_good = skipped, True

    def denormalised(z_BCTHW: Tensor) -> Tensor:
        """Contiguous: equal latents, equal frames."""
        return vae.denormalise(z_BCTHW.to(weight.device, weight.dtype).contiguous())

    for chunk, passage in decode_floats(vae, latents_BCTHW, passages, prepare=denormalised, skipped=skipped):
        if is_good and not torch.isfinite(chunk).all():
            is_good = False
            _tell_of_no_numbers(chunk, done)
        frames = passage.collect(to_uint8(chunk))
        done += chunk.shape[2]
        on_frames(done)
        if frames is not None:
            yield frames


def decode_floats(
    vae: WanVAE,
    latents_BCTHW: Tensor,
    passages: Iterator[Passage],
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    skipped: int = 0,
) -> Iterator[tuple[Tensor, Passage]]:
    """Yield frames (B, 3, t, H, W) in [-1, 1] as they leave the decoder, and the passage that they come from.

    `prepare`, `skipped`: as in `WanVAE.decode_stream` and `decode`. Where memory runs out, the next passage goes on.
    """
    device, done = next(vae.parameters()).device, skipped

    def new_frames(passage: Passage) -> Iterator[tuple[Tensor, Passage]]:
        first = _latent_to_begin_with(vae.spec, done)
        start = first * vae.spec.temporal_scale  # the first latent frame of a passage makes one frame
        chunks = vae.decode_stream(latents_BCTHW[:, :, first:], passage, prepare=prepare)
        for chunk in _in_own_precision(chunks, device):
            end = start + chunk.shape[2]
            if end > done:
                yield chunk[:, :, max(0, done - start) :], passage
            start = end

    for chunk, passage in _with_less_memory(passages, new_frames):
        done += chunk.shape[2]
        yield chunk, passage


def _spoilt(latents_BCTHW: Tensor) -> int:
    """How many values are no finite numbers. Latents that lie on a disk are not brought into memory at once for it."""
    return int(torch.stack([(~torch.isfinite(frame)).sum() for frame in latents_BCTHW.unbind(2)]).sum())


def _latent_to_begin_with(spec: VaeSpec, done: int) -> int:
    """Which latent frame the decoder begins with so that all frames after the first `done` are as in a whole passage.

    What a frame depends on lies at most `decoder_reach` before its own. A multiple of four keeps the latent frames
    together that pass together in a whole passage.
    """
    own = (done + spec.temporal_scale - 1) // spec.temporal_scale
    return max(0, own - spec.decoder_reach) // _TOGETHER * _TOGETHER


@torch.inference_mode()
def encode(vae: WanVAE, levels_THWC: Tensor, passages: Iterator[Passage]) -> Tensor:
    """The mode of the posterior of frames (T, H, W, 3), as normalised float32 latents (1, C, T', H', W').

    `levels_THWC`: of 255, in any dtype. The float video is never whole.
    """
    weight = next(vae.parameters())
    x_BCTHW = levels_THWC.permute(3, 0, 1, 2)[None]

    def as_floats(chunk: Tensor) -> Tensor:
        """In [-1, 1], rounded where the reference rounds."""
        return (2.0 * (chunk.to(weight.device).to(torch.float32) / 255.0) - 1.0).to(weight.dtype)

    mode, _ = encode_floats(vae, x_BCTHW, passages, prepare=as_floats).chunk(2, dim=1)
    return vae.normalise(mode.to(torch.float32))


def encode_floats(
    vae: WanVAE, x_BCTHW: Tensor, passages: Iterator[Passage], *, prepare: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The moments of the posterior of frames, as `WanVAE.encode_stream` takes them, by the first passage that can."""

    def moments(passage: Passage) -> Iterator[Tensor]:
        yield passage.join(torch.cat(list(vae.encode_stream(x_BCTHW, passage, prepare=prepare)), dim=2))

    with own_precision(next(vae.parameters()).device):
        (found,) = _with_less_memory(passages, moments)
    return found


def _tell_of_no_numbers(chunk_BCTHW: Tensor, frames_before: int) -> None:
    good_BT = torch.isfinite(chunk_BCTHW).all(4).all(3).all(1)
    name = str(chunk_BCTHW.dtype).removeprefix("torch.")
    what, advice = "the decoder returned values that are no numbers", f"it computed in {name}; try float32 or bfloat16"
    if frames_before == 0 and not good_BT[:, 0].any():
        raise InternalError(f"{what}; {advice}")
    first = frames_before + 1 + int(good_BT.all(0).int().argmin())
    log.warning("%s; the video is black from frame %d on; %s", what, first, advice)


def _in_own_precision(chunks: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The same chunks; what makes them does not see an autocast of the caller, who gets it back in between."""
    while True:
        with own_precision(device):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def _with_less_memory(passages: Iterator[Passage], compute: Callable[[Passage], Iterator[Result]]) -> Iterator[Result]:
    """The results of `compute` for the first passage; for the next one from where memory ran out, and so on."""
    passage = next(passages)
    while True:
        try:
            yield from compute(passage)
            return
        except (MemoryError, RuntimeError) as error:
            narrower = next(passages, None)
            if narrower is None or not is_memory_error(error):
                raise
            log.warning("memory ran out with %s; going on with %s", passage, narrower)
        passage = narrower  # out here the error, and the tensors that its traceback held, are gone


def to_uint8(x_BCTHW: Tensor) -> Frames:
    """Frames in [-1, 1] -> uint8 (B, T, H, W, 3), rounded as the reference does. A NaN becomes 0."""
    scaled = (x_BCTHW.float() / 2 + 0.5).nan_to_num_(nan=0.0).clamp_(0, 1).mul_(255).round_()
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
