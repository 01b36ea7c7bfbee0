"""Every environment variable Frameloom reads, and its log. Nothing else reads os.environ.

FRAMELOOM_LOG: level of the log (debug, info, warning, error); the command line shows info and above by default.
FRAMELOOM_CACHE: folder for what is worth keeping between runs (compiled kernels, measured choices); by default
frameloom in XDG_CACHE_HOME or ~/.cache.
TORCHINDUCTOR_CACHE_DIR: folder for what torch.compile generates; set here, to one in the cache folder, if it is not.
"""

import logging
import os
from pathlib import Path

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


def cache_folder() -> Path:
    """Where compiled kernels and measured choices are kept; it may not exist yet. Raises RequestError."""
    chosen = os.environ.get("FRAMELOOM_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frameloom"
    except RuntimeError:  # an unknown ~user, or one without a home
        known = f"FRAMELOOM_CACHE is {chosen!r}, whose home is unknown" if chosen else "this user has no home folder"
        raise RequestError(f"{known}; set FRAMELOOM_CACHE to a folder that can be written") from None


def keep_compiled_code() -> None:
    """Let torch.compile keep what it generates in the cache folder; torch reads no other setting for it."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
