"""The counters and histograms of all ingress replicas as Prometheus families.

A scrape reaches any one replica. Were it told of that one alone, its counters would leap back and
forth from scrape to scrape, so replicas tell the router what they count and serve the sum.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ostro.actors.fabric.messages import Counts
from ostro.cluster.metrics_list import MODEL_LABEL, PREFIX, MetricSpec, Source, of_source


class CountsExchange(Protocol):
    """The way to the other replicas; `cell_client` is the real one."""

    def tell_counts(self, counts: Counts) -> None:
        """Tell what this replica has counted so far; lost if nobody can be reached."""
        ...

    async def pooled_counts(self) -> Counts:
        """What all replicas have told.

        Raises:
            NotReadyError: The router does not answer.
        """
        ...


class ReplicaFamilies(Collector):
    """What all replicas count; where nothing was heard of the others, what this one does."""

    def __init__(self, own: CollectorRegistry, model_name: str) -> None:
        self._own = own
        self._model_name = model_name
        self._exchange: CountsExchange | None = None
        self._told: Counts = {}
        self._pooled: Counts = {}  # the total at a moment when this replica had told `_told`

    def share(self, exchange: CountsExchange) -> None:
        """Count together with others from now on."""
        self._exchange = exchange

    async def tell(self) -> None:
        """Tell the others."""
        if self._exchange is not None:
            self._exchange.tell_counts(await asyncio.to_thread(self._counts))

    async def refresh(self) -> None:
        """Hear of the others; raises NotReadyError, and then the last that was heard holds."""
        if self._exchange is None:
            return
        told = await asyncio.to_thread(self._counts)
        self._exchange.tell_counts(told)
        self._pooled = await self._exchange.pooled_counts()
        self._told = told

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        samples: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for (name, *labels), value in self._sum().items():
            samples.setdefault(name, []).append((tuple(labels), value))
        for spec in of_source(Source.REPLICA):
            yield self._family(spec, samples)

    def _family(
        self, spec: MetricSpec, samples: dict[str, list[tuple[tuple[str, ...], float]]]
    ) -> Metric:
        family = Metric(PREFIX + spec.name, spec.text, spec.kind.value)
        for part in spec.parts:
            names = (*spec.labels, "le") if part.endswith("_bucket") else spec.labels
            for values, value in samples.get(part, ()):
                if len(values) != len(names):
                    continue  # of a replica that runs another version
                labels = dict(zip(names, values, strict=True))
                family.add_sample(part, {MODEL_LABEL: self._model_name, **labels}, value)
        return family

    def _sum(self) -> Counts:
        """The pool, and what this replica has counted since it told."""
        own, told, pooled = self._counts(), self._told, self._pooled
        return {
            **pooled,
            **{
                series: pooled.get(series, 0.0) + (value - told.get(series, 0.0))
                for series, value in own.items()
                if value != told.get(series)
            },
        }

    def _counts(self) -> Counts:
        """This replica's own, without the label that all have."""
        return {
            (sample.name, *(v for label, v in sample.labels.items() if label != MODEL_LABEL)): (
                sample.value
            )
            for family in self._own.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
