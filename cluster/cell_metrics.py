"""The cell's own numbers as Prometheus families, read from a `State` when somebody scrapes.

Counters of the cell are the same at every ingress replica: take one, do not sum over replicas.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ostro.actors.engine.step import ShardLoad
from ostro.actors.fabric.messages import State

_LOAD_GAUGES = (
    ("num_requests_running", "Requests that advance in every step", "num_running"),
    ("num_requests_waiting", "Requests that wait for their first step", "num_waiting"),
)
_LOAD_COUNTERS = (
    ("prompt_tokens", "Prompt tokens of all requests", "num_prompt_tokens"),
    ("generation_tokens", "Output tokens of all requests", "num_output_tokens"),
    ("prefix_cache_queries", "Prompt tokens looked up", "prefix_queries_tokens"),
    ("prefix_cache_hits", "Prompt tokens found in the cache", "prefix_hits_tokens"),
    ("num_preemptions", "Requests set back for want of pages", "num_preemptions"),
)


def kv_usage(load: ShardLoad) -> float:
    """Share of a shard's pages in use, 0..1."""
    return 1.0 - load.num_free_pages / load.num_pages if load.num_pages else 0.0


def expert_rows(state: State) -> list[int]:
    """Rows of each logical expert over all layers, since the cell started."""
    return [sum(rows) for rows in zip(*state.rows_LE, strict=True)]


def expert_imbalance(state: State) -> float:
    """Busiest expert shard's rows over the mean; 1 is even, 0 before the first row.

    A logical expert's rows count evenly for each of its copies.
    """
    rows_E = expert_rows(state)
    copies = [state.physical_to_logical.count(expert) for expert in range(len(rows_E))]
    per_rank = dict.fromkeys(state.rank_of_physical, 0.0)
    for expert, rank in zip(state.physical_to_logical, state.rank_of_physical, strict=True):
        per_rank[rank] += rows_E[expert] / copies[expert] if expert < len(rows_E) else 0.0
    total = sum(per_rank.values())
    return max(per_rank.values()) * len(per_rank) / total if total else 0.0


class CellCollector(Collector):
    """Families of the last `State` it was given; none without one."""

    def __init__(self, model_name: str) -> None:
        self.state: State | None = None
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        up = self._gauge("cell_ready", "1 while the cell takes requests")
        ready = self.state is not None and self.state.ready
        up.add_metric([self._model_name], float(ready))
        yield up
        if self.state is None:
            return
        yield from self._loads(self.state)
        yield from self._experts(self.state)
        yield from self._steps(self.state)
        yield self._actors(self.state)

    def _loads(self, state: State) -> Iterator[Metric]:
        usage = self._gauge("kv_cache_usage_perc", "Share of pages in use, 0..1", "engine")
        for rank, load in state.loads.items():
            usage.add_metric([self._model_name, str(rank)], kv_usage(load))
        yield usage
        for name, text, field in _LOAD_GAUGES:
            yield self._by_rank(self._gauge(name, text, "engine"), state, field)
        for name, text, field in _LOAD_COUNTERS:
            yield self._by_rank(self._counter(name, text, "engine"), state, field)

    def _by_rank(
        self, family: GaugeMetricFamily | CounterMetricFamily, state: State, field: str
    ) -> Metric:
        for rank, load in state.loads.items():
            family.add_metric([self._model_name, str(rank)], getattr(load, field))
        return family

    def _experts(self, state: State) -> Iterator[Metric]:
        tokens = self._counter("expert_tokens", "Rows of an expert, all layers", "expert")
        for expert, rows in enumerate(expert_rows(state)):
            tokens.add_metric([self._model_name, str(expert)], rows)
        yield tokens
        ratio = self._gauge("expert_imbalance_ratio", "Busiest expert shard over the mean")
        ratio.add_metric([self._model_name], expert_imbalance(state))
        yield ratio

    def _steps(self, state: State) -> Iterator[Metric]:
        steps = self._counter("steps", "Steps of the cell")
        steps.add_metric([self._model_name], state.num_steps)
        yield steps
        seconds = self._counter("step_seconds", "Seconds of all steps by stage", "stage")
        for stage, total_s in state.seconds.items():
            seconds.add_metric([self._model_name, stage], total_s)
        yield seconds

    def _actors(self, state: State) -> Metric:
        family = self._gauge("actor_state", "1 for the state it is in", "actor", "role", "state")
        for actor in state.actors:
            labels = [self._model_name, actor.actor_id, actor.role, actor.state]
            family.add_metric(labels, 1.0)
        return family

    def _gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily("ostro_" + name, text, labels=["model_name", *labels])

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily("ostro_" + name, text, labels=["model_name", *labels])
