"""A door with keys, for the tests of the faces: one key for each scope, and other tenants'."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256

from ostro.cluster.audit import AuditLog
from ostro.cluster.door import Door
from ostro.cluster.key_ring import KeyRing
from ostro.configs.key_table import Key, KeyTable, Quota, Scope
from ostro.configs.security import SecurityConfig

GENERATE, CONTROL, OBSERVE, ADMIN, EXPIRED, LIMITED, COUNTED = (
    f"ostro-{name}"
    for name in ("generate", "control", "observe", "admin", "expired", "limited", "counted")
)
MAX_TOKENS = 100


def table_key(text: str, *scopes: Scope, tenant: str = "acme", **fields) -> Key:
    """The table's entry of a key."""
    return Key(
        tenant=tenant, sha256=sha256(text.encode()).hexdigest(), scopes=tuple(scopes), **fields
    )


def key_id(text: str) -> str:
    """What logs call a key."""
    return table_key(text, Scope.GENERATE).key_id


TABLE = KeyTable(
    keys=(
        table_key(GENERATE, Scope.GENERATE),
        table_key(CONTROL, Scope.CONTROL),
        table_key(OBSERVE, Scope.OBSERVE, tenant="watchers"),
        table_key(ADMIN, Scope.ADMIN, tenant="ops"),
        table_key(EXPIRED, Scope.ADMIN, expires=datetime(2020, 1, 1, tzinfo=UTC)),
        table_key(LIMITED, Scope.GENERATE, tenant="small"),
        table_key(COUNTED, Scope.GENERATE, tenant="counted"),
    ),
    quotas={
        "small": Quota(max_tokens_per_request=MAX_TOKENS, tokens_per_minute=1000),
        "counted": Quota(requests_per_minute=60),
    },
)


def make_door(*, clock: Callable[[], float] = time.monotonic, **security) -> Door:
    """A door that knows `TABLE`."""
    config = SecurityConfig(key_file="keys.yaml", **security)
    ring = KeyRing(is_open=False)
    ring.replace(TABLE)
    return Door(ring, AuditLog(config), config, clock)


def bearer(key: str) -> dict[str, str]:
    """The header that shows a key."""
    return {"authorization": f"Bearer {key}"}
