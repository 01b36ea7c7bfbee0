"""Classifier-free guidance, the two experts of Wan 2.2 A14B, and the per-token timesteps of TI2V-5B.

Reference: the denoising loop of diffusers WanPipeline and WanImageToVideoPipeline.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from frameloom.errors import CheckpointError, InternalError


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond), rounded in this order, in the dtype and shape of the inputs."""
    return (cond - uncond).mul_(scale).add_(uncond)  # in place: these are as large as the video


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSwitch:
    """Which of the two networks works at a timestep, and with which guidance scale.

    `boundary_ratio`: of num_train_timesteps, 0..1 (0.875 for T2V-A14B, 0.9 for I2V-A14B); None: one network.
    `guidance_scale_2`: of the low-noise expert; None: the same as `guidance_scale`. Raises CheckpointError.
    """

    boundary_ratio: float | None = None
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.boundary_ratio is not None and not 0 <= self.boundary_ratio <= 1:
            raise CheckpointError(f"boundary_ratio {self.boundary_ratio} is not in 0..1; use null for a single network")

    @property
    def guided(self) -> bool:
        """Whether the unconditional prediction is needed: the first scale decides for both experts."""
        return self.guidance_scale > 1

    def for_timestep(self, t: Tensor | float) -> tuple[int, float]:
        """(0 for the high-noise, 1 for the low-noise expert; its guidance scale).

        `t`: a number, or a tensor () on the host (one on a device costs a synchronisation). Compared as a
        tensor, so that the boundary rounds to float32 as in the reference.
        """
        if self.boundary_ratio is None:
            return 0, self.guidance_scale
        if bool(torch.as_tensor(t) >= self.boundary_ratio * self.num_train_timesteps):
            return 0, self.guidance_scale
        return 1, self.guidance_scale if self.guidance_scale_2 is None else self.guidance_scale_2


def expand_timesteps(
    t: Tensor | float,
    grid: tuple[int, int, int],
    *,
    patch_size: tuple[int, int, int] = (1, 2, 2),
    conditioned: Tensor | None = None,
    batch_size: int = 1,
) -> Tensor:
    """One timestep per token, float32 (batch_size, tokens), on the device of `t`: `t`, or 0 in a given frame.

    `grid`: latent frames, height, width; `patch_size`: latent cells per token on the same axes;
    `conditioned`: bool (latent frames,), True for a frame that is an input; None: none is, all tokens have
    `t`. A token takes the flag of its first frame. Tokens run over width, then height, then frames.
    Raises InternalError if the grid does not divide into patches or the mask has another length.
    """
    if any(cells % patch for cells, patch in zip(grid, patch_size, strict=True)):
        raise InternalError(f"latent grid {grid} is not a multiple of the patch {patch_size}; round the size first")
    if conditioned is not None and conditioned.shape != grid[:1]:
        raise InternalError(
            f"conditioned has shape {tuple(conditioned.shape)}; give one flag per latent frame ({grid[0]},)"
        )
    device = t.device if isinstance(t, Tensor) else None
    noisy = torch.ones(grid[0], dtype=torch.float32, device=device)
    if conditioned is not None:
        noisy = noisy * conditioned.to(device=noisy.device).logical_not()
    tokens_per_frame = (grid[1] // patch_size[1]) * (grid[2] // patch_size[2])
    per_frame = noisy[:: patch_size[0], None] * t
    return per_frame.expand(-1, tokens_per_frame).reshape(1, -1).expand(batch_size, -1)
