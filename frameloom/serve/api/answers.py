"""A job as the API shows it: OpenAI's Video object, and what we know beyond it."""

from collections.abc import Mapping
from typing import Any, Final

from frameloom.serve.api.asking import FIELD_OF
from frameloom.serve.jobs.job import Job
from frameloom.serve.service import Standing
from frameloom.wire import Card

_SHOWN: Final = (
    "seed", "negative_prompt", "guidance_scale", "guidance_scale_2", "flow_shift", "strength", "control_strength",
    "windows", "window_frames", "window_overlap",
)  # fmt: skip
_INPUTS: Final[Mapping[str, str]] = {**{field: param for param, field in FIELD_OF.items()}, "extends": "video"}


def video_of(standing: Standing, card: Card | None) -> dict[str, Any]:
    """The Video object of a job."""
    job = standing.job
    ask, numbers = job.ask, _numbers(job, card)
    remaining = standing.remaining_s
    return {
        "id": job.id,
        "object": "video",
        "model": ask.model,
        "status": job.status,
        "progress": standing.progress,
        "created_at": int(job.created_at),
        "completed_at": _second(job.completed_at),
        "expires_at": _second(job.expires_at),
        "seconds": _seconds(numbers),
        "size": f"{numbers['width']}x{numbers['height']}" if numbers["width"] and numbers["height"] else "auto",
        "prompt": ask.request.get("prompt"),
        "remixed_from_video_id": ask.source if ask.kind == "remix" else None,
        "error": _error(job),
        "kind": ask.kind,
        "source_video_id": ask.source,
        **numbers,
        **{name: ask.request.get(name) for name in _SHOWN},
        "loras": [{"name": name, "scale": strength} for name, strength in ask.loras],
        "inputs": sorted({_INPUTS[name] for name in ask.request if name in _INPUTS}),
        "extends": "extends" in ask.request,
        "quality": ask.quality,
        "priority": ask.priority,
        "deadline": ask.deadline_s,
        "stage": standing.stage,
        "step": standing.step,
        "total": standing.total,
        "queue_position": standing.position,
        "remaining_seconds": None if remaining is None else round(remaining, 1),
        "attempts": job.attempts,
        "started_at": _second(job.started_at),
        "preview_version": standing.preview,
        "bytes": job.result.num_bytes if job.result else None,
        "sha256": job.result.sha256 if job.result else None,
    }


def page_of(standings: list[Standing], *, has_more: bool, card: Card | None) -> dict[str, Any]:
    """A page of a list."""
    data = [video_of(standing, card) for standing in standings]
    ends = [data[0]["id"], data[-1]["id"]] if data else [None, None]
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}


def _numbers(job: Job, card: Card | None) -> dict[str, Any]:
    """As they came out; else as they were foreseen; else as they were asked for, and as the model has them."""
    request, resolved, result = job.ask.request, job.ask.resolved, job.result
    is_plain = not any(name in request for name in _INPUTS)
    usual: Mapping[str, Any] = card.defaults if card is not None and is_plain else {}
    found: dict[str, Any] = {}
    for name in ("width", "height", "num_frames", "steps", "fps"):
        made = getattr(result, name, None)
        foreseen = resolved.get(name, request.get(name, usual.get(name)))
        found[name] = foreseen if made is None else made
    return found


def _seconds(numbers: Mapping[str, Any]) -> str:
    """From the first frame to the last, as `seconds` asks for it: 65 frames at 16 per second are 4."""
    frames, fps = numbers["num_frames"], numbers["fps"]
    if not frames or not fps:
        return "auto"
    return f"{round(max(frames - 1, 1) / fps, 3):g}"


def _second(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def _error(job: Job) -> dict[str, Any] | None:
    if job.error is None:
        return None
    kind = "invalid_request_error" if job.error.code == "invalid_request" else "video_generation_error"
    return {"code": job.error.code, "message": job.error.message, "param": job.error.param, "type": kind}
