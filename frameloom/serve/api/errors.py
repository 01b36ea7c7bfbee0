"""Every error in one shape, as OpenAI's clients read it: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from frameloom.errors import InputError
from frameloom.serve.jobs.job import StoreError
from frameloom.serve.service import RefusedError
from frameloom.settings import LOGGER_NAME

_LOG: Final = logging.getLogger(f"{LOGGER_NAME}.serve")
MAX_RETRY_S: Final = 120
"""Longer waits are not honoured by OpenAI's clients: they give up at once."""

_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error",
    429: "rate_limit_error",
}  # fmt: skip
_REFUSED: Final[Mapping[str, int]] = {
    "queue_full": 429, "key_queue_full": 429, "starting": 503, "draining": 503, "insufficient_storage": 507,
    "idempotency_mismatch": 409, "video_not_found": 404,
}  # fmt: skip
_FINAL: Final = (409, 507)
"""Statuses after which clients would try again by themselves, and which trying again does not change."""
_CODES: Final[Mapping[int, str]] = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An answer other than the one asked for: its status, a code for programs, one sentence for people.

    `param`: the field that is to blame. `retry_s`: when to come again.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_s, self.headers = retry_s, dict(headers or {})

    def answer(self) -> Response:
        """The same as HTTP has it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": told}, self.status, {**self._retry(), **self.headers})

    def _retry(self) -> dict[str, str]:
        headers = {"x-should-retry": "false"} if self.status in _FINAL else {}
        if self.retry_s is not None:
            whole = min(MAX_RETRY_S, max(1, round(self.retry_s)))
            headers |= {"retry-after": str(whole), "retry-after-ms": str(whole * 1000)}
        return headers


def bad(param: str | None, message: str) -> ApiError:
    """A request that cannot be done as it was asked."""
    return ApiError(400, "invalid_request", message, param=param)


def no_video(job_id: str) -> ApiError:
    """There is no such job, or it is another key's."""
    shown = job_id if len(job_id) <= 60 else job_id[:57] + "..."
    return ApiError(404, "video_not_found", f"there is no video {shown!r}; GET /v1/videos lists those that there are")


def refused(error: RefusedError) -> ApiError:
    """What the service says of a job that it does not take."""
    status = _REFUSED.get(error.code, 503)
    wait = error.retry_s if error.retry_s is not None or status not in (429, 503) else 5
    return ApiError(status, error.code, error.message, retry_s=wait)


def _of_http(error: HTTPException) -> ApiError:
    """Starlette's own: a path or a method that there is not."""
    says = {
        404: "there is nothing at this path; GET /openapi.json lists what there is",
        405: "this path does not take that method; GET /openapi.json lists those it takes",
    }.get(error.status_code, str(error.detail))
    code = _CODES.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal_error")
    return ApiError(error.status_code, code, says, headers=error.headers)


def _of_validation(error: RequestValidationError) -> ApiError:
    first: dict[str, Any] = error.errors()[0]
    param = str(first["loc"][-1])
    value = repr(first.get("input"))
    shown = value if len(value) <= 60 else value[:57] + "..."
    reason = str(first["msg"])
    return bad(param, f"{param} {shown} is not possible: {reason[:1].lower()}{reason[1:]}")


def _of_store(error: StoreError) -> ApiError:
    _LOG.error("the store: %s", error)  # it names files, which are nothing to clients
    return ApiError(503, "store_unavailable", "the store of jobs is out of order; come again soon", retry_s=5)


def _of_input(error: InputError) -> ApiError:
    return bad(None, str(error))


def _of_disconnect(_: ClientDisconnect) -> ApiError:
    return bad(None, "the connection ended before the request was whole")  # nobody is there to read it


Handler = Callable[[Request, Any], Coroutine[Any, Any, Response]]


def handlers() -> dict[int | type[Exception], Handler]:
    """By the exception, what FastAPI is to answer."""
    translations: dict[type[Exception], Callable[[Any], ApiError]] = {
        ApiError: lambda error: error,
        RefusedError: refused,
        HTTPException: _of_http,
        RequestValidationError: _of_validation,
        StoreError: _of_store,
        InputError: _of_input,
        ClientDisconnect: _of_disconnect,
    }
    return {kind: _handler(translate) for kind, translate in translations.items()}


def _handler(translate: Callable[[Any], ApiError]) -> Handler:
    async def handle(request: Request, error: Any) -> Response:
        return translate(error).answer()

    return handle
