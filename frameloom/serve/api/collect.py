"""The pictures and videos of a request, in whatever way they were given, as the files that a job keeps."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from frameloom.serve.api.asking import FIELD_OF, Shape
from frameloom.serve.api.body import Hold
from frameloom.serve.api.errors import ApiError, bad
from frameloom.serve.api.forms import Upload
from frameloom.serve.api.inputs import Given, bytes_of_data_url
from frameloom.serve.api.parameters import PARAMETERS
from frameloom.serve.api.repeats import URLS
from frameloom.serve.api.site import Site
from frameloom.serve.config import Key
from frameloom.serve.jobs.job import Job

MAX_SOURCE_BYTES: Final = 512 * 2**20
"""Of a finished video that another one is made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """`shapes` by parameter; `files` by their name in `inputs/`; `source`: the job whose video it is, if it is one."""

    shapes: Mapping[str, list[Shape]]
    files: Mapping[str, bytes]
    source: str | None = None


@contextlib.asynccontextmanager
async def collect(found: Mapping[str, Any], kind: str, *, site: Site, caller: Key) -> AsyncIterator[Collected]:
    """Get, look at and name what the parameters give. Raises ApiError.

    What came from URLs is accounted for as bodies are until the block ends. What is read and made beyond that may take
    `MAX_SOURCE_BYTES` and more, so requests take turns in the block.
    """
    params = [param for param in FIELD_OF if param in found]
    if not params:
        yield Collected(shapes={}, files={})
        return
    with site.bodies.holding() as hold:
        came = {param: await _came(found[param], param, site, caller, hold) for param in params}
        async with site.turns.one():
            given = await _examined(came, kind, site)
            job = came.get("video", [None])[0]
            yield Collected(
                shapes={param: [one.shape for one in ones] for param, ones in given.items()},
                files={one.shape.name: one.data for ones in given.values() for one in ones},
                source=job.id if isinstance(job, Job) else None,
            )


@contextlib.asynccontextmanager
async def copied(source: Job, site: Site) -> AsyncIterator[Collected]:
    """The pictures of a job, for another one; in turn with those that are collected. Raises ApiError."""
    values = [value for name, value in source.ask.request.items() if name not in ("prompt", "negative_prompt")]
    listed = [one for value in values for one in (value if isinstance(value, list) else [value])]
    names = [one for one in listed if isinstance(one, str) and one.startswith("inputs/")]
    if not names:
        yield Collected(shapes={}, files={}, source=source.id)
        return
    async with site.turns.one():
        files = {name.removeprefix("inputs/"): await _read(site, source.id, name) for name in names}
        yield Collected(shapes={}, files=files, source=source.id)


async def _came(value: Any, param: str, site: Site, caller: Key, hold: Hold) -> list[bytes | Job]:
    """What a parameter gives: bytes, or the finished job whose video it is, which is not read yet."""
    if PARAMETERS[param].form == "video" and (job := await _video_job(value, param, site, caller)) is not None:
        return [job]
    values = value if PARAMETERS[param].form == "images" else [value]
    return [await _bytes(one, param, site, hold) for one in values]


async def _examined(came: Mapping[str, list[bytes | Job]], kind: str, site: Site) -> dict[str, list[Given]]:
    given: dict[str, list[Given]] = {}
    for param, ones in came.items():
        form = PARAMETERS[param].form
        name = "extends" if kind == "extension" else FIELD_OF[param]
        given[param] = []
        for index, one in enumerate(ones):
            data = await _made(one, param, site) if isinstance(one, Job) else one
            if form == "video":
                given[param].append(await site.examiner.video(data, param, name))
            else:
                numbered = f"reference-{index}" if form == "images" else name
                given[param].append(await site.examiner.image(data, param, numbered))
            _check_sum(given, param, site)
    return given


def _check_sum(given: Mapping[str, list[Given]], param: str, site: Site) -> None:
    """Small files may hold large pictures: raise ApiError where all together are kept in too many bytes."""
    most = max(MAX_SOURCE_BYTES, site.config.limits.body_bytes)
    if sum(len(one.data) for ones in given.values() for one in ones) > most:
        raise bad(
            param, f"the pictures take more than {most // 2**20} MiB when they are read; give fewer or smaller ones"
        )


async def _bytes(value: Any, param: str, site: Site, hold: Hold) -> bytes:
    """Of an upload, or of a URL as OpenAI's clients write it: a text, {"image_url": text} or {"url": text}."""
    if isinstance(value, Upload):
        return value.data
    if isinstance(value, dict) and len(value) == 1:
        (key, inner) = next(iter(value.items()))
        if key in URLS:
            return await _bytes(inner, param, site, hold)
        if key == "file_id":
            raise bad(param, f"this server keeps no files; send the {param} itself, or a data: URL")
    if isinstance(value, str) and value[:5].lower() == "data:":
        return await asyncio.to_thread(bytes_of_data_url, value, param)
    if isinstance(value, str) and "://" in value[:12]:
        return await site.fetcher.fetch(value, param, hold)
    raise bad(param, f"the {param} is no file and no URL; send a file, or data:...;base64,...")


async def _video_job(value: Any, param: str, site: Site, caller: Key) -> Job | None:
    """The finished job that {"id": ...} names; None where a file was given."""
    job_id = value.get("id") if isinstance(value, dict) and set(value) == {"id"} else None
    if job_id is None:
        return None
    if not isinstance(job_id, str):
        raise bad(param, f"the id of the {param} is no text; give one such as video_...")
    job = (await site.standing(job_id, caller)).job
    if job.result is None:
        ended = job.status == "failed"
        code = "video_failed" if ended else "video_not_ready"
        reason = "failed" if ended else "is not finished yet; come again when it is"
        raise ApiError(400, code, f"{job_id} {reason}", param=param)
    return job


async def _made(job: Job, param: str, site: Site) -> bytes:
    """The bytes of a finished video. Raises ApiError."""
    assert job.result is not None
    if job.result.num_bytes > MAX_SOURCE_BYTES:
        raise bad(param, f"{job.id} is larger than {MAX_SOURCE_BYTES // 2**20} MiB; give a shorter video")
    return await _read(site, job.id, job.result.video)


async def _read(site: Site, job_id: str, name: str) -> bytes:
    """A file in the folder of a job. Raises ApiError 404 where it is gone."""
    try:
        return await asyncio.to_thread((site.service.folder(job_id) / name).read_bytes)
    except FileNotFoundError:
        raise ApiError(404, "video_expired", f"the files of {job_id} are gone") from None
