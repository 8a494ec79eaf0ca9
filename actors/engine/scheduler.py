"""The scheduler of one attention shard: which tokens of which requests the next step computes.

There is one rule. A request's step computes `num_tokens - num_computed_tokens` tokens, cut to the
step's budget: all of a prompt, a chunk of it, the rest after a prefix hit, everything again after
a preemption, or one token while decoding.

Planning is optimistic, so that it may run ahead of the device: `schedule()` counts what it plans
as computed, and a token that a planned step has yet to sample as there. Pages of prompts are shared
at once, within the step too: it writes latents in the order of its entries, before they are read.
`complete()` brings the results in, in order; those of a request that ended meanwhile are dropped,
and its pages are held until no planned step refers to it any more.

A decode may be followed by drafts of what comes next (`draft_room`). Their outputs come one by one,
each under the request's state after the one before; the first that no draft equals is the last.
Until they are in, nothing more is planned for the request.

Every event is delivered once, by whichever of `complete()` and `take_events()` is called first.
One thread calls everything. Nothing here knows the device, the model or the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ostro.actors.engine.admission import AdmissionPolicy, check_servable
from ostro.actors.engine.draft_room import DraftRoom
from ostro.actors.engine.fairness import OUTPUT_WEIGHT, youngest_victim
from ostro.actors.engine.request import FinishReason, RequestProgress, RequestState, TokenEvent
from ostro.actors.engine.request_pages import RequestPages
from ostro.actors.engine.roster import Roster
from ostro.actors.engine.step import (
    Busy,
    SampledToken,
    ScheduledRequest,
    ScheduledStep,
    ShardLoad,
    Totals,
    error_event,
    outputs_event,
    token_event,
)
from ostro.actors.engine.step_budget import StepBudget
from ostro.actors.engine.step_ledger import StepLedger
from ostro.actors.engine.stopwatch import Stopwatch
from ostro.actors.engine.token_rules import begin, observe, reason_to_end
from ostro.actors.errors import InvalidRequestError
from ostro.configs.deployment import EngineConfig

_RUNNING, _FINISHED = RequestState.RUNNING, RequestState.FINISHED


class Scheduler:
    """Plans steps for the requests of one shard; see the module's text.

    Waiting requests are ordered by tenant (`fairness`), then (scheduling_class, arrival), running
    ones by arrival. When pages run out, the youngest running request is preempted: the oldest
    always advances. A tenant beyond its share makes room for one that waits below its own.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        max_context: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        stages: Callable[[], Mapping[str, float]] = dict,
        pages: RequestPages | None = None,
    ) -> None:
        self._config = config
        self._clock, self._stages = clock, stages
        size, cached = config.page_size, config.prefix_cache
        self._pages = pages or RequestPages(num_pages, size, prefix_cache=cached)
        # One request alone may fill the cache.
        self._longest = min(max_context, self._pages.num_slots)
        self._admission = AdmissionPolicy(config.max_waiting_requests, config.max_waiting_tokens)
        self._roster = Roster(self._pages)
        self._shares, self._waiting = self._roster.shares, self._roster.waiting
        self._running = self._roster.running
        self._drafts = DraftRoom(self._roster, self._pages, config.max_tokens_per_step)
        self._events: list[TokenEvent] = []
        self._blocked = (-1, -1)
        self._steps = StepLedger(StepBudget(config))
        self._totals = Totals()

    # ---- what callers ask for

    def add(self, first: RequestProgress, *others: RequestProgress) -> None:
        """Queue the choices of one prompt, all or none; or one that has output from elsewhere.

        Raises:
            InvalidRequestError: They can never be served.
            OverloadedError: Too much waits already.
        """
        choices = (first, *others)
        if any(self._roster.find(progress.request_id) for progress in choices):
            raise InvalidRequestError(
                "this request_id is in use", code="duplicate_request_id", param="request_id"
            )
        check_servable(first, self._longest)
        if not first.is_resumed:
            self._admission.check(*self._waiting.beside(first))
        for progress in choices:
            self._enter(progress)

    def _enter(self, progress: RequestProgress) -> None:
        progress.max_num_tokens = min(progress.max_num_tokens, self._longest)
        begin(progress)
        self._roster.enter(progress)
        if (reason := reason_to_end(progress)) is not None:
            self._end(progress, reason)

    def cancel(self, request_id: str) -> bool:
        """End a request with a CANCELLED event; False if it is not here (any more)."""
        progress = self._roster.find(request_id)
        if progress is None:
            return False
        self._end(progress, FinishReason.CANCELLED)
        return True

    def end_thinking(self, request_id: str) -> bool:
        """Close a request's thinking from its next token on; False if there is none to close."""
        progress = self._roster.find(request_id)
        if progress is None or progress.thinking is None:
            return False
        return progress.thinking.end_now()

    # ---- steps

    def schedule(self) -> ScheduledStep | None:
        """Plan the next step, or None if nothing can advance before results come in."""
        step = self._steps.begin(self._clock())
        if self._waiting and self._shares.contended:
            self._give_way(step)
        prefilling = self._schedule_decodes(step)
        step.num_decodes = len(step.entries)
        step.budget = self._steps.budget.beside(step.num_decodes)
        num_promised = 0
        if self._shares.contended and prefilling:
            least = self._shares.order(prefilling)
            num_promised = self._schedule_waiting(step, self._pages.lacking(prefilling), least)
        self._schedule_prefills(step, prefilling)
        self._schedule_waiting(step, self._pages.lacking(prefilling) + num_promised)
        if not step.entries:
            self._steps.drop()
            return None
        if not self._shares.contended:
            self._shares.charge_alone(step)
        if self._config.speculation is not None:
            self._drafts.place(step)
        return step

    def accept(self, entry: ScheduledRequest, sampled: SampledToken) -> bool:
        """Bring in the next token of an entry that samples; `complete` follows when all are in.

        Returns:
            Whether the entry's next draft was right, so that the token after it is wanted too.
        """
        progress, token_id = entry.progress, sampled.token_id
        if progress.state is _FINISHED:
            return False
        output = progress.output_token_ids
        if (grammar := progress.grammar) is not None and grammar.error is not None:
            if entry.outputs:
                self._events.append(outputs_event(entry, None))
            self._events.append(error_event(progress.request, grammar.error, len(output)))
            self._roster.finish(progress)
            return False
        output.append(token_id)
        self._totals.output_tokens += 1
        observe(progress, token_id)
        reason = reason_to_end(progress)
        if entry.outputs is None:
            logprobs = [sampled.logprob] if sampled.logprob is not None else None
            event = token_event(progress, len(output) - 1, [token_id], logprobs, reason)
            self._events.append(event)
        else:
            entry.outputs.append(sampled)
            if reason is None and entry.is_next_draft_right():
                return True
            self._events.append(outputs_event(entry, reason))
        if reason is not None:
            self._roster.finish(progress)
        return False

    def grow_for_drafts(self, progress: RequestProgress, num_tokens: int) -> bool:
        """Take the pages of a running request for so many tokens; False where others need them."""
        return progress.state is _RUNNING and self._drafts.grow(progress, num_tokens)

    def complete(self, step: ScheduledStep) -> list[TokenEvent]:
        """Bring a step to its end, its tokens having been accepted.

        Returns:
            All events not delivered yet, those of this step among them.

        Raises:
            RuntimeError: An earlier step is not completed yet.
        """
        self._steps.check_next(step)
        num_wasted, publish = 0, self._pages.publish
        for entry in step.entries:
            progress = entry.progress
            end = entry.start + entry.num_tokens
            progress.num_in_flight -= 1
            if entry.num_drafts:
                num_rejected = self._drafts.close(entry)
                if entry.outputs:  # else it ended before any was verified
                    self._totals.verify(entry.num_drafts, entry.num_accepted())
                num_wasted += num_rejected
                end -= num_rejected
            # A request that was preempted meanwhile has another list: its latents are gone.
            if entry.pages is progress.pages:
                publish(progress, end)
            if entry.samples:
                progress.num_pending_outputs -= 1
            if progress.state is _FINISHED:
                self._roster.let_go(progress)
        seconds = self._steps.complete(step, self._clock())
        self._admission.record(step.num_tokens - num_wasted, seconds)
        return self.take_events()

    def take_events(self) -> list[TokenEvent]:
        """Events not delivered yet: of requests that ended between steps, or could not go on."""
        events, self._events = self._events, []
        return events

    # ---- how it stands

    def has_work(self) -> bool:
        """Whether some request wants to advance, now or once results are in."""
        return bool(self._running or self._waiting)

    def is_idle(self) -> bool:
        """Whether there is no request and no step in flight."""
        return not self._roster and not self._steps

    def load(self) -> ShardLoad:
        """Numbers for the router and for metrics."""
        pool, num_waiting = self._pages.pool, len(self._waiting)
        now = Busy(len(self._running), num_waiting, self._waiting.num_tokens, pool.num_free)
        return self._totals.load(now, pool.num_pages)

    def cache_changes(self) -> tuple[list[int], list[int]]:
        """(page hashes that became reusable, page hashes evicted) since the last call."""
        return self._pages.changes()

    def give_up(self) -> RequestPages:
        """End with all requests; the pages, with what is cached, for one that follows on this.

        Raises:
            PageLeakError: The books are wrong.
        """
        self._pages.hand_over(self._roster.holders(), self._steps)
        return self._pages

    def check_integrity(self) -> None:
        """Raise PageLeakError unless every page is free, idle, or held exactly as counted."""
        self._pages.check(self._roster.holders())

    # ---- planning

    def _schedule_decodes(self, step: ScheduledStep) -> list[RequestProgress]:
        """Place the running requests that want one token; returns the others."""
        page_size = self._config.page_size
        prefilling = []
        for progress in tuple(self._running):
            num_tokens = progress.num_tokens
            start = progress.num_computed_tokens
            if num_tokens - start != 1:
                if progress.state is _RUNNING:
                    prefilling.append(progress)
            elif (
                num_tokens < progress.max_num_tokens
                and progress.state is _RUNNING
                and (
                    start < len(progress.pages) * page_size
                    or self._find_pages(step, progress, num_tokens)
                )
            ):
                self._place(step, progress, 1)
        return prefilling

    def _schedule_prefills(self, step: ScheduledStep, prefilling: list[RequestProgress]) -> None:
        for progress in prefilling:
            num_new = self._chunk(step, progress)
            end = progress.num_computed_tokens + num_new
            if num_new > 0 and progress.state is _RUNNING and self._find_pages(step, progress, end):
                self._place(step, progress, num_new)
                self._pages.publish(progress, end)

    def _schedule_waiting(
        self, step: ScheduledStep, num_promised: int, below: int | None = None
    ) -> int:
        """Begin with waiting requests, those of tenants that had less than `below` only.

        Returns:
            Pages that these have yet to take; `num_promised` are to be taken by others.
        """
        num_missing = 0
        while (
            self._waiting
            and not step.preempted
            and len(self._running) < self._config.max_running_requests
            and step.num_tokens < step.budget
        ):
            progress = self._waiting.first()
            had = self._shares.level(progress.request.tenant)
            if progress.num_in_flight or (below is not None and had >= below):
                break
            if not self._admit(progress, num_promised + num_missing):
                break
            num_new = self._chunk(step, progress)
            self._pages.grow(progress, progress.num_computed_tokens + num_new)
            self._place(step, progress, num_new)
            self._pages.publish(progress, progress.num_computed_tokens)
            num_missing += self._pages.missing(progress, progress.num_tokens)
        return num_missing

    def _admit(self, progress: RequestProgress, num_promised: int) -> bool:
        """Let the first waiting request run if there are pages for all of it."""
        pool = self._pages.pool
        if self._is_blocked(progress):
            return False
        num_cached = self._pages.adopt(progress)
        if self._pages.missing(progress, progress.num_tokens) + num_promised > pool.num_free:
            self._pages.release(progress)
            self._blocked = (progress.arrival, pool.num_releases)
            return False
        if progress.state is RequestState.WAITING:
            progress.stopwatch = Stopwatch(self._clock, self._stages, progress.arrived_s)
            self._totals.begin(progress, num_cached)
        self._roster.begin(progress, num_cached)
        return True

    def _is_blocked(self, progress: RequestProgress) -> bool:
        """Whether it lacked pages when it was last tried, and none came free since."""
        return self._blocked == (progress.arrival, self._pages.pool.num_releases)

    def _chunk(self, step: ScheduledStep, progress: RequestProgress) -> int:
        left = step.budget - step.num_tokens
        return min(progress.num_tokens - progress.num_computed_tokens, left)

    def _place(self, step: ScheduledStep, progress: RequestProgress, num_new: int) -> None:
        start = progress.num_computed_tokens
        end = start + num_new
        token_ids: list[int | None] = [*progress.known_tokens(start, end)]
        if len(token_ids) < num_new:
            token_ids.append(None)
        samples = end == progress.num_tokens
        step.entries.append(
            ScheduledRequest(progress, start, num_new, token_ids, progress.pages, samples)
        )
        step.num_tokens += num_new
        progress.num_computed_tokens = end
        progress.num_in_flight += 1
        if self._shares.contended:
            self._shares.charge(progress.request.tenant, num_new + (OUTPUT_WEIGHT - 1) * samples)
        if samples:
            progress.num_pending_outputs += 1

    # ---- when pages or places run out

    def _give_way(self, step: ScheduledStep) -> None:
        """Preempt a request of a tenant beyond its share, if the first waiting one is blocked."""
        first, victim = self._waiting.first(), None
        if self._roster.leaving or first.num_in_flight:
            return
        if len(self._running) >= self._config.max_running_requests:
            victim = self._shares.victim_for_place(first, self._running)
        elif self._is_blocked(first):
            victim = self._shares.victim_for_pages(first, self._running, self._pages)
        if victim is not None:
            self._preempt(step, victim)

    def _find_pages(self, step: ScheduledStep, progress: RequestProgress, num_tokens: int) -> bool:
        """Get a running request pages for so many tokens, from younger ones if need be."""
        while not self._pages.grow(progress, num_tokens):
            victim = youngest_victim(step, self._running, progress)
            if self._roster.leaving or victim is None:
                return False
            self._preempt(step, victim)
            if victim is progress:
                return False
        return True

    def _preempt(self, step: ScheduledStep, progress: RequestProgress) -> None:
        self._roster.preempt(progress)
        self._totals.preemptions += 1
        step.preempted.append(progress.request_id)

    # ---- ends

    def _end(self, progress: RequestProgress, reason: FinishReason) -> None:
        """End a request between its tokens."""
        self._events.append(token_event(progress, len(progress.output_token_ids), [], None, reason))
        self._roster.finish(progress)
