"""Where a converted checkpoint is written: a folder, with room, held by one process, and nothing of others in the way.

Whatever lies there already is taken for this conversion's own only where its bytes show it.
"""

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from frameloom.errors import OutputError
from frameloom.lock import Lock, holder_of
from frameloom.settings import LOGGER_NAME
from frameloom.weights.checkpoint import Checkpoint
from frameloom.weights.header import MAX_HEADER_BYTES
from frameloom.weights.hub_choice import is_weights
from frameloom.weights.write import Target, is_whole, mapped_of, partial_of

log = logging.getLogger(LOGGER_NAME)
_LOCK = ".frameloom-convert.lock"
_SPARE_BYTES = 64 * 2**20  # left free on the disk


def check_folder(destination: Path) -> None:
    """Raise OutputError where a path is no folder and cannot become one."""
    try:
        destination.stat()
        problem = "" if destination.is_dir() else "is a file"
    except FileNotFoundError:
        problem = "is a link to nothing" if destination.is_symlink() else ""
    except (OSError, ValueError) as error:
        problem = f"can be no folder ({getattr(error, 'strerror', error)})"
    if problem:
        raise OutputError(f"{str(destination)!r} {problem}; give a folder that is empty or new")


# --- one process at a time ---


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, by a hidden file that is free again when this one ends, however it does.

    Raises OutputError where another holds it. Where no file can be locked, the log says so, and nothing is held.
    """
    path, lock = folder / _LOCK, None
    try:
        lock = Lock(path)
    except BlockingIOError:
        holder = f" ({number})" if (number := holder_of(path)) is not None else ""
        raise OutputError(
            f"'{folder}' is being written by another process{holder}; wait for its end, or give another folder"
        ) from None
    except OSError as error:
        log.info("%s cannot be locked (%s): nothing else must write there now", folder, error.strerror)
    try:
        yield
    finally:
        if lock is not None:
            lock.remove()


# --- what lies there ---


def check_occupied(
    checkpoint: Checkpoint, root: Path, targets: Sequence[Target], described: Mapping[Path, bytes]
) -> None:
    """Raise OutputError where a source would be overwritten, or files of something else lie."""
    sources = {os.path.realpath(file) for part in checkpoint.components.values() for file in part.files}
    if not sources.isdisjoint(os.path.realpath(target.path) for target in targets):
        raise OutputError(f"'{root}' holds files that are converted; give another folder")
    judges = _judges(targets, described)
    try:
        occupied = [*_in_place(judges), *_strangers(root, judges)]
    except OSError as error:
        raise OutputError(f"'{root}' cannot be looked through ({error}); give another folder") from None
    if occupied:
        raise OutputError(
            f"'{root}' holds '{occupied[0].relative_to(root)}' of something else, or damaged; "
            "give a folder that is new, empty or of an earlier run of the same command, or move it away"
        )


def _in_place(judges: Mapping[Path, Callable[[Path], bool]]) -> Iterator[Path]:
    """What lies where something will be written, or where a folder must be, and must stay."""
    for path, is_ours in judges.items():
        there = next(place for place in (path, *path.parents) if os.path.lexists(place))
        fits = there.is_dir() if there != path else path.is_file() and is_ours(path)
        if not fits:
            yield there


def _strangers(root: Path, judges: Mapping[Path, Callable[[Path], bool]]) -> Iterator[Path]:
    """What would be taken for a part of the checkpoint, and is none."""
    for file in sorted(root.rglob("*")):
        if file not in judges and file.is_file() and (is_weights(file.name) or file.name == "model_index.json"):
            yield file


def _judges(targets: Sequence[Target], described: Mapping[Path, bytes]) -> dict[Path, Callable[[Path], bool]]:
    """For each file that will be written, and what an ended run leaves beside it: whether what is there is its own."""
    judges: dict[Path, Callable[[Path], bool]] = {}
    for target in targets:
        begins = functools.partial(_begins_as, target)
        judges[target.path] = functools.partial(_is_pickle_of, target) if target.is_pickle else begins
        judges[mapped_of(target.path) if target.is_pickle else partial_of(target.path)] = begins
        if target.is_pickle:  # which is only begun when the other is there, and that is judged
            judges[partial_of(target.path)] = lambda partial: mapped_of(partial.with_suffix("")).is_file()
    for path, content in described.items():
        judges |= dict.fromkeys((path, partial_of(path)), functools.partial(_begins_content, content))
    return judges


def _begins_as(target: Target, path: Path) -> bool:
    """Whether a safetensors file, whole or not, was made from the same source, if in another dtype."""
    header = target.header
    with path.open("rb") as file:
        head = file.read(max(len(header), 8))
        size_bytes = 8 + int.from_bytes(head[:8], "little")
        if header.startswith(head[: len(header)]):
            return True
        if size_bytes > MAX_HEADER_BYTES:
            return False
        text = (head + file.read(max(0, size_bytes - len(head))))[8:size_bytes]
    try:
        return bool(json.loads(text)["__metadata__"]["source"] == target.metadata["source"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_pickle_of(target: Target, path: Path) -> bool:
    """Whether it lists what is planned (the numbers are compared before it is kept), or is empty."""
    return path.stat().st_size == 0 or is_whole(target)


def _begins_content(content: bytes, path: Path) -> bool:
    with path.open("rb") as file:
        return content.startswith(file.read(len(content) + 1))


# --- room ---


def check_space(root: Path, targets: Sequence[Target], described: Mapping[Path, bytes]) -> None:
    """Raise OutputError where the disk has no room for what is missing."""
    needed = sum(_missing_bytes(target) for target in targets)
    needed += sum(len(content) for path, content in described.items() if not path.exists())
    free = shutil.disk_usage(root).free
    if needed and needed + _SPARE_BYTES > free:
        raise OutputError(
            f"'{root}' needs {(needed + _SPARE_BYTES) / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "make room, or give a folder on another disk"
        )


def _missing_bytes(target: Target) -> int:
    if is_whole(target):
        return 0
    begun = (partial_of(target.path), mapped_of(target.path))
    copies = 2 if target.is_pickle else 1  # it is made from another file
    return max(0, copies * target.size_bytes - sum(path.stat().st_size for path in begun if path.is_file()))
