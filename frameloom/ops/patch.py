"""Tokens back to the latent grid that they were cut from."""

from torch import Tensor

Grid = tuple[int, int, int]


def unpatchify(tokens: Tensor, grid: Grid, *, patch_size: Grid) -> Tensor:
    """(B, L, pt·ph·pw·C) -> (B, C, T, H, W), any dtype; `grid` is the number of tokens along t, h, w.

    Inside a token the channel varies fastest, as the output layer of the Wan checkpoints has it.
    """
    cells = tokens.reshape(tokens.shape[0], *grid, *patch_size, -1)  # B t h w pt ph pw C
    return cells.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
