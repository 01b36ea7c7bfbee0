"""Guidance on two groups of ranks: each predicts the velocity under one branch, and they exchange the results."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from frameloom.errors import InternalError
from frameloom.models.dit_fast import LoopChoices
from frameloom.models.wan_dit import FrameTimes, WanDiT
from frameloom.parallel.team import Team
from frameloom.settings import LOGGER_NAME

Predict = Callable[[WanDiT, Tensor, Tensor | FrameTimes], list[Tensor]]

log = logging.getLogger(LOGGER_NAME)


class MakePredictor(Protocol):
    """Who predicts under the branches of the guidance, which have a text each and the image in common."""

    def __call__(self, texts: Sequence[Tensor], choices: LoopChoices, image_BNE: Tensor | None = None, /) -> Predict:
        """Return what predicts the steps of one video."""
        ...


def one_branch_each(make: MakePredictor, pair: Team) -> MakePredictor:
    """Predictors that `make` makes for this rank's branch alone; `pair`: this rank and its partner in the other group.

    The group at position 0 predicts the first branch. Without guidance there is one branch, and both groups predict it.
    """
    if pair.size != 2:
        raise InternalError(f"the branches of the guidance were divided over {pair.size} groups")

    def made(texts: Sequence[Tensor], choices: LoopChoices, image_BNE: Tensor | None = None, /) -> Predict:
        if len(texts) == 1:
            log.info("no guidance: both groups of ranks compute the same")
            return make(texts, choices, image_BNE)
        mine = make([texts[pair.index]], choices, image_BNE)

        def predict(expert: WanDiT, x_BCTHW: Tensor, timestep: Tensor | FrameTimes) -> list[Tensor]:
            (velocity_BCTHW,) = mine(expert, x_BCTHW, timestep)
            return pair.collect(velocity_BCTHW, [velocity_BCTHW.shape] * len(texts))

        return predict

    return made
