"""Takes over the transformers of Diffusers whose blocks are Wan's: which classes those are, and how."""

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from torch import Tensor, nn

from frameloom.integrations.diffusers.attention import TakenAttention, refuses_attention
from frameloom.integrations.diffusers.blocks import (
    TakenBlock,
    TakenFeedForward,
    TakenSkyReelsBlock,
    TakenVaceBlock,
)
from frameloom.integrations.diffusers.conditions import HeldTables, TakenRotary, TakenTextEmbedder
from frameloom.integrations.diffusers.denoiser import TakenDenoiser
from frameloom.integrations.diffusers.kin import TakenAnyFlowBlock, TakenHeliosBlock
from frameloom.integrations.diffusers.plain import refuses_method
from frameloom.integrations.diffusers.report import Entry
from frameloom.integrations.diffusers.swap import Held, is_swapped, plain_class, swap
from frameloom.integrations.diffusers.ways import Heads, HeldWays, Way, Ways
from frameloom.ops.registry import Policy

# By module and name, so that a release of Diffusers without one of them is no error.
_MODELS: Mapping[str, type | None] = MappingProxyType(
    {
        "transformer_wan.WanTransformer3DModel": TakenDenoiser,
        "transformer_chronoedit.ChronoEditTransformer3DModel": TakenDenoiser,
        "transformer_wan_vace.WanVACETransformer3DModel": None,
        "transformer_wan_animate.WanAnimateTransformer3DModel": None,
        "transformer_skyreels_v2.SkyReelsV2Transformer3DModel": None,
        "transformer_helios.HeliosTransformer3DModel": None,
        "transformer_anyflow.AnyFlowTransformer3DModel": None,
        "transformer_anyflow_far.AnyFlowFARTransformer3DModel": None,
        "transformer_wan_animate_2.WanAnimate2Transformer3DModel": None,
    }
)
_BLOCKS: Mapping[str, type] = MappingProxyType(
    {
        "transformer_wan.WanTransformerBlock": TakenBlock,
        "transformer_chronoedit.WanTransformerBlock": TakenBlock,
        "transformer_wan_animate.WanTransformerBlock": TakenBlock,
        "transformer_wan_vace.WanVACETransformerBlock": TakenVaceBlock,
        "transformer_skyreels_v2.SkyReelsV2TransformerBlock": TakenSkyReelsBlock,
        "transformer_helios.HeliosTransformerBlock": TakenHeliosBlock,
        "transformer_anyflow.AnyFlowTransformerBlock": TakenAnyFlowBlock,
        "transformer_anyflow_far.AnyFlowTransformerBlock": TakenAnyFlowBlock,
    }
)
_ATTENTIONS = frozenset(
    {
        "transformer_wan.WanAttention",
        "transformer_chronoedit.WanAttention",
        "transformer_wan_animate.WanAttention",
        "transformer_skyreels_v2.SkyReelsV2Attention",
    }
)
_TABLES = frozenset(
    {
        "transformer_wan.WanRotaryPosEmbed",
        "transformer_chronoedit.ChronoEditRotaryPosEmbed",
        "transformer_wan_animate.WanRotaryPosEmbed",
        "transformer_skyreels_v2.SkyReelsV2RotaryPosEmbed",
    }
)
_HOME = "diffusers.models.transformers."
_PADDING = "of a text's padding one position is computed, where the text is on the CPU"
_OFF = "the weights stay as they lie, so none are packed or fused"


def take_transformer(name: str, module: nn.Module, policy: Policy) -> Entry | None:
    """Let the blocks of a transformer compute by ours; None where it has none that are known. See `accelerate.Take`."""
    kind = type(module).__name__
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module) and _blocks(original):
        return _left(name, kind, "torch.compile has it as a whole, and traces the code of Diffusers")
    blocks = _blocks(module)
    if not blocks:
        return _without_blocks(name, module)
    if any(is_swapped(block) for block in blocks):
        return Entry(component=name, kind=kind, taken=True, what="it was taken before")
    if changed := next(filter(None, map(_changed, blocks)), None):
        return _left(name, kind, changed)
    attention = next(filter(_has_heads, (block.attn1 for block in blocks)), None)
    if attention is None:
        return _left(name, kind, f"in its {type(blocks[0].attn1).__name__} the heads or the norms are not known here")
    weight = attention.norm_q.weight
    if weight.is_meta and not any(hasattr(part, "_hf_hook") for part in module.modules()):
        return _left(name, kind, "its weights are on the meta device; load them first")
    ways = Ways(policy, Heads(attention.heads, attention.inner_dim // attention.heads))
    way = ways.at(weight.device, weight.dtype)
    changes = {reason for block in blocks for reason in _take_block(block, ways)}
    around = _take_around(module, ways, changes)
    what = f"{len(blocks)} blocks{around} by {_said(way, module, attention)}"
    embeds = ways.collapses_padding and any(isinstance(part, TakenTextEmbedder) for part in module.modules())
    said = (what, *([_PADDING] if embeds else []), _OFF, *sorted(changes))
    return Entry(component=name, kind=kind, taken=True, what="; ".join(said))


def _said(way: Way, module: nn.Module, attention: nn.Module) -> str:
    """Of what is chosen, what these classes use."""
    attends = is_swapped(attention)
    elsewhere = {"dit.norm_rotate": attends, "dit.patch": is_swapped(module)}
    unused = tuple(start for start, is_used in elsewhere.items() if not is_used)
    used = [name for name in way.rewrites if not name.startswith(unused)]
    how = way.attention if attends else "as Diffusers has it"
    return f"{', '.join(used) or 'the plain operations'}; attention {how}"


def _left(name: str, kind: str, what: str) -> Entry:
    return Entry(component=name, kind=kind, taken=False, what=what)


def _without_blocks(name: str, module: nn.Module) -> Entry | None:
    """A transformer that is known, but for its blocks; None for anything else."""
    if _known_model(module) is None:
        return None
    return _left(name, type(module).__name__, "its blocks are none of those that are known here")


def _has_heads(attention: Any) -> bool:
    """Whether an attention tells its heads and has a weight by them, as those of Diffusers do; wrappers may not."""
    weight = getattr(getattr(attention, "norm_q", None), "weight", None)
    return isinstance(weight, Tensor) and hasattr(attention, "heads") and hasattr(attention, "inner_dim")


def _blocks(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if _place(part) in _BLOCKS]


def _place(module: nn.Module) -> str:
    """Where Diffusers has a module's class: file and name; empty for a class from elsewhere."""
    plain: Any = type(module)
    return _place_of(plain_class(plain))


def _place_of(kind: type) -> str:
    home = kind.__module__
    return f"{home.removeprefix(_HOME)}.{kind.__name__}" if home.startswith(_HOME) else ""


def _known_model(module: nn.Module) -> Any:
    """The class of Diffusers that a transformer is of, or derived from."""
    return next((kind for kind in type(module).__mro__ if _place_of(kind) in _MODELS), None)


def _changed(module: nn.Module) -> str | None:
    """Why a part that is known is left: somebody has changed its class; None where nobody has."""
    kind: type = type(module)
    return refuses_attention(kind) if _place(module) in _ATTENTIONS else refuses_method(kind, "forward")


def _take_block(block: nn.Module, ways: Ways) -> set[str]:
    """Take a block and what it is made of. Returns why parts that are known were left."""
    parts: Any = block
    swap(block, _BLOCKS[_place(block)], HeldWays(ways=ways))
    attentions = [part for part in (parts.attn1, parts.attn2) if _place(part) in _ATTENTIONS]
    known: list[tuple[nn.Module, type]] = [(part, TakenAttention) for part in attentions]
    if type(parts.ffn) is FeedForward:
        known.append((parts.ffn, TakenFeedForward))
    return {reason for part, mixin in known if (reason := _take_part(part, mixin, HeldWays(ways=ways)))}


def _take_part(part: nn.Module, mixin: type, held: Held) -> str | None:
    """Take it, or return why it is left."""
    reason = _changed(part)
    if reason is None:
        swap(part, mixin, held)
    return reason


def _take_around(module: Any, ways: Ways, changes: set[str]) -> str:
    """What lies around the blocks, where its forward is the one that is known. Returns what is said of it.

    Why parts that are known were left comes to `changes`.
    """
    model = _known_model(module)
    if model is None or refuses_method(type(module), "forward"):
        return ", in a forward that is its own,"
    embedder = getattr(module.condition_embedder, "text_embedder", None)  # none of what is wrapped
    known: list[tuple[nn.Module, type, Held]] = []
    if type(embedder) is PixArtAlphaTextProjection:
        known.append((embedder, TakenTextEmbedder, HeldWays(ways=ways)))
    if _place(module.rope) in _TABLES and all(is_swapped(block.attn1) for block in _blocks(module)):
        known.append((module.rope, TakenRotary, HeldTables(network=weakref.ref(module))))
    mixin = _MODELS[_place_of(model)]
    if mixin is not None:
        known.append((module, mixin, HeldWays(ways=ways)))
    changes.update(filter(None, (_take_part(*each) for each in known)))
    return ""
