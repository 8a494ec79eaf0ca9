"""Every metric that Ostro serves, once: its families, the dashboard and the table come from here.

Suffixes, types and units are vLLM's where it has the same thing, so that its dashboards port by
prefix. All have the label `model_name`; `engine` is the rank of an attention shard. A scrape of any
ingress replica tells of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

PREFIX = "ostro_"
MODEL_LABEL = "model_name"

_FIRST_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 1, 2.5)
_WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
_PART_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 40, 160)
_TOKENS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
_CHOICES = (1, 2, 4, 8, 16, 32, 64, 128)


class Kind(StrEnum):
    """What a metric is to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """Who counts: an ingress replica its own requests, or the cell all of them."""

    REPLICA = "replica"
    CELL = "cell"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: Without the prefix, and without the `_total` of a counter.
        unit: What one of it is: "seconds", "tokens", "requests", "bytes", "ratio" ...
        labels: Besides the model's name.
        bounds: Of a histogram's buckets.
        gen_ai_name: A histogram's name in OpenTelemetry's conventions, if it has one there.
    """

    name: str
    kind: Kind
    source: Source
    unit: str
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    gen_ai_name: str | None = None

    @property
    def family(self) -> str:
        """The name that is served, without what a histogram's parts add."""
        return PREFIX + self.name + ("_total" if self.kind is Kind.COUNTER else "")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its samples."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(self.family + part for part in ("_bucket", "_count", "_sum"))
        return (self.family,)

    @property
    def label_names(self) -> tuple[str, ...]:
        """All labels, in the order in which families are made."""
        return (MODEL_LABEL, *self.labels)


def _counted(unit: str, *rows: tuple[str, str, str], source: Source) -> Iterator[MetricSpec]:
    for name, labels, text in rows:
        yield MetricSpec(name, Kind.COUNTER, source, unit, text, tuple(labels.split()))


def _cell_gauge(name: str, unit: str, text: str, labels: str = "") -> MetricSpec:
    return MetricSpec(name, Kind.GAUGE, Source.CELL, unit, text, tuple(labels.split()))


def _histogram(
    name: str,
    unit: str,
    bounds: tuple[float, ...],
    text: str,
    labels: str = "",
    gen_ai_name: str | None = None,
) -> MetricSpec:
    return MetricSpec(
        name,
        Kind.HISTOGRAM,
        Source.REPLICA,
        unit,
        text,
        tuple(labels.split()),
        bounds,
        gen_ai_name,
    )


_REQUESTS = (
    *_counted(
        "requests",
        ("request_success", "finished_reason", "Generations by how they ended"),
        ("request_failure", "code", "Generations that failed"),
        ("admission_rejections", "reason", "Requests refused, or given up, before they began"),
        ("api_key_refusals", "code", "Calls without a good key"),
        ("tenant_requests", "tenant", "Generations that ended well, by whose they were"),
        source=Source.REPLICA,
    ),
    *_counted(
        "tokens",
        ("tenant_prompt_tokens", "tenant", "Their prompt tokens"),
        ("tenant_generation_tokens", "tenant", "Their output tokens"),
        ("thinking_tokens", "effort", "Thinking tokens"),
        ("image_tokens", "", "Prompt tokens that stand for images"),
        source=Source.REPLICA,
    ),
    *_counted(
        "choices",
        ("thinking_ended", "by effort", "What ended a choice's thinking: model, budget or caller"),
        source=Source.REPLICA,
    ),
    _histogram(
        "time_to_first_token_seconds",
        "seconds",
        _FIRST_S,
        "From a request's arrival to its first token",
        "effort",
        "gen_ai.server.time_to_first_token",
    ),
    _histogram(
        "time_to_first_answer_token_seconds",
        "seconds",
        _FIRST_S,
        "From a request's arrival to the first token that is not thinking",
        "effort",
    ),
    _histogram("inter_token_latency_seconds", "seconds", _GAP_S, "Between a choice's deltas"),
    _histogram(
        "request_time_per_output_token_seconds",
        "seconds",
        _GAP_S,
        "From a request's first token to its end, over a choice's other tokens",
        gen_ai_name="gen_ai.server.time_per_output_token",
    ),
    _histogram(
        "e2e_request_latency_seconds",
        "seconds",
        _WHOLE_S,
        "From a request's arrival to its end",
        "effort",
        "gen_ai.server.request.duration",
    ),
    _histogram(
        "request_queue_time_seconds",
        "seconds",
        _FIRST_S,
        "From a request's arrival at its shard to its first step",
    ),
    _histogram(
        "request_prefill_time_seconds",
        "seconds",
        _FIRST_S,
        "From a request's first step to its first token",
    ),
    _histogram(
        "request_decode_time_seconds",
        "seconds",
        _WHOLE_S,
        "From a request's first token at its shard to its end",
    ),
    _histogram(
        "request_part_seconds",
        "seconds",
        _PART_S,
        "Where a request's time went: the gateway, and the stages of its steps, not divided "
        "among those that shared them",
        "part",
    ),
    _histogram("request_prompt_tokens", "tokens", _TOKENS, "Prompt tokens of a request"),
    _histogram(
        "request_generation_tokens", "tokens", _TOKENS, "Output tokens of a request", "effort"
    ),
    _histogram("request_params_n", "choices", _CHOICES, "Choices of a request"),
    _histogram(
        "image_fetch_seconds",
        "seconds",
        _FIRST_S,
        "Of one image that a request names by URL, redirects included",
        "outcome",
    ),
    *_counted(
        "bytes",
        ("image_fetch_bytes", "", "Files of images that were fetched"),
        source=Source.REPLICA,
    ),
)

_CELL = (
    _cell_gauge("cell_ready", "", "1 while the cell takes requests"),
    _cell_gauge(
        "tls_expiry_timestamp_seconds",
        "seconds",
        "Unix time until which a file of serving.tls counts; nothing without TLS",
        "file",
    ),
    _cell_gauge("cell_epoch", "", "Number of the epoch: one more after every recovery"),
    _cell_gauge(
        "num_requests_running", "requests", "Requests that advance in every step", "engine"
    ),
    _cell_gauge(
        "num_requests_waiting", "requests", "Requests that wait for their first step", "engine"
    ),
    _cell_gauge("num_tokens_waiting", "tokens", "Their tokens", "engine"),
    _cell_gauge("kv_cache_usage_perc", "ratio", "Share of pages in use, 0..1", "engine"),
    *_counted(
        "tokens",
        ("prompt_tokens", "engine", "Prompt tokens of requests that began to run"),
        ("generation_tokens", "engine", "Output tokens of all requests"),
        ("prefix_cache_queries", "engine", "Prompt tokens looked up"),
        ("prefix_cache_hits", "engine", "Prompt tokens found in the cache"),
        ("spec_decode_num_draft_tokens", "engine", "Drafts that were verified"),
        ("spec_decode_num_accepted_tokens", "engine", "Drafts that were right"),
        (
            "spec_decode_num_draft_tokens_per_pos",
            "engine position",
            "Drafts by their place after a request's last token, from 0 on",
        ),
        (
            "spec_decode_num_accepted_tokens_per_pos",
            "engine position",
            "Drafts that were right, and all before them too",
        ),
        source=Source.CELL,
    ),
    *_counted(
        "requests",
        ("num_preemptions", "engine", "Requests set back for want of pages"),
        ("spec_decode_num_drafts", "engine", "Steps of requests that verified drafts"),
        ("requests_resumed", "", "Choices that went on after the loss of a rank"),
        source=Source.CELL,
    ),
    *_counted(
        "rows",
        (
            "expert_tokens",
            "layer expert",
            "Rows of a logical expert; layer is all unless observability.expert_layers is on",
        ),
        source=Source.CELL,
    ),
    _cell_gauge(
        "expert_imbalance_ratio",
        "ratio",
        "Busiest expert shard's rows over the mean's since the cell started; 1 is even",
    ),
    *_counted("steps", ("steps", "", "Steps of the cell"), source=Source.CELL),
    *_counted(
        "seconds",
        ("step_seconds", "stage", "Of attention shards' steps, by stages that share no time"),
        ("dispatch_seconds", "stage", "Of attention shards before rows travel: gate, send"),
        (
            "combine_seconds",
            "stage",
            "Of attention shards until a layer is whole: wait for other ranks, own experts, add",
        ),
        ("attention_wait_seconds", "", "Attention shards waiting for experts"),
        ("expert_wait_seconds", "", "Expert shards waiting for rows"),
        ("expert_compute_seconds", "", "Expert shards computing"),
        source=Source.CELL,
    ),
    _cell_gauge("actor_state", "", "1 for the state that an actor is in", "actor role state"),
    *_counted(
        "restarts",
        ("actor_restarts", "actor role", "New processes of an actor, as far as scrapes saw them"),
        source=Source.CELL,
    ),
    _cell_gauge("actor_memory_used_bytes", "bytes", "Resident, or of its GPU", "actor role"),
    _cell_gauge("actor_memory_total_bytes", "bytes", "Of its node, or its GPU", "actor role"),
)

METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in (*_REQUESTS, *_CELL)}


def of_source(source: Source) -> Iterable[MetricSpec]:
    """The metrics that one of the two counts."""
    return (spec for spec in METRICS.values() if spec.source is source)


def table() -> str:
    """The list as a table in Markdown."""
    rows = [
        (f"`{spec.family}`", spec.kind.value, ", ".join(spec.labels), spec.unit, spec.text)
        for spec in METRICS.values()
    ]
    head = (("metric", "type", "labels", "unit", "what"), ("---",) * 5)
    return "".join(f"| {' | '.join(row)} |\n" for row in (*head, *rows))
