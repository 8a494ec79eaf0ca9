"""The cell's own numbers as Prometheus families, read from a `State` when somebody scrapes.

They are the same at every ingress replica: scrape one, do not sum over replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ostro.actors.engine.stages import EXPERTS_COMPUTE, EXPERTS_WAIT, step_stages
from ostro.actors.engine.step import ShardLoad
from ostro.actors.fabric.messages import ActorStatus, State
from ostro.cluster.metrics_list import METRICS, PREFIX, Kind

# Fields of a load, by the metric that tells them.
_LOADS = {
    "num_requests_running": "num_running",
    "num_requests_waiting": "num_waiting",
    "num_tokens_waiting": "num_waiting_tokens",
    "prompt_tokens": "num_prompt_tokens",
    "generation_tokens": "num_output_tokens",
    "prefix_cache_queries": "prefix_queries_tokens",
    "prefix_cache_hits": "prefix_hits_tokens",
    "num_preemptions": "num_preemptions",
}
_ACTORS = {
    "actor_restarts": "num_restarts",
    "actor_memory_used_bytes": "memory_used_bytes",
    "actor_memory_total_bytes": "memory_total_bytes",
}
_WAITS = {
    "attention_wait_seconds": "wait",
    "expert_wait_seconds": EXPERTS_WAIT,
    "expert_compute_seconds": EXPERTS_COMPUTE,
}
_ALL_LAYERS = "all"

Sample = tuple[tuple[str, ...], float]  # values of a metric's own labels, and its own


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
    """Families of the last `State` it was given; without one, that the cell is not ready."""

    def __init__(self, model_name: str, *, expert_layers: bool) -> None:
        """Make a collector.

        Args:
            model_name: The label of all series.
            expert_layers: Tell experts' rows layer by layer.
        """
        self.state: State | None = None
        self._model_name = model_name
        self._expert_layers = expert_layers

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        state = self.state
        yield self._family("cell_ready", [((), float(state is not None and state.ready))])
        if state is None:
            return
        for name, samples in self._samples(state):
            yield self._family(name, samples)

    def _samples(self, state: State) -> Iterator[tuple[str, Iterable[Sample]]]:
        yield "cell_epoch", [((), state.epoch)]
        for name, field in _LOADS.items():
            yield name, _by_rank({rank: getattr(of, field) for rank, of in state.loads.items()})
        yield from _draft_samples(state.loads)
        yield "kv_cache_usage_perc", _by_rank({r: kv_usage(of) for r, of in state.loads.items()})
        yield "expert_tokens", self._expert_samples(state)
        yield "expert_imbalance_ratio", [((), expert_imbalance(state))]
        yield "steps", [((), state.num_steps)]
        yield "requests_resumed", [((), state.num_resumed)]
        yield from _step_samples(state.seconds)
        yield from _actor_samples(state.actors)

    def _expert_samples(self, state: State) -> Iterator[Sample]:
        layers = {str(layer): rows_E for layer, rows_E in enumerate(state.rows_LE)}
        for layer, rows_E in (
            layers if self._expert_layers else {_ALL_LAYERS: expert_rows(state)}
        ).items():
            for expert, rows in enumerate(rows_E):
                yield (layer, str(expert)), rows

    def _family(self, name: str, samples: Iterable[Sample]) -> Metric:
        spec = METRICS[name]
        make = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
        family = make(PREFIX + name, spec.text, labels=spec.label_names)
        for labels, value in samples:
            family.add_metric([self._model_name, *labels], value)
        return family


def _by_rank(value_of: Mapping[int, float]) -> list[Sample]:
    return [((str(rank),), value) for rank, value in value_of.items()]


def _draft_samples(
    loads: Mapping[int, ShardLoad],
) -> Iterator[tuple[str, Iterable[Sample]]]:
    drafts = {rank: load.num_drafted[0] if load.num_drafted else 0 for rank, load in loads.items()}
    yield "spec_decode_num_drafts", _by_rank(drafts)
    for kind, field in (("draft", "num_drafted"), ("accepted", "num_accepted")):
        by_rank: dict[int, tuple[int, ...]] = {
            rank: getattr(load, field) for rank, load in loads.items()
        }
        name = f"spec_decode_num_{kind}_tokens"
        yield name, _by_rank({rank: sum(counts) for rank, counts in by_rank.items()})
        yield (
            f"{name}_per_pos",
            [
                ((str(rank), str(position)), count)
                for rank, counts in by_rank.items()
                for position, count in enumerate(counts)
            ],
        )


def _step_samples(counted: Mapping[str, float]) -> Iterator[tuple[str, Iterable[Sample]]]:
    def seconds(**names: str) -> list[Sample]:
        return [((stage,), counted.get(name, 0.0)) for stage, name in names.items()]

    yield "step_seconds", [((stage,), s) for stage, s in step_stages(counted).items()]
    yield "dispatch_seconds", seconds(gate="gate", send="dispatch")
    yield "combine_seconds", seconds(wait="wait", experts="experts", add="add")
    for name, stage in _WAITS.items():
        yield name, [((), counted.get(stage, 0.0))]


def _actor_samples(actors: Sequence[ActorStatus]) -> Iterator[tuple[str, Iterable[Sample]]]:
    yield "actor_state", [((a.actor_id, a.role, a.state), 1.0) for a in actors]
    for name, field in _ACTORS.items():
        yield name, [((a.actor_id, a.role), getattr(a, field)) for a in actors]
