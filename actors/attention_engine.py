"""The engine of an attention shard during one epoch.

It takes messages from the router, runs the scheduler, executes planned steps and delivers their
tokens. In a cell of several ranks the router's plans say when to run; the proposal for step s + 1
goes out before step s runs, so planning never waits. With drafts, which follow on what step s
brings, it goes out after. A cell of one rank has nobody to agree with: it plans for itself, in
place.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ostro.actors.drafter import Drafting
from ostro.actors.engine.choices import each_choice
from ostro.actors.engine.grammar import GrammarCompiler
from ostro.actors.engine.grammar_masks import MaskMaker
from ostro.actors.engine.grammar_queue import GrammarQueue
from ostro.actors.engine.images import check_images
from ostro.actors.engine.request import (
    FinishReason,
    RequestProgress,
    TokenEvent,
)
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import ScheduledStep, error_event, token_event
from ostro.actors.errors import OstroError, TransportError
from ostro.actors.fabric.channel import ChannelClosedError, SyncConnection, SyncServer
from ostro.actors.fabric.local_exchange import ExchangeCounters
from ostro.actors.fabric.messages import (
    AbortEpoch,
    Assign,
    Cancel,
    EndThinking,
    ExpertCounts,
    Message,
    Proposal,
    StepDone,
    StepEvents,
    StepPlan,
)
from ostro.actors.model.batch import Batch, build_batches, split_evenly
from ostro.actors.model.decoder import ExpertExchange
from ostro.actors.stage_counts import StageCounts
from ostro.actors.step_sampling import StepSampler, StepSampling
from ostro.configs.vision import VisionConfig

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.5
_GRAMMAR_WAIT_S = 0.001  # while a grammar is being compiled
_REPORT_EVERY_S = 1.0


class StepExchange(ExpertExchange, Protocol):
    """What the loop asks of a transport beyond what the decoder does."""

    counters: ExchangeCounters

    def begin_step(self, plan: StepPlan) -> None:
        """Make ready for the rows of a plan."""
        ...

    def end_step(self) -> None:
        """Wait until the step's rows are through."""
        ...

    def serve_all(self, num_layers: int) -> None:
        """Serve the experts of a step in which this rank has no rows of its own."""
        ...


class StepDecoder(Protocol):
    """The model as the loop knows it; `model.decoder.Decoder` is one."""

    seconds: dict[str, float]

    def forward(self, batches: Sequence[Batch], exchange: ExpertExchange) -> list[torch.Tensor]:
        """Per micro-batch the logits of its rows that sample, float32 [B, V]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParts:
    """What one epoch's engine works with.

    Attributes:
        conducted: Whether the router plans the steps (a cell of several ranks).
        drafting: Makes the drafts of the next step; None where there are none.
        grammars: Compiles grammars; outlives the epoch, as `masks` does.
        max_waiting_requests: How many requests may wait for their grammars.
        stages: Of this epoch; the scheduler reads them.
        take_counts: Rows per layer and local physical expert since last asked, or None if the rank
            holds no experts.
    """

    rank: int
    epoch: int
    conducted: bool
    scheduler: Scheduler
    decoder: StepDecoder
    sampler: StepSampler
    drafting: Drafting | None
    grammars: GrammarCompiler
    masks: MaskMaker
    exchange: StepExchange
    connection: SyncConnection
    tokens: SyncServer
    stages: StageCounts
    page_size: int
    max_waiting_requests: int
    vision: VisionConfig | None
    num_layers: int
    take_counts: Callable[[], list[list[int]]] | None


class AttentionEngine:
    """What an attention shard does in an epoch; `rank_loop.RankLoop` turns it."""

    def __init__(self, parts: AttentionParts) -> None:
        self._parts = parts
        self._scheduler = parts.scheduler
        self._sampling = StepSampling(parts.scheduler, parts.sampler, parts.masks)
        self._grammars = GrammarQueue(parts.grammars, parts.max_waiting_requests)
        self._ingress_of: dict[str, str] = {}
        self._plans: deque[StepPlan] = deque()
        self._proposed: ScheduledStep | None = None
        self._next_step = 0
        self._has_told_cache = self._was_busy = False
        self._reported_s = time.monotonic()
        self._host_seconds = parts.stages.host
        self.num_steps = 0

    def turn(self) -> None:
        """See `rank_loop.Engine`."""
        if not self._has_told_cache:  # what the last epoch left, before anything is placed
            self._has_told_cache = True
            self._report_step([], None)
        connection, has_work = self._parts.connection, self._has_work()
        message = connection.receive(timeout_s=0.0 if has_work else self._idle_wait_s())
        if message is None and not has_work and self._was_busy and self._scheduler.is_idle():
            self._was_busy = False
            self._scheduler.check_integrity()
        while message is not None:
            self._absorb(message)
            message = connection.receive(timeout_s=0.0)
        if self._grammars:
            self._add_ready()
        self._deliver(self._scheduler.take_events(), step=None)
        if not self._parts.conducted:
            self._run_own_step()
            return
        if self._proposed is None:
            self._propose(owed=False)
        if self._plans:
            self._run_plan(self._plans.popleft())

    def is_at_rest(self) -> bool:
        """See `rank_loop.Engine`."""
        return self._scheduler.is_idle() and not self._grammars

    def _has_work(self) -> bool:
        """Whether to go on without waiting for a message."""
        if self._parts.conducted:
            may_propose = self._proposed is None and self._scheduler.has_work()
            return bool(self._plans) or may_propose
        return self._scheduler.has_work()

    def _idle_wait_s(self) -> float:
        return _GRAMMAR_WAIT_S if self._grammars else _IDLE_WAIT_S

    def _absorb(self, message: Message) -> None:
        if getattr(message, "epoch", self._parts.epoch) != self._parts.epoch:
            logger.warning("rank %d: dropped a message of another epoch", self._parts.rank)
            return
        match message:
            case StepPlan():
                self._plans.append(message)
            case Assign():
                self._add(message)
            case Cancel(request_id=request_id):
                self._cancel(request_id)
            case EndThinking(request_id=request_id):
                if not self._grammars.end_thinking(request_id):
                    self._scheduler.end_thinking(request_id)
            case AbortEpoch():
                raise ChannelClosedError(message.reason)
            case _:
                logger.warning("rank %d: unexpected %s", self._parts.rank, type(message).__name__)

    def _add(self, assign: Assign) -> None:
        request, output_token_ids = assign.request, assign.output_token_ids
        choices, now_s = each_choice(request), time.monotonic()
        self._ingress_of.update((choice.request_id, assign.ingress_id) for choice in choices)
        try:
            check_images(request, self._parts.vision)
            waiting = [
                RequestProgress(choice, arrived_s=now_s, output_token_ids=output_token_ids)
                for choice in choices
            ]
            if request.grammar is None:
                self._scheduler.add(*waiting)
            else:
                self._grammars.add(waiting, request.grammar)
        except OstroError as error:
            self._deliver([error_event(choice, error) for choice in choices], step=None)

    def _add_ready(self) -> None:
        """Hand over to the scheduler the requests whose grammars are compiled by now."""
        for ready in self._grammars.take_ready():
            try:
                if ready.error is not None:
                    raise ready.error
                self._scheduler.add(*ready.choices)
            except OstroError as error:
                refusals = [error_event(choice.request, error) for choice in ready.choices]
                self._deliver(refusals, step=None)
            for request_id in ready.unthinking:
                self._scheduler.end_thinking(request_id)

    def _cancel(self, request_id: str) -> None:
        progress = self._grammars.cancel(request_id)
        if progress is None:
            self._scheduler.cancel(request_id)
        else:
            cancelled = token_event(progress, 0, [], None, FinishReason.CANCELLED)
            self._deliver([cancelled], step=None)

    def _propose(self, *, owed: bool) -> None:
        began_s = time.perf_counter()
        self._proposed = self._scheduler.schedule()
        num_tokens = self._proposed.num_tokens if self._proposed else 0
        if num_tokens or owed:
            self._send(Proposal(self._parts.epoch, self._parts.rank, num_tokens))
        self._host_seconds["plan"] += time.perf_counter() - began_s

    def _run_plan(self, plan: StepPlan) -> None:
        if not any(plan.tokens_AM[self._parts.rank]):
            self._parts.exchange.begin_step(plan)
            self._parts.exchange.serve_all(self._parts.num_layers)
            return
        step, self._proposed = self._proposed, None
        if step is None or step.num_tokens != sum(plan.tokens_AM[self._parts.rank]):
            raise TransportError(f"the plan of step {plan.step} is not what this rank proposed")
        drafting = self._parts.drafting
        plans_ahead = drafting is None or drafting.is_resting  # drafts follow on what a step brings
        if plans_ahead:
            self._propose(owed=True)
        self._execute(step, plan)
        if not plans_ahead:
            self._propose(owed=True)

    def _run_own_step(self) -> None:
        began_s = time.perf_counter()
        step = self._scheduler.schedule()
        self._host_seconds["plan"] += time.perf_counter() - began_s
        if step is None:
            return
        tokens_M = split_evenly(step.num_tokens, 1)
        plan = StepPlan(self._parts.epoch, self._next_step, False, [tokens_M], 0)
        self._next_step += 1
        self._execute(step, plan)

    def _execute(self, step: ScheduledStep, plan: StepPlan) -> None:
        parts, self._was_busy = self._parts, True
        began_s = time.perf_counter()
        batches = build_batches(
            step.entries,
            page_size=parts.page_size,
            num_micro_batches=len(plan.tokens_AM[parts.rank]),
        )
        self._sampling.start(step)
        parts.exchange.begin_step(plan)
        logits = parts.decoder.forward(batches, parts.exchange)
        parts.exchange.end_step()
        forward_s = time.perf_counter()
        self._sampling.finish(step, logits)
        sampled_s = time.perf_counter()
        seconds = self._host_seconds
        seconds["forward"] += forward_s - began_s
        seconds["sample"] += sampled_s - forward_s
        events = self._scheduler.complete(step)
        self.num_steps += 1
        self._deliver(events, step=plan.step)
        self._report_counts()
        delivered_s = time.perf_counter()
        seconds["deliver"] += delivered_s - sampled_s
        if parts.drafting is not None:
            parts.drafting.after(step, batches)
            seconds["sample"] += time.perf_counter() - delivered_s

    def _deliver(self, events: list[TokenEvent], *, step: int | None) -> None:
        if not events and step is None:
            return
        # The router first, so that it knows of an end before a reader can act on it.
        self._report_step(events, step)
        by_ingress: dict[str, list[TokenEvent]] = {}
        for event in events:
            ingress_id = self._ingress_of.get(event.request_id)
            if ingress_id is not None:
                by_ingress.setdefault(ingress_id, []).append(event)
            if event.finish_reason is not None:
                self._ingress_of.pop(event.request_id, None)
        for ingress_id, of_ingress in by_ingress.items():
            message = StepEvents(self._parts.epoch, self._parts.rank, of_ingress)
            if not self._parts.tokens.send(ingress_id, message):
                for event in of_ingress:
                    self._scheduler.cancel(event.request_id)

    def _report_step(self, events: list[TokenEvent], step: int | None) -> None:
        added, dropped = self._scheduler.cache_changes()
        self._send(
            StepDone(
                epoch=self._parts.epoch,
                rank=self._parts.rank,
                step=step,
                outputs=[(event.request_id, event.token_ids) for event in events],
                finished=[event.request_id for event in events if event.finish_reason],
                load=self._scheduler.load(),
                cached_pages=added,
                dropped_pages=dropped,
                seconds=self._parts.stages.counted(),
            )
        )

    def _report_counts(self) -> None:
        take_counts, now_s = self._parts.take_counts, time.monotonic()
        if take_counts is not None and now_s - self._reported_s > _REPORT_EVERY_S:
            self._reported_s = now_s
            self._send(ExpertCounts(self._parts.epoch, self._parts.rank, take_counts(), {}))

    def _send(self, message: Message) -> None:
        self._parts.connection.send(message)
