"""What both trainings share: optimisers, warm-up and decay to zero, averaged weights, checkpoints to resume from."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frameloom.platform.host import cpu_flags
from frameloom.shapes.world import Frames

SEED = 20_26


def rng_for(step: int, *, salt: int) -> np.random.Generator:
    """The random choices of one step depend on the step alone, so that a resumed run sees what an unbroken one sees."""
    return np.random.default_rng([SEED, salt, step])


def to_video(frames: Iterable[Frames]) -> Tensor:
    """uint8 clips (T, H, W, 3) -> float32 (B, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(list(frames))).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU and on a CPU with AMX; on other CPUs float32 is as fast or faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or "amx_bf16" in cpu_flags())


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: every direction of a weight matrix moves at the same speed.

    For weights of two or more dimensions, seen as (out, everything else); torch's own Muon takes plain matrices alone,
    and half the weights here are convolutions. The step is scaled to AdamW's usual size, so both share a learning rate.
    Sources: kellerjordan.github.io/posts/muon (the Newton-Schulz coefficients), arXiv:2502.16982 (the scale).
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure here
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            keep, rate = group["momentum"], group["lr"]
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - keep)
                matrix = p.grad.lerp(momentum, keep).flatten(1)
                by_shape[tuple(matrix.shape)].append((p, matrix))
            for shape, pairs in by_shape.items():
                steps = orthogonalise(torch.stack([matrix for _, matrix in pairs]))
                for (p, _), step in zip(pairs, steps, strict=True):
                    p.mul_(1 - rate * group["weight_decay"])
                    p.add_(step.view_as(p), alpha=-0.2 * rate * max(shape) ** 0.5)


def orthogonalise(matrices_NRC: Tensor) -> Tensor:
    """Bring all singular values of each matrix near 1 (about 0.7 to 1.2), by five Newton-Schulz steps."""
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x: Tensor = matrices_NRC.mT if tall else matrices_NRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).contiguous()


class Trainer:
    """Owns the optimisers, the averaged weights and the checkpoint file of one training run of `total_steps` steps.

    Weight matrices and convolutions learn by Muon, the rest (and those whose names hold one of `plain`) by AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        path: Path,
        total_steps: int,
        learning_rate: float,
        plain: tuple[str, ...] = (),
        ema_decay: float = 0.999,
    ) -> None:
        self.model, self.path, self.total_steps = model, path, total_steps
        self.learning_rate, self.ema_decay = learning_rate, ema_decay
        self.device = next(model.parameters()).device
        self.step = 0
        self.seconds = 0.0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and not any(w in name for w in plain)]
        rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=learning_rate, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        ]
        self._started = time.monotonic()
        if path.exists():
            self._resume()

    def update(self, loss: Tensor) -> None:
        """One optimiser step from `loss`, and one step of the average."""
        warm_up = min(1.0, (self.step + 1) / 100)
        decay = max(0.0, 1 - self.step / self.total_steps)
        self.model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:  # level for half of the run, then linear to zero
                group["lr"] = self.learning_rate * warm_up * min(1.0, 2 * decay)
            optimiser.step()
        keep = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - keep)
        self.step += 1

    @property
    def elapsed_s(self) -> float:
        """Seconds spent on this run, over all its sittings."""
        return self.seconds + time.monotonic() - self._started

    def save(self) -> None:
        """Write everything needed to go on, whole or not at all."""
        state = {
            "step": self.step,
            "seconds": self.elapsed_s,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def use_average(self) -> nn.Module:
        """Put the averaged weights into the model, for evaluation and export."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.average[name])
        return self.model.eval()

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True, map_location=self.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        print(f"resuming {self.path.name} at step {self.step} after {self.seconds / 60:.0f} min", flush=True)
