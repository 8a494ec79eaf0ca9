"""The keys in force at one ingress replica: from what a caller shows to who it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from ostro.actors.errors import ForbiddenError, NotReadyError, UnauthenticatedError
from ostro.cluster.access import Needs
from ostro.configs.key_table import Key, KeyTable, Quota, Scope

_BEARER = "bearer "
_UNLIMITED = Quota()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks.

    Attributes:
        tenant: "" where there are no keys.
        key_id: Of the key that was shown; "" likewise.
    """

    tenant: str = ""
    key_id: str = ""
    scopes: frozenset[Scope] = frozenset()
    quota: Quota = _UNLIMITED

    def check(self, needs: Needs) -> None:
        """Refuse what the caller may not do.

        Raises:
            ForbiddenError: The text names the scopes that would do.
        """
        if needs is None or Scope.ADMIN in self.scopes or not needs.isdisjoint(self.scopes):
            return
        raise ForbiddenError(
            f"key {self.key_id} has the scopes {_listed(self.scopes)}; this needs {_listed(needs)}"
        )


STRANGER = Caller()
_ANYBODY = Caller(scopes=frozenset({Scope.ADMIN}))


class KeyRing:
    """Knows callers by their keys.

    Args:
        is_open: There are no keys, and whoever comes may do everything.
        clock: Seconds since the epoch.
    """

    def __init__(self, *, is_open: bool, clock: Callable[[], float] = time.time) -> None:
        self._is_open = is_open
        self._clock = clock
        self._keys: dict[str, tuple[Key, Caller]] | None = None

    def replace(self, table: KeyTable) -> None:
        """Put other keys in force, from the next request on."""
        self._keys = {key.sha256: (key, _caller(key, table)) for key in table.keys}

    def caller(self, shown: str | None) -> Caller:
        """Who shows this key.

        Raises:
            UnauthenticatedError: There is none, or it is unknown or has expired.
            NotReadyError: The keys have not come yet.
        """
        if self._is_open:
            return _ANYBODY
        if self._keys is None:
            raise NotReadyError("the server is starting; try again", retry_after_s=5)
        if not shown:
            raise UnauthenticatedError(
                "no API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="missing_api_key",
            )
        # Found by its hash: what a lookup's time tells of a hash is of no use to who chose the key.
        # Nor are wrong keys counted against anybody: nobody guesses 256 random bits.
        found = self._keys.get(sha256(shown.encode()).hexdigest())
        if found is None:
            raise UnauthenticatedError("this API key is not known here")
        key, caller = found
        if key.expires is not None and key.expires.timestamp() <= self._clock():
            raise UnauthenticatedError(
                f"API key {key.key_id} expired at {key.expires.isoformat()}", code="expired_api_key"
            )
        return caller


def shown_key(authorization: str | None, api_key: str | None) -> str | None:
    """The key in the two headers that may bring one; a bearer token goes first."""
    if authorization is not None and authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip()
    return api_key


def _caller(key: Key, table: KeyTable) -> Caller:
    return Caller(
        tenant=key.tenant,
        key_id=key.key_id,
        scopes=frozenset(key.scopes),
        quota=table.quotas.get(key.tenant, _UNLIMITED),
    )


def _listed(scopes: frozenset[Scope]) -> str:
    return " or ".join(sorted(scopes)) if scopes else "none"
