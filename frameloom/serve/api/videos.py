"""Routes of videos: made, listed, looked up, cancelled and deleted."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse

from frameloom.errors import RequestError
from frameloom.serve.api.answers import page_of, video_of
from frameloom.serve.api.asking import (
    Order,
    check_effect,
    check_model,
    check_takes,
    needs_card,
    order_of,
    remixed,
    with_seed,
)
from frameloom.serve.api.collect import Collected, collect, copied
from frameloom.serve.api.described import BODY, body_of, errors
from frameloom.serve.api.errors import ApiError, bad, no_video
from frameloom.serve.api.forms import Fields, fields_of
from frameloom.serve.api.parameters import missing, read_parameters
from frameloom.serve.api.repeats import repeat_of
from frameloom.serve.api.schemas import Video, VideoDeleted, VideoPage
from frameloom.serve.api.site import Caller, OfSite, Site
from frameloom.serve.api.weighing import work_of
from frameloom.serve.config import Key
from frameloom.serve.jobs.job import Ask, Kind, Repeat
from frameloom.serve.service import Standing

router = APIRouter(prefix="/v1/videos", tags=["videos"])

IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=255, min_length=1)]
_SMALL: Final = 262_144
"""Bytes of a body that is read apart from the loop, so that others are answered meanwhile, if it is larger."""
_CARD_S: Final = 10.0
"""How long a request that needs the model's rules waits for them, after the very first start of a server."""


@router.post("", response_model=Video, responses=errors(*BODY), openapi_extra=body_of("create"))
async def create(request: Request, site: OfSite, caller: Caller, repeat: IdempotencyKey = None) -> JSONResponse:
    """Make a video from a prompt, and from pictures where the model takes them."""
    return await _made(request, "create", site=site, caller=caller, repeat=repeat)


@router.post("/edits", response_model=Video, responses=errors(*BODY), openapi_extra=body_of("edit"))
async def edit(request: Request, site: OfSite, caller: Caller, repeat: IdempotencyKey = None) -> JSONResponse:
    """Make a video from another one: `strength` says how much of it is made anew."""
    return await _made(request, "edit", site=site, caller=caller, repeat=repeat)


@router.post("/extensions", response_model=Video, responses=errors(*BODY), openapi_extra=body_of("extension"))
async def extend(request: Request, site: OfSite, caller: Caller, repeat: IdempotencyKey = None) -> JSONResponse:
    """Go on from the last frame of a video; the result begins with that video."""
    return await _made(request, "extension", site=site, caller=caller, repeat=repeat)


@router.post("/characters", include_in_schema=False)
@router.get("/characters/{_}", include_in_schema=False)
async def characters(site: OfSite, caller: Caller) -> JSONResponse:
    """Characters are a thing of OpenAI's models: their clients are told so."""
    what = "this server has no characters; give pictures as references, where the model takes them"
    raise ApiError(404, "not_supported", what)


@router.get("", response_model=VideoPage, responses=errors(404))
async def listed(
    site: OfSite,
    caller: Caller,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> JSONResponse:
    """List videos of this key, the newest first; `after`: go on after this one."""
    newest_first = order == "desc"
    page = await site.service.page(caller.name, after=after, limit=limit, newest_first=newest_first)
    if page is None:
        raise no_video(after or "")
    standings, has_more = page
    return JSONResponse(page_of(standings, has_more=has_more, card=site.service.card))


@router.get("/{video_id}", response_model=Video, responses=errors(404))
async def retrieve(video_id: str, site: OfSite, caller: Caller) -> JSONResponse:
    """How a video stands. While it is made the header `openai-poll-after-ms` says when to ask again."""
    return _shown(await site.standing(video_id, caller), site)


@router.delete("/{video_id}", response_model=VideoDeleted, responses=errors(404, 507))
async def delete(video_id: str, site: OfSite, caller: Caller) -> JSONResponse:
    """Remove a video and its files; one that is being made is cancelled."""
    await site.standing(video_id, caller)
    if not await site.service.delete(video_id):
        raise no_video(video_id)
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


@router.post("/{video_id}/cancel", response_model=Video, responses=errors(404, 507))
async def cancel(video_id: str, site: OfSite, caller: Caller) -> JSONResponse:
    """End a video that is not finished: it fails with the code `cancelled`. Twice is fine."""
    await site.standing(video_id, caller)
    standing = await site.service.cancel(video_id)
    if standing is None:
        raise no_video(video_id)
    return _shown(standing, site)


@router.post("/{video_id}/remix", response_model=Video, responses=errors(*BODY), openapi_extra=body_of("remix"))
async def remix(
    video_id: str, request: Request, site: OfSite, caller: Caller, repeat: IdempotencyKey = None
) -> JSONResponse:
    """Make a video once more with another prompt: the same seed, numbers and pictures."""
    _check_room(site, caller, repeat)
    async with site.bodies.read(request) as body:
        found = _read(await _fields(request, body), "remix", site)
    once = await repeat_of(repeat, "remix", found, source=video_id)
    if (before := await _before(once, site, caller)) is not None:
        return before
    source = (await site.standing(video_id, caller)).job
    if source.ask.model != site.config.name:
        raise bad(None, f"{source.id} was made by {source.ask.model}, which is not served here any more")
    _check_loras(source.ask.loras, site)
    order = remixed(source.ask.request, source.ask.resolved, found["prompt"], site.config, site.service.card)
    taken = {**found, "loras": source.ask.loras, "quality": source.ask.quality}
    async with copied(source, site) as collected:
        return await _accepted(taken, "remix", order, collected, site=site, caller=caller, once=once)


async def _made(request: Request, kind: Kind, *, site: Site, caller: Key, repeat: str | None) -> JSONResponse:
    """Accept a create, an edit or an extension."""
    _check_room(site, caller, repeat)
    async with site.bodies.read(request) as body:  # what came of it is accounted for until all is done
        found = _read(await _fields(request, body), kind, site)
        once = await repeat_of(repeat, kind, found)
        if (before := await _before(once, site, caller)) is not None:
            return before
        _check_loras(found.get("loras", ()), site)
        if needs_card(found) and site.service.card is None:
            await _model_known(site)
        check_takes(found, kind, site.service.card)
        check_effect(found, site.service.card)
        async with collect(found, kind, site=site, caller=caller) as collected:
            card, is_own = site.service.card, collected.source is not None
            order = order_of(found, kind, card=card, config=site.config, shapes=collected.shapes, is_own=is_own)
            return await _accepted(found, kind, order, collected, site=site, caller=caller, once=once)


def _check_room(site: Site, caller: Key, repeat: str | None) -> None:
    """Bodies are not read where there is no room for a job; one that comes again may need none."""
    if repeat is None:
        site.service.check_room(caller.name, 0.0)


async def _before(once: Repeat | None, site: Site, caller: Key) -> JSONResponse | None:
    """The job that came with an Idempotency-Key before, whatever became since of what it was made from."""
    standing = None if once is None else await site.service.repeated(caller.name, once)
    return None if standing is None else _shown(standing, site)


async def _fields(request: Request, body: bytes) -> Fields:
    kind = request.headers.get("content-type", "")
    if len(body) <= _SMALL:
        return fields_of(kind, body)
    return await asyncio.to_thread(fields_of, kind, body)


def _read(fields: Fields, kind: Kind, site: Site) -> dict[str, Any]:
    """The parameters, of which those that cannot be left out are there."""
    found = read_parameters(fields, kind, limits=site.config.limits)
    missing(found, "prompt", "what the video should show")
    if kind in ("edit", "extension"):
        missing(found, "video", 'a file, or {"id": "video_..."}')
    check_model(found, site.config)
    return found


async def _accepted(
    found: Mapping[str, Any],
    kind: Kind,
    order: Order,
    collected: Collected,
    *,
    site: Site,
    caller: Key,
    once: Repeat | None,
) -> JSONResponse:
    order = with_seed(order)
    ask = Ask(
        key=caller.name,
        kind=kind,
        model=site.config.name,
        request=order.request,
        loras=tuple(found.get("loras", ())),
        quality=found.get("quality"),
        priority=min(found.get("priority", 0), caller.priority),
        deadline_s=found.get("deadline"),
        source=collected.source,
        work_s=await work_of(order, found, site),
        resolved=order.resolved,
    )
    return _shown(await site.service.accept(site.service.new_id(), ask, collected.files, once), site)


def _shown(standing: Standing, site: Site) -> JSONResponse:
    headers = {}
    if standing.job.status in ("queued", "in_progress"):
        ahead = 0.0 if standing.remaining_s is None else standing.remaining_s
        headers["openai-poll-after-ms"] = str(round(1000 * min(2.0, max(0.25, ahead / 20))))
    return JSONResponse(video_of(standing, site.service.card), headers=headers)


def _check_loras(loras: Iterable[tuple[str, float]], site: Site) -> None:
    for name, scale in loras:
        try:
            site.config.lora(name, scale)
        except RequestError as error:
            raise bad("loras", str(error)) from None


async def _model_known(site: Site) -> None:
    """Wait some seconds for the model's rules."""
    until = asyncio.get_running_loop().time() + _CARD_S
    while site.service.card is None and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.05)
    if site.service.card is None:
        what = site.service.trouble or "the model is still being opened; come again soon"
        raise ApiError(503, "starting", what, retry_s=5)
