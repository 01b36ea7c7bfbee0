"""The file of keys: who may ask, and what each may have. Secrets go nowhere but into `Key`, which hides them.

[alice]
secret = "at least sixteen characters"
queued = 20      # jobs of hers that may wait at a time; by default as --max-queue-per-key says
priority = 5     # her jobs may ask for up to this; 0 by default

[bob]
secret_sha256 = "..."  # instead of the secret: printf %s SECRET | sha256sum
"""

import logging
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from frameloom.errors import RequestError
from frameloom.serve.config import Key
from frameloom.settings import LOGGER_NAME

MIN_SECRET: Final = 16
"""Characters; a shorter one can be guessed."""
MAX_PRIORITY: Final = 1_000
"""That a key may give; that of a job may be as far below 0, too."""
_MAX_BYTES: Final = 1_000_000
_LOG: Final = logging.getLogger(LOGGER_NAME)
_FIELDS: Final = ("secret", "secret_sha256", "queued", "priority")


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises RequestError, one sentence, which holds no secret."""
    text = _text(path)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"\(at (line \d+)[^)]*\)|\(at end of document\)", str(error))
        line = f", {where[1] or 'at its end'}" if where else ""
        raise RequestError(f"keys file '{path}' is no TOML{line}; write [name] and below it secret = \"...\"") from None
    keys = tuple(_key(path, name, table) for name, table in tables.items())
    if not keys:
        raise RequestError(f"keys file '{path}' has no keys; write [name] and below it secret = \"...\"")
    seen: dict[bytes, str] = {}
    for key in keys:
        if (other := seen.setdefault(key.digest, key.name)) != key.name:
            raise RequestError(f"keys {other!r} and {key.name!r} in '{path}' have the same secret; give each its own")
    return keys


def key_of_secret(secret: str) -> Key:
    """The one key of a server whose secret comes from the environment. Raises RequestError."""
    return _checked("FRAMELOOM_API_KEY", Key(name="default", secret=secret))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise RequestError(f"keys file '{path}' is longer than {_MAX_BYTES} bytes; that is no file of keys")
        text = data.decode()
    except OSError as error:
        raise RequestError(f"keys file '{path}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"keys file '{path}' is no UTF-8 text; write it as TOML") from None
    if mode & 0o007:  # a group may be the server's own
        _LOG.warning("keys file '%s' may be read by others (mode %04o); chmod 600 it", path, mode)
    return text


def _key(path: Path, name: str, table: Any) -> Key:
    where = f"key {name!r} in '{path}'"
    if not isinstance(table, Mapping):
        raise RequestError(f'{where} is no table; write [{name}] and below it secret = "..."')
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise RequestError(f"{where} is no name; use up to 64 letters, digits, dots, dashes and underscores")
    for field in table:
        if field not in _FIELDS:
            raise RequestError(f"{where} has {field!r}, which is unknown; use {', '.join(_FIELDS)}")
    return _checked(
        where,
        Key(
            name=name,
            secret=_said(where, table, "secret"),
            secret_sha256=_said(where, table, "secret_sha256").lower(),
            queued=_number(where, table, "queued", low=1, high=1_000_000),
            priority=_number(where, table, "priority", low=0, high=MAX_PRIORITY) or 0,
        ),
    )


def _said(where: str, table: Mapping[str, Any], field: str) -> str:
    value = table.get(field, "")
    if not isinstance(value, str):
        raise RequestError(f"{field} of {where} is no text; put it in quotation marks")
    return value


def _number(where: str, table: Mapping[str, Any], field: str, *, low: int, high: int) -> int | None:
    value = table.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{field} of {where} is {value!r}; use a whole number from {low} to {high}")
    return value


def _checked(where: str, key: Key) -> Key:
    if bool(key.secret) == bool(key.secret_sha256):
        raise RequestError(f"{where} needs either secret or secret_sha256, and only one of them")
    if key.secret_sha256 and not re.fullmatch(r"[0-9a-f]{64}", key.secret_sha256):
        raise RequestError(f"secret_sha256 of {where} is not 64 hexadecimal digits; use printf %s SECRET | sha256sum")
    if key.secret and (len(key.secret) < MIN_SECRET or not re.fullmatch(r"[!-~]+", key.secret)):
        raise RequestError(
            f"the secret of {where} needs {MIN_SECRET} or more letters, digits and signs without spaces; "
            "try: openssl rand -hex 32"
        )
    return key
