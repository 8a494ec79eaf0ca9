"""From the bytes of a request body to a checked object, with every refusal named.

Too large is 413 before anything is parsed, too slow is 408, unreadable is 400, wrong types and, if
`strict` is asked for, fields that are unknown or without effect are 422 with one entry per field.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from itertools import islice
from typing import TypeVar

import msgspec
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from ostro.actors.errors import InvalidRequestError, SlowBodyError, TooLargeError
from ostro.cluster.wire_schema import RequestBody, ignored_fields
from ostro.configs.deployment import ServingConfig

Body = TypeVar("Body", bound=RequestBody)

_LARGE_BYTES = 2**18  # above it (about 1 ms of work) parsing leaves the event loop
_MAX_SHOWN_CHARS = 100
_MAX_SHOWN_FIELDS = 32
_UNION_TAG = re.compile(r"(str|int|float|bool|Part|ImageUrl|(list|dict)\[.*\])")
_NOT_A_FIELD_NAME = re.compile(r"[^A-Za-z0-9_.\[\]-]")


class SchemaError(InvalidRequestError):
    """Fields of a wrong type, missing or unknown.

    Attributes:
        detail: One entry per field: `type`, `loc`, `msg`, `input`.
    """

    code = "invalid_type"

    def __init__(self, message: str, *, param: str | None, detail: list[dict[str, object]]) -> None:
        super().__init__(message, param=param)
        self.detail = detail


async def read_body(
    request: Request, kind: type[Body], *, limits: ServingConfig, unheeded: Collection[str] = ()
) -> tuple[Body, dict[str, str]]:
    """The body as `kind`, and the headers that name its ignored fields.

    Args:
        request: Whose body it is.
        kind: What to read it as.
        limits: How large it may be, and how slow.
        unheeded: Fields of `kind` that this deployment does not heed.

    Raises:
        TooLargeError: More than `max_body_bytes`.
        SlowBodyError: It took longer than `body_timeout_s`.
        InvalidRequestError: No JSON, or no UTF-8, or the caller left before it was whole.
        SchemaError: JSON that is no `kind`.
    """
    try:
        async with asyncio.timeout(limits.body_timeout_s) as timeout:
            data = await _read(request, limits.max_body_bytes)
    except ClientDisconnect:  # nobody reads the refusal, but the logs tell of no failure of ours
        raise InvalidRequestError("the body broke off", code="incomplete_body") from None
    except TimeoutError:
        if not timeout.expired():
            raise
        raise SlowBodyError(f"the body did not arrive within {limits.body_timeout_s:g} s") from None
    if len(data) > _LARGE_BYTES:
        return await asyncio.to_thread(_parse, data, kind, unheeded)
    return _parse(data, kind, unheeded)


def _parse(data: bytes, kind: type[Body], unheeded: Collection[str]) -> tuple[Body, dict[str, str]]:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(
            f"the body is not valid JSON in UTF-8: {str(error)[:200]}", code="invalid_json"
        ) from error
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise _schema_error(error) from None
    ignored = ignored_fields(body, unheeded)
    if not ignored:
        return body, {}
    if body.strict:
        raise _ignored_error(ignored)
    shown = [_NOT_A_FIELD_NAME.sub("?", name)[:_MAX_SHOWN_CHARS] for name in ignored]
    return body, {"x-ignored-fields": ", ".join(shown[:_MAX_SHOWN_FIELDS])}


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(data)


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"the body is larger than {max_bytes} bytes, the most that is taken")


def _schema_error(error: ValidationError) -> SchemaError:
    entries = error.errors(include_url=False, include_context=False)
    detail: list[dict[str, object]] = [
        {
            "type": entry["type"],
            "loc": ["body", *_place(entry["loc"])],
            "msg": entry["msg"],
            "input": _shown(entry["input"]),
        }
        for entry in entries[:_MAX_SHOWN_FIELDS]
    ]
    # A union tells of each of its members; the one that was meant got furthest.
    first = _place(entries[0]["loc"])
    within = [entry for entry in entries if _place(entry["loc"])[: len(first)] == first]
    entry = max(within, key=lambda entry: len(_place(entry["loc"])))
    param = _dotted(_place(entry["loc"])) or None
    return SchemaError(f"{param or 'body'}: {entry['msg']}", param=param, detail=detail)


def _ignored_error(ignored: dict[str, str]) -> SchemaError:
    shown = [
        (name[:_MAX_SHOWN_CHARS], why) for name, why in islice(ignored.items(), _MAX_SHOWN_FIELDS)
    ]
    detail: list[dict[str, object]] = [
        {"type": "extra_forbidden", "loc": ["body", name], "msg": why, "input": None}
        for name, why in shown
    ]
    name, why = shown[0]
    return SchemaError(f"{name}: {why}", param=name, detail=detail)


def _place(loc: tuple[int | str, ...]) -> list[int | str]:
    """Where in the body, without the names of the union's members that pydantic tried."""
    return [step for step in loc if isinstance(step, int) or not _UNION_TAG.fullmatch(step)]


def _dotted(place: list[int | str]) -> str:
    return "".join(
        f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_SHOWN_CHARS]}" for step in place
    ).lstrip(".")


def _shown(value: object) -> object:
    if isinstance(value, str):
        return value[:_MAX_SHOWN_CHARS]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return type(value).__name__
