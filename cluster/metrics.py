"""What one ingress replica counts and times; never any text of a prompt or an answer.

`Metrics.watch` stands around a frontend's events. What there is to count is in `metrics_list`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from ostro.actors.errors import DeadlineError, NotReadyError, OstroError, OverloadedError
from ostro.cluster.cell_metrics import CellCollector
from ostro.cluster.fetch_outcome import FetchOutcome
from ostro.cluster.generation import Finished, GenerationEvent, ReasoningReport, Started, TextDelta
from ostro.cluster.metrics_list import PREFIX, Kind, MetricSpec, Source, of_source
from ostro.cluster.replica_families import CountsExchange, ReplicaFamilies
from ostro.cluster.seams import Cell
from ostro.cluster.tls_metrics import TlsCollector
from ostro.cluster.tracing import NO_TRACES, UNKNOWN, Origin, Tracer
from ostro.configs.observability import ObservabilityConfig
from ostro.configs.tls import TlsConfig

_DEFAULTS = ObservabilityConfig()
_STATE_TIMEOUT_S = 2.0
_AT_THE_DOOR = (OverloadedError, NotReadyError, DeadlineError)  # if nothing had begun
_OTHER = "other"
_TELL_EVERY_S = 5.0
# Parts of a request's time with a histogram of their own.
_PARTS = {
    "queue": "request_queue_time_seconds",
    "prefill": "request_prefill_time_seconds",
    "decode": "request_decode_time_seconds",
}


def closing_events(
    events: AsyncIterator[GenerationEvent],
) -> AbstractAsyncContextManager[AsyncGenerator[GenerationEvent, None]]:
    """Closes a generation's iterator on exit, which cancels it if it still runs."""
    return aclosing(cast("AsyncGenerator[GenerationEvent, None]", events))


class Metrics:
    """Counters and histograms of one replica, and what is served of all.

    Attributes:
        registry: This replica's own.
    """

    def __init__(
        self,
        model_name: str,
        config: ObservabilityConfig = _DEFAULTS,
        tracer: Tracer = NO_TRACES,
        tls: TlsConfig | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._tracer = tracer
        self._max_tenants = config.max_tenants
        self._tenants: set[str] = set()
        self._cell = CellCollector(model_name, expert_layers=config.expert_layers)
        self._replicas = ReplicaFamilies(self.registry, model_name)
        self._served = CollectorRegistry()
        self._served.register(self._replicas)
        self._served.register(self._cell)
        if tls is not None:
            self._served.register(TlsCollector(tls, model_name))
        self._rendering = asyncio.Lock()
        self._telling: asyncio.Task[None] | None = None
        self._has_news = False
        self._families = {
            spec.name: _family(spec, self.registry) for spec in of_source(Source.REPLICA)
        }
        self._children: dict[tuple[str, ...], MetricWrapperBase] = {}
        self._observe_gap = self._histogram("inter_token_latency_seconds").observe

    async def watch(
        self, events: AsyncIterator[GenerationEvent], origin: Origin = UNKNOWN
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Pass events on and record them; closing this closes `events`.

        A request counts once, however many choices it has; thinking counts choice by choice.
        """
        last_s: dict[int, float] = {}  # by choice
        started: Started | None = None
        ended = False
        observe_gap, clock = self._observe_gap, time.monotonic
        trace = self._tracer.begin(origin)
        try:
            async with closing_events(events) as source:
                async for event in source:
                    if isinstance(event, TextDelta):
                        now_s = clock()
                        before_s = last_s.get(event.choice)
                        if before_s is not None:
                            observe_gap(now_s - before_s)
                        last_s[event.choice] = now_s
                    elif isinstance(event, Finished):
                        self._record_thinking(event.reasoning)
                        if event.is_last and started is not None:
                            ended = True
                            self._record(started, event)
                            trace.finish(started, event)
                    elif isinstance(event, Started):
                        started = event
                    yield event
        except Exception as error:
            ended = True
            self._record_failure(error, begun=started is not None)
            trace.fail(started, error)
            raise
        finally:
            if not ended:
                self._counter("request_success", "disconnected").inc()
                trace.leave(started)

    def count_refused_key(self, error: OstroError) -> None:
        """A caller was not let in."""
        self._counter("api_key_refusals", error.code).inc()

    def observe_fetch(self, outcome: FetchOutcome, seconds: float, num_bytes: int) -> None:
        """An image was fetched, or was not to be had."""
        self._histogram("image_fetch_seconds", outcome).observe(seconds)
        self._counter("image_fetch_bytes").inc(num_bytes)

    def share(self, exchange: CountsExchange) -> None:
        """Count together with the other replicas, for as long as this one lives."""
        self._replicas.share(exchange)
        self._telling = asyncio.get_running_loop().create_task(self._keep_telling())

    async def render(self, cell: Cell | None) -> bytes:
        """All metrics in Prometheus text, without the cell's if it does not answer."""
        async with self._rendering:
            self._cell.state = None
            with contextlib.suppress(OstroError, TimeoutError):
                async with asyncio.timeout(_STATE_TIMEOUT_S):
                    await self._replicas.refresh()
                    self._cell.state = None if cell is None else await cell.state()
            # In a thread, as it takes 15 ms: streams go on meanwhile.
            return await asyncio.to_thread(generate_latest, self._served)

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            if self._has_news:
                self._has_news = False
                await self._replicas.tell()

    def _record(self, started: Started, event: Finished) -> None:
        usage, effort = event.usage, event.reasoning.effort
        self._counter("request_success", event.reason).inc()
        self._counter("image_tokens").inc(usage.image_tokens)
        self._record_times(event, started.num_choices)
        self._histogram("request_prompt_tokens").observe(usage.prompt_tokens)
        self._histogram("request_generation_tokens", effort).observe(usage.completion_tokens)
        self._histogram("request_params_n").observe(started.num_choices)
        if started.tenant:
            tenant = self._tenant_label(started.tenant)
            self._counter("tenant_requests", tenant).inc()
            self._counter("tenant_prompt_tokens", tenant).inc(usage.prompt_tokens)
            self._counter("tenant_generation_tokens", tenant).inc(usage.completion_tokens)

    def _record_times(self, event: Finished, num_choices: int) -> None:
        timing, effort = event.timing, event.reasoning.effort
        self._histogram("e2e_request_latency_seconds", effort).observe(timing.total_s)
        if timing.first_token_s is not None:
            self._histogram("time_to_first_token_seconds", effort).observe(timing.first_token_s)
        if timing.first_answer_token_s is not None:
            first_s = timing.first_answer_token_s
            self._histogram("time_to_first_answer_token_seconds", effort).observe(first_s)
        gap_s = timing.gap_s(event.usage.completion_tokens / num_choices)
        if gap_s is not None:
            self._histogram("request_time_per_output_token_seconds").observe(gap_s)
        for part, seconds in timing.parts().items():
            of_its_own = _PARTS.get(part)
            if of_its_own is not None:
                self._histogram(of_its_own).observe(seconds)
            else:
                self._histogram("request_part_seconds", part).observe(seconds)

    def _record_thinking(self, report: ReasoningReport) -> None:
        if report.thinking_tokens:
            self._counter("thinking_tokens", report.effort).inc(report.thinking_tokens)
        if report.ended_by is not None:
            self._counter("thinking_ended", report.ended_by, report.effort).inc()

    def _record_failure(self, error: Exception, *, begun: bool) -> None:
        code = error.code if isinstance(error, OstroError) else OstroError.code
        self._counter("request_failure", code).inc()
        if not begun and isinstance(error, _AT_THE_DOOR):
            self._counter("admission_rejections", code).inc()

    def _tenant_label(self, tenant: str) -> str:
        """The tenant, or what all of them are called that came after the last place was taken."""
        if tenant not in self._tenants:
            if len(self._tenants) >= self._max_tenants:
                return _OTHER
            self._tenants.add(tenant)
        return tenant

    def _counter(self, name: str, *labels: str) -> Counter:
        return cast("Counter", self._child(name, labels))

    def _histogram(self, name: str, *labels: str) -> Histogram:
        return cast("Histogram", self._child(name, labels))

    def _child(self, name: str, labels: tuple[str, ...]) -> MetricWrapperBase:
        """The series of these labels, kept: looking one up costs the library microseconds."""
        self._has_news = True
        key = (name, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._families[name].labels(self._model_name, *labels)
            self._children[key] = child
        return child


def _family(spec: MetricSpec, registry: CollectorRegistry) -> MetricWrapperBase:
    name = PREFIX + spec.name
    if spec.kind is Kind.COUNTER:
        return Counter(name, spec.text, spec.label_names, registry=registry)
    return Histogram(name, spec.text, spec.label_names, registry=registry, buckets=spec.bounds)
