"""One trace per request, as OpenTelemetry's own in-memory exporters receive it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import grpc
import httpx
import pytest
from grpc_face import SERVICES, ByKeyword
from grpc_thread import serve_in_thread
from http_face import HELLO
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from otlp_collector import attributes, otlp_collector
from scripted_frontend import MODEL, STARTED, THOUGHTFUL, ScriptedFrontend, served

from ostro.actors.errors import InvalidRequestError
from ostro.cluster import tracing
from ostro.cluster.generation import ChatGeneration, TextDelta
from ostro.cluster.grpc_ingress import GrpcMethods
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.metrics import Metrics
from ostro.cluster.tracing import NO_TRACES, check_exporter, make_tracer
from ostro.cluster.tracing_otel import OtelTracer
from ostro.configs.deployment import ServingConfig
from ostro.configs.errors import ConfigError
from ostro.configs.observability import ObservabilityConfig
from ostro.protos.generation_pb2 import StreamGenerateRequest
from ostro.protos.generation_pb2_grpc import GenerationServiceStub

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT = {"model": MODEL, "messages": HELLO}
AWAY = "http://127.0.0.1:9"


class Recorded:
    """A tracer, and what it has sent."""

    def __init__(self) -> None:
        self._spans, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.tracer = OtelTracer(MODEL, provider, MeterProvider(metric_readers=[self._reader]))
        self.metrics = Metrics(MODEL, tracer=self.tracer)

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._spans.get_finished_spans()}

    def histograms(self) -> dict[str, tuple[int, float]]:
        data = self._reader.get_metrics_data()
        metrics = data.resource_metrics[0].scope_metrics[0].metrics
        points = {metric.name: metric.data.data_points[0] for metric in metrics}
        return {name: (point.count, point.sum) for name, point in points.items()}

    def watch(self, *script, stop_after: int | None = None) -> None:
        async def run() -> None:
            events = ScriptedFrontend(*script).chat(ChatGeneration(messages=()))
            async with contextlib.aclosing(self.metrics.watch(events)) as watched:
                num_read = 0
                async for _ in watched:
                    num_read += 1
                    if num_read == stop_after:
                        return

        asyncio.run(run())

    @contextlib.contextmanager
    def http(self, *script) -> Iterator[httpx.Client]:
        frontend = ScriptedFrontend(*script)
        app = build_http_app(lambda: frontend, ServingConfig(), self.metrics)
        with served(app) as url, httpx.Client(base_url=url, timeout=20) as client:
            yield client


def test_a_request_is_a_span_with_its_phases_in_it():
    recorded = Recorded()
    recorded.watch(*THOUGHTFUL)
    spans = recorded.spans()
    root = spans[f"chat {MODEL}"]
    assert root.kind is SpanKind.SERVER
    assert root.parent is None
    assert {"queue", "prefill", "decode"} == spans.keys() - {root.name}
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent.span_id == root.context.span_id
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert spans["decode"].end_time == root.end_time
    assert root.end_time - root.start_time == 500_000_000
    assert spans["prefill"].end_time - spans["prefill"].start_time == 30_000_000


def test_a_span_has_the_conventions_attributes_and_the_parts_of_its_time():
    recorded = Recorded()
    recorded.watch(*THOUGHTFUL)
    attributes = recorded.spans()[f"chat {MODEL}"].attributes
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.id": "gen-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 11,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.reasoning.output_tokens": 5,
        "ostro.reasoning.effort": "low",
        "ostro.reasoning.ended_by": "model",
        "ostro.seconds.experts": 0.2,
    }
    assert {name: attributes.get(name) for name in expected} == expected


def test_histograms_have_the_conventions_names():
    recorded = Recorded()
    recorded.watch(*THOUGHTFUL)
    assert recorded.histograms() == {
        "gen_ai.server.request.duration": (1, 0.5),
        "gen_ai.server.time_to_first_token": (1, 0.05),
        "gen_ai.server.time_per_output_token": (1, pytest.approx(0.045)),
    }


def test_no_text_is_in_a_trace():
    recorded = Recorded()
    with pytest.raises(InvalidRequestError):
        recorded.watch(STARTED, TextDelta(text="a secret"), InvalidRequestError("about a secret"))
    recorded.watch(STARTED, TextDelta(text="a secret"), *THOUGHTFUL[1:])
    told = [json.loads(span.to_json()) for span in recorded._spans.get_finished_spans()]
    assert len(told) == 5
    assert "secret" not in json.dumps(told)


@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_is_an_error_by_its_code(begun):
    recorded = Recorded()
    started = (STARTED,) if begun else ()
    with pytest.raises(InvalidRequestError):
        recorded.watch(*started, InvalidRequestError("no", code="unsupported_value"))
    (span,) = recorded.spans().values()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert span.attributes["error.type"] == "unsupported_value"
    assert ("gen_ai.response.id" in span.attributes) is begun


def test_a_reader_that_leaves_is_an_error_of_that_name():
    recorded = Recorded()
    recorded.watch(*THOUGHTFUL, stop_after=2)
    (span,) = recorded.spans().values()
    assert span.attributes["error.type"] == "disconnected"


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/chat/completions", CHAT, "chat"),
        ("/v1/completions", {"model": MODEL, "prompt": "Say"}, "text_completion"),
        ("/v1/responses", {"model": MODEL, "input": "Say"}, "chat"),
        ("/v1/messages", {**CHAT, "max_tokens": 9}, "chat"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_http_callers_trace_goes_on(path, body, operation, stream):
    recorded = Recorded()
    with recorded.http() as client:
        answer = client.post(path, json={**body, "stream": stream}, headers={"traceparent": PARENT})
    assert answer.status_code == 200
    root = recorded.spans()[f"{operation} {MODEL}"]
    assert format(root.context.trace_id, "032x") == PARENT.split("-")[1]
    assert format(root.parent.span_id, "016x") == PARENT.split("-")[2]


def test_a_caller_that_does_not_sample_is_not_traced_and_a_broken_context_begins_anew():
    recorded = Recorded()
    with recorded.http() as client:
        for parent in (PARENT[:-2] + "00", "nonsense"):
            client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": parent})
    (root,) = (span for span in recorded.spans().values() if span.parent is None)
    assert len(recorded._spans.get_finished_spans()) == 4
    assert format(root.context.trace_id, "032x") != PARENT.split("-")[1]


def test_a_grpc_callers_trace_goes_on():
    recorded = Recorded()
    frontend = ScriptedFrontend()
    methods = ByKeyword(GrpcMethods(lambda: frontend, recorded.metrics))
    metadata = (("traceparent", PARENT), ("some-bin", b"\xff"))
    with (
        serve_in_thread(lambda server: SERVICES[0](methods, server)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        stub = GenerationServiceStub(channel)
        list(stub.StreamGenerate(StreamGenerateRequest(text="Say"), metadata=metadata, timeout=20))
    root = recorded.spans()[f"text_completion {MODEL}"]
    assert format(root.context.trace_id, "032x") == PARENT.split("-")[1]


# ---- switched on, and off


def traced(config: ObservabilityConfig | None = None, **environ: str):
    return make_tracer(config or ObservabilityConfig(), MODEL, "i-1", environ)


def test_nothing_is_sent_unless_asked_for():
    assert traced() is NO_TRACES
    assert traced(OTEL_SERVICE_NAME="x") is NO_TRACES
    off = {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": AWAY}
    assert traced(**off) is NO_TRACES
    assert traced(ObservabilityConfig(otlp_endpoint=AWAY), OTEL_SDK_DISABLED="TRUE") is NO_TRACES


def test_a_protocol_that_is_not_there_is_told_in_the_log(caplog):
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": AWAY, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    assert traced(**asked) is NO_TRACES
    assert "OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf" in caplog.text


def test_without_the_extra_a_configured_endpoint_is_refused_and_a_variable_is_told(
    monkeypatch, caplog
):
    monkeypatch.setattr(tracing, "_EXPORTER", "opentelemetry.exporter.nowhere")
    configured = ObservabilityConfig(otlp_endpoint=AWAY)
    with pytest.raises(ConfigError, match=r"pip install 'ostro\[otel\]'"):
        check_exporter(configured)
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        traced(configured)
    check_exporter(ObservabilityConfig())
    assert traced(OTEL_EXPORTER_OTLP_ENDPOINT=AWAY) is NO_TRACES
    assert "ostro[otel]" in caplog.text


def test_a_collector_gets_spans_and_metrics():
    with otlp_collector() as collector:
        tracer = traced(ObservabilityConfig(otlp_endpoint=f"{collector.url}/"))
        metrics = Metrics(MODEL, tracer=tracer)

        async def run() -> None:
            async for _ in metrics.watch(ScriptedFrontend().chat(ChatGeneration(messages=()))):
                pass

        asyncio.run(run())
        tracer.close()
    (resource,) = collector.resources()
    named = attributes(resource)
    assert (named["service.name"], named["service.instance.id"]) == ("ostro", "i-1")
    assert len(collector.spans()) == 4
    assert len(collector.metrics()) == 3


_WITHOUT = """
import asyncio, sys
# FastAPI brings the API, which does nothing by itself; the rest of it may not be there.
sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.exporter"] = None
from scripted_frontend import MODEL, ScriptedFrontend
from ostro.cluster.generation import ChatGeneration
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.grpc_ingress import GrpcMethods
from ostro.cluster.metrics import Metrics
from ostro.cluster.tracing import make_tracer
from ostro.configs.observability import ObservabilityConfig

config = ObservabilityConfig()
metrics = Metrics(MODEL, config, make_tracer(config, MODEL, "i", {}))

async def run():
    return [e async for e in metrics.watch(ScriptedFrontend().chat(ChatGeneration(messages=())))]

print(len(asyncio.run(run())), "ostro.cluster.tracing_otel" in sys.modules)
"""


def test_a_request_is_served_where_opentelemetry_is_not_installed():
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{len(THOUGHTFUL)} False\n"), done.stderr


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    with pytest.raises(ConfigError, match=r"otlp_endpoint=.*http://collector:4318"):
        ObservabilityConfig(otlp_endpoint=endpoint)


@pytest.mark.parametrize("fields", [{"trace_ratio": 1.5}, {"max_tenants": -1}])
def test_numbers_out_of_range_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ObservabilityConfig(**fields)
