"""What the server and its workers say to each other: msgpack frames over a private socket. Torch-free.

A frame is its length, four bytes and big-endian, and a message of msgpack. Nothing large travels: pictures and videos
are files in the data folder, named by absolute paths that the server has made.
"""

import os
import struct
import sys
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

import msgspec

from frameloom.types import EngineConfig, Lora, Stage

MAX_BYTES: Final = 4_000_000
"""Of one message; a longer one ends the connection."""
_LENGTH: Final = struct.Struct(">I")

Code: TypeAlias = Literal[
    "invalid_request", "out_of_memory", "insufficient_storage", "cancelled", "deadline_exceeded", "attempts_exhausted",
    "internal_error",
]  # fmt: skip
"""Why a job has failed, as its `error.code` says it."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What crosses the socket."""


class Run(Message, frozen=True, kw_only=True):
    """Make a video. `job` and `fence` name this attempt, and all that is said of it carries both.

    `request`: fields of types.GenerateRequest as JSON has them, with absolute paths where pictures belong. `folder`:
    where the files go: `output` (an .mp4), `thumbnail` and `sheet` (JPEG), `preview` (.apng, replaced now and then).
    `journal`: the folder in which the engine keeps what it has computed; what an earlier attempt left there is gone
    on from. `loras`: of the server's own list, never a path of a client's. `extends`: a video to put in front; the
    request starts from its last frame.
    """

    job: str
    fence: int
    request: dict[str, Any]
    output: str
    thumbnail: str
    sheet: str
    preview: str
    journal: str
    loras: tuple[Lora, ...] = ()
    quality: int | None = None
    extends: str | None = None


class Together(Message, frozen=True, kw_only=True):
    """Make several videos as one batch: requests that differ in prompts and seeds alone, with the same LoRAs.

    Each is an attempt of its own, and everything is said of each by itself, `Cancel`, `News` and the outcome. There are
    no previews and no journals: a batch is small, and begun anew. What fails in a batch is told with `together`.
    """

    runs: tuple[Run, ...]


class Cancel(Message, frozen=True, kw_only=True):
    """Stop an attempt within one step, and say `Cancelled`; nothing happens if it is over."""

    job: str
    fence: int


class Foresee(Message, frozen=True, kw_only=True):
    """What a request would take; answered with `Foreseen`, also while a video is made."""

    number: int
    request: dict[str, Any]


class Stop(Message, frozen=True, kw_only=True):
    """End: at once where nothing is made, else after the attempt that is under way."""


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is asked for and can do. `defaults`: of a request, by the names of types.GenerateRequest.

    Width, height: multiples of; frames are 1 + `temporal` x k. `takes`: the pictures that it starts from, by the names
    of the request. `previews`: whether a preview can be drawn. `device`, `dtype`, `torch`: where and how it computes.
    `small_tokens`: of the denoiser; videos up to so many may be made together, see `Together`.
    `experts`: denoisers that share the steps; None where a card of an earlier version does not tell.
    """

    model: str
    defaults: dict[str, Any]
    width_multiple: int
    height_multiple: int
    temporal: int
    takes: tuple[str, ...]
    needs_image: bool
    previews: bool
    device: str
    dtype: str
    torch: str
    ranks: int = 1
    small_tokens: int = 0
    experts: int | None = None


class Ready(Message, frozen=True, kw_only=True):
    """The engine is built. `usual_seconds`: foreseen of a request that leaves everything open; None if unknown."""

    card: Card
    usual_seconds: float | None = None


class Unable(Message, frozen=True, kw_only=True):
    """The engine cannot be built, and trying again would not help: one sentence."""

    message: str


class Beat(Message, frozen=True, kw_only=True):
    """A sign of life, once a second, from a thread of its own. `work`: counts steps and frames as they are done."""

    work: int


class News(Message, frozen=True, kw_only=True):
    """`step` of `total` steps of a stage are done. `previewed`: how often the preview was drawn anew."""

    job: str
    fence: int
    stage: Stage
    step: int
    total: int
    previewed: int = 0


class Done(Message, frozen=True, kw_only=True):
    """The files of an attempt are whole, on the disk. `made`: what `Engine.generate_to` told of it.

    `num_bytes` and `sha256`: of the video; its size in pixels, its frames, extended ones included, and its rate.
    """

    job: str
    fence: int
    num_bytes: int
    sha256: str
    width: int
    height: int
    num_frames: int
    fps: float
    made: dict[str, Any]


class Failed(Message, frozen=True, kw_only=True):
    """An attempt has failed. `again`: another attempt may do better. `ends`: this worker cannot make it, it ends.

    `together`: it was made in a batch, and what went wrong may be another's fault: it is to be made alone.
    """

    job: str
    fence: int
    code: Code
    message: str
    again: bool = False
    ends: bool = False
    together: bool = False

    def of_batch(self) -> "Failed":
        """The same of an attempt that was made with others."""
        return msgspec.structs.replace(self, again=True, together=True)


class Cancelled(Message, frozen=True, kw_only=True):
    """An attempt was stopped, and its memory is free."""

    job: str
    fence: int


class Foreseen(Message, frozen=True, kw_only=True):
    """Seconds and peak of memory of a request; `refusal`: one sentence, of one that cannot be computed or cannot fit.

    The numbers of the resolved request come with it: width, height, num_frames, steps, fps. Without a plan all is 0.
    """

    number: int
    seconds: float = 0.0
    memory_bytes: int = 0
    resolved: dict[str, Any] = {}
    refusal: str = ""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told at its start, as an argument. `socket`: the descriptor of its end of the socket.

    `model`, `parts` and `variant`: as `frameloom.load` takes them; `name`: what clients call it. `ranks`: processes
    that make a video together; `pairs`: the descriptors of the lines from the first of them to each other one.
    """

    socket: int
    name: str
    model: str | None = None
    parts: dict[str, str] = {}
    variant: str = ""
    config: EngineConfig = EngineConfig()
    ranks: int = 1
    pairs: tuple[tuple[int, int], ...] = ()

    def command(self) -> list[str]:
        """How a worker is started; it imports nothing from the working folder, unless whoever starts it does."""
        safe = [] if sys.path[0] in ("", os.getcwd()) else ["-P"]
        return [sys.executable, *safe, "-m", "frameloom.engine.worker", msgspec.json.encode(self).decode()]

    @classmethod
    def of(cls, argument: str) -> "Setup":
        """The setup that an argument says."""
        return msgspec.json.decode(argument, type=cls)

    def with_pairs(self, pairs: Sequence[tuple[int, int]]) -> "Setup":
        """The same for ranks that have lines."""
        return msgspec.structs.replace(self, pairs=tuple(pairs))


ToWorker: TypeAlias = Run | Together | Cancel | Foresee | Stop
ToServer: TypeAlias = Ready | Unable | Beat | News | Done | Failed | Cancelled | Foreseen

_ENCODER: Final = msgspec.msgpack.Encoder()
_OF_SERVER: Final = msgspec.msgpack.Decoder(ToWorker)
_OF_WORKER: Final = msgspec.msgpack.Decoder(ToServer)


class FrameError(Exception):
    """What came is no message: the connection is of no use any more."""


def frame(message: Message) -> bytes:
    """A message as it crosses the socket."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_BYTES:
        raise FrameError(f"a message of {len(body)} bytes is longer than {MAX_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into messages of one direction."""

    def __init__(self, *, from_worker: bool) -> None:
        self._decoder = _OF_WORKER if from_worker else _OF_SERVER
        self._held = bytearray()

    def feed(self, data: bytes) -> "list[ToWorker | ToServer]":
        """The messages that are whole now. Raises FrameError."""
        self._held += data
        found: list[ToWorker | ToServer] = []
        while len(self._held) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held)
            if length > MAX_BYTES:
                raise FrameError(f"a message of {length} bytes was announced, and {MAX_BYTES} are the most")
            end = _LENGTH.size + length
            if len(self._held) < end:
                break
            try:
                found.append(self._decoder.decode(bytes(self._held[_LENGTH.size : end])))
            except msgspec.DecodeError as error:
                raise FrameError(f"no message: {error}") from None
            del self._held[:end]
        return found
