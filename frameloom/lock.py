"""A file that one process holds at a time; it is free again when that process ends, however it does. Torch-free."""

import fcntl
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

_MAX_DIGITS = 20  # of a process number


class Lock:
    """Holds a file, which names this process, until it is closed. `before`: who held it last, by number, if known."""

    def __init__(self, path: Path) -> None:
        """Raises BlockingIOError where another process holds it, OSError where no file can be held."""
        self._path, self._file = path, _locked(path)
        self.before = holder_of(path)
        with suppress(OSError):  # a full disk
            self._file.truncate(0)
            self._file.write(str(os.getpid()).encode())

    def close(self) -> None:
        """Let go; the file stays."""
        self._file.close()

    def remove(self) -> None:
        """Let go, and leave no file."""
        with suppress(OSError):
            self._path.unlink()
        self._file.close()


def holder_of(path: Path) -> int | None:
    """The number of the process that holds a file, or held it last; None where it has written none."""
    try:
        with path.open("rb") as file:
            digits = file.read(_MAX_DIGITS)
    except OSError:
        return None
    return int(digits) if digits.isdigit() else None


def is_held(path: Path) -> bool:
    """Whether a process holds a file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _locked(path: Path) -> FileIO:
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        file = FileIO(number, "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(number), path.stat()):
                return file
        except FileNotFoundError:
            pass  # whoever held it has removed it meanwhile
        except OSError:
            file.close()
            raise
        file.close()
