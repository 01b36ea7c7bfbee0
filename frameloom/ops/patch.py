"""A latent cut into patches, one token for each, and tokens back to the latent grid that they were cut from."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from frameloom.errors import RequestError

Grid = tuple[int, int, int]
PatchSize = int | tuple[int, ...]


def full_patch_size(patch_size: PatchSize) -> Grid:
    """The patch along t, h, w. Raises RequestError for what is no patch size.

    A number or a 1-tuple is the same along all three, as torch expands the kernel of a 3D convolution and Diffusers the
    patch of a video model; a 2-tuple is the (h, w) of a picture, one frame deep, as in image models.
    """
    sizes = (patch_size,) if isinstance(patch_size, int) else tuple(patch_size)
    if len(sizes) not in (1, 2, 3) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise RequestError(f"patch size {patch_size!r} is impossible; give one, two (h, w) or three (t, h, w) numbers")
    return cast(Grid, {1: sizes * 3, 2: (1, *sizes), 3: sizes}[len(sizes)])


def patch_conv(x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, patch_size: PatchSize) -> Tensor:
    """A token (D,) for every patch of x, row-major over (t, h, w): x_BLD, by a convolution whose stride is its kernel.

    `weight` is (D, C, pt, ph, pw), of x's dtype. What is left of a patch at an edge is dropped. Raises RequestError
    where `patch_size` is not the weight's, or larger than x.
    """
    patch = _checked_patch(x_BCTHW, weight, patch_size)
    return F.conv3d(x_BCTHW, weight, bias, stride=patch).flatten(2).transpose(1, 2).contiguous()


def patch_embed(x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, patch_size: PatchSize) -> Tensor:
    """`patch_conv` as one matrix product of disjoint patches; by the convolution where they do not divide x."""
    pt, ph, pw = _checked_patch(x_BCTHW, weight, patch_size)
    batch, channels, frames, height, width = x_BCTHW.shape
    if frames % pt or height % ph or width % pw:
        return patch_conv(x_BCTHW, weight, bias, patch_size)
    cells = x_BCTHW.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
    patches_BLP = cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
    return F.linear(patches_BLP, weight.flatten(1), bias)


def unpatchify(tokens: Tensor, grid: Grid, *, patch_size: Grid) -> Tensor:
    """(B, L, pt·ph·pw·C) -> (B, C, T, H, W), any dtype; `grid` is the number of tokens along t, h, w.

    Inside a token the channel varies fastest, as the output layer of the Wan checkpoints has it.
    """
    cells = tokens.reshape(tokens.shape[0], *grid, *patch_size, -1)  # B t h w pt ph pw C
    return cells.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _checked_patch(x_BCTHW: Tensor, weight: Tensor, patch_size: PatchSize) -> Grid:
    patch, kernel = full_patch_size(patch_size), tuple(weight.shape[2:])
    if patch != kernel:
        raise RequestError(f"patch size {patch} is not that of the weight; use {kernel}")
    size = tuple(x_BCTHW.shape[2:])
    if any(cells < side for cells, side in zip(size, patch, strict=True)):
        raise RequestError(f"a latent of {size} cells holds no patch of {patch}; use one that is at least as large")
    return patch
