"""The folder of jobs: which there are, how each stands, and what may be removed. Torch-free.

A job is a folder named by the time it began. `job.json` says all that a resumed run needs besides the pictures, which
are an entry of its journal; `finished.json` says where the video is; `lock` is held by who works on it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from frameloom.errors import RequestError
from frameloom.lock import is_held
from frameloom.settings import jobs_folder

MAX_FINISHED: Final = 100  # jobs that are listed after they are done, and
MAX_FINISHED_BYTES: Final = 10_000_000_000  # what all of them may take
FORMAT: Final = "frameloom job 1"
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
        raise RequestError(f"job {name} is being worked on; end that first")
    shutil.rmtree(found[0])


def folder_of(name: str | None) -> Path:
    """The folder of a job by its name, or the beginning of it, or its path; None: the newest that is not finished.

    Raises RequestError.
    """
    root = jobs_folder()
    if name is None:
        for folder in reversed(folders(root)):
            if not (folder / FINISHED).exists() and not is_locked(folder):
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


def folders(root: Path) -> list[Path]:
    """Of jobs that have begun, oldest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if (path / DESCRIPTION).is_file()), key=lambda path: path.name)


def make_room(root: Path) -> None:
    """Remove finished jobs, the oldest first, while there are too many or they take too much."""
    finished = [folder for folder in folders(root) if (folder / FINISHED).exists() and not is_locked(folder)]
    sizes = [_bytes_of(folder) for folder in finished]
    while len(finished) > MAX_FINISHED or sum(sizes) > MAX_FINISHED_BYTES:
        shutil.rmtree(finished.pop(0), ignore_errors=True)
        sizes.pop(0)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


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
