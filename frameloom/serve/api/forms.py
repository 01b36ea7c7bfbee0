"""Bodies as clients send them, JSON or multipart, become one mapping of fields; what is wrong with them is said."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from frameloom.serve.api.errors import ApiError, bad

MAX_PARTS: Final = 256
MAX_VALUES: Final = 20_000
"""Of commas and brackets of a JSON body: each may cost a hundred times its byte. A long prompt has thousands."""
MAX_DEPTH: Final = 16
_CHARSETS: Final = {"utf-8": "utf-8", "utf8": "utf-8", "us-ascii": "ascii", "iso-8859-1": "latin-1"}
_NAME: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})((?:\[[A-Za-z0-9_]{0,64}\]){0,2})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """A file of a form. Neither its name nor its type is looked at."""

    data: bytes


class Several(list[Any]):
    """What a form says of a parameter in several fields of one name."""


Fields: TypeAlias = dict[str, Any]
"""By parameter: None, text, a number, an Upload, or lists and mappings of these. Numbers of a form are text."""


def fields_of(content_type: str, body: bytes) -> Fields:
    """What a body says. Raises ApiError 400 or 415."""
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        return _from_form(options.get(b"boundary", b""), body)
    if kind == b"application/json":
        return _from_json(body)
    shown = content_type[:60] or "nothing"
    raise ApiError(
        415,
        "unsupported_media_type",
        f"the content type is {shown}; send application/json or multipart/form-data",
    )


def _from_json(body: bytes) -> Fields:
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise bad(None, f"the JSON body has more than {MAX_VALUES} values; send less")
    try:
        told = _parsed(body.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise bad(None, "the body is not UTF-8; send JSON in UTF-8") from None
    except ValueError as error:
        reason = error if body.strip() else "it is empty"
        raise bad(None, f'the body is no JSON ({reason}); send an object such as {{"prompt": "..."}}') from None
    if not isinstance(told, dict):
        raise bad(None, 'the body is no object; send one such as {"prompt": "..."}')
    _check_text(told, None)
    return told


def _parsed(text: str) -> Any:
    """What JSON says. Raises ValueError, and ApiError for what is said twice."""
    try:
        return json.loads(text, parse_int=_int, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _int(digits: str) -> int | float:
    return int(digits) if len(digits) < 30 else float(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise bad(twice[:64], f"{twice[:64]} is given twice; give it once")
    return found


def _check_text(value: Any, param: str | None, depth: int = 0) -> None:
    """Raise ApiError for text that no file or terminal can hold: halves of characters, and zeros; and for depths."""
    if depth > MAX_DEPTH:
        raise bad(None, f"the body is nested more than {MAX_DEPTH} deep; nothing here is")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_text(name, param)
            _check_text(inner, param or name, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner, param, depth + 1)
    elif isinstance(value, str) and ("\0" in value or not _is_whole(value)):
        shown = param if param is not None and _is_whole(param) else None
        raise bad(shown, f"{shown or 'a name'} holds characters that are no text; leave them out")


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Form:
    """Collects the parts of a form, as the parser finds them."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, str | Upload]] = []
        self.is_whole = False
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value, self._data = bytearray(), bytearray(), bytearray()

    def callbacks(self) -> Any:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin, "on_part_data": self._more, "on_part_end": self._end,
            "on_header_field": self._more_header, "on_header_value": self._more_value,
            "on_header_end": self._end_header, "on_end": self._whole,
        }  # fmt: skip

    def _begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise bad(None, f"the form has more than {MAX_PARTS} parts; send fewer")
        self._headers = {}
        self._data = bytearray()

    def _more(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _more_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _more_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = _text_of(options.get(b"name", b""), None, "utf-8")
        if b"filename" in options:
            self.parts.append((name, Upload(data=bytes(self._data))))
            return
        _, options = parse_options_header(self._headers.get(b"content-type", b""))
        charset = options.get(b"charset", b"utf-8").decode("latin-1").lower()
        self.parts.append((name, _text_of(bytes(self._data), name, charset)))

    def _whole(self) -> None:
        self.is_whole = True


def _text_of(data: bytes, param: str | None, charset: str) -> str:
    try:
        text = data.decode(_CHARSETS[charset])
    except (UnicodeError, KeyError):
        raise bad(param, f"{param or 'the name of a part'} is no text in UTF-8; send it in UTF-8") from None
    _check_text(text, param)
    return text


def _from_form(boundary: bytes, body: bytes) -> Fields:
    if not boundary:
        raise bad(None, "the content type names no boundary; let your client make it")
    form = _Form()
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.logger.setLevel(logging.CRITICAL)  # what is wrong with a form is told to who sent it
        parser.write(body)
    except FormParserError as error:
        raise bad(None, f"the body is no multipart form ({error})") from None
    if not form.is_whole:
        raise bad(None, "the form ends early: its last boundary is missing; send it again")
    return _gathered(form.parts)


def _gathered(parts: list[tuple[str, str | Upload]]) -> Fields:
    """Parts by parameter: `a`, `a[]` (a list), `a[b]` (a mapping), `a[][b]` (a list of mappings, field by field)."""
    found: dict[str, dict[str, list[str | Upload]]] = {}
    for name, value in parts:
        if isinstance(value, Upload) and not value.data and "[" not in name:
            continue  # as browsers send a file that was not chosen
        if (match := _NAME.fullmatch(name)) is None:
            raise bad(name[:64], f"{name[:64]!r} is no name of a parameter; GET /openapi.json lists them")
        found.setdefault(match[1], {}).setdefault(match[2], []).append(value)
    return {param: _value(param, spelled) for param, spelled in found.items()}


def _value(param: str, spelled: Mapping[str, list[str | Upload]]) -> Any:
    """One parameter, of what was given by its spellings."""
    if set(spelled) == {""}:
        values = spelled[""]
        return _structured(param, values[0]) if len(values) == 1 else Several(values)
    if set(spelled) == {"[]"}:
        return spelled["[]"]
    keys = {spelling: spelling[1:-1].split("][") for spelling in spelled}
    if all(len(key) == 1 and key[0] for key in keys.values()):
        return {keys[spelling][0]: _single(param, values) for spelling, values in spelled.items()}
    if not all(len(key) == 2 and not key[0] and key[1] for key in keys.values()):
        raise bad(param, f"{param} is given in several ways at once; give it in one, or as one field of JSON")
    return _zipped(param, {keys[spelling][1]: values for spelling, values in spelled.items()})


def _single(param: str, values: list[str | Upload]) -> str | Upload:
    if len(values) > 1:
        raise bad(param, f"a part of {param} is given twice; give it once")
    return values[0]


def _zipped(param: str, columns: Mapping[str, list[str | Upload]]) -> list[dict[str, str | Upload]]:
    """Clients group a list of objects by field, not by item: the n-th of each field belong together."""
    if len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(f"{len(column)} of {name}" for name, column in columns.items())
        raise bad(param, f"{param} has {counts}, which cannot be put together; give {param} as one field of JSON")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _structured(param: str, value: str | Upload) -> Any:
    """Lists and objects may come as JSON in one field; of a prompt, brackets are brackets."""
    if isinstance(value, str) and value[:1] in ("[", "{") and param not in ("prompt", "negative_prompt"):
        if sum(map(value.count, ",[{")) > MAX_VALUES:
            raise bad(param, f"{param} has more than {MAX_VALUES} values; send less")
        try:
            told = _parsed(value)
        except ApiError as error:
            raise bad(param, f"in {param}, {error.message}") from None
        except ValueError as error:
            raise bad(param, f"{param} is no JSON ({error}); GET /openapi.json says what it looks like") from None
        _check_text(told, param)
        return told
    return value
