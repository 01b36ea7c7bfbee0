"""What all ranks must take alike, though each could find it for itself: prompts as features, ways of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from frameloom.errors import InternalError, RequestError
from frameloom.models.dit_fast import LoopChoices
from frameloom.parallel.team import Team

_SUMMED_BYTES = 1 << 20


class EncodesPrompts(Protocol):
    """A text encoder."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as features (B, S, E)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedOnce:
    """The text encoder of the first rank, which alone holds it (None elsewhere): the others get what it returns."""

    team: Team
    encoder: EncodesPrompts | None
    device: torch.device

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as features (B, S, E), the same bits on every rank."""
        mine = None if self.encoder is None else self.encoder.encode_prompts(prompts)
        return self.team.tensor_of_first(mine).to(self.device)


class EncodesImages(Protocol):
    """An image encoder."""

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Images as features (B, N, E)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImagesEncodedOnce:
    """The image encoder of the first rank, likewise."""

    team: Team
    encoder: EncodesImages | None
    device: torch.device

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Images as features (B, N, E), the same bits on every rank."""
        mine = None if self.encoder is None else self.encoder.encode_images(images)
        return self.team.tensor_of_first(mine).to(self.device)


class PlansSteps(Protocol):
    """Says how the steps of a video are computed."""

    def loop(self, latents_BCTHW: tuple[int, ...], *, guided: bool) -> tuple[LoopChoices, str]:
        """The way, and why."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AgreedSteps:
    """The first rank's way of a step, on every rank. A batch of both branches that has no memory cannot be taken back
    by one rank alone, so there is none, unless it was `insisted` on.
    """

    team: Team
    planner: PlansSteps
    insisted: bool

    def loop(self, latents_BCTHW: tuple[int, ...], *, guided: bool) -> tuple[LoopChoices, str]:
        """The way, and why."""
        choices, why = self.planner.loop(latents_BCTHW, guided=guided)
        batched, why = self.team.agree([choices.guidance_batched, why])
        if batched and not self.insisted:
            batched, why = False, "one branch after the other: several ranks share each"
        return replace(choices, guidance_batched=batched), why


def check_same(team: Team, what: str, value: str) -> None:
    """Raise RequestError, on every rank, unless all ranks were given the same."""
    mine = value.encode()
    length = -team.least(-len(mine))
    data = torch.zeros(length + 1, dtype=torch.uint8)
    data[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else 0
    told = [bytes(x.cpu().numpy()) for x in team.collect(data.to(team.device), [(length + 1,)] * team.size)]
    different = [team.ranks[index] for index, other in enumerate(told) if other != told[0]]
    if different:
        raise RequestError(f"rank {different[0]} was given another {what} than rank 0; start all with the same command")


def check_same_numbers(team: Team, what: str, x: Tensor) -> None:
    """Raise RequestError, on every rank, unless all ranks were given the same numbers."""
    if (rank := _other_numbers(team, x)) is not None:
        raise RequestError(f"rank {rank} was given other {what} than rank 0; give all ranks the same")


def check_equal_latents(team: Team, latents: Tensor) -> None:
    """Raise InternalError, on every rank, unless all ranks have computed the same bits."""
    if (rank := _other_numbers(team, latents)) is not None:
        raise InternalError(f"rank {rank} has other latents than rank 0; ranks need the same kind of device")


def _other_numbers(team: Team, x: Tensor) -> int | None:
    """The first rank whose tensor is another one than rank 0's, told by two sums; None if there is none."""
    sums = torch.tensor([0, 0, x.numel()], device=x.device)
    whole = x.contiguous().view(-1).view(torch.uint8)
    for start in range(0, len(whole), _SUMMED_BYTES):
        words = whole[start : start + _SUMMED_BYTES].to(torch.int64)  # eight times as large
        places = torch.arange(start + 1, start + 1 + len(words), device=words.device) % 65521
        sums[:2] += torch.stack((words.sum(), (words * places).sum()))
    mine = sums.to(team.device)
    told = team.collect(mine, [(3,)] * team.size)
    return next((team.ranks[index] for index, other in enumerate(told) if not torch.equal(other, told[0])), None)
