"""What answers hold, for the description of the API; tests hold the answers against it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from frameloom.serve.jobs.job import Kind, Status
from frameloom.types import Stage
from frameloom.wire import Code


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class VideoError(_Answer):
    """Why a video failed. `code` is `cancelled` where it was asked to end."""

    code: Code
    message: str
    param: str | None
    type: str


class UsedLora(_Answer):
    """A LoRA by its registered name."""

    name: str
    scale: float


class Video(_Answer):
    """A video: how it was asked for, how far it is, what came out. Times are seconds since 1970.

    `seconds`: from the first frame to the last; `seconds` and `size` are "auto" while nobody can tell. `deadline`:
    seconds after `created_at`. `queue_position`: how many go before it. `preview_version`: grows with each preview; 0:
    there is none. `extends`: it begins with the video that it goes on from, as extensions and their remixes do.
    """

    id: str
    object: Literal["video"]
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    prompt: str | None
    remixed_from_video_id: str | None
    error: VideoError | None
    kind: Kind
    source_video_id: str | None
    width: int | None
    height: int | None
    num_frames: int | None
    steps: int | None
    fps: float | None
    seed: int | None
    negative_prompt: str | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    flow_shift: float | None
    strength: float | None
    control_strength: float | list[float] | None
    windows: bool | None
    window_frames: int | None
    window_overlap: int | None
    loras: list[UsedLora]
    inputs: list[str]
    extends: bool
    quality: int | None
    priority: int
    deadline: float | None
    stage: Stage | None
    step: int
    total: int
    queue_position: int | None
    remaining_seconds: float | None
    attempts: int
    started_at: int | None
    preview_version: int
    bytes: int | None
    sha256: str | None


class VideoPage(_Answer):
    """A page of videos; `last_id` as `after` gets the next one."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(_Answer):
    """A video is gone."""

    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class ErrorTold(_Answer):
    """`code` for programs, `message` for people, `param`: the parameter that is to blame."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(_Answer):
    """Every error has this shape."""

    error: ErrorTold


class ModelCard(_Answer):
    """A model. All but the first four are null before the model is known, soon after the server's first start.

    Width and height are multiples; frames are 1 + `temporal` x k. `takes`: the parameters of pictures that it takes.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    checkpoint: str | None
    defaults: dict[str, float | str | None] | None
    width_multiple: int | None
    height_multiple: int | None
    temporal: int | None
    takes: list[str] | None
    needs_image: bool | None
    extends: bool | None
    previews: bool | None
    device: str | None
    dtype: str | None
    ranks: int | None
    experts: int | None
    limits: dict[str, int]


class ModelList(_Answer):
    """The models of this server: one."""

    object: Literal["list"]
    data: list[ModelCard]


class LoraCard(_Answer):
    """A LoRA that requests may name."""

    id: str
    object: Literal["lora"]
    name: str


class LoraList(_Answer):
    """The LoRAs of this server."""

    object: Literal["list"]
    data: list[LoraCard]


class Estimate(_Answer):
    """What a video would take. `refusal`: why it cannot be made; empty where it can. Unknown numbers are null."""

    object: Literal["estimate"]
    seconds: float | None
    memory_bytes: int | None
    refusal: str
    resolved: dict[str, float | int | str | None]


class Health(_Answer):
    """All is well."""

    status: Literal["ok"]
