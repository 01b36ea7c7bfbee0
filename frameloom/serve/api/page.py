"""Routes of the page: files of our own, read once, sent with a policy that lets nothing else in."""

import hashlib
import mimetypes
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from frameloom.serve.api.errors import ApiError

FOLDER: Final = Path(__file__).parents[1] / "web"
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES: Final[Mapping[str, str]] = {".js": "text/javascript; charset=utf-8", ".mjs": "text/javascript; charset=utf-8"}


def page_router(folder: Path = FOLDER) -> APIRouter:
    """The page of a folder at /, and its files at /web/; what is not there when the server starts is not sent."""
    files = {path.relative_to(folder).as_posix(): _answer(path) for path in folder.rglob("*") if path.is_file()}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return _sent(request, files.get("index.html"))

    @router.api_route("/web/{name:path}", methods=["GET", "HEAD"])
    async def file(name: str, request: Request) -> Response:
        return _sent(request, files.get(name))

    return router


def _answer(path: Path) -> tuple[bytes, dict[str, str]]:
    data = path.read_bytes()
    kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if kind.startswith("text/") and "charset" not in kind:
        kind += "; charset=utf-8"
    return data, {
        "content-type": kind,
        "etag": f'"{hashlib.sha256(data).hexdigest()[:32]}"',
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }


def _sent(request: Request, file: tuple[bytes, dict[str, str]] | None) -> Response:
    if file is None:
        raise ApiError(404, "not_found", "there is no such file of the page; the page itself is at /")
    data, headers = file
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers)
