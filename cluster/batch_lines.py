"""The lines of a batch: what is asked, one JSON object a line, as OpenAI's Batch API has them.

{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

_MAX_LINE_BYTES = 64 * 2**20  # twice what a server takes as a body
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Of each URL, where its body says how much to think; None where it does not.
_EFFORT_FIELDS: dict[str, tuple[str, ...] | None] = {
    "/v1/chat/completions": ("reasoning_effort",),
    "/v1/completions": None,
    "/v1/responses": ("reasoning", "effort"),
    "/v1/messages": ("output_config", "effort"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """One request.

    Attributes:
        number: Of its line, from 1.
        end: Bytes of the file up to its end.
    """

    number: int
    end: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineFault:
    """A line that cannot be asked.

    Attributes:
        custom_id: None where the line has none that can be read.
        code: Machine-readable snake_case reason.
    """

    number: int
    end: int
    custom_id: str | None
    code: str
    message: str


class _Id(msgspec.Struct):
    custom_id: str


class _Line(_Id):
    url: str
    body: dict[str, Any]
    method: str = "POST"


def read_batch(path: Path, effort: str | None = None) -> Iterator[BatchLine | LineFault]:
    """Read a batch line by line; only one is held at a time.

    Args:
        path: The file.
        effort: For bodies that name none, where their URL knows efforts.

    Raises (while iterating):
        OSError: The file cannot be read.
    """
    end = 0
    with path.open("rb") as file:
        number = 0
        while data := file.readline(_MAX_LINE_BYTES):
            number += 1
            end += len(data)
            if len(data) == _MAX_LINE_BYTES and not data.endswith(b"\n"):
                while rest := file.readline(_MAX_LINE_BYTES):
                    end += len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield _fault(number, end, None, "line_too_long", f"{_MAX_LINE_BYTES} bytes at most")
                continue
            data = (data.removeprefix(_BYTE_ORDER_MARK) if number == 1 else data).strip()
            if data:
                yield _read_line(data, number, end, effort)


def _read_line(data: bytes, number: int, end: int, effort: str | None) -> BatchLine | LineFault:
    try:
        line = msgspec.json.decode(data, type=_Line)
    except msgspec.ValidationError as error:
        return _fault(number, end, _custom_id(data), "invalid_line", str(error))
    except UNREADABLE as error:
        return _fault(number, end, None, "invalid_json", str(error))
    why = _unfit(line)
    if why is not None:
        return _fault(number, end, line.custom_id, *why)
    if effort is not None:
        _set_effort(line, effort)
    return BatchLine(number=number, end=end, custom_id=line.custom_id, url=line.url, body=line.body)


def _unfit(line: _Line) -> tuple[str, str] | None:
    """Code and text of why a readable line cannot be asked; None if it can."""
    if not line.custom_id:
        return "invalid_line", "custom_id is empty"
    if line.url not in _EFFORT_FIELDS:
        urls = ", ".join(_EFFORT_FIELDS)
        return "unknown_url", f"url {line.url[:200]!r}: must be one of {urls}"
    if line.method != "POST":
        return "unsupported_value", f"method {line.method[:20]!r}: must be POST"
    if line.body.get("stream"):
        return "unsupported_value", "body.stream: a batch is answered whole; leave it out"
    return None


def _set_effort(line: _Line, effort: str) -> None:
    place = _EFFORT_FIELDS[line.url]
    if place is None:
        return
    *folders, name = place
    body = line.body
    for folder in folders:
        inner = body.setdefault(folder, {})
        if not isinstance(inner, dict):
            return  # the server says what is wrong with it
        body = inner
    body.setdefault(name, effort)


def _custom_id(data: bytes) -> str | None:
    """The id of a line that is not as it should be, if it can be read."""
    try:
        return msgspec.json.decode(data, type=_Id).custom_id
    except UNREADABLE:
        return None


def _fault(number: int, end: int, custom_id: str | None, code: str, why: str) -> LineFault:
    return LineFault(
        number=number, end=end, custom_id=custom_id, code=code, message=f"line {number}: {why}"
    )
