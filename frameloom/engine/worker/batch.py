"""Several attempts of small jobs as one batch: denoised together, then decoded one after the other."""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from frameloom.engine.denoised import Denoised
from frameloom.engine.engine import Engine
from frameloom.engine.worker.attempt import Attempt, CancelledError
from frameloom.engine.worker.failure import failed
from frameloom.engine.worker.line import Line
from frameloom.errors import FrameloomError, InternalError
from frameloom.settings import LOGGER_NAME
from frameloom.types import Progress
from frameloom.wire import Cancelled, Done, Failed, Run, Together

log = logging.getLogger(LOGGER_NAME)

_OWN: Final = ("prompt", "negative_prompt", "seed")


class Batch:
    """Carries out an order of several, and tells of each by itself.

    Whatever goes wrong is told as a failure `together`: whether it has to do with the others, only an attempt of its
    own can say. One that is cancelled is told so at the next step of any of them, and the others go on.
    """

    def __init__(self, engine: Engine, line: Line, order: Together) -> None:
        self._engine, self._line = engine, line
        self._attempts = [
            Attempt(
                engine=engine, line=line, order=run, draws=False, is_first=True, beside=partial(self._heed, but=run)
            )
            for run in order.runs
        ]  # fmt: skip
        self._open = list(self._attempts)

    def run(self) -> None:
        """Make them; each is told of as soon as it has ended."""
        videos, failures = self._denoised()
        gc.collect()  # what an error held is free when it is told
        for attempt, failure in failures.items():
            self._end(attempt, failure)
        for attempt, video in zip(self._attempts, videos, strict=False):
            if attempt in self._open:
                self._end(attempt, self._written(attempt, video))

    def _denoised(self) -> tuple[Sequence[Denoised], Mapping[Attempt, Failed]]:
        """The videos in the order of the attempts, or what is told of those that are open."""
        try:
            self._attempts[0].set_loras()
            return self._engine.denoise(progress=self._progress, **self._asked()), {}
        except CancelledError:
            return (), {}
        except Exception as error:
            _log("%d requests failed together, each is made alone next", error, len(self._open))
            return (), {attempt: _failed(attempt.order, error) for attempt in self._open}

    def _asked(self) -> dict[str, Any]:
        """What the engine is asked. Raises InternalError where that is no batch, RequestError for one that is wrong."""
        orders = [attempt.order for attempt in self._attempts]
        each = [self._engine.resolve(**order.request) for order in orders]
        shared = [replace(one, prompts=(), negative_prompts=(), seed=0) for one in each]
        alike = [(one, order.loras, order.extends) for one, order in zip(shared, orders, strict=True)]
        if self._engine.team is not None or orders[0].extends is not None or any(one != alike[0] for one in alike):
            raise InternalError("requests that are not alike, or of several ranks, cannot be made together")
        return {
            **{name: value for name, value in orders[0].request.items() if name not in _OWN},
            "prompts": [one.prompts[0] for one in each],
            "negative_prompt": [one.negative_prompts[0] for one in each],
            "seed": [one.seed_of(0) for one in each],
        }

    def _progress(self, progress: Progress) -> None:
        """Of all of them."""
        self._line.work += 1
        self._heed()
        if not self._open:
            raise CancelledError
        for attempt in self._open:
            attempt.tell(progress)

    def _heed(self, *, but: Run | None = None) -> None:
        """Those that were asked to stop have stopped, but for the one that stops by itself."""
        for attempt in tuple(self._open):
            order = attempt.order
            if order is not but and self._line.is_cancelled(order):
                self._end(attempt, Cancelled(job=order.job, fence=order.fence))

    def _written(self, attempt: Attempt, video: Denoised) -> Done | Failed | Cancelled:
        order = attempt.order
        try:
            made = self._engine.write_to(order.output, video, quality=order.quality, progress=attempt.progress)
            return attempt.finished(made)
        except CancelledError:
            return Cancelled(job=order.job, fence=order.fence)
        except Exception as error:
            _log("an attempt in a batch failed, its job is made alone next", error)
            return _failed(order, error)

    def _end(self, attempt: Attempt, told: Done | Failed | Cancelled) -> None:
        self._open.remove(attempt)
        if not isinstance(told, Done):
            attempt.tidy()
        self._line.done_with(attempt.order)
        self._line.tell(told)


def _failed(order: Run, error: Exception) -> Failed:
    return failed(order, error).of_batch()


def _log(what: str, error: Exception, *values: object) -> None:
    log.warning(f"{what}: %s", *values, error, exc_info=not isinstance(error, FrameloomError))
