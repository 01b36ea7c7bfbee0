"""What makes two requests the same, of which the second gets the job of the first: what is asked, however written."""

import asyncio
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from frameloom.serve.api.forms import Upload
from frameloom.serve.api.inputs import bytes_of_data_url
from frameloom.serve.api.parameters import PARAMETERS
from frameloom.serve.jobs.job import Repeat

URLS: Final = ("image_url", "video_url", "url")
"""Under which name clients write the URL of a picture."""
_PICTURES: Final = ("image", "images", "video")


async def repeat_of(
    name: str | None, kind: str, found: Mapping[str, Any], *, source: str | None = None
) -> Repeat | None:
    """An Idempotency-Key and the digest of its request; None without a key. Raises ApiError for a damaged data: URL.

    The digest is of what the client sent, and of the id of the job that it asks to go on from: what that job was, or
    what a URL leads to, may be gone when the request comes again.
    """
    return None if name is None else await asyncio.to_thread(_repeat_of, name, kind, found, source)


def _repeat_of(name: str, kind: str, found: Mapping[str, Any], source: str | None) -> Repeat:
    told = {param: _told(value, param) for param, value in found.items() if param != "model"}
    if "size" in told and not {"width", "height"} & set(told):
        told["width"], told["height"] = told.pop("size")
    text = json.dumps([kind, source, told], sort_keys=True)
    return Repeat(name=name, digest=hashlib.sha256(text.encode()).hexdigest())


def _told(value: Any, param: str) -> Any:
    """The same of a file and of a data: URL that holds it."""
    if isinstance(value, Upload):
        return _digest(value.data)
    if isinstance(value, list):
        return [_told(one, param) for one in value]
    if isinstance(value, dict):
        (key, inner), *rest = [*value.items()] or [("", None)]
        is_url = key in URLS and not rest
        return _told(inner, param) if is_url else {name: _told(one, param) for name, one in value.items()}
    if isinstance(value, str) and PARAMETERS[param].form in _PICTURES and value[:5].lower() == "data:":
        return _digest(bytes_of_data_url(value, param))
    return value


def _digest(data: bytes) -> str:
    return f"sha256 {hashlib.sha256(data).hexdigest()}"
