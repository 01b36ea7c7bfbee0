"""The memory order that the fast kernels work in: (B, C, T, H, W) with each frame dense and its channels innermost."""

from collections.abc import Sequence

from torch import Tensor

from frameloom.errors import InternalError
from frameloom.platform.allocator import empty


def has_dense_frames(x_BCTHW: Tensor) -> bool:
    """Whether each frame is dense in memory with the channels innermost; frames may begin anywhere."""
    _, channels, _, height, width = x_BCTHW.shape
    _, c, _, h, w = x_BCTHW.stride()
    ordered = (c == 1 or channels == 1) and (w == channels or width == 1)
    return (ordered and (h == width * channels or height == 1)) or x_BCTHW.numel() == 0


def dense_frames(x_BCTHW: Tensor) -> Tensor:
    """x itself where it is in that order, else a copy that is."""
    if has_dense_frames(x_BCTHW):
        return x_BCTHW
    return x_BCTHW.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def empty_frames(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised memory in that order for a tensor (B, C, T, H, W), of the dtype and device of `like`."""
    b, c, t, h, w = shape
    return empty(like, b, t, h, w, c).permute(0, 4, 1, 2, 3)


def checked_frames(x_BCTHW: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """x in that order (copied if it is not), and where a result of its shape goes: `out`, or memory of its own."""
    if out is None:
        return dense_frames(x_BCTHW), empty_frames(x_BCTHW, x_BCTHW.shape)
    if not has_dense_frames(out):
        raise InternalError(f"a result was to be written to memory of strides {out.stride()}, without dense frames")
    return dense_frames(x_BCTHW), out
