"""Pipelines that encode a whole padded video and use some latent frames of it: the others are not encoded.

Cosmos conditions on the first frames of a video; what follows them is filled up, encoded, and multiplied by zero. The
VAE is causal: latent frame i is made of the frames up to `4 i` and of no later one.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from frameloom.integrations.diffusers.plain import is_diffusers_own
from frameloom.integrations.diffusers.report import Entry
from frameloom.integrations.diffusers.swap import held_by, plain_class, swap
from frameloom.ops.registry import Policy

_FRAMES_PER_LATENT = 4  # what AutoencoderKLWan feeds its encoder after the first frame, whatever its configuration says
_USING = ("__call__", "prepare_latents", "_encode_video", "create_condition_mask")  # that decide which frames are used

Used = Callable[[Any, Mapping[str, Any]], int | None]
"""How many latent frames a pipeline will use of what it encodes, from `prepare_latents`' arguments; None for all."""


def take_conditioning(pipe: DiffusionPipeline, policy: Policy) -> Entry | None:
    """Let a Cosmos pipeline encode the frames that it conditions on, and no others; None for pipelines of other kinds.

    Where only equal bits are allowed, it encodes everything or, where nothing is used, nothing: convolutions over fewer
    frames may round in another way.
    """
    plain = plain_class(type(pipe))
    known = next((kind for kind in plain.__mro__ if kind.__name__ in _USED and _is_of_diffusers(kind)), None)
    if known is None:
        return None
    refusal = _refuses(pipe)
    what = "of a padded video only the frames that are used are encoded"
    if policy.exactness == "bitwise":
        what = "a video of which no frame is used is not encoded"
    if refusal is None:
        swap(pipe, _Conditioned, Conditioning(used=_USED[known.__name__], exact=policy.exactness == "bitwise"))
    return Entry(component="pipeline", kind=plain.__name__, taken=refusal is None, what=refusal or what)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning:
    """What a taken pipeline knows: how many of its latent frames are used, and whether bits have to stay."""

    used: Used
    exact: bool

    def release(self) -> None:
        """Nothing of the pipeline's was changed."""

    def frames(self, pipe: Any, arguments: Mapping[str, Any]) -> int | None:
        """How many latent frames have to be encoded; None for all, as where pipeline or VAE were changed since."""
        if _refuses(pipe) is not None:
            return None
        used = self.used(pipe, arguments)
        return None if self.exact and used else used


class UsedFrames:
    """A pipeline's VAE of which only the first latent frames will be used: `encode` gives zeros for the others."""

    def __init__(self, vae: Any, used: int) -> None:
        self._vae = vae
        self._used = used

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """As the VAE's, of a video (B, C, T, H, W). A sample of it draws as many numbers as that of the whole."""
        scale = 2 ** (len(self._vae.config.dim_mult) - 1) * (self._vae.config.patch_size or 1)
        whole = 1 + (x.shape[2] - 1) // _FRAMES_PER_LATENT
        if whole <= self._used or x.shape[3] % scale or x.shape[4] % scale:
            return self._vae.encode(x, return_dict=return_dict)  # type: ignore[no-any-return]
        shape = (x.shape[0], 2 * self._vae.config.z_dim, whole, x.shape[3] // scale, x.shape[4] // scale)
        parameters = x.new_zeros(shape)
        if self._used:
            encoded = self._vae.encode(x[:, :, : 1 + _FRAMES_PER_LATENT * (self._used - 1)], return_dict=False)[0]
            rest = encoded.parameters.new_zeros((*shape[:2], whole - self._used, *shape[3:]))
            parameters = torch.cat([encoded.parameters, rest], dim=2)
        posterior = DiagonalGaussianDistribution(parameters)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


class _Conditioned:
    """Given to the class of a pipeline."""

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        plain: Any = plain_class(type(self))
        bound = inspect.signature(plain.prepare_latents).bind(self, *args, **kwargs)
        bound.apply_defaults()
        indexes = "condition_frame_indexes_vision"
        if indexes in bound.arguments:  # they may come from an iterator, which can be read once
            bound.arguments[indexes] = tuple(bound.arguments[indexes])
        used = held_by(self).frames(self, bound.arguments)
        pipe: Any = self if used is None else _beside(self, UsedFrames(self.vae, used))  # type: ignore[attr-defined]
        return plain.prepare_latents(pipe, *bound.args[1:], **bound.kwargs)


def _beside(pipe: Any, vae: UsedFrames) -> Any:
    """The same pipeline with another VAE, for one call: the pipeline itself is never seen with it."""
    twin: Any = object.__new__(plain_class(type(pipe)))
    twin.__dict__.update(pipe.__dict__, vae=vae)
    return twin


def _refuses(pipe: Any) -> str | None:
    """Why more frames may be needed than are known to be used, or None."""
    plain = plain_class(type(pipe))
    for name in _USING:
        if name in vars(pipe) or (hasattr(plain, name) and not is_diffusers_own(plain, name)):
            return f"{plain.__name__} has its own {name}"
    return _refuses_vae(getattr(pipe, "vae", None))


def _refuses_vae(vae: Any) -> str | None:
    """Why it may need more frames than are used, or None."""
    if not isinstance(vae, AutoencoderKLWan):
        return f"its VAE is of class {type(vae).__name__}, not AutoencoderKLWan"
    kind = plain_class(type(vae))
    for name in ("encode", "_encode", "tiled_encode"):
        if not is_diffusers_own(kind, name) or name in vars(vae):
            return f"its VAE has its own {name}"
    config: Any = vae.config  # type: ignore[attr-defined]  # a mixin's
    if 2 ** sum(config.temperal_downsample) != _FRAMES_PER_LATENT:
        return f"its VAE does not make one latent frame of {_FRAMES_PER_LATENT}"
    return None


def _is_of_diffusers(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "diffusers"


def _latents_of(pipe: Any, frames: int) -> int:
    return 1 + (frames - 1) // int(pipe.vae_scale_factor_temporal)


def _of_cosmos3(pipe: Any, asked: Mapping[str, Any]) -> int | None:
    """An action's video from its first frame, or all of it; a video its first latent frames, a picture one."""
    action = asked.get("action")
    if asked["latents"] is not None:  # they are taken as they are
        return 0
    if action is not None:
        return None if action.mode == "inverse_dynamics" else 1
    if asked["num_frames"] == 1:
        return 0
    if asked.get("video") is not None:
        indexes: tuple[int, ...] = asked["condition_frame_indexes_vision"]
        return max([0, *(1 + index for index in indexes)])
    return int(asked["image"] is not None)


def _of_cosmos2(pipe: Any, asked: Mapping[str, Any]) -> int | None:
    frames: int = asked["video"].shape[2]
    wanted: int = asked["num_frames"]
    return None if frames >= wanted else _latents_of(pipe, frames)


def _of_cosmos2_5(pipe: Any, asked: Mapping[str, Any]) -> int | None:
    return _latents_of(pipe, asked["num_frames_in"])


def _of_transfer(pipe: Any, asked: Mapping[str, Any]) -> int | None:
    return max(0, int(asked["num_cond_latent_frames"]))


_USED: Mapping[str, Used] = MappingProxyType(
    {
        "Cosmos3OmniPipeline": _of_cosmos3,
        "Cosmos2VideoToWorldPipeline": _of_cosmos2,
        "Cosmos2_5_PredictBasePipeline": _of_cosmos2_5,
        "Cosmos2_5_TransferPipeline": _of_transfer,
    }
)
