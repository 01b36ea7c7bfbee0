"""Flow-matching schedules, the Euler sampler, and the state that any sampler carries from step to step.

A latent at noise level sigma is x = (1 - sigma) * x0 + sigma * noise; the network predicts noise - x0.
References: diffusers FlowMatchEulerDiscreteScheduler and UniPCMultistepScheduler (use_flow_sigmas).
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frameloom.errors import CheckpointError, InternalError, RequestError

_FIRST_SIGMA_MARGIN = 1e-6  # UniPC takes log(1 - sigma): the reference moves a first sigma of 1 down by this much


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FlowSchedule:
    """The noise levels of one run, on the host.

    `sigmas`: float32 (steps + 1,), from about 1 down to exactly 0. `timesteps`: (steps,), what the network
    is told, in 0..num_train_timesteps; float32 for Euler, int64 (cut, not rounded) for UniPC, as in the
    references.
    """

    sigmas: Tensor
    timesteps: Tensor
    num_train_timesteps: int

    @property
    def num_steps(self) -> int:
        """How often the network is evaluated (twice that with guidance)."""
        return len(self.timesteps)

    def after(self, skipped: int) -> Self:
        """The same without its first steps: the rest of a run that begins with a noisy video."""
        return replace(self, sigmas=self.sigmas[skipped:], timesteps=self.timesteps[skipped:])

    @property
    def digest(self) -> str:
        """Twelve hex digits that differ when any sigma differs."""
        return hashlib.sha256(self.sigmas.numpy().tobytes()).hexdigest()[:12]


def euler_schedule(num_steps: int, *, shift: float, num_train_timesteps: int = 1000) -> FlowSchedule:
    """Sigmas as FlowMatchEulerDiscreteScheduler(shift=shift).set_timesteps(num_steps) makes them.

    The lowest sigma is shifted twice, once at construction and once with all others: that is the reference.
    Raises RequestError when num_steps < 1, shift is not a positive number, or two sigmas would coincide.
    """
    _check_request(num_steps, shift=shift)
    ends = torch.tensor([num_train_timesteps, 1.0], dtype=torch.float32, device="cpu") / num_train_timesteps
    first_t, last_t = ((shift * ends / (1 + (shift - 1) * ends)).double() * num_train_timesteps).tolist()
    levels = _shifted(np.linspace(first_t, last_t, num_steps) / num_train_timesteps, shift=shift)
    sigmas = _with_zero(levels)
    return FlowSchedule(
        sigmas=sigmas, timesteps=sigmas[:-1] * num_train_timesteps, num_train_timesteps=num_train_timesteps
    )


def distilled_schedule(num_steps: int, *, shift: float, num_train_timesteps: int = 1000) -> FlowSchedule:
    """Sigmas 1, 1 - 1/n, ..., 1/n, shifted: the levels that models of few steps were distilled for.

    With 4 steps and shift 5 the timesteps 1000, 937.5, 833.3 and 625 of LightX2V's Wan distillations (their
    denoising_step_list 1000, 750, 500, 250). Raises RequestError as `euler_schedule` does.
    """
    _check_request(num_steps, shift=shift)
    sigmas = _with_zero(_shifted(np.linspace(1, 0, num_steps + 1)[:-1], shift=shift))
    return FlowSchedule(
        sigmas=sigmas, timesteps=sigmas[:-1] * num_train_timesteps, num_train_timesteps=num_train_timesteps
    )


def unipc_schedule(num_steps: int, *, shift: float, num_train_timesteps: int = 1000) -> FlowSchedule:
    """Sigmas as UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift) makes them for num_steps.

    Raises RequestError when num_steps < 1, shift is not a positive number, or two sigmas would coincide.
    """
    _check_request(num_steps, shift=shift)
    levels = _shifted(np.linspace(1, 1 / num_train_timesteps, num_steps + 1)[:-1], shift=shift)
    if abs(levels[0] - 1) < _FIRST_SIGMA_MARGIN:
        levels[0] -= _FIRST_SIGMA_MARGIN
    return FlowSchedule(
        sigmas=_with_zero(levels),
        timesteps=torch.from_numpy((levels * num_train_timesteps).astype(np.int64)),
        num_train_timesteps=num_train_timesteps,
    )


def _shifted(levels: NDArray[np.float64], *, shift: float) -> NDArray[np.float64]:
    """Spend more of the steps at high noise (shift > 1); 0 and 1 stay where they are (arXiv:2403.03206)."""
    return shift * levels / (1 + (shift - 1) * levels)


def _with_zero(levels: NDArray[np.float64]) -> Tensor:
    """The levels and the final 0 in float32; the solvers divide by their differences, so none may vanish."""
    sigmas = torch.from_numpy(np.append(levels, 0.0).astype(np.float32))
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise RequestError(
            f"{len(levels)} denoising steps with this flow shift give equal noise levels; use fewer steps "
            "or a lower shift"
        )
    return sigmas


def _check_request(num_steps: int, *, shift: float) -> None:
    if num_steps < 1:
        raise RequestError(f"{num_steps} denoising steps were asked; at least 1 is needed, use for example 50")
    if not (math.isfinite(shift) and shift > 0):
        raise RequestError(f"flow shift {shift} is not a positive number; use for example 3.0 or 5.0")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplerState:
    """All that the next step needs besides the latents: a saved and loaded state continues bit for bit.

    `step`: steps already taken. `sampler`: which sampler on which sigmas took them. `history`: tensors of the
    shape of the latents, never written in place; they may be the very tensors that the caller passed in, so
    the caller does not write into those either.
    """

    step: int
    sampler: str
    history: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Self:
        """The same state with its history on `device`."""
        return replace(self, history={name: x.to(device) for name, x in self.history.items()})

    def check(self, *, sampler: str, num_steps: int, latents: Tensor) -> None:
        """Raise CheckpointError if this state belongs to another run, InternalError if no step is left."""
        if self.sampler != sampler:
            raise CheckpointError(
                f"the state to continue from was made by '{self.sampler}', this run samples with "
                f"'{sampler}'; use the same scheduler, steps and shift, or start again"
            )
        if self.step >= num_steps:
            raise InternalError(f"step {self.step + 1} of {num_steps} was asked; start a new state")
        for name, x in self.history.items():
            if x.shape != latents.shape:
                raise CheckpointError(
                    f"the state to continue from holds '{name}' of shape {tuple(x.shape)}, this run's "
                    f"latents are {tuple(latents.shape)}; use the same size and frames, or start again"
                )


class Sampler(Protocol):
    """Solves dx/dsigma = velocity from noise to data, one evaluation per step; nothing in it ever changes."""

    schedule: FlowSchedule

    def start(self) -> SamplerState:
        """The state before the first step."""
        ...

    def step(self, velocity: Tensor, latents: Tensor, state: SamplerState) -> tuple[Tensor, SamplerState]:
        """Latents at sigmas[state.step + 1], from those at sigmas[state.step] and their (guided) velocity.

        Any shape, the same for both, on one device. Never waits for the device, writes to no argument.
        Raises CheckpointError for a state of another run, InternalError past the last step.
        """
        ...


class Euler:
    """x += (sigma_next - sigma) * velocity, added in float32 (reference: FlowMatchEulerDiscreteScheduler)."""

    def __init__(self, schedule: FlowSchedule) -> None:
        self.schedule = schedule
        self._dts = (schedule.sigmas[1:] - schedule.sigmas[:-1]).unbind()
        self._name = f"Euler, {schedule.num_steps} steps, sigmas {schedule.digest}"

    def start(self) -> SamplerState:
        """The state before the first step; Euler keeps no history."""
        return SamplerState(step=0, sampler=self._name)

    def step(self, velocity: Tensor, latents: Tensor, state: SamplerState) -> tuple[Tensor, SamplerState]:
        """See Sampler.step. The latents come back in the dtype of `velocity`, as in the reference."""
        state.check(sampler=self._name, num_steps=self.schedule.num_steps, latents=latents)
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        dt = self._dts[state.step].to(velocity.dtype)  # a bf16 velocity rounds the reference's dt to bf16 too
        moved = (wide + dt * velocity).to(velocity.dtype)
        return moved, replace(state, step=state.step + 1)
