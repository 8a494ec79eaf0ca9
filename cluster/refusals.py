"""What every dialect says of fields that are not served or not there."""

from __future__ import annotations

from typing import NoReturn, TypeVar

from ostro.actors.errors import InvalidRequestError

_T = TypeVar("_T")


def refuse(where: str, why: str) -> NoReturn:
    """Refuse a field by its place in the request; `why` names the way out."""
    raise InvalidRequestError(f"{where}: {why}", code="unsupported_value", param=where)


def present(value: _T | None, where: str) -> _T:
    """A value that has to be there.

    Raises:
        InvalidRequestError: It is not; `param` is its place.
    """
    if value is None:
        raise InvalidRequestError(f"{where} is missing", param=where)
    return value
