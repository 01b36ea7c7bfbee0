"""The pictures and videos of a request, in whatever way they were given, as the files that a job keeps."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from frameloom.serve.api.asking import FIELD_OF, Shape
from frameloom.serve.api.errors import ApiError, bad
from frameloom.serve.api.forms import Upload
from frameloom.serve.api.inputs import Given, bytes_of_data_url
from frameloom.serve.api.parameters import PARAMETERS
from frameloom.serve.api.repeats import URLS
from frameloom.serve.api.site import Site
from frameloom.serve.config import Key
from frameloom.serve.service import Standing

MAX_SOURCE_BYTES: Final = 512 * 2**20
"""Of a finished video that another one is made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """`shapes` by parameter; `files` by their name in `inputs/`; `source`: the job whose video it is, if it is one."""

    shapes: Mapping[str, list[Shape]]
    files: Mapping[str, bytes]
    source: str | None = None


async def collect(found: Mapping[str, Any], kind: str, *, site: Site, caller: Key) -> Collected:
    """Get, look at and name what the parameters give. Raises ApiError."""
    given: dict[str, list[Given]] = {}
    source = None
    for param in FIELD_OF:
        if param not in found:
            continue
        name = "extends" if kind == "extension" else FIELD_OF[param]
        if PARAMETERS[param].form == "images":
            given[param] = []
            for index, one in enumerate(found[param]):
                given[param].append(await _image(one, param, f"reference-{index}", site))
                _check_sum(given, param, site)
        elif PARAMETERS[param].form == "image":
            given[param] = [await _image(found[param], param, name, site)]
        else:
            job = await _video_job(found[param], param, site, caller)
            source = job.job.id if job is not None and param == "video" else source
            data = await _bytes(found[param], param, site) if job is None else await _made(job, param, site)
            given[param] = [await site.examiner.video(data, param, name)]
        _check_sum(given, param, site)
    return Collected(
        shapes={param: [one.shape for one in ones] for param, ones in given.items()},
        files={one.shape.name: one.data for ones in given.values() for one in ones},
        source=source,
    )


def _check_sum(given: Mapping[str, list[Given]], param: str, site: Site) -> None:
    """Small files may hold large pictures: raise ApiError where all together are kept in too many bytes."""
    most = max(MAX_SOURCE_BYTES, site.config.limits.body_bytes)
    if sum(len(one.data) for ones in given.values() for one in ones) > most:
        raise bad(
            param, f"the pictures take more than {most // 2**20} MiB when they are read; give fewer or smaller ones"
        )


async def _image(value: Any, param: str, name: str, site: Site) -> Given:
    return await site.examiner.image(await _bytes(value, param, site), param, name)


async def _bytes(value: Any, param: str, site: Site) -> bytes:
    """Of an upload, or of a URL as OpenAI's clients write it: a text, {"image_url": text} or {"url": text}."""
    if isinstance(value, Upload):
        return value.data
    if isinstance(value, dict) and len(value) == 1:
        (key, inner) = next(iter(value.items()))
        if key in URLS:
            return await _bytes(inner, param, site)
        if key == "file_id":
            raise bad(param, f"this server keeps no files; send the {param} itself, or a data: URL")
    if isinstance(value, str) and value[:5].lower() == "data:":
        return await asyncio.to_thread(bytes_of_data_url, value, param)
    if isinstance(value, str) and "://" in value[:12]:
        return await site.fetcher.fetch(value, param)
    raise bad(param, f"the {param} is no file and no URL; send a file, or data:...;base64,...")


async def _video_job(value: Any, param: str, site: Site, caller: Key) -> Standing | None:
    """The finished job that {"id": ...} names; None where a file was given."""
    job_id = value.get("id") if isinstance(value, dict) and set(value) == {"id"} else None
    if job_id is None:
        return None
    if not isinstance(job_id, str):
        raise bad(param, f"the id of the {param} is no text; give one such as video_...")
    standing = await site.standing(job_id, caller)
    if standing.job.result is None:
        ended = standing.job.status == "failed"
        code = "video_failed" if ended else "video_not_ready"
        reason = "failed" if ended else "is not finished yet; come again when it is"
        raise ApiError(400, code, f"{job_id} {reason}", param=param)
    return standing


async def _made(standing: Standing, param: str, site: Site) -> bytes:
    """The bytes of a finished video. Raises ApiError."""
    job = standing.job
    assert job.result is not None
    if job.result.num_bytes > MAX_SOURCE_BYTES:
        raise bad(param, f"{job.id} is larger than {MAX_SOURCE_BYTES // 2**20} MiB; give a shorter video")
    return await read_file(site, job.id, job.result.video)


async def read_file(site: Site, job_id: str, name: str) -> bytes:
    """A file in the folder of a job. Raises ApiError 404 where it is gone."""
    try:
        return await asyncio.to_thread((site.service.folder(job_id) / name).read_bytes)
    except FileNotFoundError:
        raise ApiError(404, "video_expired", f"the files of {job_id} are gone") from None
