"""The data folder of a server: `jobs.sqlite`, `lock`, and a folder `videos/ID` for the files of each job."""

import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from frameloom.errors import InputError
from frameloom.lock import Lock
from frameloom.serve.jobs.job import JOB_ID

_INPUT: Final = re.compile(r"[a-z0-9_]+(-[0-9]+)?\.[a-z0-9]+")  # names that our own code has made
_OF_FENCE: Final = re.compile(r"(?:video|thumbnail|sheet)-([0-9]+)\.(?:mp4|jpg)")
_PARTIAL: Final = ".partial"
_GONE: Final = ".gone"
PREVIEW: Final = "preview.apng"
"""In the folder of a job: what the video is becoming, as a picture that moves."""


class DataFolderError(InputError):
    """The data folder cannot be used: by whom it is held, or what is wrong with it, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Where an attempt leaves what it makes; names carry its fence, so a late writer harms no other attempt."""

    video: Path
    thumbnail: Path
    sheet: Path
    preview: Path
    journal: Path


class DataFolder:
    """Holds a data folder for this process, and makes it if need be. Raises DataFolderError."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()
        self.videos = path / "videos"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = Lock(path / "lock")
        except BlockingIOError:
            raise DataFolderError(
                f"another server uses the data folder {path}: end it, or name another folder with --data-dir"
            ) from None
        except OSError as error:
            raise DataFolderError(
                f"the data folder {path} cannot be used ({error.strerror}): name another one with --data-dir"
            ) from None
        try:
            self.videos.mkdir(mode=0o700, exist_ok=True)
            sync_folder(path)
        except OSError as error:
            self._lock.close()
            raise DataFolderError(
                f"the data folder {path} cannot be written ({error.strerror}): make room, or name another one"
            ) from None

    @property
    def store(self) -> Path:
        """The file of the job store."""
        return self.path / "jobs.sqlite"

    def of(self, job_id: str) -> Path:
        """The folder of a job, there or not. Raises ValueError for what is no id of ours."""
        if not JOB_ID.fullmatch(job_id):
            raise ValueError(f"{job_id!r} is no id of a job")
        return self.videos / job_id

    def files(self, job_id: str, fence: int) -> Files:
        """Where an attempt leaves what it makes."""
        folder = self.of(job_id)
        return Files(
            video=folder / f"video-{fence}.mp4",
            thumbnail=folder / f"thumbnail-{fence}.jpg",
            sheet=folder / f"sheet-{fence}.jpg",
            preview=folder / PREVIEW,
            journal=folder / "journal",
        )

    def jobs(self) -> list[str]:
        """The ids of all jobs that have a folder."""
        return [name for name in os.listdir(self.videos) if JOB_ID.fullmatch(name)]

    def prepare(self, job_id: str) -> None:
        """Make the folder of a job, if it has none; it is on the disk when this returns. Raises OSError."""
        self.of(job_id).mkdir(mode=0o700, exist_ok=True)
        sync_folder(self.videos)

    def keep_inputs(self, job_id: str, inputs: Mapping[str, bytes]) -> None:
        """Write the inputs of a job, by file name; all are on the disk, or none is there. Raises OSError."""
        if not inputs:
            return
        folder = self.of(job_id)
        partial = folder.with_name(f"{folder.name}{_PARTIAL}")
        try:
            (partial / "inputs").mkdir(mode=0o700, parents=True)
            for name, data in inputs.items():
                _write(partial / "inputs" / _checked(name), data)
            sync_folder(partial / "inputs")
            sync_folder(partial)
            partial.rename(folder)
            sync_folder(self.videos)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def remove(self, job_id: str) -> None:
        """Remove all that there is of a job; what cannot be removed now is removed at the next start."""
        folder = self.of(job_id)
        gone = folder.with_name(f"{folder.name}{_GONE}")
        with suppress(FileNotFoundError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def tidy(self, job_id: str, fence: int | None) -> None:
        """Leave of a job that has ended its inputs and the files of one attempt; with None, of no attempt."""
        folder = self.of(job_id)
        with suppress(FileNotFoundError):
            for name in os.listdir(folder):
                match = _OF_FENCE.fullmatch(name)
                if name != "inputs" and (match is None or fence is None or int(match[1]) != fence):
                    _discard(folder / name)

    def sweep(self, known: Collection[str]) -> list[str]:
        """Remove what a crash has left: folders of jobs that are not known, and what was half made or half removed.

        Returns the names of what was removed. What is no folder of ours is left alone.
        """
        removed = []
        for name in os.listdir(self.videos):
            ours = JOB_ID.fullmatch(name.removesuffix(_PARTIAL).removesuffix(_GONE))
            if ours and name not in known:
                _discard(self.videos / name)
                removed.append(name)
        return removed

    def used_bytes(self) -> int:
        """What all files take on the disk."""
        return _used(self.path)

    def used_by(self, job_id: str) -> int:
        """What the files of a job take on the disk."""
        return _used(self.of(job_id))

    def free_bytes(self) -> int:
        """What a user who is not root may still write."""
        disk = os.statvfs(self.path)
        return disk.f_bavail * disk.f_frsize

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.close()


def sync_folder(path: Path) -> None:
    """What was made or renamed in a folder is on the disk when this returns."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _checked(name: str) -> str:
    if not _INPUT.fullmatch(name):
        raise ValueError(f"{name!r} is no name for an input")
    return name


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _used(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                blocks = os.lstat(os.path.join(folder, name)).st_blocks
                total += 512 * blocks  # the unit of st_blocks, whatever the disk's
    return total
