"""Requests to OpenTelemetry: a span each, with spans of its phases in it, and three histograms.

Names follow OpenTelemetry's conventions for generative AI, written out: its package has them under
names that it calls deprecated. Spans are made when a request has ended, with the times that it
had: while it runs they cost nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Histogram
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from ostro.actors.errors import OstroError
from ostro.cluster.generation import Finished, Started
from ostro.cluster.metrics_list import METRICS
from ostro.cluster.tracing import Origin, Tracer
from ostro.configs.observability import ObservabilityConfig

_NAME = "ostro"
_CLOSE_S = 1.0
_NS = 1_000_000_000
_CONTEXTS = TraceContextTextMapPropagator()

Attributes = dict[str, AttributeValue]


def connect(
    config: ObservabilityConfig, model: str, instance_id: str, environ: Mapping[str, str]
) -> Tracer:
    """A tracer that sends over OTLP, as the configuration and the OTEL_* variables say."""
    resource = Resource.create(_resource(instance_id, environ))
    sampler = None  # the variables' choice
    if "OTEL_TRACES_SAMPLER" not in environ:
        sampler = ParentBased(TraceIdRatioBased(config.trace_ratio))
    spans = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
    readers = []
    if environ.get("OTEL_TRACES_EXPORTER") != "none":
        exporter = OTLPSpanExporter(endpoint=_url(config, "v1/traces"))
        spans.add_span_processor(BatchSpanProcessor(exporter))
    if environ.get("OTEL_METRICS_EXPORTER") != "none":
        sender = OTLPMetricExporter(endpoint=_url(config, "v1/metrics"))
        readers.append(PeriodicExportingMetricReader(sender))
    meters = MeterProvider(readers, resource, shutdown_on_exit=False)
    return OtelTracer(model, spans, meters)


class OtelTracer:
    """A `Tracer` over providers of OpenTelemetry's own, not its global ones."""

    def __init__(self, model: str, spans: TracerProvider, meters: MeterProvider) -> None:
        self.model = model
        self.tracer = spans.get_tracer(_NAME)
        self._providers = (spans, meters)
        meter = meters.get_meter(_NAME)
        self.histograms: dict[str, Histogram] = {
            spec.name: meter.create_histogram(
                spec.gen_ai_name,
                unit="s",
                description=spec.text,
                explicit_bucket_boundaries_advisory=spec.bounds,
            )
            for spec in METRICS.values()
            if spec.gen_ai_name is not None
        }

    def begin(self, origin: Origin) -> OtelTrace:
        """See `Tracer.begin`."""
        return OtelTrace(self, origin)

    def close(self) -> None:
        """See `Tracer.close`."""
        # The SDK's own time limits do not hold: it may wait for a collector for half a minute.
        ending = threading.Thread(target=self._shut_down, name="ostro-traces-end", daemon=True)
        ending.start()
        ending.join(_CLOSE_S)

    def _shut_down(self) -> None:
        for provider in self._providers:
            provider.shutdown()


class OtelTrace:
    """See `RequestTrace`."""

    def __init__(self, tracer: OtelTracer, origin: Origin) -> None:
        self._tracer = tracer
        self._origin = origin
        self._began_ns = time.time_ns()

    def finish(self, started: Started, finished: Finished) -> None:
        """See `RequestTrace.finish`."""
        timing = finished.timing
        span = self._span(started)
        span.set_attributes(_of_the_end(finished))
        if timing.first_token_s is not None and timing.prefill_s is not None:
            begun_s = timing.first_token_s - timing.prefill_s
            self._phase(span, "queue", begun_s - timing.queued_s, begun_s)
            self._phase(span, "prefill", begun_s, timing.first_token_s)
            self._phase(span, "decode", timing.first_token_s, timing.total_s)
        span.end(self._at_ns(timing.total_s))
        self._record("e2e_request_latency_seconds", timing.total_s)
        self._record("time_to_first_token_seconds", timing.first_token_s)
        gap_s = timing.gap_s(finished.usage.completion_tokens / started.num_choices)
        self._record("request_time_per_output_token_seconds", gap_s)

    def fail(self, started: Started | None, error: Exception) -> None:
        """See `RequestTrace.fail`; its message stays here, as it may quote the request."""
        code = error.code if isinstance(error, OstroError) else type(error).__name__
        self._cut_off(started, code)

    def leave(self, started: Started | None) -> None:
        """See `RequestTrace.leave`."""
        self._cut_off(started, "disconnected")

    def _cut_off(self, started: Started | None, error_type: str) -> None:
        ended_ns = time.time_ns()
        span = self._span(started)
        span.set_attribute("error.type", error_type)
        span.set_status(Status(StatusCode.ERROR))
        span.end(ended_ns)
        total_s = (ended_ns - self._began_ns) / _NS
        self._record("e2e_request_latency_seconds", total_s, **{"error.type": error_type})

    def _span(self, started: Started | None) -> Span:
        span = self._tracer.tracer.start_span(
            f"{self._origin.operation} {self._tracer.model}",
            context=self._callers_context(),
            kind=SpanKind.SERVER,
            attributes=self._names(),
            start_time=self._began_ns,
        )
        if started is not None:
            span.set_attributes(_of_the_start(started))
        return span

    def _phase(self, span: Span, name: str, begin_s: float, end_s: float) -> None:
        context = set_span_in_context(span)
        begin_ns = max(self._at_ns(begin_s), self._began_ns)
        phase = self._tracer.tracer.start_span(name, context=context, start_time=begin_ns)
        phase.end(self._at_ns(end_s))

    def _record(self, name: str, seconds: float | None, **more: str) -> None:
        if seconds is not None:
            self._tracer.histograms[name].record(seconds, {**self._names(), **more})

    def _names(self) -> Attributes:
        return {
            "gen_ai.operation.name": self._origin.operation,
            "gen_ai.provider.name": _NAME,
            "gen_ai.request.model": self._tracer.model,
            "gen_ai.response.model": self._tracer.model,
        }

    def _callers_context(self) -> Context:
        carrier = {"traceparent": self._origin.traceparent, "tracestate": self._origin.tracestate}
        return _CONTEXTS.extract({key: value for key, value in carrier.items() if value})

    def _at_ns(self, since_arrival_s: float) -> int:
        return self._began_ns + int(since_arrival_s * _NS)


def _of_the_start(started: Started) -> Attributes:
    attributes: Attributes = {
        "gen_ai.response.id": started.request_id,
        "gen_ai.request.choice.count": started.num_choices,
        "gen_ai.usage.input_tokens": started.num_prompt_tokens,
        "ostro.reasoning.effort": started.effort,
    }
    if started.budget_tokens is not None:
        attributes["ostro.reasoning.budget_tokens"] = started.budget_tokens
    if started.tenant:
        attributes["ostro.tenant"] = started.tenant
    return attributes


def _of_the_end(finished: Finished) -> Attributes:
    usage = finished.usage
    attributes: Attributes = {
        "gen_ai.response.finish_reasons": (finished.reason,),
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_prompt_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.thinking_tokens,
    }
    if usage.image_tokens:
        attributes["ostro.usage.image_tokens"] = usage.image_tokens
    if finished.reasoning.ended_by is not None:
        attributes["ostro.reasoning.ended_by"] = finished.reasoning.ended_by
    parts = finished.timing.parts()
    attributes.update({f"ostro.seconds.{part}": seconds for part, seconds in parts.items()})
    return attributes


def _url(config: ObservabilityConfig, path: str) -> str | None:
    root = config.otlp_endpoint
    return None if root is None else f"{root.rstrip('/')}/{path}"


def _resource(instance_id: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What the variables do not say already."""
    said = environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in said
    instance = {"service.instance.id": instance_id}
    return instance if named else {"service.name": _NAME, **instance}
