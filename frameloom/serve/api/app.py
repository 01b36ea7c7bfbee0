"""The HTTP application: routes in front of a service, and nothing that needs torch."""

from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

import frameloom
from frameloom.serve.api import about, content, events, videos
from frameloom.serve.api.auth import Doorkeeper
from frameloom.serve.api.body import BodyReader
from frameloom.serve.api.described import set_limits
from frameloom.serve.api.errors import handlers
from frameloom.serve.api.fetch import Fetcher
from frameloom.serve.api.gate import Gate
from frameloom.serve.api.inputs import Examiner
from frameloom.serve.api.page import page_router
from frameloom.serve.api.site import Site
from frameloom.serve.config import ServeConfig
from frameloom.serve.metrics import Metrics
from frameloom.serve.observe import Observed
from frameloom.serve.service import Service

_SAYS: Final = (
    "Videos from prompts: OpenAI's Videos API, with durable jobs, true cancelling, progress by the step, and the "
    "parameters of the model. Every error has one shape and every answer an `x-request-id`."
)


def make_app(service: Service, config: ServeConfig, *, metrics: Metrics | None = None) -> FastAPI:
    """The application of a service that was started; `app.state.site` is the Site that its routes share."""
    counted = metrics or Metrics()
    app = FastAPI(
        title="Frameloom", version=frameloom.__version__, description=_SAYS, docs_url=None, redoc_url=None,
        exception_handlers=handlers(), redirect_slashes=False,
    )  # fmt: skip
    app.state.site = Site(
        service=service,
        config=config,
        doorkeeper=Doorkeeper(config.keys),
        bodies=BodyReader(limit=config.limits.body_bytes),
        examiner=Examiner(config.limits),
        fetcher=Fetcher(hosts=config.url_hosts, max_bytes=config.limits.body_bytes),
        metrics=counted,
    )
    routers = (videos.router, content.router, events.router, about.router)
    for router in (*routers, _heads(routers), page_router()):
        app.include_router(router)
    app.add_middleware(Gate, config=config)
    app.add_middleware(Observed, metrics=counted)  # the last one added is the outermost
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _heads(routers: Sequence[APIRouter]) -> APIRouter:
    """HEAD wherever there is GET: the same answer, of which the protocol leaves the body out."""
    router = APIRouter(include_in_schema=False)
    for route in (route for one in routers for route in one.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            router.add_api_route(route.path, route.endpoint, methods=["HEAD"])
    return router


def _described(app: FastAPI) -> dict[str, Any]:
    """The description, with the limits of this server, and without the answers of FastAPI that ours replace."""
    if app.openapi_schema is None:
        described: dict[str, Any] = FastAPI.openapi(app)
        for path in described["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            described["components"]["schemas"].pop(name, None)
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}, {}]
        set_limits(described, app.state.site.config.limits)
        app.openapi_schema = described
    return app.openapi_schema
