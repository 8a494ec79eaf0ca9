"""Which scope each HTTP route and each RPC needs: the one table of it.

What is not named here needs `generate`, so that a new route is never open by being forgotten.
"""

from __future__ import annotations

from ostro.configs.key_table import Scope

Needs = frozenset[Scope] | None
"""A key with any of these scopes; None needs no key."""

OPEN: Needs = None
ANY_KEY: Needs = frozenset(Scope)
_GENERATE: Needs = frozenset({Scope.GENERATE})
_CONTROL: Needs = frozenset({Scope.CONTROL})
_OBSERVE: Needs = frozenset({Scope.OBSERVE})

_ROUTES: dict[str, Needs] = {
    "/health": OPEN,
    "/live": OPEN,
    "/ready": OPEN,
    "/metrics": _OBSERVE,
    "/openapi.json": ANY_KEY,
    "/v1/models": ANY_KEY,
    "/v1/chat/completions/control": _CONTROL,
}
_RPCS: dict[str, Needs] = {
    "Check": OPEN,
    "Watch": OPEN,
    "GetModel": ANY_KEY,
    "GetCluster": _OBSERVE,
    "WatchCluster": _OBSERVE,
    "GetExperts": _OBSERVE,
    "ControlGeneration": _CONTROL,
}


def route_needs(path: str) -> Needs:
    """What a request to this path needs.

    Example:
        "/mistral/v1/models/small" -> what "/v1/models" needs
    """
    path = path.removeprefix("/mistral")
    if path.startswith("/v1/models/"):
        path = "/v1/models"
    return _ROUTES.get(path, _GENERATE)


def rpc_needs(name: str) -> Needs:
    """What an RPC of this name needs."""
    return _RPCS.get(name, _GENERATE)
