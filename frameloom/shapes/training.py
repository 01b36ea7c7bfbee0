"""What both trainings share: AdamW with warm-up and decay to zero, averaged weights, checkpoints to resume from."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from frameloom.shapes.world import Frames

SEED = 20_26


def rng_for(step: int, *, salt: int) -> np.random.Generator:
    """The random choices of one step depend on the step alone, so that a resumed run sees what an unbroken one sees."""
    return np.random.default_rng([SEED, salt, step])


def to_video(frames: Iterable[Frames]) -> Tensor:
    """uint8 clips (T, H, W, 3) -> float32 (B, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(list(frames))).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


class Trainer:
    """Owns the optimiser, the averaged weights and the checkpoint file of one training run of `total_steps` steps."""

    def __init__(
        self,
        model: nn.Module,
        *,
        path: Path,
        total_steps: int,
        learning_rate: float,
        ema_decay: float = 0.999,
    ) -> None:
        self.model, self.path, self.total_steps = model, path, total_steps
        self.learning_rate, self.ema_decay = learning_rate, ema_decay
        self.step = 0
        self.seconds = 0.0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)
        self._started = time.monotonic()
        if path.exists():
            self._resume()

    def update(self, loss: Tensor) -> None:
        """One optimiser step from `loss`, and one step of the average."""
        warm_up = min(1.0, (self.step + 1) / 100)
        decay = max(0.0, 1 - self.step / self.total_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * warm_up * min(1.0, 1.5 * decay)  # level for a third, then linear to zero
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
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
            "optimiser": self.optimiser.state_dict(),
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
        state = torch.load(self.path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        print(f"resuming {self.path.name} at step {self.step} after {self.seconds / 60:.0f} min", flush=True)
