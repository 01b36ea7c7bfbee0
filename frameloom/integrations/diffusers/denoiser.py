"""The forward of WanTransformer3DModel and of the class that is the same: what lies around its blocks.

Beside what the blocks gain: patches by one product, the timestep of a frame embedded once and not for each of its
tokens, the padding of a text known beside an image, too, and the last layer's norm in one pass.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from frameloom.integrations.diffusers.plain import (
    first_reason,
    has_affine,
    is_hooked,
    is_traced,
    refuses_input,
    refuses_layer,
    refuses_method,
    refuses_weights,
)
from frameloom.integrations.diffusers.swap import held_by, plain_class
from frameloom.integrations.diffusers.ways import Way, Ways
from frameloom.ops.norm import at_least_fp32
from frameloom.ops.patch import Grid, unpatchify


class TakenDenoiser(nn.Module):
    """Mixin of WanTransformer3DModel and ChronoEditTransformer3DModel."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Latents (B, C, T, H, W) -> velocity, in the class or the tuple that Diffusers returns.

        timestep: (B,), or (B, L) with one for each token. Texts (B, S, E), images (B, N, E).
        """
        inputs = hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image
        plain = functools.partial(super().forward, *inputs, return_dict, attention_kwargs=attention_kwargs)
        if is_traced() or attention_kwargs:
            return plain()
        ways: Ways = held_by(self).ways
        reason = first_reason(_reasons(self, ways, *inputs))
        if reason is not None:
            ways.told.tell_plain(type(self).__name__, reason)
            return plain()
        grid = _grid(self, hidden_states)
        by_frame = timestep if timestep.ndim == 1 else _by_frame(timestep, grid)
        if by_frame is None:
            ways.told.tell_plain(type(self).__name__, "tokens of one frame have different timesteps")
            return plain()
        velocity = _velocity(self, ways, hidden_states, by_frame, encoder_hidden_states, encoder_hidden_states_image)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


def _velocity(
    module: Any, ways: Ways, x_BCTHW: Tensor, timestep: Tensor, text_BSE: Tensor, image_BNE: Tensor | None
) -> Tensor:
    """`timestep`: (B,), or (B, F) for F frames of tokens."""
    way, grid = ways.of(x_BCTHW), _grid(module, x_BCTHW)
    rope = module.rope(x_BCTHW)
    x_BLD = _patches(module, way, x_BCTHW)
    entries = None if timestep.ndim == 1 else timestep.shape[1]
    time, projection, text_BSD, image_BND = module.condition_embedder(
        timestep.flatten(), text_BSE, image_BNE, timestep_seq_len=entries
    )
    projection = projection.unflatten(-1, (6, -1))
    context_BSD = text_BSD if image_BND is None else _joined(ways, text_BSD, image_BND)
    for block in module.blocks:
        x_BLD = block(x_BLD, context_BSD, projection, rope)
    cells_BLP: Tensor = module.proj_out(_last_norm(module, way, x_BLD, time))
    return unpatchify(cells_BLP, grid, patch_size=tuple(module.config.patch_size))


def _patches(module: Any, way: Way, x_BCTHW: Tensor) -> Tensor:
    layer = module.patch_embedding
    if refuses_layer(layer, nn.Conv3d) or refuses_weights((layer.weight, layer.bias), x_BCTHW, same_dtype=True):
        tokens: Tensor = layer(x_BCTHW).flatten(2).transpose(1, 2).contiguous()
        return tokens
    return way.ops.patch_embed(x_BCTHW, layer.weight, layer.bias, layer.kernel_size)


def _cuts_patches(layer: nn.Module) -> bool:
    """Whether a convolution, which may be another layer by now, reads every number once."""
    if type(layer) is not nn.Conv3d:
        return True
    strides = layer.stride == layer.kernel_size == tuple(layer.weight.shape[2:])
    return strides and set(layer.padding) == {0} and set(layer.dilation) == {1} and layer.groups == 1


def _joined(ways: Ways, text_BSD: Tensor, image_BND: Tensor) -> Tensor:
    """Image first, as Diffusers joins them; the blocks know the text's padding again."""
    context_BSD = torch.cat((image_BND, text_BSD), dim=1)
    padding = ways.paddings.of(text_BSD)
    if padding is not None:
        ways.paddings.put(context_BSD, padding._replace(start=image_BND.shape[1]))
    return context_BSD


def _last_norm(module: Any, way: Way, x_BLD: Tensor, time: Tensor) -> Tensor:
    """Normed, scaled and shifted by the timestep: `time` (B, D), or (B, F, D) by frames of tokens."""
    time = time[:, None] if time.ndim == 2 else time
    entries = module.scale_shift_table[:, None] + time[:, :, None]
    shift, scale = (part if time.shape[1] in (1, x_BLD.shape[1]) else part.unsqueeze(2) for part in entries.unbind(2))
    return way.ops.norm_scale_shift(x_BLD, module.norm_out.eps, scale=scale, shift=shift)


def _grid(module: Any, x_BCTHW: Tensor) -> Grid:
    frames, height, width = (n // p for n, p in zip(x_BCTHW.shape[2:], module.config.patch_size, strict=True))
    return frames, height, width


def _by_frame(timestep_BL: Tensor, grid: Grid) -> Tensor | None:
    """(B, L) -> (B, F); None where a frame's tokens differ. Waits for the device."""
    if timestep_BL.shape[1] != math.prod(grid):
        return None
    frames_BFN = timestep_BL.reshape(timestep_BL.shape[0], grid[0], -1)
    first_BF1 = frames_BFN[:, :, :1]
    return first_BF1[:, :, 0] if bool((frames_BFN == first_BF1).all()) else None


def _reasons(
    module: Any, ways: Ways, x: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None
) -> Iterator[str | None]:
    yield refuses_method(plain_class(type(module)), "forward")
    yield refuses_input(module, x, text, image)
    if timestep.ndim not in (1, 2) or not x.shape[0] == timestep.shape[0] == text.shape[0]:
        yield "latents, timesteps and texts come in different numbers"
    if any(size % patch for size, patch in zip(x.shape[2:], module.config.patch_size, strict=True)):
        yield "the latents cannot be cut into whole patches"
    if timestep.ndim == 2 and not ways.embeds_frames:
        yield "each token has a timestep of its own, and what is the same may not be shared"
    if is_hooked(module.rope) or is_hooked(module.proj_out):
        yield "its positions or its last layer have hooks"  # as where the tokens are divided over devices
    yield refuses_layer(module.norm_out, FP32LayerNorm)
    yield "its last norm has weights" if has_affine(module.norm_out) else None
    yield None if _cuts_patches(module.patch_embedding) else "its patches are not cut as its configuration says"
    table = module.scale_shift_table
    yield refuses_weights((table,), x)
    if at_least_fp32(table) is not table and ways.policy.exactness == "bitwise":
        yield "its modulation is narrower than float32"
