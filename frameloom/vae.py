"""The VAE of Wan 2.1 and 2.2 alone, for other programs: `open` it, then `decode`, `encode` or `stream`.

What is said here is stable: it changes with the major version of this package only. docs/vae.md has examples.

Shapes: B videos, Z latent channels, C colours (3 in most), T frames, H rows and W columns; of latents T', H' and W',
where T = 1 + temporal_scale * (T' - 1), H = spatial_scale * H', W = spatial_scale * W'.
"""

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self, SupportsIndex

import torch
from torch import Tensor
from torch.nn import Module, Parameter

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
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    exactness: str = "rounding",
    rewrites: Sequence[str] = (),
    memory: int | str = "auto",
    variant: str = "",
) -> "Vae":
    """Open a VAE: a folder, a weight file, "owner/name" of the hub, or a mapping of tensors by their names.

    Names may be Diffusers' or the original code's. `config`: as the config.json of Diffusers' AutoencoderKLWan or
    AutoencoderKLQwenImage; None where a file beside the weights, or their shapes, tell it.

    `device`: auto, cpu, cuda, cuda:1 ..., or torch's; auto is the first accelerator there is, and of a mapping where
    its tensors are. `dtype`: float32, float16 or bfloat16, by name or torch's; auto is float32, and of a mapping that
    of its tensors. `exactness`, `rewrites`: as in `frameloom.load`. `memory`: bytes, or such as "4GB", that a call may
    take besides the weights; auto is a share of what is free. `variant`: such as "fp16".

    Tensors of a mapping are shared where device and dtype are theirs: each call computes with the numbers that they
    have then. Parameters are brought into the memory order that is computed with, in place, and `close` brings them
    back; of other tensors, which may be views of somebody's, a call makes what it needs in another order, and drops it.

    Raises CheckpointError for what holds no VAE of Wan's, RequestError for the rest; both are one sentence.
    """
    ask_for_same_sums()
    policy = policy_of(exactness, rewrites)
    budget_bytes = memory_bytes(memory)
    words = None if config is None else {"z_dim": VaeSpec().z_dim, **_as_json(config)}
    device_name, dtype_name = _named(device), _named(dtype)
    if isinstance(source, Mapping):
        return _of_mapping(
            source, words, device=device_name, dtype=dtype_name, policy=policy, budget_bytes=budget_bytes
        )
    if not isinstance(source, str | os.PathLike):
        if isinstance(source, Module):
            raise CheckpointError(
                f"a module ({type(source).__name__}) is not opened as such; give dict(module.named_parameters()) and "
                "its config, or use frameloom.accelerate"
            )
        raise CheckpointError(f"{source!r} is no VAE; give a folder, a weight file, or a mapping of tensors")
    chosen, _ = choose_device(device_name)
    computed, _ = choose_dtype(dtype_name, chosen, preferred=torch.float32)
    component = open_vae(source, config=words, variant=variant)
    spec = VaeSpec.from_config(component.config, where=str(component.described_by))
    with memory_errors(f"the VAE on {chosen}", "choose another device, or a narrower dtype"):
        fast = load_fast_vae(component, spec, computed, chosen, policy=policy, budget_bytes=budget_bytes)
    return Vae(_Network(fast.vae, fast.planner, chosen, computed))


class Vae:
    """A VAE that is open. Use it in a `with` statement, or call `close`; by one thread at a time.

    Latents are those of the VAE; `normalise` makes of them what the sampler of a Wan model sees, and `denormalise`
    takes that back. Tensors may come on any device and in any float dtype: they are computed with, and returned, on
    `device` in `dtype`. No gradients are recorded.

    `chunk` and `band` say how much passes at a time: so many latent frames, and so many rows at most in each part of
    the network. Whatever they are, it is the same function, with neither seams nor blends; None leaves both to the
    memory that is free. Where a passage that was chosen runs out of memory, a smaller one goes on from there.
    """

    def __init__(self, network: "_Network") -> None:
        self._network: _Network | None = network
        self._planner = network.planner
        self.device, self.dtype = network.device, network.dtype
        spec = network.vae.spec
        self.latent_channels = spec.z_dim
        self.temporal_scale, self.spatial_scale = spec.temporal_scale, spec.spatial_scale

    @property
    def decisions(self) -> tuple[str, ...]:
        """What is computed in another way than the reference does, or why not, one line each."""
        return tuple(map(str, self._planner.choices.decisions))

    @torch.no_grad()
    def decode(self, latents: Tensor, *, chunk: int | None = None, band: int | None = None) -> Tensor:
        """Frames (B, C, T, H, W) in [-1, 1] of latents (B, Z, T', H', W'). Raises RequestError on another shape."""
        spec, out, done = self._open().vae.spec, None, 0
        for frames in self.stream(latents, chunk=chunk, band=band):
            if out is None:
                batch, _, count, height, width = latents.shape
                space, length = spec.spatial_scale, 1 + spec.temporal_scale * (count - 1)
                out = frames.new_empty(batch, frames.shape[1], length, height * space, width * space)
            out[:, :, done : done + frames.shape[2]].copy_(frames)
            done += frames.shape[2]
        assert out is not None
        return out

    def stream(self, latents: Tensor, *, chunk: int | None = None, band: int | None = None) -> Iterator[Tensor]:
        """The same frames as they leave the decoder, (B, C, t, H, W) each: the whole video need never be in memory."""
        latents = self._checked(latents, self._open().vae.spec.z_dim, "latents", "(B, {}, T, H, W)")
        return self._streamed(latents, self._passages(latents, chunk, band, encode=False))

    @torch.no_grad()
    def encode(self, frames: Tensor, *, chunk: int | None = None, band: int | None = None) -> Tensor:
        """Latents (B, Z, T', H', W') of frames (B, C, T, H, W) in [-1, 1]: the mode of the posterior.

        T is 1 + temporal_scale * k, and H and W are multiples of spatial_scale; RequestError otherwise.
        """
        return self.moments(frames, chunk=chunk, band=band).chunk(2, dim=1)[0]

    @torch.no_grad()
    def moments(self, frames: Tensor, *, chunk: int | None = None, band: int | None = None) -> Tensor:
        """Mean and log-variance of the posterior, one after the other: (B, 2Z, T', H', W'); else as `encode`."""
        network = self._open()
        frames = self._checked(frames, network.vae.spec.given_channels, "frames", "(B, {}, T, H, W), in [-1, 1]")
        network.vae.check_frames(*frames.shape[2:])
        passages = self._passages(frames, chunk, band, encode=True)
        with network.bound() as vae:
            return encode_floats(vae, frames, passages)

    def normalise(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std of each channel, as the sampler of a Wan model sees them; in the dtype they have."""
        return self._open().vae.normalise(self._normalisable(latents))

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return self._open().vae.denormalise(self._normalisable(latents))

    def close(self) -> None:
        """Let the weights go; those of a mapping lie as they lay before. A second call does nothing."""
        if self._network is not None:
            self._network.release()
            self._network = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> "_Network":
        if self._network is None:
            raise RequestError("this VAE is closed; open it again")
        return self._network

    def _streamed(self, latents: Tensor, passages: Iterator[Passage]) -> Iterator[Tensor]:
        with self._open().bound() as vae:
            chunks = decode_floats(vae, latents, passages)
            while self._open():
                with torch.no_grad():  # not while the caller has the frames
                    found = next(chunks, None)
                if found is None:
                    return
                yield found[0]

    def _checked(self, x: Tensor, channels: int, what: str, wanted: str) -> Tensor:
        _check_numbers(x, what)
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise RequestError(f"{what} have shape {tuple(x.shape)}; give {wanted.format(channels)}")
        return x.to(self.device, self.dtype)

    def _normalisable(self, latents: Tensor) -> Tensor:
        _check_numbers(latents, "latents")
        if latents.ndim not in (4, 5) or latents.shape[-4] != self.latent_channels:
            shape = tuple(latents.shape)
            raise RequestError(f"latents have shape {shape}; give (B, {self.latent_channels}, T, H, W)")
        return latents

    def _passages(self, x: Tensor, chunk: int | None, band: int | None, *, encode: bool) -> Iterator[Passage]:
        shape = tuple(x.shape)
        if chunk is None and band is None:
            return self._planner.encode(shape) if encode else self._planner.decode(shape)
        choices = self._planner.choices
        steps, rows = _count("chunk", chunk), _count("band", band)
        for name, value, allowed in (("chunk", steps, choices.chunks), ("band", rows, choices.bands)):
            if value is not None and not allowed and (name, value) != ("chunk", 1):
                raise RequestError(f"{name} {value} may round otherwise; leave it out, or open with exactness rounding")
        return iter([replace(choices.passage, steps=steps or choices.passage.steps, rows=rows)])


class _Network:
    """A network with weights of its own, and what plans its memory."""

    def __init__(self, vae: WanVAE, planner: VaePlanner, device: torch.device, dtype: torch.dtype) -> None:
        self.vae, self.planner, self.device, self.dtype = vae, planner, device, dtype

    @contextmanager
    def bound(self) -> Iterator[WanVAE]:
        """The network on its weights as they are now."""
        yield self.vae

    def release(self) -> None:
        """Let the weights go."""
        del self.vae


class _Borrowed(_Network):
    """A network on the weights of somebody else, who may change them between two calls."""

    def __init__(self, lent: LentVae, weights: Mapping[str, Tensor]) -> None:
        self._lent, self._weights = lent, weights
        self._calls = 0  # streams may be read in turns
        first = next(iter(weights.values()))
        self.device, self.dtype = first.device, first.dtype
        usable = self._usable()
        vae, planner = lent.bind(usable)
        lent.unbind(usable)
        super().__init__(vae, planner, first.device, first.dtype)

    @contextmanager
    def bound(self) -> Iterator[WanVAE]:
        """As there; the weights are let go after the last call."""
        weights = self._usable()
        if self._calls:
            self._lent.keep(weights)
        self._lent.bind(weights)
        self._calls += 1
        try:
            yield self.vae
        finally:
            self._calls -= 1
            if not self._calls:
                self._lent.unbind(weights)

    def release(self) -> None:
        """Bring the weights back into their own memory order."""
        self._lent.release({name: weight for name, weight in self._weights.items() if isinstance(weight, Parameter)})
        super().release()

    def _usable(self) -> dict[str, Tensor]:
        """Parameters themselves; of other tensors, whose memory may be another's too, only the numbers are used."""
        for name, weight in self._weights.items():
            if weight.device != self.device or weight.dtype != self.dtype:
                raise RequestError(
                    f"{name} is {weight.dtype} on {weight.device} now, and was {self.dtype} on {self.device} when the "
                    "VAE was opened; open it again"
                )
        if misfit := self._lent.misfit(self._weights):
            raise RequestError(f"the tensors have changed: {misfit}; open the VAE again")
        return {
            name: weight if isinstance(weight, Parameter) else Parameter(weight.detach(), requires_grad=False)
            for name, weight in self._weights.items()
        }


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
    if dtype == "auto" and len(dtypes := sorted({str(tensor.dtype) for tensor in found.values()})) > 1:
        raise RequestError(f"these tensors are of several dtypes, {' and '.join(dtypes)}; name the one to compute with")
    if dtype == "auto" and computed not in DTYPES.values():
        raise RequestError(f"these tensors are {computed}; give dtype float32, float16 or bfloat16")
    with torch.no_grad():
        there = {name: tensor.to(chosen, computed) for name, tensor in found.items()}
    weights = {
        name: tensor if tensor is found[name] else Parameter(tensor, requires_grad=False)
        for name, tensor in there.items()
    }
    return Vae(_Borrowed(lent, weights))


def _check_numbers(x: Tensor, what: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise RequestError(f"{what} are {kind}; give a tensor of floating-point numbers")
    if x.is_meta or x.layout != torch.strided:
        raise RequestError(f"{what} are {'without values' if x.is_meta else x.layout}; give a dense tensor")


def _count(name: str, value: SupportsIndex | None) -> int | None:
    """A number of frames or rows: an integer of any library, and no bool."""
    if value is None:
        return None
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise RequestError(f"{name} {value!r} is not possible; give a whole number from 1 on, or None")
    return number


def _named(device_or_dtype: Any) -> Any:
    """torch's objects by the names that all of the package understands."""
    is_torchs = isinstance(device_or_dtype, torch.device | torch.dtype)
    return str(device_or_dtype).removeprefix("torch.") if is_torchs else device_or_dtype


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config is {type(config).__name__}; give the words of a config.json as a mapping")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
