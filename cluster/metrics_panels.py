"""What the dashboard shows: rows of panels over the list of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ostro.cluster.metrics_list import METRICS
from ostro.cluster.metrics_queries import gauge, mean, quantile, rate, ratio

_PER_SECOND = "suffix: /s"
_TOKENS_PER_S = "suffix: tok/s"
_SHARES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression and how its series are called."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture.

    Attributes:
        unit: Grafana's name of it.
        width: Of the dashboard's 24 columns.
        kind: Grafana's name of the picture.
        stacked: Whether series are parts of a whole.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    kind: str = "timeseries"
    stacked: bool = False
    text: str = ""


def _stat(title: str, unit: str, expression: str, text: str = "") -> Panel:
    return Panel(title, unit, (Query(expression),), width=4, kind="stat", text=text)


def _quantiles(title: str, name: str, width: int = 8) -> Panel:
    queries = tuple(Query(quantile(name, share), label) for share, label in _SHARES)
    return Panel(title, "s", queries, width, text=METRICS[name].text)


def _by(
    title: str,
    unit: str,
    expression: str,
    label: str,
    *,
    width: int = 8,
    kind: str = "timeseries",
    stacked: bool = False,
    text: str = "",
) -> Panel:
    queries = (Query(expression, f"{{{{{label}}}}}"),)
    return Panel(title, unit, queries, width, kind, stacked, text)


ROWS: dict[str, Sequence[Panel]] = {
    "Overview": (
        _stat("Ready", "bool_yes_no", gauge("cell_ready", how="min")),
        _stat("Requests running", "short", gauge("num_requests_running")),
        _stat("Requests waiting", "short", gauge("num_requests_waiting")),
        _stat("Output tokens", _TOKENS_PER_S, rate("generation_tokens")),
        _stat("KV cache in use", "percentunit", gauge("kv_cache_usage_perc", how="max")),
        _stat("Recoveries", "short", gauge("cell_epoch", how="max"), METRICS["cell_epoch"].text),
    ),
    "Latency": (
        _quantiles("Time to first token", "time_to_first_token_seconds"),
        _by(
            "Time to first answer token by effort, p95",
            "s",
            quantile("time_to_first_answer_token_seconds", 0.95, "effort"),
            "effort",
        ),
        _quantiles("Between tokens", "inter_token_latency_seconds"),
        _quantiles("Queue", "request_queue_time_seconds"),
        _quantiles("Prefill", "request_prefill_time_seconds"),
        _quantiles("Decode", "request_decode_time_seconds"),
        _by(
            "Whole request by effort, p95",
            "s",
            quantile("e2e_request_latency_seconds", 0.95, "effort"),
            "effort",
            width=12,
        ),
        _by(
            "Where a request's time goes, mean",
            "s",
            mean("request_part_seconds", "part"),
            "part",
            width=12,
            stacked=True,
            text=METRICS["request_part_seconds"].text,
        ),
    ),
    "Throughput": (
        Panel(
            "Tokens",
            _TOKENS_PER_S,
            (Query(rate("prompt_tokens"), "prompt"), Query(rate("generation_tokens"), "output")),
        ),
        _by(
            "Ends of requests",
            _PER_SECOND,
            rate("request_success", "finished_reason"),
            "finished_reason",
            stacked=True,
        ),
        _by("Failures", _PER_SECOND, rate("request_failure", "code"), "code", stacked=True),
        Panel(
            "Tokens of a request, mean",
            "short",
            (
                Query(mean("request_prompt_tokens"), "prompt"),
                Query(mean("request_generation_tokens"), "output"),
            ),
        ),
        Panel("Image tokens", _TOKENS_PER_S, (Query(rate("image_tokens"), "image"),)),
        Panel("Choices of a request, mean", "short", (Query(mean("request_params_n"), "choices"),)),
    ),
    "KV and prefix cache": (
        _by(
            "Pages in use",
            "percentunit",
            gauge("kv_cache_usage_perc", "engine", "max"),
            "engine",
        ),
        Panel(
            "Prompt tokens found in the cache",
            "percentunit",
            (Query(ratio(rate("prefix_cache_hits"), rate("prefix_cache_queries")), "hits"),),
        ),
        _by("Preemptions", _PER_SECOND, rate("num_preemptions", "engine"), "engine"),
        Panel("Resumed", _PER_SECOND, (Query(rate("requests_resumed"), "after a loss"),)),
    ),
    "Drafts": (
        Panel(
            "Drafts that were right",
            "percentunit",
            (
                Query(
                    ratio(
                        rate("spec_decode_num_accepted_tokens"),
                        rate("spec_decode_num_draft_tokens"),
                    ),
                    "right",
                ),
            ),
        ),
        _by(
            "Right by position",
            _TOKENS_PER_S,
            rate("spec_decode_num_accepted_tokens_per_pos", "position"),
            "position",
        ),
        _by(
            "Verified by position",
            _TOKENS_PER_S,
            rate("spec_decode_num_draft_tokens_per_pos", "position"),
            "position",
        ),
    ),
    "Reasoning": (
        _by("Thinking by effort", _TOKENS_PER_S, rate("thinking_tokens", "effort"), "effort"),
        _by(
            "What ended thinking",
            _PER_SECOND,
            rate("thinking_ended", "by"),
            "by",
            stacked=True,
        ),
        _by(
            "Output tokens of a request by effort, mean",
            "short",
            mean("request_generation_tokens", "effort"),
            "effort",
        ),
    ),
    "Experts": (
        Panel(
            "Busiest expert shard over the mean",
            "short",
            (Query(gauge("expert_imbalance_ratio", how="max"), "since the start"),),
        ),
        _by(
            "Hottest experts",
            "suffix: rows/s",
            f"topk(16, {rate('expert_tokens', 'expert')})",
            "expert",
            kind="bargauge",
        ),
        Panel(
            "Busiest expert over the mean",
            "short",
            (
                Query(
                    ratio(
                        f"max({rate('expert_tokens', 'expert')})",
                        f"avg({rate('expert_tokens', 'expert')})",
                    ),
                    "now",
                ),
            ),
        ),
        _by(
            "Rows by layer",
            "suffix: rows/s",
            rate("expert_tokens", "layer"),
            "layer",
            width=12,
            text="One line unless observability.expert_layers is on",
        ),
        Panel(
            "Waiting for one another",
            "percentunit",
            (
                Query(rate("attention_wait_seconds"), "attention for experts"),
                Query(rate("expert_wait_seconds"), "experts for rows"),
                Query(rate("expert_compute_seconds"), "experts computing"),
            ),
            width=12,
            text="Seconds per second, over all shards of a kind",
        ),
    ),
    "Step stages": (
        Panel("Steps", "suffix: steps/s", (Query(rate("steps"), "steps"),)),
        _by(
            "Seconds of a step by stage",
            "s",
            f"{rate('step_seconds', 'stage')} / on () group_left () ({rate('steps')} > 0)",
            "stage",
            stacked=True,
            text="Over all attention shards",
        ),
        Panel(
            "Rows out and back",
            "percentunit",
            (
                Query(rate("dispatch_seconds", "stage"), "dispatch: {{stage}}"),
                Query(rate("combine_seconds", "stage"), "combine: {{stage}}"),
            ),
            text="Seconds per second, over all attention shards",
        ),
    ),
    "Actors": (
        _by("States", "short", gauge("actor_state", "role state"), "role}} {{state", stacked=True),
        _by("Restarts", "short", gauge("actor_restarts", "actor"), "actor"),
        _by(
            "Memory in use",
            "percentunit",
            ratio(
                gauge("actor_memory_used_bytes", "actor"),
                gauge("actor_memory_total_bytes", "actor"),
            ),
            "actor",
        ),
    ),
    "Admission and tenants": (
        Panel(
            "Refusals",
            _PER_SECOND,
            (
                Query(rate("admission_rejections", "reason"), "{{reason}}"),
                Query(rate("api_key_refusals", "code"), "{{code}}"),
            ),
        ),
        Panel(
            "Waiting",
            "short",
            (
                Query(gauge("num_requests_waiting", "engine"), "requests, engine {{engine}}"),
                Query(gauge("num_tokens_waiting", "engine"), "tokens, engine {{engine}}"),
            ),
        ),
        _by("Requests by tenant", _PER_SECOND, rate("tenant_requests", "tenant"), "tenant"),
        _by(
            "Prompt tokens by tenant",
            _TOKENS_PER_S,
            rate("tenant_prompt_tokens", "tenant"),
            "tenant",
            width=12,
        ),
        _by(
            "Output tokens by tenant",
            _TOKENS_PER_S,
            rate("tenant_generation_tokens", "tenant"),
            "tenant",
            width=12,
        ),
    ),
    "Images by URL": (
        _by(
            "Fetches", _PER_SECOND, rate("image_fetch_seconds", "outcome"), "outcome", stacked=True
        ),
        _by(
            "Fetch time by outcome, p95",
            "s",
            quantile("image_fetch_seconds", 0.95, "outcome"),
            "outcome",
        ),
        Panel("Fetched", "Bps", (Query(rate("image_fetch_bytes"), "files"),)),
    ),
    "Certificates": (
        _by(
            "Days until they expire",
            "d",
            f"({gauge('tls_expiry_timestamp_seconds', 'file', 'min')} - time()) / 86400",
            "file",
            width=24,
            text=METRICS["tls_expiry_timestamp_seconds"].text,
        ),
    ),
}
