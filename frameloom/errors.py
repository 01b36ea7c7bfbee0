"""The exceptions Frameloom raises on purpose. Each knows its exit code and its HTTP status.

FrameloomError
├── InputError              what was asked cannot be done; nothing was written
│   ├── RequestError        prompt, size, frames, steps, guidance, seed, device, dtype
│   ├── CheckpointError     a model path or its files
│   └── OutputError         where or how the video should be saved
└── InternalError           a promise of ours is broken (a bug, never the user's doing)
"""

from typing import ClassVar


class FrameloomError(Exception):
    """Base of every error Frameloom raises: one sentence that says what to do next."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class InputError(FrameloomError, ValueError):
    """What was asked cannot be done: says the value, what is possible, and what to do."""

    exit_code = 2
    http_status = 400


class RequestError(InputError):
    """A value of the request is out of its range."""


class CheckpointError(InputError):
    """A model path, or a file in it, is missing, damaged or of a kind we do not know."""


class OutputError(InputError):
    """The output path cannot be written, or its extension names no format."""


class InternalError(FrameloomError):
    """A promise Frameloom makes to itself does not hold: please report it."""
