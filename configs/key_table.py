"""Who may call a deployment: tenants, the hashes of their keys, their scopes and quotas.

What a key file holds, and what travels to every ingress replica as it is. No key is in here. Its
hash is plain SHA-256: a slow or salted one protects what people choose, but a key is 256 random
bits that nobody can guess, and each request would pay for the slowness.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from enum import StrEnum
from typing import Annotated

import msgspec

_ID_CHARS = 12

# No "/": what a tenant's caches are called is the tenant, a slash and the caller's own word.
TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
Tenant = Annotated[str, msgspec.Meta(pattern=TENANT_PATTERN)]
Limit = Annotated[int, msgspec.Meta(ge=1)]


class Scope(StrEnum):
    """What a key is good for; `cluster.access` tells which route needs which.

    `ADMIN` is good for everything, and steers the generations of other tenants too.
    """

    GENERATE = "generate"
    CONTROL = "control"
    OBSERVE = "observe"
    ADMIN = "admin"


class Quota(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What a tenant may use, all of its keys together; None is unlimited.

    Attributes:
        requests_per_minute: Prompts that may be taken, each with any number of answers; what is
            only tokenized, counted or detokenized is a request too, of no tokens.
        tokens_per_minute: Prompt and completion; a prompt counts when it comes, a completion when
            it ends, so a long one may leave a debt that the next requests wait for.
        concurrent_requests: Answers that may be made, or wait for it, at a time.
        max_tokens_per_request: Largest `max_tokens`, and what a request that names none gets.
    """

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    max_tokens_per_request: Limit | None = None

    @property
    def is_per_minute(self) -> bool:
        """Whether it has a budget that can be spent."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


class Key(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One key; a tenant may have several.

    Attributes:
        tenant: Whose it is.
        sha256: Of the key's text, in hexadecimal.
        scopes: What it is good for.
        expires: From then on it is refused.
        note: For people.
    """

    tenant: Tenant
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1)]
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    note: str = ""

    @property
    def key_id(self) -> str:
        """What logs call it: the first characters of its hash, which say nothing of the key."""
        return self.sha256[:_ID_CHARS]


class KeyTable(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """All keys and quotas of a deployment.

    Attributes:
        quotas: By tenant; who is not named is not limited.
    """

    keys: tuple[Key, ...] = ()
    quotas: dict[Tenant, Quota] = {}

    def __post_init__(self) -> None:
        (key_id, count), *_ = Counter(key.key_id for key in self.keys).most_common(1) or [("", 0)]
        if count > 1:
            raise ValueError(f"key {key_id} stands {count} times")
        unknown = sorted(set(self.quotas) - {key.tenant for key in self.keys})
        if unknown:
            raise ValueError(f"quotas of {', '.join(unknown)}: no key has this tenant")
