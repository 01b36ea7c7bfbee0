"""Routes about the server: its model, its LoRAs, what a video would take, its health and its numbers."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from frameloom.serve.api.asking import FIELD_OF, check_effect, check_model, needs_card, order_of
from frameloom.serve.api.described import errors, query_of
from frameloom.serve.api.errors import ApiError
from frameloom.serve.api.parameters import read_parameters
from frameloom.serve.api.schemas import Estimate, Health, LoraList, ModelCard, ModelList
from frameloom.serve.api.site import Caller, OfSite, Site
from frameloom.serve.metrics import CONTENT_TYPE
from frameloom.wire import Foreseen

router = APIRouter(tags=["server"])


@router.get("/v1/models", response_model=ModelList, responses=errors())
async def models(site: OfSite, caller: Caller) -> JSONResponse:
    """The model of this server, what it is asked for by default, and what it can do."""
    return JSONResponse({"object": "list", "data": [_model(site)]})


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=errors(404))
async def model(model: str, site: OfSite, caller: Caller) -> JSONResponse:
    """The same of one model."""
    check_model({"model": model}, site.config)
    return JSONResponse(_model(site))


@router.get("/v1/loras", response_model=LoraList, responses=errors())
async def loras(site: OfSite, caller: Caller) -> JSONResponse:
    """The LoRAs that requests may name."""
    data = [{"id": name, "object": "lora", "name": name} for name in site.config.loras]
    return JSONResponse({"object": "list", "data": data})


@router.get("/v1/estimate", response_model=Estimate, responses=errors(404), openapi_extra=query_of("estimate"))
async def estimate(request: Request, site: OfSite, caller: Caller) -> JSONResponse:
    """What a video would take: seconds and memory, with the numbers that are left out filled in."""
    given = dict(request.query_params)
    found = read_parameters(given, "estimate", limits=site.config.limits)
    check_model(found, site.config)
    card = site.service.card
    if card is None and needs_card(found):
        raise ApiError(503, "starting", "the model is not known yet; come again soon", retry_s=2)
    check_effect(found, card)
    order = order_of({"prompt": "-", **found}, "estimate", card=card, config=site.config, shapes={})
    foreseen = await site.service.foresee(order.request) or Foreseen(number=0)
    told: dict[str, Any] = {"seconds": None, "memory_bytes": None, "refusal": foreseen.refusal}
    if not foreseen.refusal:  # a planner that knows nothing says 0
        told["seconds"] = foreseen.seconds or site.service.work_s({**order.request, **order.resolved}) or None
        told["memory_bytes"] = foreseen.memory_bytes or None
    return JSONResponse({"object": "estimate", **told, "resolved": {**order.resolved, **foreseen.resolved}})


@router.get("/health/live", response_model=Health, responses=errors(always=(403, 500, 503)))
async def live() -> JSONResponse:
    """Whether the server answers."""
    return JSONResponse({"status": "ok"})


@router.get("/health/ready", response_model=Health, responses=errors())
async def ready(site: OfSite) -> JSONResponse:
    """Whether a worker can take a job now."""
    if not site.service.is_ready:
        why = site.service.trouble or "no worker is ready yet"
        raise ApiError(503, "not_ready", why, retry_s=5)
    return JSONResponse({"status": "ok"})


@router.get("/metrics", response_class=Response, responses={**errors(), 200: {"content": {"text/plain": {}}}})
async def metrics(site: OfSite, caller: Caller) -> Response:
    """What Prometheus reads. Where the server has keys it needs one."""
    numbers = {**site.service.numbers(), "watchers": float(site.streams)}
    return Response(site.metrics.page(numbers), media_type=CONTENT_TYPE)


def _model(site: Site) -> dict[str, Any]:
    card, limits = site.service.card, site.config.limits
    told: dict[str, Any] = dict.fromkeys(ModelCard.model_fields)
    told |= {
        "id": site.config.name,
        "object": "model",
        "created": site.started_at,
        "owned_by": "frameloom",
        "limits": {
            "pixels_frames": limits.pixels_frames,
            "steps": limits.steps,
            "prompt_chars": limits.prompt_chars,
            "body_bytes": limits.body_bytes,
            "image_pixels": limits.image_pixels,
            "video_frames": limits.video_frames,
        },
    }
    if card is None:
        return told
    same = ("defaults", "width_multiple", "height_multiple", "temporal", "needs_image", "previews", "device", "dtype")
    told |= {name: getattr(card, name) for name in (*same, "ranks", "experts")}
    takes = [param for param, name in FIELD_OF.items() if name in card.takes]
    return told | {"checkpoint": card.model, "takes": takes, "extends": "input_reference" in takes}
