"""What clients ask for: few requests, so that each has one right answer, found once by a server left in peace."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import av
import numpy as np
from served import Served, form

PROMPTS = ("a red circle rising", "a blue square falling", "a green triangle moving left on a white background")
SIZES: tuple[Mapping[str, Any], ...] = (
    {"size": "64x64", "num_frames": 9, "steps": 2, "seed": 3},
    {"size": "64x64", "num_frames": 9, "steps": 6, "seed": 4},
    {"size": "96x64", "num_frames": 17, "steps": 30, "seed": 5},
)
EDIT: Mapping[str, Any] = {"num_frames": 9, "steps": 8, "seed": 6, "strength": 0.6}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A request, its path and how it travels; those of a `group` differ in the prompt alone."""

    name: str
    group: str
    prompt: str
    fields: Mapping[str, Any]
    edits: bool = False

    @property
    def path(self) -> str:
        """Where it is sent."""
        return "/v1/videos/edits" if self.edits else "/v1/videos"

    def body(self, *, as_form: bool) -> tuple[Any, dict[str, str]]:
        """Body and headers: JSON, or a form, which a video always travels in."""
        fields = {"prompt": self.prompt, **self.fields}
        if self.edits:
            return form(fields, {"video": ("source.mp4", source())})
        return form(fields, {}) if as_form else (fields, {})

    def sent(self, server: Served) -> str:
        """The job that a server makes of it."""
        body, headers = self.body(as_form=False)
        made = server.ask("POST", self.path, body, headers=headers)
        assert made.status == 200, made
        return str(made.json()["id"])

    @staticmethod
    def digest(server: Served, job: str) -> str:
        """The sha256 of the video of a job, when it is there."""
        ended = server.ended(job)
        assert ended["status"] == "completed", ended
        return hashlib.sha256(server.ask("GET", f"/v1/videos/{job}/content").body).hexdigest()


@cache
def source() -> bytes:
    """A small video: a light square that moves right."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16, width=64, height=64, pix_fmt="yuv420p")
        for i in range(9):
            picture = np.full((64, 64, 3), 40, np.uint8)
            picture[20:44, 4 * i : 4 * i + 24] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def num_frames(content: bytes) -> int:
    """How many frames of a video can be decoded. Raises av.FFmpegError."""
    with av.open(io.BytesIO(content)) as container:
        return sum(1 for _ in container.decode(video=0))


ASKS = tuple(
    Ask(name=f"create {i}.{j}", group=f"create {i}", prompt=prompt, fields=fields)
    for i, fields in enumerate(SIZES)
    for j, prompt in enumerate(PROMPTS)
) + tuple(
    Ask(name=f"edit {j}", group="edit", prompt=prompt, fields=EDIT, edits=True) for j, prompt in enumerate(PROMPTS)
)
"""A remix of a video has the bytes of the request of its group that has the new prompt."""
