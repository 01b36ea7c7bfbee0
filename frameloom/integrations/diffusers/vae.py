"""Takes over the VAE of a pipeline: AutoencoderKLWan, or AutoencoderKLQwenImage, the same under other names."""

import contextlib
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from frameloom.engine.lent_vae import LentVae
from frameloom.errors import CheckpointError, RequestError
from frameloom.integrations.diffusers.plain import (
    Told,
    first_reason,
    has_global_hooks,
    is_traced,
    is_transformed,
    refuses_method,
)
from frameloom.integrations.diffusers.report import Entry
from frameloom.integrations.diffusers.swap import held_by, plain_class, swap
from frameloom.memory.vae import VaePlanner
from frameloom.models.meta import on_meta
from frameloom.models.spec import VaeSpec
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Policy
from frameloom.pipeline.stages import decode_floats, encode_floats

_KINDS: tuple[Any, ...] = (AutoencoderKLWan, AutoencoderKLQwenImage)
_OVERRIDDEN = ("encode", "decode", "_encode", "_decode", "forward", "tiled_encode", "tiled_decode")
_PASSED_BY = ("__call__", "forward", "_conv_forward")  # of its parts
_UNUSED = ("dropout", "scale_factor_temporal", "scale_factor_spatial")  # keys that say nothing of what is computed
_KNOWN = vars(nn.Module()).keys() | {"forward"}  # of any part; and what is looked at as a hook
_HARMLESS = ("training", "gradient_checkpointing", "_is_full_backward_hook")  # of parts, where nothing is recorded
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OTHER_BITS = "bitwise was asked for, and the network here adds up in other orders: the last bits would differ"
_FRAMES_AT_A_TIME = 4  # that the plain methods encode, whatever the compression


def take_vae(name: str, module: nn.Module, policy: Policy) -> Entry | None:
    """Let a Wan VAE encode and decode by the network here; None for another class."""
    kind = _kind_of(module)
    if kind is None:
        return None
    if reason := _refuses(module, kind):
        return _left(name, module, reason)
    if policy.exactness == "bitwise":
        return _left(name, module, _OTHER_BITS)
    try:
        spec = VaeSpec.from_config(_config(module), where=f"the config of {name}")
        held = _LiveVae(module, spec, _parts_of(kind, module), policy)
    except CheckpointError as error:
        return _left(name, module, str(error))
    if misfit := held.lent.misfit(_weights(module)):
        return _left(name, module, f"its weights do not fit its config: {misfit}")
    if reason := _refuses_parts(_named_parts(module), held.parts):
        return _left(name, module, reason)
    try:
        what, extra_bytes = held.told(module)
    except RequestError as error:  # of a device of which nothing is known
        return _left(name, module, str(error))
    except BaseException:  # no memory is left, or the user has no time
        held.release()
        raise
    swap(module, _Taken, held)
    return Entry(component=name, kind=type(module).__name__, taken=True, what=what, extra_bytes=extra_bytes)


def _left(name: str, module: nn.Module, reason: str) -> Entry:
    return Entry(component=name, kind=type(module).__name__, taken=False, what=reason)


class _Taken:
    """The methods that a taken VAE has instead of its own, which are called where ours do not apply."""

    def _encode(self, x: Tensor) -> Any:
        if is_traced():
            return super()._encode(x)  # type: ignore[misc]  # a mixin
        live = _live(self)
        moments = live.encode(self, x) if live else None
        return _plain(self)._encode(self, x) if moments is None else moments

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        if is_traced():
            return super()._decode(z, return_dict=return_dict)  # type: ignore[misc]  # a mixin
        live = _live(self)
        frames = live.decode(self, z) if live else None
        if frames is None:
            return _plain(self)._decode(self, z, return_dict=return_dict)
        return DecoderOutput(sample=frames) if return_dict else (frames,)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What the config makes of a part: its class, and the numbers and words that it computes with beside weights."""

    kind: type[nn.Module]
    settings: Mapping[str, object]

    def refuses(self, name: str, part: nn.Module) -> str | None:
        """Why a part of this name is another one, or None."""
        if type(part) is not self.kind:
            return f"{name} is {type(part).__name__}, and its config asks for {self.kind.__name__}"
        there = vars(part)
        for key, wanted in self.settings.items():
            value = there.get(key, self)  # which equals no setting
            if type(value) is not type(wanted) or value != wanted:
                return f"{name}.{key} is not what its config makes of it"
        own = (key for key in there if key not in self.settings and key not in _KNOWN and hasattr(self.kind, key))
        return next((f"{name} has {key} of its own" for key in own), None)


class _LiveVae:
    """What computes for a taken VAE, on the weights that it has at each call."""

    def __init__(self, module: nn.Module, spec: VaeSpec, parts: Mapping[str, _Part], policy: Policy) -> None:
        self._module = weakref.ref(module)
        self.lent = LentVae(spec, policy)
        self.parts = parts
        self._lock = threading.RLock()  # the network is bound by one call at a time
        self._is_released = False
        self._told = Told(logging.WARNING)

    def decode(self, module: Any, z_BZTHW: Tensor) -> Tensor | None:
        """Frames in [-1, 1] of latents; None where the module must do it by itself."""
        if self._must_be_plain(module, z_BZTHW, self.lent.spec.z_dim):
            return None
        return self._computed(module, _decoded, z_BZTHW)

    def encode(self, module: Any, x_BCTHW: Tensor) -> Tensor | None:
        """Moments of frames; None where the module must do it by itself."""
        spec = self.lent.spec
        if self._must_be_plain(module, x_BCTHW, spec.given_channels):
            return None
        if spec.temporal_scale > _FRAMES_AT_A_TIME or any(size % spec.spatial_scale for size in x_BCTHW.shape[3:]):
            return self._leave(f"frames of {tuple(x_BCTHW.shape[2:])} are not divided by the compression")
        used = 1 + (x_BCTHW.shape[2] - 1) // _FRAMES_AT_A_TIME * _FRAMES_AT_A_TIME  # the plain method ignores the rest
        return self._computed(module, _encoded, x_BCTHW[:, :, :used])

    def told(self, module: nn.Module) -> tuple[str, int]:
        """How it is computed, and the bytes that this takes beside its weights; chosen now where that can be known."""
        weights = _weights(module)
        first = next(iter(weights.values()))
        will_move = first.device.type == "cpu" and torch.accelerator.is_available()
        if will_move or hasattr(module, "_hf_hook") or _refuses_weights(module, weights, first.dtype, first.device):
            return "by the network here; its kernels are chosen at the first call, where its weights are then", 0
        with self._at_work(module) as bound:
            used = [decision.name for decision in bound[1].choices.decisions if decision.used] if bound else []
            return f"by the network here; {', '.join(used)}", self.lent.extra_bytes(weights)

    def release(self) -> None:
        """Bring the weights back into their own memory order, after the call that may be going on in another thread."""
        module = self._module()
        with self._lock:
            self._is_released = True
            if module is not None:
                moved = ((name, weight) for name, weight in _weights(module).items() if name in self.lent.moved)
                self.lent.release({name: _kept(module, name, weight) for name, weight in moved})

    @contextlib.contextmanager
    def _at_work(self, module: nn.Module) -> Iterator[tuple[WanVAE, VaePlanner] | None]:
        """The network on the weights; None where they were given back since the call began."""
        with self._lock:
            if self._is_released:
                yield None
                return
            weights = _weights(module)
            try:
                yield self.lent.bind(weights)
            finally:
                self.lent.unbind(weights)
                if hasattr(module, "_hf_hook"):  # it is moved out of the way after this
                    self.lent.forget()

    def _must_be_plain(self, module: nn.Module, x: Tensor, channels: int) -> bool:
        reason = self._refusal(module, x, channels)
        if reason:
            self._leave(reason)
        elif module.use_tiling:
            self._told.tell(f"{type(module).__name__} makes no tiles: the whole picture is computed within the memory")
        return reason is not None

    def _refusal(self, module: Any, x: Tensor, channels: int) -> str | None:
        """Why a call cannot be computed here."""
        if is_transformed():
            return "a transform of torch.func, or forward-mode differentiation, is going on"
        weights = _weights(module)
        if (
            type(x) not in (Tensor, nn.Parameter)
            or x.layout != torch.strided
            or x.ndim != 5
            or x.shape[1] != channels
            or 0 in x.shape
        ):
            return "it was given something else than a video"
        if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights.values())):
            return "gradients are recorded; call it under torch.no_grad()"
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            return "torch.autocast is on"
        parts = _named_parts(module)
        if module.config.dropout and any(part.training for part in parts.values() if type(part) is nn.Dropout):
            return "it is being trained, with dropout"
        if has_global_hooks() or _has_hooks(parts):
            return "its parts have hooks"
        return (
            _refuses_parts(parts, self.parts)
            or _patched(module, parts)
            or _refuses_weights(module, weights, x.dtype, x.device)
            or self.lent.misfit(weights)
        )

    def _computed(
        self, module: nn.Module, compute: Callable[[WanVAE, VaePlanner, Tensor], Tensor], x: Tensor
    ) -> Tensor | None:
        try:
            with self._at_work(module) as bound:
                return compute(*bound, x) if bound else None
        except RequestError as error:  # the planner's, or of a device of which nothing is known
            return self._leave(str(error))

    def _leave(self, reason: str) -> Tensor | None:
        """The reason is told, and there is nothing to return."""
        module = self._module()
        self._told.tell(f"{type(module).__name__} computes by itself: {reason}")
        return None


@torch.no_grad()
def _decoded(vae: WanVAE, planner: VaePlanner, z_BZTHW: Tensor) -> Tensor:
    """All frames, written where they stay as they come."""
    spec = vae.spec
    batch, _, frames, height, width = z_BZTHW.shape
    size = 1 + spec.temporal_scale * (frames - 1), height * spec.spatial_scale, width * spec.spatial_scale
    out = z_BZTHW.new_empty(batch, spec.made_channels, *size)
    done = 0
    for chunk, _ in decode_floats(vae, z_BZTHW, planner.decode(tuple(z_BZTHW.shape))):
        out[:, :, done : done + chunk.shape[2]].copy_(chunk)
        done += chunk.shape[2]
    return out


@torch.no_grad()
def _encoded(vae: WanVAE, planner: VaePlanner, x_BCTHW: Tensor) -> Tensor:
    return encode_floats(vae, x_BCTHW, planner.encode(tuple(x_BCTHW.shape)))


def _live(module: Any) -> _LiveVae | None:
    """None once it was restored, which another thread may do while a call begins."""
    with contextlib.suppress(KeyError):
        live: _LiveVae = held_by(module)
        return live
    return None


def _plain(module: Any) -> Any:
    """The class it had, even where it has it again since the call began."""
    return plain_class(type(module))


def _kind_of(module: nn.Module) -> type[nn.Module] | None:
    own = getattr(module, "_orig_mod", module)  # of what torch.compile gives
    return next((kind for kind in _KINDS if isinstance(own, kind)), None)


def _refuses(module: Any, kind: type[nn.Module]) -> str | None:
    """Why a VAE cannot be taken over, told by its class and its parts."""
    if not isinstance(module, kind):
        return "it is compiled as a whole; compile it after it was taken over"
    own = [name for name in _OVERRIDDEN if getattr(type(module), name) is not getattr(kind, name)]
    own += [name for name in _OVERRIDDEN if name in vars(module) and name != "forward"]
    if own:
        return f"it has {', '.join(dict.fromkeys(own))} of its own, which must be called"
    parts = _named_parts(module)
    if foreign := {type(part).__name__ for part in parts.values() if not _is_own(part, kind)}:
        return f"it has parts of other makers: {', '.join(sorted(foreign))}"
    if patched := _patched(module, parts):
        return patched
    if any(parameter.is_meta for parameter in module.parameters()) and not _has_hooks(parts):
        return "its weights are on the meta device: load them first"
    if any(type(p) is not nn.Parameter or p.dtype not in _DTYPES for p in module.parameters()):
        return "its weights are quantized"
    if len(dtypes := {str(p.dtype) for p in module.parameters()}) > 1:
        return f"its weights are of several dtypes, {' and '.join(sorted(dtypes))}; bring them into one"
    return None


def _patched(module: nn.Module, parts: Mapping[str, nn.Module]) -> str | None:
    """Which method that is passed by was replaced in a class of Diffusers or torch, or None."""
    whole = ((plain_class(type(module)), name) for name in _OVERRIDDEN)
    kinds = dict.fromkeys(map(type, parts.values()))
    inner = ((kind, name) for kind in kinds for name in _PASSED_BY if hasattr(kind, name))
    return first_reason(refuses_method(kind, name) for kind, name in (*whole, *inner))


def _is_own(part: nn.Module, kind: type[nn.Module]) -> bool:
    return type(part).__module__ == kind.__module__ or type(part).__module__.startswith("torch.nn.modules.")


def _config(module: Any) -> dict[str, Any]:
    """What of its config says how it computes, as if it had been read from a file."""
    config = {name: value for name, value in dict(module.config).items() if name not in _UNUSED}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def _kept(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight, or what Accelerate keeps of it where it is offloaded by layers."""
    prefix, _, attribute = name.rpartition(".")
    weights_map = getattr(getattr(module.get_submodule(prefix), "_hf_hook", None), "weights_map", None)
    kept: Tensor = weights_map[attribute] if weight.is_meta and weights_map is not None else weight
    return kept


def _parts_of(kind: type[nn.Module], module: Any) -> dict[str, _Part]:
    """The parts that the config of a VAE makes, by their names."""
    known = inspect.signature(kind).parameters
    with on_meta():
        twin = kind(**{name: value for name, value in dict(module.config).items() if name in known})
    return {
        name: _Part(kind=type(part), settings={k: v for k, v in vars(part).items() if _is_setting(k, v)})
        for name, part in _named_parts(twin).items()
    }


def _named_parts(module: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in module.named_modules() if name}


def _is_setting(name: str, value: object) -> bool:
    return name not in _HARMLESS and isinstance(value, int | float | str | tuple | None)


def _refuses_parts(parts: Mapping[str, nn.Module], wanted: Mapping[str, _Part]) -> str | None:
    """Why its parts are others than those of its config, or None."""
    if unlike := parts.keys() ^ wanted.keys():
        return f"its parts are not those of its config: {', '.join(sorted(unlike)[:3])}"
    return first_reason(wanted[name].refuses(name, part) for name, part in parts.items())


def _has_hooks(parts: Mapping[str, nn.Module]) -> bool:
    """Whether one of them has a hook that would be passed by."""
    return any(map(_is_hooked, parts.values()))


def _is_hooked(part: nn.Module) -> bool:
    registry = vars(part).get("_diffusers_hook")
    return bool(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) or getattr(registry, "hooks", None)
    )


def _refuses_weights(
    module: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why these weights cannot be computed with for an input of a dtype on a device."""
    for name, weight in weights.items():
        if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
            return f"{name} is quantized"
        if weight.is_inference():
            return f"{name} was made in inference mode"
        if weight.dtype != dtype or weight.device != device or weight.is_meta:
            return f"{name} is {weight.dtype} on {weight.device}, what comes is {dtype} on {device}"
    return None
