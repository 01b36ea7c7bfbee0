"""The VAE of Wan 2.1 and 2.2 alone, for other programs: `open` it, then `decode`, `encode` or `stream`.

What is said here is stable: it changes with the major version of this package only. docs/vae.md has examples.

Shapes: B videos, Z latent channels, C colours (3 in most), T frames, H rows and W columns; of latents T', H' and W',
where T = 1 + temporal_scale * (T' - 1), H = spatial_scale * H', W = spatial_scale * W'.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from frameloom.config import memory_bytes
from frameloom.engine.lent_vae import LentVae
from frameloom.engine.rewrites import policy_of
from frameloom.engine.vae import load_fast_vae
from frameloom.errors import CheckpointError, RequestError
from frameloom.memory.vae import VaePlanner
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_state import Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Policy
from frameloom.pipeline.stages import decode_floats, encode_floats
from frameloom.platform.device import DTYPES, choose_device, choose_dtype, memory_errors
from frameloom.settings import ask_for_same_sums
from frameloom.weights.live import vae_of_tensors
from frameloom.weights.source import open_vae

__all__ = ["Vae", "open"]


def open(  # noqa: A001  # it is said with the name of its module: frameloom.vae.open
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    exactness: str = "rounding",
    rewrites: Sequence[str] = (),
    memory: int | str = "auto",
    variant: str = "",
) -> "Vae":
    """Open a VAE: a folder, a weight file, "owner/name" of the hub, or a mapping of tensors by their names.

    Names may be Diffusers' or the original code's. `config`: as the config.json of Diffusers' AutoencoderKLWan or
    AutoencoderKLQwenImage; None where a file beside the weights, or their shapes, tell it.

    `device`: auto, cpu, cuda, cuda:1 ...; auto is the first accelerator there is, and of a mapping where its tensors
    are. `dtype`: float32, float16 or bfloat16; auto is float32, and of a mapping that of its tensors. Tensors of a
    mapping are shared where device and dtype are theirs: they are brought into the memory order that is computed with,
    in place, and `close` brings them back. `exactness`, `rewrites`: as in `frameloom.load`. `memory`: bytes, or such
    as "4GB", that a call may take besides the weights; auto is a share of what is free. `variant`: such as "fp16".

    Raises CheckpointError for what holds no VAE of Wan's, RequestError for the rest; both are one sentence.
    """
    ask_for_same_sums()
    policy = policy_of(exactness, rewrites)
    budget_bytes = memory_bytes(memory)
    words = None if config is None else {"z_dim": VaeSpec().z_dim, **_as_json(config)}
    if isinstance(source, Mapping):
        return _of_mapping(source, words, device=device, dtype=dtype, policy=policy, budget_bytes=budget_bytes)
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"{source!r} is no VAE; give a folder, a weight file, or a mapping of tensors")
    chosen, _ = choose_device(device)
    computed, _ = choose_dtype(dtype, chosen, preferred=torch.float32)
    component = open_vae(source, config=words, variant=variant)
    spec = VaeSpec.from_config(component.config, where=str(component.described_by))
    with memory_errors(f"the VAE on {chosen}", "choose another device, or a narrower dtype"):
        fast = load_fast_vae(component, spec, computed, chosen, policy=policy, budget_bytes=budget_bytes)
    return Vae(fast.vae, fast.planner, release=lambda: None)


class Vae:
    """A VAE that is open. Use it in a `with` statement, or call `close`; by one thread at a time.

    Latents are those of the VAE; `normalise` makes of them what the sampler of a Wan model sees, and `denormalise`
    takes that back. Tensors may come on any device and in any float dtype: they are computed with, and returned, on
    `device` in `dtype`. No gradients are recorded.

    `chunk` and `band` say how much passes at a time: so many latent frames, and so many rows at most in each part of
    the network. Whatever they are, it is the same function, with neither seams nor blends; None leaves both to the
    memory that is free. Where a passage that was chosen runs out of memory, a smaller one goes on from there.
    """

    def __init__(self, vae: WanVAE, planner: VaePlanner, *, release: Callable[[], None]) -> None:
        weight = next(vae.parameters())
        self._vae: WanVAE | None = vae
        self._planner, self._release = planner, release
        self.device, self.dtype = weight.device, weight.dtype
        self.latent_channels = vae.spec.z_dim
        self.temporal_scale, self.spatial_scale = vae.spec.temporal_scale, vae.spec.spatial_scale

    @property
    def decisions(self) -> tuple[str, ...]:
        """What is computed in another way than the reference does, or why not, one line each."""
        return tuple(map(str, self._planner.choices.decisions))

    @torch.no_grad()
    def decode(self, latents: Tensor, *, chunk: int | None = None, band: int | None = None) -> Tensor:
        """Frames (B, C, T, H, W) in [-1, 1] of latents (B, Z, T', H', W'). Raises RequestError on another shape."""
        vae, out, done = self._open(), None, 0
        for frames in self.stream(latents, chunk=chunk, band=band):
            if out is None:
                batch, _, count, height, width = latents.shape
                space, length = vae.spec.spatial_scale, 1 + vae.spec.temporal_scale * (count - 1)
                out = frames.new_empty(batch, frames.shape[1], length, height * space, width * space)
            out[:, :, done : done + frames.shape[2]].copy_(frames)
            done += frames.shape[2]
        assert out is not None
        return out

    def stream(self, latents: Tensor, *, chunk: int | None = None, band: int | None = None) -> Iterator[Tensor]:
        """The same frames as they leave the decoder, (B, C, t, H, W) each: the whole video need never be in memory."""
        vae = self._open()
        latents = self._checked(latents, vae.spec.z_dim, "latents", "(B, {}, T, H, W)")
        return self._streamed(vae, latents, self._passages(latents, chunk, band, encode=False))

    @torch.no_grad()
    def encode(self, frames: Tensor, *, chunk: int | None = None, band: int | None = None) -> Tensor:
        """Latents (B, Z, T', H', W') of frames (B, C, T, H, W) in [-1, 1]: the mode of the posterior.

        T is 1 + temporal_scale * k, and H and W are multiples of spatial_scale; RequestError otherwise.
        """
        return self.moments(frames, chunk=chunk, band=band).chunk(2, dim=1)[0]

    @torch.no_grad()
    def moments(self, frames: Tensor, *, chunk: int | None = None, band: int | None = None) -> Tensor:
        """Mean and log-variance of the posterior, one after the other: (B, 2Z, T', H', W'); else as `encode`."""
        vae = self._open()
        frames = self._checked(frames, vae.spec.given_channels, "frames", "(B, {}, T, H, W), in [-1, 1]")
        vae.check_frames(*frames.shape[2:])
        return encode_floats(vae, frames, self._passages(frames, chunk, band, encode=True))

    def normalise(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std of each channel, as the sampler of a Wan model sees them; in the dtype they have."""
        return self._open().normalise(latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return self._open().denormalise(latents)

    def close(self) -> None:
        """Let the weights go; those of a mapping lie as they lay before. A second call does nothing."""
        if self._vae is not None:
            self._vae = None
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> WanVAE:
        if self._vae is None:
            raise RequestError("this VAE is closed; open it again")
        return self._vae

    def _streamed(self, vae: WanVAE, latents: Tensor, passages: Iterator[Passage]) -> Iterator[Tensor]:
        chunks = decode_floats(vae, latents, passages)
        while True:
            with torch.no_grad():  # not while the caller has the frames
                found = next(chunks, None)
            if found is None:
                return
            yield found[0]

    def _checked(self, x: Tensor, channels: int, what: str, wanted: str) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise RequestError(f"{what} are {kind}; give a tensor of floating-point numbers")
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise RequestError(f"{what} have shape {tuple(x.shape)}; give {wanted.format(channels)}")
        return x.to(self.device, self.dtype)

    def _passages(self, x: Tensor, chunk: int | None, band: int | None, *, encode: bool) -> Iterator[Passage]:
        shape = tuple(x.shape)
        if chunk is None and band is None:
            return self._planner.encode(shape) if encode else self._planner.decode(shape)
        choices = self._planner.choices
        for name, value, allowed in (("chunk", chunk, choices.chunks), ("band", band, choices.bands)):
            if value is not None and (type(value) is not int or value < 1):
                raise RequestError(f"{name} {value!r} is not possible; give a whole number from 1 on, or None")
            if value is not None and not allowed and (name, value) != ("chunk", 1):
                raise RequestError(f"{name} {value} may round otherwise; leave it out, or open with exactness rounding")
        return iter([replace(choices.passage, steps=chunk or choices.passage.steps, rows=band)])


def _of_mapping(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    *,
    device: str,
    dtype: str,
    policy: Policy,
    budget_bytes: int | None,
) -> Vae:
    config, found = vae_of_tensors(tensors, config=config)
    lent = LentVae(VaeSpec.from_config(config, where="the config"), policy, budget_bytes=budget_bytes)
    if misfit := lent.misfit(found):
        raise CheckpointError(f"the tensors do not fit their config: {misfit}")
    first = next(iter(found.values()))
    chosen = first.device if device == "auto" else choose_device(device)[0]
    computed = first.dtype if dtype == "auto" else choose_dtype(dtype, chosen, preferred=first.dtype)[0]
    if dtype == "auto" and computed not in DTYPES.values():
        raise RequestError(f"these tensors are {computed}; give dtype float32, float16 or bfloat16")
    with torch.no_grad():
        weights = {name: tensor.to(chosen, computed) for name, tensor in found.items()}
    vae, planner = lent.bind(weights)
    return Vae(vae, planner, release=lambda: lent.release(weights))


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
