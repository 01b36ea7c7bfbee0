"""Brings files of a hub repository into the hub library's cache: resumed, counted, and compared with what the hub said.

Large files are fetched here, by ranges, because the library throws away what an interrupted download had; it keeps them
in its own layout, so what any other program fetched is used, and the other way round.
"""

import functools
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # it has no __all__

from frameloom.errors import CheckpointError
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)
_CONNECTIONS = 4
_SECONDS_BETWEEN_LINES = 10.0
_WORTH_TELLING_BYTES = 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """What the hub says of one file, None where it does not: `sha256` of large files alone, `git_sha1` of the others.

    The latter is git's hash of a file: over "blob", its size, a zero byte and what it holds.
    """

    size_bytes: int | None
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The files of a repository at one commit, by their paths. `problem`: why the hub was not asked, "" if it was."""

    repo: str
    commit: str
    files: Mapping[str, StoredFile]
    problem: str = ""

    @property
    def home(self) -> Path:
        """Where the cache keeps this repository."""
        return home_of(self.repo)

    @property
    def snapshot(self) -> Path:
        """The folder of the files of this commit."""
        return self.home / "snapshots" / self.commit


OnBytes = Callable[[str, int, int], None]
"""Called with the name of a file or repository, the bytes of it that are done, and of how many."""


class FileError(Exception):
    """The hub's server did not give a file that its listing has; `__cause__` is what the hub library raised."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def home_of(repo: str) -> Path:
    """The folder of the hub library's cache for a repository; it may not exist yet."""
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / folder


def notes_of(repo: str) -> Path:
    """Beside them, what is noted of a repository: listings, what was checked, and what is not complete yet."""
    return home_of(repo) / "frameloom"


def fetch(listing: Listing, paths: Sequence[str], *, on_bytes: OnBytes | None = None) -> Path:
    """Have these files of the listing in the cache, whole and undamaged; the folder they are in is its `snapshot`.

    `on_bytes` is called with the repository and every piece that arrives, from one thread at a time; without it the log
    tells every ten seconds. What is damaged in the cache is fetched again. Raises CheckpointError for a lack of space,
    for what arrives damaged (and is removed), and for what is missing while the hub cannot be reached; FileError for
    what the server refuses; what the hub library raises besides is raised as it is.
    """
    missing = [path for path in paths if not _is_whole(listing, path)]
    if missing and listing.problem:
        raise CheckpointError(f"{listing.problem}; the cache lacks {missing[0]}{_and_more(len(missing) - 1)}")
    if missing:
        _check_space(listing, missing)
        _fetch_all(listing, missing, on_bytes or _LogLines(listing, missing))
    for path in missing:
        if damage := _damage(listing, path):
            _discard(listing.snapshot / path)
            raise CheckpointError(_arrived_damaged(listing, path, damage))
    return listing.snapshot


def _and_more(count: int) -> str:
    return f" and {count} more" if count else ""


# --- space ---


def _check_space(listing: Listing, paths: Sequence[str]) -> None:
    needed_bytes = sum(_remaining_bytes(listing, path) for path in paths)
    there = next(folder for folder in (listing.home, *listing.home.parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(there).free
    if needed_bytes > free_bytes:
        raise CheckpointError(
            f"'{listing.repo}' needs {_bytes(needed_bytes)} more in {there}, where {_bytes(free_bytes)} are free; "
            "make room, or set HF_HOME to a folder on a larger disk"
        )


def _remaining_bytes(listing: Listing, path: str) -> int:
    stored = listing.files[path]
    if stored.sha256 and (listing.home / "blobs" / stored.sha256).exists():  # under another commit
        return 0
    return max(0, (stored.size_bytes or 0) - _partial_bytes(_partial(listing, stored)))


def _partial(listing: Listing, stored: StoredFile) -> Path:
    return notes_of(listing.repo) / f"{stored.sha256}.partial"


def _partial_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# --- progress ---


class _LogLines:
    """Tells the log how far a transfer is: at its start and its end, and every ten seconds; of small ones nothing."""

    def __init__(self, listing: Listing, paths: Sequence[str]) -> None:
        total_bytes = sum(listing.files[path].size_bytes or 0 for path in paths)
        self._level = logging.INFO if total_bytes >= _WORTH_TELLING_BYTES else logging.DEBUG
        self._next_s = time.monotonic() + _SECONDS_BETWEEN_LINES
        log.log(self._level, "fetching %s (%d files, %s)", listing.repo, len(paths), _bytes(total_bytes))

    def __call__(self, repo: str, done_bytes: int, total_bytes: int) -> None:
        is_whole = done_bytes >= total_bytes
        if time.monotonic() >= self._next_s or is_whole:
            self._next_s = time.monotonic() + _SECONDS_BETWEEN_LINES
            log.log(self._level, "%s: %s of %s", repo, _bytes(done_bytes), _bytes(total_bytes))
            self._level = logging.DEBUG if is_whole else self._level  # that it is whole is told once


class _Count:
    """Bytes that have arrived over all connections; ends one that brings too many, and each once `stop` was called."""

    def __init__(self, listing: Listing, paths: Sequence[str], on_bytes: OnBytes) -> None:
        self._repo, self._on_bytes = listing.repo, on_bytes
        self._sizes = {path: listing.files[path].size_bytes or 0 for path in paths}
        self._done = dict.fromkeys(paths, 0)
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def add(self, path: str, count: int) -> None:
        self.set(path, self._done[path] + count)

    def finish(self, path: str) -> None:
        """All of a file is here: fetched now, or before under another name."""
        self.set(path, self._sizes[path] or self._done[path])

    def set(self, path: str, count: int) -> None:
        if self._stopped:
            raise _StoppedError
        if 0 < self._sizes[path] < count:
            raise CheckpointError(
                f"the server sends more of '{path}' of '{self._repo}' than the {self._sizes[path]} bytes that the hub "
                "announced; run this again later, and check HF_ENDPOINT"
            )
        with self._lock:
            if self._done[path] == count:
                return
            self._done[path] = count
            done, total = sum(self._done.values()), sum(self._sizes.values())
            self._on_bytes(self._repo, done, max(done, total))


class _StoppedError(Exception):
    """Another connection failed, or the user wants no more."""


class _Bar:
    """What the hub library takes for a progress bar of one file. `initial`: bytes that are there and are kept."""

    def __init__(self, count: _Count, path: str, *, initial: int = 0, **_: object) -> None:
        self._count, self._path = count, path
        count.set(path, initial)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: float | None = 1) -> None:
        self._count.add(self._path, int(count or 0))


# --- transfer ---


def _fetch_all(listing: Listing, paths: Sequence[str], on_bytes: OnBytes) -> None:
    count = _Count(listing, paths, on_bytes)
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        waiting = [pool.submit(_fetch_file, listing, path, count) for path in paths]
        try:
            for done in as_completed(waiting):
                done.result()
        except BaseException:  # also when the user interrupts: what has arrived by then is kept
            count.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_file(listing: Listing, path: str, count: _Count) -> None:
    stored = listing.files[path]
    bar: Any = functools.partial(_Bar, count, path)
    try:
        if stored.sha256 and stored.size_bytes and stored.size_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            _fetch_large(listing, path, bar)
        elif stored.size_bytes and stored.size_bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
            bar = None  # only the library's own protocol transfers these, and shows its own bars
        hf_hub_download(listing.repo, path, revision=listing.commit, tqdm_class=bar)  # of what is there, makes a link
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileError(path) from error
    count.finish(path)


def _fetch_large(listing: Listing, path: str, bar: Any) -> None:
    """Put a file where the library keeps what it fetched; under its lock, so one of several processes does it."""
    stored = listing.files[path]
    assert stored.sha256 is not None
    blob = listing.home / "blobs" / stored.sha256
    lock = listing.home.parent / ".locks" / listing.home.name / f"{stored.sha256}.lock"
    partial = _partial(listing, stored)
    for folder in (blob.parent, lock.parent, partial.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():  # another process or another commit may have it
            _continue(listing, path, bar)
            os.replace(partial, blob)
            _note_checked(listing, stored, blob)


def _continue(listing: Listing, path: str, bar: Any) -> None:
    """Fetch what the partial file lacks, and compare the whole with its hash."""
    stored = listing.files[path]
    partial = _partial(listing, stored)
    if _partial_bytes(partial) > (stored.size_bytes or 0):
        partial.unlink()
    with partial.open("ab") as file:
        http_get(
            hf_hub_url(listing.repo, path, revision=listing.commit),
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=stored.size_bytes,
            displayed_filename=path,
            tqdm_class=bar,
        )
    if _sha256(partial) != stored.sha256:
        partial.unlink()
        raise CheckpointError(_arrived_damaged(listing, path, _WRONG_SHA256))


# --- what is in the cache ---

_WRONG_SHA256 = "its sha256 is not what the hub says"


def _is_whole(listing: Listing, path: str) -> bool:
    """Whether the cache has a file, undamaged; the log tells of a damaged one, which is removed if the hub is there."""
    file = listing.snapshot / path
    if not file.is_file():
        return False
    damage = _damage(listing, path)
    if damage:
        log.warning("'%s' of '%s' is damaged in the cache (%s)", path, listing.repo, damage)
        if not listing.problem:
            _discard(file)
    return not damage


def _damage(listing: Listing, path: str) -> str:
    """What is wrong with a file of the cache, or ""; the hash of a large one, which takes a while, is computed once."""
    stored, file = listing.files[path], listing.snapshot / path
    size = file.stat().st_size
    if stored.size_bytes not in (None, size):
        return f"{size} of {stored.size_bytes} bytes"
    if stored.git_sha1 is not None and _git_sha1(file) != stored.git_sha1:
        return "its sha1 is not what the hub says"
    if stored.sha256 is None or _is_checked(listing, stored, file):
        return ""
    if _sha256(file) != stored.sha256:
        return _WRONG_SHA256
    _note_checked(listing, stored, file)
    return ""


def _arrived_damaged(listing: Listing, path: str, why: str) -> str:
    return f"'{path}' of '{listing.repo}' is damaged ({why}) and was removed; run this again to fetch it anew"


def _discard(file: Path) -> None:
    """Remove a link of the cache and what it points to."""
    for path in (file.resolve(), file):
        path.unlink(missing_ok=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _git_sha1(file: Path) -> str:
    begun = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: begun).hexdigest()


def _is_checked(listing: Listing, stored: StoredFile, file: Path) -> bool:
    note = notes_of(listing.repo) / f"{stored.sha256}.checked"
    return note.is_file() and note.read_text(encoding="ascii", errors="replace") == _state(file)


def _note_checked(listing: Listing, stored: StoredFile, file: Path) -> None:
    write_note(notes_of(listing.repo) / f"{stored.sha256}.checked", _state(file))


def _state(file: Path) -> str:
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def write_note(path: Path, text: str) -> None:
    """Write a small file whole or not at all. In a cache that cannot be written there are no notes: it costs time."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        log.debug("%s is not kept: %s", path, error)
