"""A pipeline's text encoder remembers the prompts that came last: negative ones above all come again and again.

What is remembered is bound to all that it was made of: tokens, mask, options, configuration, weights, and how this
machine computes. A hit gives copies, and needs no weight: an encoder that is offloaded stays where it is.
"""

import functools
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from frameloom.integrations.diffusers.plain import Told, is_traced
from frameloom.integrations.diffusers.report import Entry
from frameloom.integrations.diffusers.swap import held_by, swap
from frameloom.ops.registry import Policy
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)
MOST_BYTES = 64 * 2**20  # eight prompts of Wan's in float32, sixteen in bfloat16
_KINDS = ("T5EncoderModel", "UMT5EncoderModel")
_SCATTERED = (
    torch.arange(64, dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1
)  # where in each weight numbers are looked at
_OPTIONS = (bool, int, str, type(None))

Key = tuple[Any, ...]


def take_text_encoder(name: str, module: nn.Module, policy: Policy) -> Entry | None:
    """Let a text encoder remember prompts; None for what is no text encoder. It is bitwise: any policy allows it."""
    if not name.startswith("text_encoder"):
        return None
    kind = type(module)
    refusal = None
    if not (kind.__name__ in _KINDS and kind.__module__.startswith("transformers.")):
        refusal = f"prompts are remembered of {' and '.join(_KINDS)}"
    else:
        swap(module, _Remembering, Prompts())
    what = f"prompts that come again are remembered, in up to {MOST_BYTES >> 20} MiB"
    return Entry(component=name, kind=kind.__name__, taken=refusal is None, what=refusal or what)


@dataclass(kw_only=True, slots=True)
class Prompts:
    """What was computed last, oldest first, and how often it was asked for again: by several threads, too.

    `held_bytes`: what the outputs take that are remembered.
    """

    most_bytes: int = MOST_BYTES
    held_bytes: int = 0
    hits: int = 0
    misses: int = 0
    told: Told = field(default_factory=Told)
    _outputs: OrderedDict[Key, Any] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is empty: what is remembered is bound to the weights that it was computed with."""
        return functools.partial(Prompts, most_bytes=self.most_bytes), ()

    def find(self, key: Key) -> Any:
        """A copy of what was computed, or None."""
        with self._lock:
            found = self._outputs.get(key)
            if found is None:
                self.misses += 1
                return None
            self._outputs.move_to_end(key)  # the youngest now
            self.hits += 1
        log.debug("a prompt was remembered: %d of %d", self.hits, self.hits + self.misses)
        return _copied(found)

    def keep(self, key: Key, output: Any) -> None:
        """Remember a copy of an output, and forget the oldest for it; nothing of one that is too large."""
        if not _is_known(output) or _bytes_of(output) > self.most_bytes:
            return
        copied = _copied(output)
        with self._lock:
            self.held_bytes += _bytes_of(copied) - _bytes_of(self._outputs.pop(key, None))
            self._outputs[key] = copied
            while self.held_bytes > self.most_bytes:
                self.held_bytes -= _bytes_of(self._outputs.popitem(last=False)[1])

    def release(self) -> None:
        """Forget everything."""
        with self._lock:
            self._outputs.clear()
            self.held_bytes = 0


class _Remembering:
    """Given to the class of a text encoder. It stands before hooks, which move weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        prompts: Prompts = held_by(self)
        reason = _refuses(module)
        if reason is not None:
            prompts.told.tell(f"prompts are not remembered: {reason}")
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        asked = _asked(args, kwargs)
        if asked is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        key = (asked, _made_of(module), _embedding_of(module, args, kwargs))
        output = prompts.find(key)
        if output is None:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            prompts.keep(key, output)
        return output


def _refuses(module: Any) -> str | None:
    """Why an output says nothing of the next, or None."""
    if is_traced():
        return "it is being turned into a graph"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if module.training:
        return "it is in training mode"
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda", "xpu", "mps"))):
        return "autocast is on"
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a hook is on all modules"
    embedding = type(module.get_input_embeddings())
    if embedding is not nn.Embedding:
        return f"its words are embedded by a {embedding.__name__}"
    return next(filter(None, map(_refuses_layer, module.modules())), None)


def _refuses_layer(layer: nn.Module) -> str | None:
    kind, inside = type(layer), vars(layer)
    if not kind.__module__.startswith(("torch.nn.", "transformers.")):
        return f"it has a {kind.__name__} of {kind.__module__.partition('.')[0]} inside"
    if "_diffusers_hook" in inside or not _is_accelerates(inside.get("_hf_hook")):
        return f"a hook is on its {kind.__name__}"
    if "forward" in inside and "_hf_hook" not in inside:
        return f"its {kind.__name__} has a forward of its own"
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    if any(not str(getattr(hook, "__module__", None)).startswith("transformers.") for hook in hooks):
        return f"a hook is on its {kind.__name__}"
    for weight in _weights_of(layer):
        if weight.is_meta:
            return "its weights are elsewhere until they are used"
        if type(weight) not in (nn.Parameter, Tensor) or weight.is_inference() or not weight.dtype.is_floating_point:
            return "its weights are not plain"
    return None


def _is_accelerates(hook: object) -> bool:
    return hook is None or type(hook).__module__.startswith("accelerate.")


def _weights_of(layer: nn.Module) -> Iterator[Tensor]:
    for weight in (*layer._parameters.values(), *layer._buffers.values()):
        if weight is not None:
            yield weight


def _asked(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key | None:
    """Tokens, mask and options, as a key; None where there is something else."""
    parts = [(str(place), value) for place, value in enumerate(args)] + sorted(kwargs.items())
    key = tuple((name, _part(value)) for name, value in parts)
    return key if all(part is not None for _, part in key) else None


def _part(value: object) -> Key | None:
    if type(value) is Tensor:
        if value.is_meta or value.dtype.is_floating_point or value.is_complex():
            return None
        return str(value.device), value.dtype, tuple(value.shape), value.cpu().numpy().tobytes()
    return (value,) if isinstance(value, _OPTIONS) else None


def _made_of(module: Any) -> Key:
    """What an output depends on beside its inputs; equal where weights were moved, other where they were changed."""
    named = [*module.named_parameters(), *module.named_buffers()]
    identities = tuple((name, id(weight), weight._version, weight.dtype, weight.shape) for name, weight in named)
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    places = (str(place),) if place is not None else tuple(sorted({str(weight.device) for _, weight in named}))
    computed = (module.config.to_json_string(), module.config._attn_implementation, *_arithmetic())
    return identities, _sampled([weight for _, weight in named]), places, computed


def _embedding_of(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
    """The rows of the embedding that a prompt uses, in full: single words are what people rewrite."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if not isinstance(tokens, Tensor):
        return None
    weight = module.get_input_embeddings().weight.detach()
    used = torch.unique(tokens).long().to(weight.device)
    if used.numel() == 0 or int(used[0]) < 0 or int(used[-1]) >= len(weight):  # the encoder says what is wrong
        return None
    rows = weight.index_select(0, used).contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(rows.numpy()).digest()


def _sampled(weights: Sequence[Tensor]) -> bytes:
    """Numbers from all over the weights: who writes to `.data`, as merged adapters do, leaves no other trace."""
    devices: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        flat = weight.detach().reshape(-1)
        scattered = (_SCATTERED * flat.numel()).to(torch.int64)  # in no column, row or stride alone
        devices.setdefault(weight.device, []).append(flat[scattered.to(flat.device)].float())
    return b"".join(torch.cat(parts).cpu().numpy().tobytes() for parts in devices.values())


def _arithmetic() -> Key:
    return (
        torch.get_num_threads(),
        torch.backends.cuda.matmul.fp32_precision,  # whichever of torch's interfaces they were set by
        torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    )


def _is_known(output: object) -> bool:
    """Whether an output is made of tensors, tuples and transformers' outputs, all of which can be copied."""
    if isinstance(output, Mapping):
        return type(output).__module__.startswith("transformers.") and all(map(_is_known, output.values()))
    if type(output) is tuple:
        return all(map(_is_known, output))
    return output is None or type(output) is Tensor


def _copied(output: Any) -> Any:
    """The same structure of copies."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    if isinstance(output, Mapping):
        copies: Any = type(output)
        return copies(**{name: _copied(value) for name, value in output.items()})
    return output


def _bytes_of(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.nbytes
    return sum(map(_bytes_of, output.values() if isinstance(output, Mapping) else output or ()))
