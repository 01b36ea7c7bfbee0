"""Every environment variable Frameloom reads, and its log. Nothing else reads os.environ.

FRAMELOOM_LOG: level of the log (debug, info, warning, error); the command line shows info and above by default.
"""

import logging
import os

from frameloom.errors import RequestError

LOGGER_NAME = "frameloom"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def log_level(*, quiet: bool = False) -> int:
    """The level asked for by FRAMELOOM_LOG, else info, or warning when quiet. Raises RequestError on another word."""
    name = os.environ.get("FRAMELOOM_LOG", "").lower()
    if not name:
        return logging.WARNING if quiet else logging.INFO
    if name not in _LEVELS:
        raise RequestError(f"FRAMELOOM_LOG is {name!r}; use one of {', '.join(_LEVELS)}")
    return _LEVELS[name]
