"""What a worker does once torch is there: builds its engine, says what it can do, and carries out orders."""

import gc
import logging

import frameloom
from frameloom.engine.build import build_engine
from frameloom.engine.engine import Engine
from frameloom.engine.plan import Place, planner_for
from frameloom.engine.worker.attempt import Attempt, CancelledError
from frameloom.engine.worker.batch import Batch
from frameloom.engine.worker.card import card_of
from frameloom.engine.worker.failure import failed
from frameloom.engine.worker.forecast import Forecast
from frameloom.engine.worker.line import Line
from frameloom.errors import FrameloomError, InputError
from frameloom.parallel.heart import is_lost
from frameloom.settings import LOGGER_NAME, launched
from frameloom.wire import Cancelled, Card, Done, Failed, Foresee, Foreseen, Ready, Run, Setup, Together, Unable

log = logging.getLogger(LOGGER_NAME)


def work(setup: Setup, line: Line) -> int:
    """Be a worker until the server wants no more; returns the exit code of this process."""
    place = launched()
    is_first = place is None or place.rank == 0
    forecast = _forecast(setup) if is_first else None
    try:
        engine = build_engine(_model(setup), setup.config, parts=setup.parts or None, variant=setup.variant)
    except InputError as error:
        if is_first:
            line.tell(Unable(message=str(error)))
        return error.exit_code
    engine.name = setup.name
    with engine:
        gc.collect()
        gc.freeze()  # the engine stays: between two videos only what came since is looked through
        card = card_of(engine, setup.name)
        worker = _Worker(engine, line, card, forecast, is_first=is_first)
        if is_first:
            worker.begin()
        return worker.serve()


class _Worker:
    """An engine that carries out orders. `forecast`: of the first rank, where plans can be made."""

    def __init__(self, engine: Engine, line: Line, card: Card, forecast: Forecast | None, *, is_first: bool) -> None:
        self._engine, self._line, self._card, self._forecast = engine, line, card, forecast
        self._is_first = is_first

    def begin(self) -> None:
        """Say what the model can do, and what a usual request takes once that is known."""
        self._line.answer_with(self._foresee)
        self._line.tell(Ready(card=self._card))
        if self._forecast is not None:
            self._forecast.start()
            self._forecast.ask(0, {}, self._tell_usual)

    def serve(self) -> int:
        """Carry out orders until there are no more."""
        while (order := self._line.next_order()) is not None:
            is_well = True
            if isinstance(order, Together):
                Batch(self._engine, self._line, order).run()
            else:
                is_well = self._carry_out(order)
            gc.collect()
            if not is_well:
                return 1
        self._line.pass_end_on()
        return 0

    def _carry_out(self, order: Run) -> bool:
        """Make a video; whether this worker can make another one."""
        attempt = Attempt(
            engine=self._engine, line=self._line, order=order, draws=self._card.previews, is_first=self._is_first
        )
        if self._engine.team is not None and self._is_first and (refusal := _refusal(attempt)) is not None:
            self._line.done_with(order)
            self._line.tell(refusal)
            return True
        self._line.pass_on(order)
        told: Done | Failed | Cancelled | None
        try:
            told = attempt.run()
        except CancelledError:
            told = Cancelled(job=order.job, fence=order.fence)
        except Exception as error:
            if not self._is_first or (self._engine.team is not None and is_lost(error)):
                raise  # what the rank that is lost died of, who started it will say
            level = logging.INFO if isinstance(error, InputError) else logging.WARNING
            log.log(level, "the attempt failed: %s", error, exc_info=not isinstance(error, FrameloomError))
            # Nobody knows where the other ranks stand after an error that the first one has had.
            told = failed(order, error, ends=self._engine.team is not None)
        self._line.done_with(order)
        if told is None or not self._is_first:
            return True
        if not isinstance(told, Done):
            gc.collect()  # what the error held is free when this is told
            attempt.tidy()
        self._line.tell(told)
        if isinstance(told, Done) and self._forecast is not None and order.extends is None:
            self._forecast.learn(order.request, told.made)
        return not (isinstance(told, Failed) and told.ends)

    def _foresee(self, message: Foresee) -> None:
        if self._forecast is None:
            self._line.tell(Foreseen(number=message.number))
        else:
            self._forecast.ask(message.number, message.request, self._line.tell)

    def _tell_usual(self, found: Foreseen) -> None:
        if found.seconds:
            self._line.tell(Ready(card=self._card, usual_seconds=found.seconds))


def _refusal(attempt: Attempt) -> Failed | None:
    """What is told of a request that cannot be computed; None of one that can."""
    try:
        attempt.check()
    except Exception as error:
        log.info("the request is refused: %s", error)
        return failed(attempt.order, error)
    return None


def _forecast(setup: Setup) -> Forecast | None:
    """Who makes plans: by the machine as it is before the engine is built, whose weights are part of every plan."""
    config = setup.config
    place = Place(device=config.device, gpus=setup.ranks)
    try:
        planner = planner_for(
            _model(setup), config, place=place, parts=setup.parts or None, variant=setup.variant, here_only=True
        )
        planner.look()
    except Exception as error:  # what is wrong with the model, building the engine tells
        log.warning("nothing will be foreseen of requests: %s", error, exc_info=not isinstance(error, FrameloomError))
        return None
    return Forecast(planner)


def _model(setup: Setup) -> str | None:
    """What to open: nothing but parts, or what was named, or the built-in model."""
    return setup.model if setup.model is not None or setup.parts else str(frameloom.shapes.PATH)
