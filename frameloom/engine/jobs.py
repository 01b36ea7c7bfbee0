"""The folder of jobs: which there are, how each stands, and what may be removed. Torch-free.

A job is a folder named by the time it began. `job.json` says all that a resumed run needs besides the pictures, which
are an entry of its journal; `finished.json` says where the video is; `lock` is held by who works on it.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from frameloom.errors import OutputError, RequestError
from frameloom.lock import holder_of, is_held
from frameloom.settings import LOGGER_NAME, jobs_folder

log = logging.getLogger(LOGGER_NAME)

MAX_FINISHED: Final = 100  # jobs that are listed after they are done, and
MAX_FINISHED_BYTES: Final = 10_000_000_000  # what all of them may take
FORMAT: Final = "frameloom job 1"
_LEFT_OVER_S: Final = 3600.0
_NAME: Final = re.compile(r"\d{8}-\d{6}-\d{6,}")
DESCRIPTION: Final = "job.json"
FINISHED: Final = "finished.json"
LOCK: Final = "lock"


def all_jobs() -> list[dict[str, Any]]:
    """What is known of every job, oldest first: its name, state, prompt, output and bytes."""
    return [_told(folder) for folder in folders(jobs_folder())]


def left_for(output: str, *, since: float) -> str | None:
    """The newest unfinished job that nobody works on, of those that have begun for an output since a time; or None."""
    told = (job for job in reversed(all_jobs()) if job["state"] == "unfinished" and job["began"] >= since)
    return next((job["name"] for job in told if job["output"].rstrip("/") == output), None)


def forget(name: str) -> None:
    """Remove a job and what it has kept. Raises RequestError for one that is being worked on, or is not there."""
    found = [folder for folder in folders(jobs_folder()) if folder.name == name]
    if not found:
        raise RequestError(f"there is no job {name!r} in {jobs_folder()}; `frameloom jobs` lists all")
    if is_locked(found[0]):
        raise RequestError(busy(found[0]))
    try:
        shutil.rmtree(found[0])
    except OSError as error:
        raise OutputError(f"the job {found[0]} cannot be removed ({error.strerror}); make it writable") from error


def folder_of(name: str | None) -> Path:
    """The folder of a job by its name, or the beginning of it, or its path; None: the newest that is not finished.

    Raises RequestError. Of the newest, one whose description is damaged is passed over, with a line in the log.
    """
    root = jobs_folder()
    if name is None:
        for folder in reversed(folders(root)):
            if (folder / FINISHED).exists() or is_locked(folder):
                continue
            try:
                read_description(folder)
            except RequestError as error:
                log.warning("%s; `frameloom jobs --forget %s` removes it", error, folder.name)
                continue
            return folder
        raise RequestError(f"no job in {root} is unfinished; `frameloom jobs` lists all")
    if (Path(name) / DESCRIPTION).is_file():
        return Path(name).absolute()
    found = [folder for folder in folders(root) if folder.name.startswith(name)]
    if len(found) != 1:
        what = f"{len(found)} jobs begin with {name!r}" if found else f"there is no job {name!r} in {root}"
        raise RequestError(f"{what}; `frameloom jobs` lists all")
    return found[0]


def is_locked(folder: Path) -> bool:
    """Whether a process works on the job in a folder."""
    return is_held(folder / LOCK)


def busy(folder: Path) -> str:
    """The sentence for those who want a job that a process works on."""
    number = holder_of(folder / LOCK)
    holder = "another process" if number is None else f"process {number}"
    return f"job {folder.name} is being worked on by {holder}; wait for it, or end it first"


def folders(root: Path) -> list[Path]:
    """Of jobs that have begun, oldest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if (path / DESCRIPTION).is_file()), key=lambda path: path.name)


def make_room(root: Path) -> None:
    """Remove finished jobs, the oldest first, while there are too many or they take too much."""
    for folder in root.iterdir():
        if _is_left_over(folder):
            shutil.rmtree(folder, ignore_errors=True)
    finished = [folder for folder in folders(root) if (folder / FINISHED).exists() and not is_locked(folder)]
    sizes = [_bytes_of(folder) for folder in finished]
    while len(finished) > MAX_FINISHED or sum(sizes) > MAX_FINISHED_BYTES:
        shutil.rmtree(finished.pop(0), ignore_errors=True)
        sizes.pop(0)


def _is_left_over(folder: Path) -> bool:
    """Whether a run ended there before it had a job, and not just now."""
    if _NAME.fullmatch(folder.name) is None or (folder / DESCRIPTION).exists() or is_locked(folder):
        return False
    with suppress(OSError):
        return time.time() - folder.stat().st_mtime > _LEFT_OVER_S
    return False


def _bytes_of(folder: Path) -> int:
    """Of all files that are there now; a running job writes and removes some."""
    found = 0
    with suppress(FileNotFoundError):
        for path in list(folder.iterdir()):
            with suppress(FileNotFoundError):
                found += path.stat().st_size
    return found


def _told(folder: Path) -> dict[str, Any]:
    known = {"name": folder.name, "bytes": _bytes_of(folder)}
    try:
        told, _ = read_description(folder)
    except RequestError as error:
        return {**known, "state": "damaged", "began": 0.0, "prompt": str(error), "output": ""}
    state = "running" if is_locked(folder) else "unfinished"
    return {
        **known,
        "state": "finished" if (folder / FINISHED).exists() else state,
        "began": told["began"],
        "prompt": told["request"]["prompts"][0],
        "output": told["order"]["output"],
    }


def read_description(folder: Path) -> tuple[dict[str, Any], str]:
    """What `job.json` says, and its digest."""
    path = folder / DESCRIPTION
    try:
        told = json.loads(path.read_text("utf-8"))
        if told.pop("format") == FORMAT and told.pop("sha256") == (digest := digest_of(told)):
            return told, digest
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RequestError(f"{path} cannot be read ({error}); start the request again") from error
    raise RequestError(f"{path} is damaged, or of another version; start the request again")


def digest_of(told: Mapping[str, Any]) -> str:
    """Tells one description from another."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
