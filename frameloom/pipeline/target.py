"""Where a video goes: the output path, parsed and checked before anything is computed or written."""

import difflib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final, Literal

from frameloom.errors import OutputError

Kind = Literal["mp4", "webm", "gif", "folder", "pattern"]

_KINDS: Final[Mapping[str, Kind]] = {".mp4": "mp4", ".webm": "webm", ".gif": "gif", ".png": "pattern"}
_MAX_FPS: Final[Mapping[Kind | None, int]] = {"gif": 50}  # browsers slow a delay under 2/100 s down to 10/100 s
_POSSIBLE: Final = "a name ending in .mp4, .webm or .gif, a folder, or a pattern such as frames/%04d.png"
_PLACEHOLDER: Final = re.compile(r"%(?:0\d)?d")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputTarget:
    """A checked output: absolute `path` and what is written there. `os.fspath` gives the path."""

    path: Path
    kind: Kind

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path:
        """The folder that receives the file or the frames."""
        return self.path if self.kind == "folder" else self.path.parent

    @property
    def home(self) -> Path:
        """The folder that holds the partial output while it is written, on the same disk as the result."""
        return self.path.parent if self.kind != "folder" or not self.path.exists() else self.path

    def partial(self, pid: int) -> Path:
        """Where process `pid` writes until the output is whole: a hidden name that no other writer has."""
        return self.home / f"{self._partials_of(pid)}{secrets.token_hex(2)}"

    def remove_partials(self, pid: int) -> None:
        """Remove what a process left that was killed while it wrote here."""
        for left in self.home.iterdir() if self.home.is_dir() else ():
            if left.name.startswith(self._partials_of(pid)):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def written(self) -> tuple[int, ...]:
        """What tells this output from another one in its place; nothing where there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def _partials_of(self, pid: int) -> str:
        # 40 characters are at most 160 bytes: the partial name fits where the final name does.
        return f".{self.path.name[:40]}.partial-{pid:08x}"


def check_output(path: str | os.PathLike[str], *, fps: float | None = None, quality: int | None = None) -> OutputTarget:
    """Check, before any work and without writing anything, that a video can be written to `path`.

    `path` ends in .mp4, .webm or .gif (an existing file is replaced when the new one is whole); or is a
    pattern such as frames/%04d.png; or is a folder: an existing one, a name without extension or with a
    trailing slash. Frames are never mixed with older files: a folder must be missing or empty (hidden files
    do not count), a pattern must match nothing yet. `fps` and `quality` are checked where they are given; only mp4
    and webm have a quality. Raises OutputError.
    """
    given = os.fsdecode(path)
    try:
        target = path if isinstance(path, OutputTarget) else _parse(given)
        _check_place(target, given)
    except OSError as error:  # a name too long for the disk, a loop of links
        raise OutputError(f"{given} cannot be an output ({error.strerror}); choose another path") from error
    if quality is not None:
        if target.kind not in ("mp4", "webm"):
            raise OutputError(f"{given} has no quality to set, only mp4 and webm do; leave the quality out")
        check_quality(quality)
    if fps is not None:
        exact_fps(fps, target.kind)
    return target


def check_sheet(path: str | os.PathLike[str], target: OutputTarget) -> Path:
    """Check in the same way that a preview of the video at `target` can be drawn; returns its absolute path."""
    given = os.fsdecode(path)
    try:
        file = Path(os.path.realpath(os.path.expanduser(given)))
        if file.suffix.lower() not in (".png", ".apng") or file.is_dir() or not file.parent.is_dir():
            why = "; give a file ending in .png or .apng in a folder that is there"
        elif target.kind in ("folder", "pattern") and target.folder == file.parent and _collides(file.name, target):
            why = " among the frames of the video; give a file in another folder"
        elif not _is_writable(file.parent):
            why = f" because {file.parent} is not writable; choose another folder"
        else:
            return file
    except (OSError, ValueError):  # a name too long for the disk, or with a null in it
        why = "; choose another path"
    raise OutputError(f"the preview {given!r} cannot be written{why}")


def check_quality(quality: Any) -> None:
    """Raise OutputError unless `quality` is a whole number from 0 to 100."""
    is_whole = isinstance(quality, Integral) and not isinstance(quality, bool)
    if not is_whole or not 0 <= quality <= 100:
        raise OutputError(f"quality {quality!r} is out of range; give a whole number from 0 (small) to 100 (best)")


def exact_fps(fps: Any, kind: Kind | None = None) -> Fraction:
    """Frames per second as a file of this kind can hold them. Raises OutputError."""
    limit = _MAX_FPS.get(kind, 240)
    is_number = isinstance(fps, Real) and not isinstance(fps, bool)
    if not is_number or not 0.1 <= fps <= limit:
        what = f"in a {kind}" if kind else "in a video"
        raise OutputError(f"{fps} frames per second are not possible {what}; give a number from 0.1 to {limit}")
    return Fraction(float(fps)).limit_denominator(1001)  # 1001: the divisor of the NTSC rates, 24000/1001


def _parse(given: str) -> OutputTarget:
    if not given or "\0" in given:
        raise OutputError(f"{given!r} is no path; give {_POSSIBLE}")
    path = Path(os.path.realpath(os.path.expanduser(given)))  # realpath: a link keeps pointing at the file it names
    extension = (path.suffix or path.name).lower()
    if given.endswith((os.sep, "/")):
        return OutputTarget(path=path, kind="folder")
    if extension in _KINDS:
        return OutputTarget(path=path, kind=_KINDS[extension])
    if not path.suffix or path.is_dir():
        return OutputTarget(path=path, kind="folder")
    near = difflib.get_close_matches(extension, _KINDS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise OutputError(f"{given} ends in {path.suffix}, which is no known format; give {_POSSIBLE}{hint}")


def _check_place(target: OutputTarget, given: str) -> None:
    path, home = target.path, target.home
    if target.kind == "folder" and path.exists() and not path.is_dir():
        raise OutputError(f"{given} is a file where a folder is expected; give {_POSSIBLE}")
    if not home.is_dir():
        raise OutputError(f"{given} cannot be written because {home} is no existing folder; create it first")
    if not _is_writable(home):
        raise OutputError(f"{given} cannot be written because {home} is not writable; choose another folder")
    if target.kind in ("folder", "pattern"):
        _check_frame_place(target, given)
    elif path.is_dir():
        raise OutputError(f"{given} is a folder where a file is expected; give a file such as {path / 'video.mp4'}")
    elif path.exists() and not path.is_file():
        raise OutputError(f"{given} is a device or a pipe, and only files can be written; give {_POSSIBLE}")


def _is_writable(folder: Path) -> bool:
    """Asked of the disk, with a nameless file: permission bits say nothing of read-only mounts, or to root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _check_frame_place(target: OutputTarget, given: str) -> None:
    name = target.path.name
    if target.kind == "pattern" and (len(_PLACEHOLDER.findall(name)) != 1 or name.count("%") != 1):
        raise OutputError(f"{given} names one picture for all frames; put one number in it, such as frame-%04d.png")
    old = [entry.name for entry in _entries(target.folder) if _collides(entry.name, target)]
    if old:
        raise OutputError(
            f"{given} already has {len(old)} files such as {min(old)}, and new frames are never mixed with "
            "old files; name a new or an empty folder, or another pattern"
        )


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _collides(name: str, target: OutputTarget) -> bool:
    if target.kind == "folder":
        return not name.startswith(".")
    before, after = _PLACEHOLDER.split(target.path.name)
    return re.fullmatch(re.escape(before) + r"\d+" + re.escape(after), name) is not None
