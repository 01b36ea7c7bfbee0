"""What the description of the API says of requests and errors, made from the same tables that read them."""

from collections.abc import Mapping
from typing import Any, Final

from frameloom.config import MAX_LORA_STRENGTH
from frameloom.request import LIMITS
from frameloom.serve.api.parameters import (
    MAX_DEADLINE_S,
    MAX_LORAS,
    MAX_QUALITY,
    MIN_DEADLINE_S,
    PARAMETERS,
    TAKEN,
    Form,
)
from frameloom.serve.api.schemas import ErrorAnswer
from frameloom.serve.config import Limits
from frameloom.serve.keys import MAX_PRIORITY

_SAYS: Final[Mapping[int, str]] = {
    400: "Something in the request is not possible; `param` names it.",
    401: "The key is missing or unknown.",
    403: "A web page of another origin, or a foreign host name, where the server has no keys.",
    404: "There is no such thing, or it is another key's.",
    405: "The path does not take this method.",
    408: "The body came too slowly.",
    409: "The Idempotency-Key came before with another request.",
    413: "The body is too large.",
    415: "The body is neither JSON nor a multipart form.",
    416: "The range is outside of the file.",
    429: "The queue is full; Retry-After says when to come again.",
    500: "The server is at fault; its log says more.",
    503: "The server starts or ends, or its store is out of order.",
    507: "The disk is full.",
}
_ALWAYS: Final = (400, 401, 403, 500, 503)
BODY: Final = (404, 408, 409, 413, 415, 429, 507)
"""Errors of requests that make a video."""

_FILE: Final = {"type": "string", "format": "binary"}
_URL: Final = {"type": "string", "description": "A data: URL, or https:// where the server allows its host."}
_BY_URL: Final = {"type": "object", "properties": {"image_url": _URL}, "required": ["image_url"]}
_BY_ID: Final = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}


def errors(*statuses: int, always: tuple[int, ...] = _ALWAYS) -> dict[int | str, dict[str, Any]]:
    """The errors that a route answers with, besides those that all do, or those that it does `always`."""
    return {status: {"model": ErrorAnswer, "description": _SAYS[status]} for status in sorted({*always, *statuses})}


def body_of(kind: str) -> dict[str, Any]:
    """The body of a request: the same parameters as JSON, or as a form."""
    required = ["prompt", *(["video"] if kind in ("edit", "extension") else [])]
    content = {}
    for media, is_form in (("application/json", False), ("multipart/form-data", True)):
        properties = {
            alias: _schema(name, is_form=is_form)
            for name in TAKEN[kind]
            for alias in (name, PARAMETERS[name].alias)
            if alias
        }
        content[media] = {"schema": {"type": "object", "properties": properties, "required": required}}
    return {"requestBody": {"required": True, "content": content}}


def query_of(kind: str) -> dict[str, Any]:
    """The same parameters in the query of a URL."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": _schema(name, is_form=True)}
            for name in TAKEN[kind]
        ]
    }


def set_limits(described: Mapping[str, Any], limits: Limits) -> None:
    """Write into a whole description what this server takes, where that is less than an engine could."""
    bounds = {
        "steps": {"maximum": limits.steps},
        "prompt": {"maxLength": limits.prompt_chars},
        "negative_prompt": {"maxLength": limits.prompt_chars},
    }
    bounds |= {alias: bounds[name] for name in list(bounds) if (alias := PARAMETERS[name].alias)}
    for operation in (operation for path in described["paths"].values() for operation in path.values()):
        bodies = [content["schema"] for content in operation.get("requestBody", {}).get("content", {}).values()]
        schemas = [(name, schema) for body in bodies for name, schema in body.get("properties", {}).items()]
        schemas += [(one["name"], one["schema"]) for one in operation.get("parameters", ())]
        for name, schema in schemas:
            schema.update(bounds.get(name, {}))


def _schema(name: str, *, is_form: bool) -> dict[str, Any]:
    form = PARAMETERS[name].form
    return {"description": PARAMETERS[name].says, **(_of_limits(name) if name in LIMITS else _of_form(form, is_form))}


def _of_limits(name: str) -> dict[str, Any]:
    kind, low, high = LIMITS[name]
    one: dict[str, Any] = {"type": "integer" if kind is int else "number", "minimum": low, "maximum": high}
    if PARAMETERS[name].form == "numbers":
        return {"anyOf": [one, {"type": "array", "items": one}]}
    return one


def _of_form(form: Form, is_form: bool) -> dict[str, Any]:
    lora = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "scale": {"type": "number", "minimum": -MAX_LORA_STRENGTH, "maximum": MAX_LORA_STRENGTH},
        },
        "required": ["name"],
    }
    image = {"anyOf": [_FILE, _URL]} if is_form else {"anyOf": [_URL, _BY_URL]}
    schemas: dict[str, dict[str, Any]] = {
        "text": {"type": "string"},
        "seconds": {"type": "string", "examples": ["4"]},
        "size": {"type": "string", "pattern": "^[0-9]{1,4}x[0-9]{1,4}$", "examples": ["832x480"]},
        "flag": {"type": "boolean"},
        "quality": {"type": "integer", "minimum": 0, "maximum": MAX_QUALITY},
        "priority": {"type": "integer", "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
        "deadline": {"type": "number", "minimum": MIN_DEADLINE_S, "maximum": MAX_DEADLINE_S},
        "image": image,
        "images": {"type": "array", "items": image},
        "video": {"anyOf": [_FILE if is_form else _URL, _BY_ID]},
        "loras": {"type": "array", "items": lora, "maxItems": MAX_LORAS},
    }
    return schemas[form]
