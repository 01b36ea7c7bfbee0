"""Networks that keep quantized weights as they are stored, against the numbers that these stand for: the same bits."""

from collections.abc import Iterator

import torch

from frameloom.engine.dit import load_fast_dit
from frameloom.engine.modules import fill
from frameloom.models.encoders import build_text_encoder, text_encoder_keeps_fp32
from frameloom.models.spec import TransformerSpec
from frameloom.ops.registry import Policy
from frameloom.parallel.weights import REFUSED
from frameloom.platform.device import free_memory_bytes, timed
from frameloom.verify.finding import Finding
from frameloom.verify.networks import SAME_BITS, compare, lack_of_memory
from frameloom.verify.trial import Compute, Trial
from frameloom.weights.checkpoint import Component
from frameloom.weights.load import Quantized
from frameloom.weights.tensors import is_quantized

_DTYPES = (torch.float32, torch.bfloat16)
_KEPT, _EXPANDED = "kept as stored", "made plain when read"
_TEXTS, _TOKENS, _WORDS = 2, 64, 40
# What holds weights in another form is never used for those that stay as they are; for plain ones it rounds otherwise.
_POLICY = Policy(forced=dict.fromkeys(REFUSED, False))


@torch.inference_mode()
def verify_stored(
    component: Component, name: str, device: torch.device, *, plain: Component | None = None
) -> Iterator[Finding]:
    """A transformer or a text encoder, if its weights are quantized: one copy of them is there at a time.

    `plain`: a file of the numbers that they stand for. Without one, what they become when they are read is the measure.
    """
    if not any(map(is_quantized, component.tensors.values())):
        return
    if note := lack_of_memory(component, free_memory_bytes(device)):
        yield Finding(name=name, what=_KEPT, promise=SAME_BITS, note=note)
        return
    ways: dict[str, Quantized] = {_KEPT: "keep"} if plain is None else {_EXPANDED: "expand", _KEPT: "keep"}
    for dtype in _DTYPES:
        measure = _load(plain or component, dtype, device, quantized="expand")
        reference, seconds = measure(), timed(measure, device)
        del measure
        for what, quantized in ways.items():
            title = f"{name}, {what}, {str(dtype).removeprefix('torch.')}"
            yield compare(
                title, what, compute=_load(component, dtype, device, quantized=quantized), reference=reference,
                seconds=seconds, bitwise=True,
            )  # fmt: skip


def _load(component: Component, dtype: torch.dtype, device: torch.device, *, quantized: Quantized) -> Compute:
    """Load a network; what is returned asks it everything."""
    load = _load_features if component.name == "text_encoder" else _load_predictions
    return load(component, dtype, device, quantized=quantized)


def _load_predictions(
    component: Component, dtype: torch.dtype, device: torch.device, *, quantized: Quantized
) -> Compute:
    spec = TransformerSpec.from_config(component.config, where=str(component.described_by))
    fast = load_fast_dit(component, spec, dtype, device, policy=_POLICY, attention="sdpa", quantized=quantized)
    return Trial.of(spec, device).everything(fast.dit, fast.choices.loop)


def _load_features(component: Component, dtype: torch.dtype, device: torch.device, *, quantized: Quantized) -> Compute:
    model = build_text_encoder(component.config, where=str(component.described_by))
    fill(model, component, dtype, device, keep=text_encoder_keeps_fp32(dtype), tied=True, quantized=quantized)
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(model.shared.num_embeddings, (_TEXTS, _TOKENS), generator=generator).to(device)
    mask_BL = (torch.arange(_TOKENS, device=device) < _WORDS).expand(_TEXTS, -1)
    return lambda: model(ids_BL, mask_BL)
