"""Two ingress replicas and a collector: counts that add up, traces that arrive."""

from __future__ import annotations

import checkpoints
import httpx
import pytest
from otlp_collector import attributes, otlp_collector
from prometheus_client.parser import text_string_to_metric_families
from served import Served
from wait_for import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_REQUESTS = 24
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
GREETING = {"messages": [{"role": "user", "content": "mellon"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def collector():
    with otlp_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def served(tmp_path_factory, collector):
    model_dir = tmp_path_factory.mktemp("tiny")
    checkpoints.make_tiny_checkpoint(model_dir, num_layers=2, with_tokenizer=True)
    settings = (
        "serving.num_ingress_replicas=2",
        "layout.num_expert_shards=1",
        f"observability.otlp_endpoint={collector.url}",
    )
    overrides = [part for setting in settings for part in ("--set", setting)]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with Served(log, "laptop", "--model", str(model_dir), *overrides) as served:
        yield served


def chat(served: Served) -> None:
    """From a connection of its own, so that replicas take turns."""
    url, headers = f"{served.url}/v1/chat/completions", {"traceparent": PARENT}
    httpx.post(url, json=GREETING, headers=headers, timeout=60).raise_for_status()


def counters(served: Served) -> dict[tuple[str, frozenset], float]:
    text = httpx.get(f"{served.url}/metrics", timeout=30).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


def total(counts: dict[tuple[str, frozenset], float], name: str) -> float:
    return sum(value for (of, _), value in counts.items() if of == name)


def test_no_counter_falls_whichever_replica_is_scraped(served):
    before = counters(served)
    for _ in range(NUM_REQUESTS):
        chat(served)
        now = counters(served)
        assert {series for series, value in before.items() if now.get(series, 0.0) < value} == set()
        before = now
    wait_for(lambda: total(counters(served), "ostro_request_success_total") == NUM_REQUESTS)
    assert total(counters(served), "ostro_e2e_request_latency_seconds_count") == NUM_REQUESTS


def test_both_replicas_send_traces_of_the_callers(served, collector):
    def senders() -> set[str]:
        return {attributes(resource)["service.instance.id"] for resource in collector.resources()}

    for _ in range(NUM_REQUESTS):  # no scrape between them: taking turns, it would keep one busy
        chat(served)
    wait_for(lambda: len(senders()) == 2)
    trace_ids = {span.trace_id.hex() for span in collector.spans()}
    assert trace_ids == {PARENT.split("-")[1]}


def test_what_waits_is_sent_when_the_server_stops(served, collector):
    num_spans = len(collector.spans())
    chat(served)
    served.stop()
    wait_for(lambda: len(collector.spans()) >= num_spans + 4)
    assert "gen_ai.server.request.duration" in {metric.name for metric in collector.metrics()}
