"""Waiting for what another process or thread brings about: it can only be polled."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_S = 0.02


def wait_for(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return once it holds; fail if it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "it never held"
        time.sleep(POLL_S)
