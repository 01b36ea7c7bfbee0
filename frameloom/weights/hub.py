"""The model hub: finds out which files a repository has, and fetches those that are needed, or only their headers.

HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE are read by the hub library, and mean what they mean
elsewhere.
"""

import difflib
import errno
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, parse_hf_uri
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from frameloom.errors import CheckpointError
from frameloom.settings import LOGGER_NAME
from frameloom.weights.header import TensorEntry, read_json, tensor_entries
from frameloom.weights.hub_choice import WEIGHT_SUFFIXES, choose_files, is_index, is_weights
from frameloom.weights.hub_fetch import FileError, Listing, OnBytes, StoredFile, fetch, home_of, notes_of, write_note

log = logging.getLogger(LOGGER_NAME)
_PREFIX = "hf://"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w.+-]*(?:/\w[\w.+-]*)*", re.ASCII)  # a branch, a tag, a commit, refs/pr/1
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_FILE_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".model")  # of weights and tokenizers
_MAX_NAME = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class HubName:
    """`owner/name[@revision][/path/of/a/file]`, taken apart; `path` is "" where the repository itself is meant."""

    repo: str
    revision: str = "main"
    path: str = ""


# --- names ---


def parse_name(text: str) -> HubName:
    """Take "owner/name", with or without "hf://", a revision and a path, apart. Raises CheckpointError.

    A revision ends at the first slash where a file follows, and may have slashes itself where none does, or as "%2F".
    """
    refused = CheckpointError(f"{text[:80]!r} is no name of the hub; write owner/name, owner/name@revision or hf://...")
    bare = text.removeprefix(_PREFIX)
    if len(bare) > _MAX_NAME:
        raise refused
    try:
        uri = parse_hf_uri(_PREFIX + bare)
    except ValueError:
        raise refused from None
    name = HubName(repo=uri.id, revision=uri.revision or constants.DEFAULT_REVISION, path=uri.path_in_repo)
    if uri.revision and name.path and not name.path.endswith(_FILE_SUFFIXES):
        name = HubName(repo=uri.id, revision=f"{uri.revision}/{name.path}")
    is_first = bare.startswith(name.repo)  # the library overlooks a slash in front, and "models/" means nothing to it
    is_right = _REPO.fullmatch(name.repo) and _REVISION.fullmatch(name.revision) and ".." not in name.revision
    if not is_first or not is_right or (name.path and not _is_plain(name.path)):
        raise refused
    return name


def is_hub_name(text: str) -> bool:
    """Whether what is no local path can only mean the hub: with a path inside if that is a weight file."""
    if text.startswith(_PREFIX):
        return True
    try:
        name = parse_name(text)
    except CheckpointError:
        return False
    return not name.path or is_weights(name.path)


def _is_plain(path: str) -> bool:
    """Whether a path stays in its folder on every system."""
    parts = path.split("/")
    return path.isprintable() and not any(part in ("", ".", "..") or set(part) & set('\\:*?"<>|') for part in parts)


# --- listings ---


def list_files(name: HubName, *, hint: str = "") -> Listing:
    """What the repository holds at this revision: one request, and none for a commit that was asked for before.

    When the hub cannot be asked, what was fetched before must do, and the log says so. `hint` goes into the message if
    the name is wrong. Raises CheckpointError.
    """
    known = _noted(name)
    if known is not None and name.revision == known.commit and not constants.HF_HUB_OFFLINE:
        return known
    try:
        with _explained(name, hint):
            listing = _asked(name)
    except CheckpointError as error:
        known = _noted(name, problem=str(error)) or _found_in_cache(name, problem=str(error))
        if known is None:
            raise
        log.warning("%s; using what was fetched before (commit %s)", error, known.commit[:8])
        return known
    _note(name, listing)
    return listing


def _asked(name: HubName) -> Listing:
    timeout_s = constants.HF_HUB_ETAG_TIMEOUT
    try:
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=timeout_s)
        files = {
            file.rfilename: _stored(file.size, file.lfs.sha256) if file.lfs else _stored(file.size, None, file.blob_id)
            for file in info.siblings or ()
            if _is_plain(file.rfilename)
        }
    except (HfHubHTTPError, HFValidationError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError):  # how the library fails at what it cannot read
        raise FileMetadataError from None
    if not _COMMIT.fullmatch(info.sha or ""):
        raise FileMetadataError
    return Listing(repo=name.repo, commit=str(info.sha), files=files)


def _stored(size: Any, sha256: Any, git_sha1: Any = None) -> StoredFile:
    """What came from outside, as what it should be. What is no git hash is none: some mirrors say something else."""
    if not (size is None or (type(size) is int and size >= 0)):
        raise ValueError("size")
    if not (sha256 is None or (isinstance(sha256, str) and _SHA256.fullmatch(sha256))):
        raise ValueError("sha256")
    is_git = isinstance(git_sha1, str) and _SHA1.fullmatch(git_sha1)
    return StoredFile(size_bytes=size, sha256=sha256, git_sha1=git_sha1 if is_git else None)


def _note(name: HubName, listing: Listing) -> None:
    """Keep a listing, and which commit the revision is, where the hub library looks for it as well."""
    files = {path: list(asdict(stored).values()) for path, stored in listing.files.items()}
    write_note(notes_of(name.repo) / f"{listing.commit}.json", json.dumps(files))
    if name.revision != listing.commit:
        write_note(home_of(name.repo) / "refs" / name.revision, listing.commit)


def _known_commit(name: HubName) -> str:
    if _COMMIT.fullmatch(name.revision):
        return name.revision
    try:
        commit = (home_of(name.repo) / "refs" / name.revision).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return commit if _COMMIT.fullmatch(commit) else ""


def _noted(name: HubName, *, problem: str = "") -> Listing | None:
    """The listing that was kept."""
    commit = _known_commit(name)
    try:
        text = (notes_of(name.repo) / f"{commit}.json").read_text(encoding="utf-8")
        files = {path: _stored(*facts) for path, facts in json.loads(text).items() if _is_plain(path)}
    except (OSError, ValueError, TypeError, AttributeError):  # there is none, or it is damaged
        return None
    return Listing(repo=name.repo, commit=commit, files=files, problem=problem)


def _found_in_cache(name: HubName, *, problem: str) -> Listing | None:
    """What another program fetched of this revision; the cache names files by their hashes."""
    commit = _known_commit(name)
    root = home_of(name.repo) / "snapshots" / commit
    if not commit or not root.is_dir():
        return None
    files: dict[str, StoredFile] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        blob = path.resolve().name
        sha256 = blob if _SHA256.fullmatch(blob) else None
        files[path.relative_to(root).as_posix()] = _stored(path.stat().st_size, sha256, blob)
    return Listing(repo=name.repo, commit=commit, files=files, problem=problem)


# --- files ---


def download(listing: Listing, paths: Sequence[str], *, on_bytes: OnBytes | None = None) -> Path:
    """Have those of `paths` that the repository holds in the cache; the folder they are in. Raises CheckpointError."""
    with _explained(HubName(repo=listing.repo, revision=listing.commit)):
        return fetch(listing, [path for path in paths if path in listing.files], on_bytes=on_bytes)


def download_checkpoint(
    listing: Listing,
    *,
    components: Collection[str] | None = None,
    variant: str = "",
    weights: bool = True,
    on_bytes: OnBytes | None = None,
) -> Path:
    """Fetch what `choose_files` takes of a repository, and of shards those that the index lists.

    Returns the folder they are in. Raises CheckpointError.
    """
    chosen = choose_files(
        listing.files, components=components, variant=variant, weights=weights, where=listing.repo
    )  # fmt: skip
    texts = [path for path in chosen if not is_weights(path)]
    root = download(listing, texts, on_bytes=on_bytes)
    if not weights:
        return root
    by_folder = {path.rpartition("/")[0]: _listed_shards(root / path) for path in texts if is_index(path)}
    large = {path for path in chosen if is_weights(path) and path.rpartition("/")[0] not in by_folder}
    for folder, names in by_folder.items():
        large |= {f"{folder}/{name}".lstrip("/") for name in names}
    return download(listing, [*texts, *sorted(large)], on_bytes=on_bytes)


def _listed_shards(index: Path) -> set[str]:
    """The names in an index as it says them: only what the repository holds is fetched."""
    weight_map = read_json(index).get("weight_map")
    return {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else set()


def download_files(
    name: str,
    paths: Sequence[str] = (),
    *,
    also: Callable[[Collection[str]], Sequence[str]] = lambda _: (),
    on_bytes: OnBytes | None = None,
) -> tuple[Path, ...]:
    """Fetch single files of a repository, or the one that `name` ends with; where they are, in the same order.

    `also` is asked which of all its files to fetch with them. Raises CheckpointError, and if it lacks a file.
    """
    parsed = parse_name(name)
    wanted = list(paths) or [parsed.path]
    listing = list_files(parsed)
    for path in wanted:
        if path not in listing.files:
            what = f"holds no file {path!r}" if path else "is a repository, and a file of it is needed"
            raise CheckpointError(f"'{listing.repo}' {what}{_suggestion(path, listing)}")
    root = download(listing, [*wanted, *also(listing.files.keys())], on_bytes=on_bytes)
    return tuple(root / path for path in wanted)


def _suggestion(path: str, listing: Listing) -> str:
    files = [name for name in listing.files if name.endswith(WEIGHT_SUFFIXES)]
    close = difflib.get_close_matches(path, files, n=1, cutoff=0.0)
    return f"; did you mean '{listing.repo}/{close[0]}'?" if close else "; its page on the hub lists what it has"


class RemoteFiles:
    """The weight files of a repository, looked at where they are. Methods raise CheckpointError."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    def names(self, component: str) -> list[str]:
        """Names of the files in one component's folder, sorted."""
        paths = map(PurePosixPath, self._listing.files)
        return sorted(path.name for path in paths if str(path.parent) == component)

    def header(self, path: Path) -> dict[str, TensorEntry]:
        """The tensors of one weight file, by a request for the beginning of the file alone."""
        name = HubName(repo=self._listing.repo, revision=self._listing.commit)
        with _explained(name):
            found = HfApi().parse_safetensors_file_metadata(
                name.repo, f"{path.parent.name}/{path.name}", revision=name.revision
            )
        entries = {key: asdict(info) for key, info in found.tensors.items()}
        return tensor_entries(path, entries, start=0)


# --- what goes wrong ---

# The first that fits; {hint} is about local folders of nearly that name.
_REFUSALS: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((GatedRepoError,), "asks for its licence to be accepted; accept it on its page, then log in with 'hf auth login'"),
    (
        (RevisionNotFoundError,),
        "has no revision '{revision}'; check the branch, tag or commit after the @ (before a file with %2F for /)",
    ),
    (
        (RepositoryNotFoundError, HFValidationError),
        "is no local folder and no public hub repository{hint}; check the name, or log in if private",
    ),
    ((FileMetadataError,), "got an answer from {endpoint} that no model hub gives; check HF_ENDPOINT"),
    ((EntryNotFoundError,), "changed on the hub while it was read; run this again"),
    (
        (OfflineModeIsEnabled,),
        "cannot be asked for while HF_HUB_OFFLINE is set{hint}; unset it, or give a local folder",
    ),
    ((PermissionError,), "cannot be kept in {cache}, which may not be written; set HF_HOME to a folder that may"),
)
_STATUSES: Mapping[int, str] = {
    401: "was refused, as the hub does not know this token (401); mend HF_TOKEN, or log in with 'hf auth login'",
    403: "may not be read with this token (403); use one that may, from the settings of your account on the hub",
    404: "is unknown at {endpoint} (404), which may be no model hub; check HF_ENDPOINT",
    429: "was refused, as the hub had too many requests (429); wait some minutes, or log in with 'hf auth login'",
}
_FILE_STATUSES: Mapping[int, str] = {
    401: "lists '{path}', but its server wants a token that it knows (401); mend HF_TOKEN, or log in",
    403: "lists '{path}', but its server refuses it (403); use a token that may read it, or run this again later",
    404: "lists '{path}', but its server has no such file (404); run this again later, or choose another revision",
}
_OTHERWISE = "{hint}; check the network, or give a local folder"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _explained(name: HubName, hint: str = "") -> Iterator[None]:
    """Whatever goes wrong on the way to the hub becomes one sentence."""
    try:
        yield
        return
    except CheckpointError:
        raise
    except Exception as error:  # hub, OS and HTTP library each raise their own kinds: all mean "no files"
        path = error.path if isinstance(error, FileError) else ""
        said = _sentence(_what_happened(error), path).format(
            hint=hint, revision=name.revision, cache=constants.HF_HUB_CACHE, endpoint=constants.ENDPOINT, path=path
        )
    raise CheckpointError(f"'{name.repo}' {said}") from None


def _what_happened(error: Exception) -> Exception:
    """What is behind our word that a file did not come, and the library's that the cache lacks it."""
    while isinstance(error, (FileError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _sentence(error: Exception, path: str) -> str:
    """`path`: of the file that was fetched, "" for another request."""
    if path and isinstance(error, HfHubHTTPError) and not isinstance(error, GatedRepoError):
        status = error.response.status_code
        if status in _FILE_STATUSES:
            return _FILE_STATUSES[status]
    for kinds, sentence in _REFUSALS:
        if isinstance(error, kinds):
            return sentence
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return _STATUSES.get(status, f"cannot be downloaded (the hub answers {status}){_OTHERWISE}")
    if type(error) is OSError and error.errno is None:  # how the library says it
        return "sent fewer bytes of a file than it announced; run this again to go on"
    if isinstance(error, OSError) and error.errno in _FULL:
        return "does not fit: {cache} is full; make room, or set HF_HOME to a larger disk, and run this again to go on"
    return f"cannot be downloaded from {{endpoint}} ({type(error).__name__}){_OTHERWISE}"
