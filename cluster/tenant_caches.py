"""Tenants keep to caches of their own: no time to a first token tells what others have sent."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from ostro.actors.engine.request import GenerationRequest


def with_own_caches(request: GenerationRequest) -> GenerationRequest:
    """The request, its prompt and images found again by its tenant alone.

    Unambiguous, as no tenant has a "/" in its name. Without a tenant nothing changes.
    """
    tenant = request.tenant
    if not tenant:
        return request
    return msgspec.structs.replace(
        request,
        cache_salt=f"{tenant}/{request.cache_salt}",
        images=tuple(
            msgspec.structs.replace(image, digest=_digest(image.digest, tenant))
            for image in request.images
        ),
    )


def _digest(digest: bytes, tenant: str) -> bytes:
    return blake2b(digest, digest_size=len(digest), key=tenant.encode()).digest()
