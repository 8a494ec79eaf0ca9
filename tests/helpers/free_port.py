"""Ports for what a test starts, each given once."""

from __future__ import annotations

import random

from ostro.cluster.ray_environment import can_bind

# Below what the system hands out to connections, which may be gone when a server comes to bind it,
# and beside the ports that a deployment chooses for itself.
_RANGE = range(32_000, 32_768)
_candidates = iter(random.SystemRandom().sample(_RANGE, len(_RANGE)))


def free_port() -> int:
    """A port that nothing listens on."""
    return next(filter(can_bind, _candidates))
