"""What all ingress replicas have counted together, those that are gone included."""

from __future__ import annotations

from ostro.actors.fabric.messages import Counts

_MAX_REPLICAS = 1024


class CountsPool:
    """Adds up what replicas tell, series by series.

    A replica tells the whole of what it has counted, again and again; only what is new goes to the
    total, which therefore never falls.
    """

    def __init__(self) -> None:
        self._total: Counts = {}
        self._told: dict[str, Counts] = {}  # by replica, the last to tell last

    def take(self, ingress_id: str, counts: Counts) -> None:
        """Note what a replica has counted so far."""
        before = self._told.pop(ingress_id, {})
        self._told[ingress_id] = counts
        if len(self._told) > _MAX_REPLICAS:  # long gone: it will not tell again
            del self._told[next(iter(self._told))]
        for series, value in counts.items():
            more = max(value - before.get(series, 0.0), 0.0)
            self._total[series] = self._total.get(series, 0.0) + more

    def total(self) -> Counts:
        """Over all replicas there ever were."""
        return self._total
