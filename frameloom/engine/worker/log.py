"""The log of a worker: lines of JSON on standard error, which the server reads and makes its own. Torch-free."""

import json
import logging
import sys

from frameloom.engine.worker.line import Line
from frameloom.settings import LOGGER_NAME, log_level


class _AsJson(logging.Formatter):
    """One line for each record, with the job that is worked on."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def format(self, record: logging.LogRecord) -> str:
        told = {"level": record.levelname.lower(), "message": record.getMessage(), "job": self._line.job}
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told)


def keep_log(line: Line, *, first: bool) -> None:
    """Log from now on; ranks other than the first speak of trouble alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_AsJson(line))
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(handler)
    logger.setLevel(log_level(quiet=not first))
