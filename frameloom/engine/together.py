"""A process alone, or ranks that answer together: what they are asked alike, and what each of them gets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frameloom.models.vae_state import Frames
from frameloom.parallel.agreement import check_equal_latents, check_same, check_same_numbers
from frameloom.parallel.team import Team
from frameloom.types import ResolvedRequest


@dataclass(frozen=True, slots=True, eq=False)
class Together:
    """`team`: the ranks; None of a process alone, of which all this is true already."""

    team: Team | None

    @property
    def writes(self) -> bool:
        """Whether this process writes files: the first rank, or the only one."""
        return self.team is None or self.team.index == 0

    def of_first(self, value: Any) -> Any:
        """What the first rank has here: anything that JSON can say."""
        return value if self.team is None else self.team.agree(value)

    def check_same(self, what: str, given: object) -> None:
        """Raise RequestError unless all were given the same."""
        if self.team is not None:
            check_same(self.team, what, repr(given))

    def agreed(self, request: ResolvedRequest) -> ResolvedRequest:
        """The request, if all were asked the same. Raises RequestError."""
        for field in fields(request):
            self.check_same(field.name.replace("_", " "), getattr(request, field.name))
        return request

    def check_same_numbers(self, what: str, numbers: Callable[[], Tensor]) -> None:
        """The same of numbers."""
        if self.team is not None:
            check_same_numbers(self.team, what, numbers())

    def equal(self, latents_BCTHW: Tensor) -> Tensor:
        """Latents, if all have computed the same. Raises InternalError."""
        if self.team is not None:
            check_equal_latents(self.team, latents_BCTHW)
        return latents_BCTHW

    def everywhere(self, parts: Iterator[Frames]) -> Frames:
        """Frames uint8 (B, T, H, W, 3) of parts of them, which the first rank has, on every rank."""
        mine = list(parts)
        if self.team is None:
            return np.concatenate(mine, axis=1)
        frames = torch.from_numpy(np.concatenate(mine, axis=1)) if mine else None
        whole: Frames = self.team.tensor_of_first(frames).cpu().numpy()
        return whole
