"""What a server's clients are told when an attempt fails: a code, and one sentence that names no path."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from frameloom.errors import CheckpointError, FrameloomError, InputError, OutputError
from frameloom.platform.device import is_memory_error
from frameloom.types import PICTURES
from frameloom.wire import Failed, Run

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL: Final = "the server has no room left on its disk; ask again later"
_OURS: Final = "the video could not be made, through no fault of the request; the server's log says why"


def failed(order: Run, error: BaseException, *, ends: bool = False) -> Failed:
    """What is told of an attempt that ended with an error, by a worker that `ends` with it."""
    chain = list(_chain(error))
    said = next((one for one in reversed(chain) if isinstance(one, FrameloomError)), error)
    if any(is_memory_error(one) or getattr(one, "errno", None) == errno.ENOMEM for one in chain):
        hint = str(said) if isinstance(said, FrameloomError) else "there is not enough memory for this video"
        asks = "" if "ask for" in hint else "; ask for a smaller or a shorter video"
        return Failed(job=order.job, fence=order.fence, ends=ends, code="out_of_memory", message=f"{hint}{asks}")
    if any(getattr(one, "errno", None) in _NO_ROOM for one in chain):
        return Failed(job=order.job, fence=order.fence, ends=ends, code="insufficient_storage", message=_FULL)
    if isinstance(said, InputError) and not isinstance(said, OutputError | CheckpointError):
        message = without_paths(str(said), order)
        return Failed(job=order.job, fence=order.fence, ends=ends, code="invalid_request", message=message)
    return Failed(job=order.job, fence=order.fence, ends=ends, code="internal_error", message=_OURS, again=True)


def without_paths(text: str, order: Run) -> str:
    """The text, with the names of fields where it names files of the server."""
    given = {name: order.request.get(name) for name in PICTURES}
    named = {path: f"the {name.replace('_', ' ')}" for name, path in given.items() if isinstance(path, str)}
    named |= {path: "a reference image" for path in order.request.get("references") or () if isinstance(path, str)}
    named |= {order.output: "the output"} | ({order.extends: "the video"} if order.extends else {})
    for path, name in sorted(named.items(), key=lambda one: -len(one[0])):
        text = text.replace(path, name)
    return text.replace(str(Path(order.output).parent), "the folder of the job")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it came from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__
