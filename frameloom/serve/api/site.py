"""What all routes share: the service, what the server was told, and who looks at keys, bodies, pictures and URLs."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from frameloom.serve.api.auth import Doorkeeper
from frameloom.serve.api.body import BodyReader, Turns
from frameloom.serve.api.errors import no_video
from frameloom.serve.api.fetch import Fetcher
from frameloom.serve.api.inputs import Examiner
from frameloom.serve.config import Key, ServeConfig
from frameloom.serve.jobs.job import JOB_ID
from frameloom.serve.logs import TALK
from frameloom.serve.metrics import Metrics
from frameloom.serve.service import Service, Standing


@dataclass(kw_only=True, slots=True)
class Site:
    """`closing`: set when the server ends, so that answers without end do end. `streams`: those that are open."""

    service: Service
    config: ServeConfig
    doorkeeper: Doorkeeper
    bodies: BodyReader
    turns: Turns = field(default_factory=Turns)
    examiner: Examiner
    fetcher: Fetcher
    metrics: Metrics
    started_at: int = field(default_factory=lambda: int(time.time()))
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    streams: int = 0

    async def standing(self, job_id: str, caller: Key) -> Standing:
        """How a job of the caller's stands. Raises ApiError 404, of others' jobs too."""
        if JOB_ID.fullmatch(job_id) is None:
            raise no_video(job_id)
        if (talk := TALK.get()) is not None:
            talk.job = job_id
        standing = await self.service.standing(job_id)
        if standing is None or standing.job.ask.key != caller.name:
            raise no_video(job_id)
        return standing


async def site_of(request: Request) -> Site:
    """The site that a request came to."""
    site: Any = request.app.state.site
    assert isinstance(site, Site)
    return site


async def caller_of(request: Request, site: Annotated[Site, Depends(site_of)]) -> Key:
    """Whose key a request has. Raises ApiError 401."""
    caller = site.doorkeeper.caller(request.headers.get("authorization"))
    if (talk := TALK.get()) is not None:
        talk.key = caller.name
    return caller


OfSite = Annotated[Site, Depends(site_of)]
Caller = Annotated[Key, Depends(caller_of)]
