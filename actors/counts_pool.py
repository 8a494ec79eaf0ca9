"""What all ingress replicas have counted together, those that are gone included."""

from __future__ import annotations

import time
from collections.abc import Callable

from ostro.actors.fabric.messages import Counts

_MAX_GONE = 64
_GONE_S = 600.0  # longer than a replica that lives is ever without a connection


class CountsPool:
    """Adds up what replicas tell, series by series.

    A replica tells the whole of what it has counted, again and again; only what is new goes to the
    total, which therefore never falls. What one told is remembered while it is connected, and for
    a while after: it may have lost its connection alone, and would then be counted twice.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total: Counts = {}
        self._told: dict[str, Counts] = {}  # by replica
        self._gone_s: dict[str, float] = {}  # since when, by replica, the longest gone first

    def take(self, ingress_id: str, counts: Counts) -> None:
        """Note what a replica has counted so far."""
        self._gone_s.pop(ingress_id, None)
        before = self._told.get(ingress_id, {})
        self._told[ingress_id] = counts
        for series, value in counts.items():
            more = max(value - before.get(series, 0.0), 0.0)
            self._total[series] = self._total.get(series, 0.0) + more
        self._forget_gone()

    def leave(self, ingress_id: str) -> None:
        """A replica's connection has ended; what it counted stays in the total."""
        if ingress_id in self._told:
            self._gone_s.pop(ingress_id, None)
            self._gone_s[ingress_id] = self._clock()
        self._forget_gone()

    def total(self) -> Counts:
        """Over all replicas there ever were."""
        return self._total

    def _forget_gone(self) -> None:
        too_long_s = self._clock() - _GONE_S
        for ingress_id, since_s in list(self._gone_s.items()):
            if since_s > too_long_s and len(self._gone_s) <= _MAX_GONE:
                return
            del self._gone_s[ingress_id], self._told[ingress_id]
