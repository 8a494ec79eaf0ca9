"""Random lives of many requests: whatever happens, outputs are right and no page is lost."""

from __future__ import annotations

from collections import deque
from enum import Enum, auto
from itertools import count

import msgspec
import pytest
from engine_fakes import (
    EOS,
    VOCABULARY,
    FakeDevice,
    expected_generation,
    make_fake_image,
    make_progress,
    make_request,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from random_rules import grammar_rules, thinking_rules

from ostro.actors.engine.choices import each_choice
from ostro.actors.engine.effort import ThinkingTracker
from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    GrammarParams,
    ImageInput,
    RequestProgress,
    ThinkingParams,
    TokenEvent,
)
from ostro.actors.engine.request_pages import RequestPages
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import ScheduledStep
from ostro.actors.errors import InvalidRequestError
from ostro.configs.deployment import EngineConfig
from ostro.configs.speculation import DraftMethod, SpeculationConfig

_MOST_DRAFTS = 5
_SPECULATION = SpeculationConfig(method=DraftMethod.NGRAM, num_draft_tokens=_MOST_DRAFTS)

# Few distinct beginnings, so that prefixes are often shared.
_PROMPTS = st.builds(
    lambda head, tail: [*head, *tail],
    st.sampled_from([(), (5, 6, 7, 8), (5, 6, 7, 8, 9, 10, 11, 5), (9,) * 6]),
    st.lists(st.integers(5, 11), min_size=1, max_size=6),
)
_TENANTS = st.sampled_from(["", "", "a", "b"])
_THINKING = thinking_rules(6)
_GRAMMARS = grammar_rules(prefixes=((), (), (5,)), held=((), (2,), (2, 7, 8)))


def _images(shown: tuple[int, int, int] | None, num_tokens: int) -> tuple[ImageInput, ...]:
    """An image given by (start, tokens, mark), as far as the prompt reaches."""
    if shown is None or shown[0] >= num_tokens:
        return ()
    start, length, mark = shown
    return (make_fake_image(start, min(length, num_tokens - start), mark),)


def _with_thinking(request: GenerationRequest, *, ended_by_caller: bool) -> GenerationRequest:
    if request.thinking is None:
        return request
    thinking = msgspec.structs.replace(request.thinking, ended_by_caller=ended_by_caller)
    return msgspec.structs.replace(request, thinking=thinking)


def _shown(thinking: ThinkingTracker | None) -> tuple[object, ...]:
    """What callers see of it."""
    if thinking is None:
        return ()
    return thinking.is_open, thinking.num_thinking_tokens, thinking.ended_by


class Guess(Enum):
    """How good drafts are."""

    RIGHT = auto()
    MIXED = auto()
    WRONG = auto()
    BEYOND = auto()

    def drafts(self, rest: list[int], known: int) -> list[int]:
        """Drafts of a request with so many known outputs, of which these follow."""
        if self is Guess.RIGHT:
            return list(rest)
        if self is Guess.BEYOND:  # more than there will be, and end marks too
            return [*rest, EOS, 9, 7, 7, 7]
        keep = 0 if self is Guess.WRONG else known * 7 % 4
        return [token if i < keep else (token + 1) % VOCABULARY for i, token in enumerate(rest)]


class RandomLives(RuleBasedStateMachine):
    """Callers, scheduler and device, in any order that the contract allows."""

    @initialize(
        page_size=st.integers(1, 4),
        num_pages=st.integers(5, 16),
        max_tokens_per_step=st.integers(1, 9),
        max_running=st.integers(1, 5),
        max_context=st.integers(8, 40),
        prefix_cache=st.booleans(),
        num_ahead=st.integers(0, 2),
        guess=st.sampled_from([None, None, *Guess]),
    )
    def start(
        self,
        page_size: int,
        num_pages: int,
        max_tokens_per_step: int,
        max_running: int,
        max_context: int,
        prefix_cache: bool,
        num_ahead: int,
        guess: Guess | None,
    ) -> None:
        self.guess = guess
        self.config = EngineConfig(
            page_size=page_size,
            max_tokens_per_step=max_tokens_per_step,
            max_running_requests=min(max_running, max_tokens_per_step),
            prefix_cache=prefix_cache,
            speculation=None if guess is None else _SPECULATION,
        )
        self.max_context, self.num_pages = max_context, num_pages
        self.num_slots = num_pages * page_size
        self.num_ahead = num_ahead
        self.scheduler = self._make_scheduler(None)
        self.device = FakeDevice(page_size)
        self.in_flight: deque[ScheduledStep] = deque()
        self.lives: dict[str, RequestProgress] = {}
        self.num_given: dict[str, int] = {}
        self.heard: dict[str, list[int]] = {}
        self.ended: dict[str, TokenEvent] = {}
        self.steered: set[str] = set()
        self.left_behind: set[str] = set()  # ended, maybe with a step in flight that was lost
        self.num_heard = 0
        self.cached: set[int] = set()
        self.whole: dict[str, tuple[list[int], FinishReason]] = {}

    # ---- what callers do

    @rule(
        prompt=_PROMPTS,
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 3),
        stop_token_ids=st.sampled_from([(), (9,)]),
        ignore_eos=st.booleans(),
        thinking=st.none() | _THINKING,
        grammar=st.none() | _GRAMMARS,
        salt=st.sampled_from(["", "", "a"]),
        shown=st.none() | st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 3)),
        scheduling_class=st.integers(0, 2),
        tenant=_TENANTS,
        share_given=st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.0]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        min_tokens: int,
        stop_token_ids: tuple[int, ...],
        ignore_eos: bool,
        thinking: ThinkingParams | None,
        grammar: GrammarParams | None,
        salt: str,
        shown: tuple[int, int, int] | None,
        scheduling_class: int,
        tenant: str,
        share_given: float,
    ) -> None:
        request = make_request(
            f"r{len(self.lives)}",
            prompt,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            thinking=thinking,
            grammar=grammar,
            cache_salt=salt,
            scheduling_class=scheduling_class,
            tenant=tenant,
            images=_images(shown, len(prompt)),
        )
        if len(prompt) + 1 > min(self.max_context, self.num_slots):
            with pytest.raises(InvalidRequestError):
                self.scheduler.add(RequestProgress(request, arrived_s=0.0))
            return
        output, _ = self._expected(request)
        given = output[: int(len(output) * share_given)]
        progress = make_progress(request, *given)
        self.lives[request.request_id] = progress
        self.num_given[request.request_id] = len(given)
        self.heard[request.request_id] = []
        self.scheduler.add(progress)

    @precondition(lambda self: len(self.lives) - len(self.ended) < 12)
    @rule(size=st.integers(2, 5), head=_PROMPTS, max_tokens=st.integers(6, 16), tenant=_TENANTS)
    def add_crowd(self, size: int, head: list[int], max_tokens: int, tenant: str) -> None:
        """Several requests with one beginning, which together want more pages than there are."""
        for tail in range(size):
            self.add(
                prompt=[*head, 5 + tail],
                max_tokens=max_tokens,
                min_tokens=0,
                stop_token_ids=(),
                ignore_eos=True,
                thinking=None,
                grammar=None,
                salt="",
                shown=(0, 3, 1 + tail % 2),
                scheduling_class=tail % 2,
                tenant=tenant,
                share_given=0.0,
            )

    @precondition(lambda self: len(self.lives) - len(self.ended) < 12)
    @rule(prompt=_PROMPTS, num_choices=st.integers(2, 4), max_tokens=st.integers(1, 12))
    def add_choices(self, prompt: list[int], num_choices: int, max_tokens: int) -> None:
        """Several answers from one prompt."""
        if len(prompt) + 1 > min(self.max_context, self.num_slots):
            return
        request = msgspec.structs.replace(
            make_request(f"r{len(self.lives)}", prompt, max_tokens=max_tokens),
            num_choices=num_choices,
        )
        choices = [RequestProgress(choice, arrived_s=0.0) for choice in each_choice(request)]
        for choice in choices:
            self.lives[choice.request_id] = choice
            self.num_given[choice.request_id] = 0
            self.heard[choice.request_id] = []
        self.scheduler.add(*choices)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.lives)))
        is_here = self.scheduler.cancel(request_id)
        self._hear(self.scheduler.take_events())
        assert request_id in self.ended
        if is_here:
            assert self.ended[request_id].finish_reason is FinishReason.CANCELLED

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def end_thinking(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.lives)))
        if self.scheduler.end_thinking(request_id):
            self.steered.add(request_id)

    # ---- what the shard does

    @precondition(lambda self: len(self.in_flight) <= self.num_ahead)
    @rule()
    def schedule(self) -> None:
        step = self.scheduler.schedule()
        if step is None:
            self._hear(self.scheduler.take_events())
            assert self.in_flight or not self.scheduler.has_work(), "stuck"
            return
        self._check_step(step)
        self.in_flight.append(step)

    @precondition(lambda self: self.in_flight)
    @rule()
    def complete(self) -> None:
        step = self.in_flight.popleft()
        self.device.run(step, self.scheduler)
        self._hear(self.scheduler.complete(step))
        self._draft(step)

    def _draft(self, step: ScheduledStep) -> None:
        if self.guess is None:
            return
        for entry in step.entries:
            progress = entry.progress
            known = len(progress.output_token_ids)
            rest = self._expected(progress.request)[0][known : known + _MOST_DRAFTS]
            progress.draft_token_ids = self.guess.drafts(rest, known)

    @rule(num_turns=st.integers(1, 12))
    def turn(self, num_turns: int) -> None:
        """Many steps at once, for lives long enough to be interesting."""
        for _ in range(num_turns):
            while len(self.in_flight) <= self.num_ahead and self.scheduler.has_work():
                num_before = len(self.in_flight)
                self.schedule()
                if len(self.in_flight) == num_before:
                    break
            if self.in_flight:
                self.complete()

    @rule(is_written=st.booleans())
    def lose_the_epoch(self, is_written: bool) -> None:
        """Steps in flight come to nothing, the first may have written; requests go on elsewhere."""
        if self.in_flight and is_written:
            self.device.run(self.in_flight[0])
        self.in_flight.clear()
        self.left_behind |= self.ended.keys()
        self.scheduler = self._make_scheduler(self.scheduler.give_up())
        self.cached = set()
        for request_id, progress in self.lives.items():
            if request_id not in self.ended:
                given, _ = self._expected(progress.request)
                known = given[: self.num_given[request_id]] + self.heard[request_id]
                before = progress.thinking
                is_ending = request_id in self.steered and before.ended_by in (None, "caller")
                request = _with_thinking(progress.request, ended_by_caller=is_ending)
                self.lives[request_id] = make_progress(request, *known)
                self.scheduler.add(self.lives[request_id])
                assert _shown(self.lives[request_id].thinking) == _shown(before)

    def _make_scheduler(self, pages: RequestPages | None) -> Scheduler:
        clock = count(1.0)
        return Scheduler(
            self.config,
            self.num_pages,
            self.max_context,
            clock=lambda: next(clock),
            pages=pages,
        )

    # ---- what must hold

    @invariant()
    def no_page_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    @invariant()
    def cache_changes_add_up(self) -> None:
        if hasattr(self, "scheduler"):
            added, dropped = self.scheduler.cache_changes()
            assert not self.cached & set(added)
            assert self.cached >= set(dropped)
            self.cached = (self.cached | set(added)) - set(dropped)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        num_idle_turns = num_heard = 0
        while self.scheduler.has_work() or self.in_flight:
            self.turn(1)
            num_idle_turns += 1
            if self.num_heard != num_heard:
                num_idle_turns, num_heard = 0, self.num_heard
            # The oldest request computes at least a token a turn, and none is longer than this.
            assert num_idle_turns <= self.num_slots + 4, "starved"
        self._hear(self.scheduler.take_events())
        assert self.scheduler.is_idle()
        self.scheduler.check_integrity()
        load = self.scheduler.load()
        assert load.num_free_pages == load.num_pages
        assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (0, 0, 0)
        for request_id, progress in self.lives.items():
            self._check_life(request_id, progress)

    def _expected(self, request: GenerationRequest) -> tuple[list[int], FinishReason]:
        if request.request_id not in self.whole:
            longest = min(self.max_context, self.num_slots)
            whole = _with_thinking(request, ended_by_caller=False)
            self.whole[request.request_id] = expected_generation(whole, max_context=longest)
        return self.whole[request.request_id]

    def _check_step(self, step: ScheduledStep) -> None:
        assert step.num_tokens == sum(entry.num_tokens for entry in step.entries)
        assert 0 < step.num_tokens <= self.config.max_tokens_per_step
        assert len(step.entries) <= self.config.max_running_requests
        ids = [entry.progress.request_id for entry in step.entries]
        assert len(set(ids)) == len(ids)
        page_size = self.config.page_size
        for index, entry in enumerate(step.entries):
            end = entry.start + entry.num_tokens
            writes = set(entry.pages[entry.start // page_size : -(-end // page_size)])
            fills = set(entry.pages[: (end - entry.num_drafts) // page_size])
            readers = [later.progress for later in step.entries[index + 1 :]]
            assert len(entry.pages) * page_size >= end
            assert entry.num_tokens > 0
            # The last token of a request is sampled, but never computed.
            stop = entry.progress.request.stop
            assert end < entry.progress.num_prompt_tokens + stop.max_tokens
            assert end < self.max_context
            for other in self.lives.values():
                shared = writes & set(other.pages) if other is not entry.progress else set()
                assert shared <= fills, "a page that will be written again is shared"
                assert not shared or other in readers, "a page is shared before it is written"

    def _hear(self, events: list[TokenEvent]) -> None:
        self.num_heard += len(events)
        for event in events:
            assert event.request_id not in self.ended, "an event after the last"
            heard = self.heard[event.request_id]
            assert event.first_index == self.num_given[event.request_id] + len(heard)
            first = self.lives[event.request_id].num_prompt_tokens + event.first_index
            told = [(logprob.token_id, -logprob.logprob) for logprob in event.logprobs or ()]
            assert told == [(token, first + i) for i, token in enumerate(event.token_ids)]
            heard.extend(event.token_ids)
            if event.finish_reason is not None:
                self.ended[event.request_id] = event

    def _check_life(self, request_id: str, progress: RequestProgress) -> None:
        output, reason = self._expected(progress.request)
        heard = output[: self.num_given[request_id]] + self.heard[request_id]
        assert progress.output_token_ids == heard
        if request_id not in self.left_behind:
            assert progress.num_in_flight == progress.num_pending_outputs == 0
        end = self.ended[request_id]
        if request_id in self.steered:
            return
        assert heard == output[: len(heard)]
        if end.finish_reason is not FinishReason.CANCELLED:
            assert (heard, end.finish_reason) == (output, reason)
        if progress.grammar is None:
            assert (end.stop_token_id is not None) == (
                end.finish_reason is FinishReason.STOP and bool(self.heard[request_id])
            )


TestRandomLives = RandomLives.TestCase
TestRandomLives.settings = settings(settings.default, max_examples=100, stateful_step_count=40)
