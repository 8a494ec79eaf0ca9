"""What one ingress replica counts and times; never any text of a prompt or an answer.

`Metrics.watch` stands around a frontend's events. Names and units follow vLLM's under the
prefix `ostro_`, so that its dashboards port by prefix.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from ostro.actors.errors import NotReadyError, OstroError, OverloadedError
from ostro.cluster.cell_metrics import CellCollector
from ostro.cluster.generation import Finished, GenerationEvent, ReasoningReport, Started, TextDelta
from ostro.cluster.seams import Cell

_STATE_TIMEOUT_S = 2.0
_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 1, 2.5)
_TOTAL_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)


def closing_events(
    events: AsyncIterator[GenerationEvent],
) -> AbstractAsyncContextManager[AsyncGenerator[GenerationEvent, None]]:
    """Closes a generation's iterator on exit, which cancels it if it still runs."""
    return aclosing(cast("AsyncGenerator[GenerationEvent, None]", events))


class Metrics:
    """Counters and histograms of one replica, and the registry that holds them."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._cell = CellCollector(model_name)
        self.registry.register(self._cell)
        self._finished = self._counter(
            "request_success", "Generations by how they ended", "finished_reason"
        )
        self._failed = self._counter("request_failure", "Generations that failed", "code")
        self._rejected = self._counter(
            "admission_rejections", "Requests refused for want of room", "reason"
        )
        self._keys_refused = self._counter("api_key_refusals", "Calls without a good key", "code")
        self._thinking = self._counter("thinking_tokens", "Thinking tokens", "effort")
        self._thinking_ended = self._counter(
            "thinking_ended", "What ended a generation's thinking", "by"
        )
        self._ttft = self._histogram("time_to_first_token_seconds", _TTFT_S)
        self._ttfat = self._histogram("time_to_first_answer_token_seconds", _TTFT_S, "effort")
        self._itl = self._histogram("inter_token_latency_seconds", _ITL_S).labels(model_name)
        self._e2e = self._histogram("e2e_request_latency_seconds", _TOTAL_S)
        self._queued = self._histogram("request_queue_time_seconds", _TTFT_S)

    async def watch(
        self, events: AsyncIterator[GenerationEvent]
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Pass events on and record them; closing this closes `events`.

        A request counts once, however many choices it has; thinking counts choice by choice.
        """
        last_s: dict[int, float] = {}  # by choice
        begun = ended = False
        observe_gap, clock = self._itl.observe, time.monotonic
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
                        if event.is_last:
                            ended = True
                            self._record(event)
                    begun = begun or isinstance(event, Started)
                    yield event
        except Exception as error:
            ended = True
            self._record_failure(error, begun=begun)
            raise
        finally:
            if not ended:
                self._finished.labels(self._model_name, "disconnected").inc()

    def count_refused_key(self, error: OstroError) -> None:
        """A caller was not let in."""
        self._keys_refused.labels(self._model_name, error.code).inc()

    async def render(self, cell: Cell | None) -> bytes:
        """The registry in Prometheus text, without the cell's numbers if it does not answer."""
        self._cell.state = None
        if cell is not None:
            with contextlib.suppress(OstroError, TimeoutError):
                async with asyncio.timeout(_STATE_TIMEOUT_S):
                    self._cell.state = await cell.state()
        return generate_latest(self.registry)

    def _record(self, event: Finished) -> None:
        name, timing = self._model_name, event.timing
        self._finished.labels(name, event.reason).inc()
        self._queued.labels(name).observe(timing.queued_s)
        self._e2e.labels(name).observe(timing.total_s)
        if timing.first_token_s is not None:
            self._ttft.labels(name).observe(timing.first_token_s)
        if timing.first_answer_token_s is not None:
            effort = event.reasoning.effort
            self._ttfat.labels(name, effort).observe(timing.first_answer_token_s)

    def _record_thinking(self, report: ReasoningReport) -> None:
        if report.thinking_tokens:
            self._thinking.labels(self._model_name, report.effort).inc(report.thinking_tokens)
        if report.ended_by is not None:
            self._thinking_ended.labels(self._model_name, report.ended_by).inc()

    def _record_failure(self, error: Exception, *, begun: bool) -> None:
        code = error.code if isinstance(error, OstroError) else OstroError.code
        self._failed.labels(self._model_name, code).inc()
        if not begun and isinstance(error, (OverloadedError, NotReadyError)):
            self._rejected.labels(self._model_name, error.code).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter("ostro_" + name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, bounds_s: tuple[float, ...], *labels: str) -> Histogram:
        text = name.removesuffix("_seconds").replace("_", " ") + ", in seconds"
        return Histogram(
            "ostro_" + name,
            text,
            ("model_name", *labels),
            registry=self.registry,
            buckets=bounds_s,
        )
