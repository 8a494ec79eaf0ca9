"""Drafts change when tokens come, never which: scheduler, rounds and rules under any guesses."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest
from engine_fakes import EOS, VOCABULARY, FakeDevice, make_progress, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rules import BEGIN, END, grammar_rules, thinking_rules

from ostro.actors.engine.effort import ThinkingTracker
from ostro.actors.engine.forced_drafts import draft_forced
from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    GrammarParams,
    RequestProgress,
    SamplingParams,
    ThinkingParams,
    TokenEvent,
)
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import SampledToken, ScheduledStep
from ostro.actors.engine.token_rules import begin, holds_for, observe, sampling_state
from ostro.configs.deployment import EngineConfig
from ostro.configs.speculation import DraftMethod, SpeculationConfig

_ON = SpeculationConfig(method=DraftMethod.NGRAM)

DraftOf = Callable[[RequestProgress], list[int]]


class _Shard:
    """Scheduler and device; `draft_of` says what is guessed of a request after each step."""

    def __init__(
        self,
        draft_of: DraftOf | None,
        *,
        num_pages: int = 64,
        draws_forced: bool = False,
        **engine: int,
    ) -> None:
        config = EngineConfig(
            page_size=2,
            max_tokens_per_step=engine.pop("max_tokens_per_step", 32),
            max_running_requests=engine.pop("max_running_requests", 8),
            prefix_cache=bool(engine.pop("prefix_cache", 0)),
            speculation=None if draft_of is None else _ON,
            **engine,
        )
        self.scheduler = Scheduler(config, num_pages, 100, clock=lambda: 1.0)
        self.device = FakeDevice(config.page_size)
        self.draft_of = draft_of
        self.draws_forced = draws_forced
        self.steps: list[ScheduledStep] = []
        self.events: list[TokenEvent] = []

    def add(self, request: GenerationRequest) -> RequestProgress:
        progress = make_progress(request)
        self.scheduler.add(progress)
        return progress

    def turn(self) -> ScheduledStep:
        step = self.scheduler.schedule()
        assert step is not None
        self.device.run(step, self.scheduler)
        self.events += self.scheduler.complete(step)
        self.scheduler.check_integrity()
        self.steps.append(step)
        if self.draft_of is not None:
            for entry in step.entries:
                entry.progress.draft_token_ids = self.draft_of(entry.progress)
            if self.draws_forced:
                draft_forced(step, 7)
        return step

    def run(self) -> dict[str, TokenEvent]:
        """Everything to its end: per request all of its events as one, and an error apart."""
        while self.scheduler.has_work():
            self.turn()
        self.events += self.scheduler.take_events()
        told: dict[str, TokenEvent] = {}
        for event in self.events:
            name = event.request_id
            if event.finish_reason is FinishReason.ERROR:
                name += " failed"
            before = told.get(name)
            joined = event if before is None else before.joined(event)
            assert joined is not None
            told[name] = msgspec.structs.replace(joined, seconds=None, num_cached_tokens=0)
        return told


def _knows(outputs: dict[str, list[int]]) -> DraftOf:
    """Guesses right, as far as is known."""

    def draft_of(progress: RequestProgress) -> list[int]:
        known = len(progress.output_token_ids)
        return outputs[progress.request_id][known : known + 7]

    return draft_of


_THINKING = thinking_rules(9)
_GRAMMARS = grammar_rules()
_REQUESTS = st.builds(
    make_request,
    prompt=st.lists(st.integers(5, 11), min_size=1, max_size=6),
    max_tokens=st.integers(1, 14),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.sampled_from([(), (9,)]),
    ignore_eos=st.booleans(),
    thinking=st.none() | _THINKING,
    grammar=st.none() | _GRAMMARS,
)


def _named(requests: list[GenerationRequest]) -> list[GenerationRequest]:
    return [
        msgspec.structs.replace(request, request_id=f"r{i}") for i, request in enumerate(requests)
    ]


@given(
    requests=st.lists(_REQUESTS, min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    share_right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    num_pages=st.sampled_from([11, 64]),
    most_per_step=st.sampled_from([4, 9, 32]),
    prefix_cache=st.booleans(),
    draws_forced=st.booleans(),
)
@settings(max_examples=60)
def test_any_drafts_give_the_events_that_none_give(
    requests: list[GenerationRequest],
    seed: int,
    share_right: float,
    num_pages: int,
    most_per_step: int,
    prefix_cache: bool,
    draws_forced: bool,
) -> None:
    sizes = {
        "num_pages": num_pages,
        "max_tokens_per_step": most_per_step,
        "max_running_requests": 4,
        "prefix_cache": prefix_cache,
    }
    plain = _Shard(None, **sizes)
    drawn = random.Random(seed)
    outputs: dict[str, list[int]] = {}

    def draft_of(progress: RequestProgress) -> list[int]:
        known = len(progress.output_token_ids)
        rest = [*outputs[progress.request_id][known : known + drawn.randint(0, 7)], EOS, 9]
        return [
            token if drawn.random() < share_right else drawn.randrange(VOCABULARY) for token in rest
        ]

    drafting = _Shard(draft_of, draws_forced=draws_forced, **sizes)
    for request in _named(requests):
        plain.add(request)
    wanted = plain.run()
    outputs.update((name, event.token_ids) for name, event in wanted.items())
    for request in _named(requests):
        outputs.setdefault(request.request_id, [])
        drafting.add(request)
    assert drafting.run() == wanted
    if (num_pages, most_per_step) == (64, 32):  # nobody waits for anybody
        assert len(drafting.steps) <= len(plain.steps)


def test_right_drafts_come_with_the_next_token_in_one_event() -> None:
    request = make_request(max_tokens=9, ignore_eos=True)
    plain = _Shard(None)
    plain.add(request)
    wanted = plain.run()["r"].token_ids
    shard = _Shard(_knows({"r": wanted}))
    shard.add(request)
    shard.turn()
    shard.turn()
    assert [event.token_ids for event in shard.events] == [wanted[:1], wanted[1:9]]
    assert shard.events[-1].finish_reason is FinishReason.LENGTH
    assert [logprob.token_id for logprob in shard.events[-1].logprobs or ()] == wanted[1:]
    assert shard.device.num_rounds == 2  # one a step: nothing depends on the tokens in between


def test_tokens_after_a_wrong_draft_are_not_those_of_its_logits() -> None:
    request = make_request(max_tokens=6, ignore_eos=True)
    plain = _Shard(None)
    plain.add(request)
    wanted = plain.run()["r"].token_ids
    shard = _Shard(lambda _: [*wanted[1:2], (wanted[2] + 1) % VOCABULARY, *wanted[3:5]])
    progress = shard.add(request)
    shard.turn()
    step = shard.turn()
    assert step.num_drafts == 4
    assert progress.output_token_ids == wanted[:3]
    assert progress.num_computed_tokens == progress.num_known_tokens - 1


def test_a_stop_token_among_right_drafts_ends_the_request() -> None:
    shard = _Shard(_knows({"r": [5, 5, 9, 5, 5]}))
    request = make_request(max_tokens=50, stop_token_ids=(9,))
    progress = shard.add(request)
    shard.turn()
    step = shard.scheduler.schedule()
    assert step is not None
    entry = step.entries[0]
    entry.token_ids[1:] = [5, 9, 5, 5][: entry.num_drafts]
    took = [shard.scheduler.accept(entry, SampledToken(token)) for token in (5, 9)]
    (event,) = shard.scheduler.complete(step)
    assert took == [True, False]
    assert (event.token_ids, event.stop_token_id) == ([5, 9], 9)
    assert progress.output_token_ids[1:] == [5, 9]
    assert shard.scheduler.is_idle()


def test_a_request_with_drafts_in_flight_is_not_planned_again() -> None:
    shard = _Shard(lambda _: [5, 5])
    shard.add(make_request(max_tokens=9, ignore_eos=True))
    shard.turn()
    step = shard.scheduler.schedule()
    assert step is not None
    assert step.num_drafts == 2
    assert shard.scheduler.schedule() is None


def test_drafts_of_a_request_that_is_cancelled_in_flight_are_not_counted() -> None:
    shard = _Shard(lambda _: [7] * 3)
    shard.add(make_request(max_tokens=20, ignore_eos=True))
    shard.turn()
    step = shard.scheduler.schedule()
    assert step is not None
    assert step.num_drafts == 3
    shard.scheduler.cancel("r")
    shard.device.run(step, shard.scheduler)
    (event,) = shard.scheduler.complete(step)
    assert (event.token_ids, event.finish_reason) == ([], FinishReason.CANCELLED)
    assert shard.scheduler.load().num_drafted == ()
    assert shard.scheduler.load().num_free_pages == 64
    shard.scheduler.check_integrity()


def test_drafts_are_cut_to_the_tokens_that_may_still_come() -> None:
    shard = _Shard(lambda _: [5] * 7)
    shard.add(make_request(max_tokens=4, ignore_eos=True))
    shard.turn()
    assert shard.turn().num_drafts == 2  # and the one that is sampled after them


def test_a_page_that_ends_with_a_wrong_draft_is_not_cached() -> None:
    """Slots 4 and 5 hold the first output and a wrong draft of the second one, which ends it."""
    plain = _Shard(None)
    plain.add(make_request("r", [7, 8, 9, 6], max_tokens=3, ignore_eos=True))
    wanted = plain.run()["r"].token_ids
    shard = _Shard(lambda _: [(wanted[1] + 1) % VOCABULARY, 5], prefix_cache=1)
    shard.add(make_request("r", [7, 8, 9, 6], max_tokens=3, ignore_eos=True))
    shard.turn()
    assert shard.turn().num_drafts == 1
    shard.scheduler.cancel("r")
    follows = shard.add(make_request("follows", [7, 8, 9, 6, *wanted[:2], 5]))
    shard.turn()  # the device checks what is read
    assert follows.num_cached_tokens == 4


# ---- room for drafts


def test_prompts_come_before_drafts_in_the_budget() -> None:
    shard = _Shard(lambda _: [5, 5, 5], max_tokens_per_step=6, max_running_requests=4)
    shard.add(make_request("first", max_tokens=20, ignore_eos=True))
    shard.turn()
    shard.add(make_request("long", [6] * 9))
    step = shard.turn()
    assert [(e.progress.request_id, e.num_tokens) for e in step.entries] == [
        ("first", 1),
        ("long", 5),
    ]
    assert (step.num_drafts, shard.turn().num_drafts) == (0, 1)


def test_drafts_leave_every_running_request_a_page_to_go_on() -> None:
    shard = _Shard(None, num_pages=12)
    for name in ("a", "b", "c"):
        shard.add(make_request(name, [7, 8, 9], max_tokens=40, ignore_eos=True))
    shard.turn()
    progress = shard.scheduler._roster.running[0]
    num_tokens = progress.num_tokens
    while shard.scheduler.grow_for_drafts(progress, num_tokens):
        num_tokens += 1
    assert shard.scheduler.load().num_free_pages == 3
    shard.run()
    assert not shard.scheduler.grow_for_drafts(progress, 1)  # it has ended


def test_drafts_preempt_nobody() -> None:
    def num_preemptions(draft_of: DraftOf | None) -> int:
        shard = _Shard(draft_of, num_pages=9)
        for name in ("a", "b"):
            shard.add(make_request(name, [7, 8, 9, 6], max_tokens=9, ignore_eos=True))
        shard.run()
        return shard.scheduler.load().num_preemptions

    assert num_preemptions(lambda _: [5] * 7) == num_preemptions(None)


def test_drafts_take_no_page_while_a_request_waits_for_some() -> None:
    shard = _Shard(lambda _: [5] * 7, num_pages=8)
    shard.add(make_request("runs", [7, 8, 9], max_tokens=8, ignore_eos=True))
    shard.turn()
    shard.add(make_request("waits", [6] * 14, max_tokens=2))
    free = shard.scheduler.load().num_free_pages
    step = shard.turn()
    assert shard.scheduler.load().num_free_pages >= free - 1
    assert step.num_drafts <= 1  # what fits into the page of the next token


def test_tenants_pay_for_what_came_out_and_not_for_drafts() -> None:
    def had(draft_of: DraftOf | None) -> tuple[int, int]:
        shard = _Shard(draft_of)
        for tenant in "ab":
            shard.add(make_request(tenant, max_tokens=9, ignore_eos=True, tenant=tenant))
        shard.turn()
        while len(shard.scheduler._roster) == 2:
            shard.turn()
        shares = shard.scheduler._roster.shares
        return shares.level("a"), shares.level("b")

    plain = _Shard(None)
    for tenant in "ab":
        plain.add(make_request(tenant, max_tokens=9, ignore_eos=True, tenant=tenant))
    outputs = {name: event.token_ids for name, event in plain.run().items()}
    assert had(_knows(outputs)) == had(lambda _: [0, 0, 0]) == had(None)


def test_planning_without_speculation_heeds_no_drafts() -> None:
    shard = _Shard(None)
    progress = shard.add(make_request(ignore_eos=True))
    shard.turn()
    progress.draft_token_ids = [5, 5]
    assert shard.turn().num_drafts == 0


# ---- drafts that rules force


def _nothing(progress: RequestProgress) -> list[int]:
    return []


def test_the_text_that_a_grammar_forces_comes_in_one_step() -> None:
    shard = _Shard(_nothing, draws_forced=True)
    progress = shard.add(
        make_request(max_tokens=20, grammar=GrammarParams(text='start: /[ab]/ "cdefg" /[ab]/'))
    )
    told = shard.run()["r"]
    assert told.token_ids[1:6] == [7, 8, 9, 10, 11]
    assert progress.grammar is not None
    assert progress.grammar.is_complete
    assert [step.num_drafts for step in shard.steps] == [0, 5]


def test_guesses_that_begin_with_what_is_forced_go_on_after_it() -> None:
    text = [7, 8, 9, 10, 11]
    grammar = GrammarParams(text='start: /[ab]/ "cdefg" /[ab]{9}/')

    def drafted(guesses: list[int]) -> int:
        shard = _Shard(lambda _: guesses, draws_forced=True)
        shard.add(make_request(max_tokens=20, grammar=grammar))
        shard.turn()
        return shard.turn().num_drafts

    assert drafted([*text, 5, 6]) == 7
    assert drafted(text[:3]) == drafted([7, 5, 5, 5, 5, 5, 5]) == drafted([]) == 5


def test_a_closing_phrase_comes_in_one_step() -> None:
    thinking = ThinkingParams(
        begin_token_id=BEGIN,
        end_token_id=END,
        budget_tokens=5,
        closing_token_ids=(5, 6, 7, 8, END),  # all of the budget but one
        starts_open=True,
    )
    request = make_request(max_tokens=9, ignore_eos=True, thinking=thinking)
    plain = _Shard(None)
    plain.add(request)
    wanted = plain.run()["r"]
    shard = _Shard(_nothing, draws_forced=True)
    shard.add(request)
    told = shard.run()["r"]
    assert told == wanted
    assert (told.thinking_ended_by, told.token_ids[1:6]) == ("budget", [5, 6, 7, 8, END])
    assert [step.num_drafts for step in shard.steps[:2]] == [0, 5]


def test_guesses_that_a_grammar_refuses_are_not_verified() -> None:
    shard = _Shard(lambda _: [5, 6, 11, 5], draws_forced=True)
    shard.add(make_request(max_tokens=20, grammar=GrammarParams(text="start: /[ab]{3,9}/")))
    shard.turn()
    assert shard.turn().num_drafts == 2


# ---- rules that hold for several tokens


@given(
    request=_REQUESTS,
    output=st.lists(st.integers(0, VOCABULARY - 1), max_size=8),
    following=st.lists(st.integers(0, VOCABULARY - 1), max_size=7),
)
@settings(max_examples=300)
def test_what_holds_for_several_tokens_holds_whatever_they_are(
    request: GenerationRequest, output: list[int], following: list[int]
) -> None:
    progress = make_progress(msgspec.structs.replace(request, grammar=None))
    begin(progress)

    def take(token_id: int) -> bool:
        """Whether the token may come at all."""
        state = sampling_state(progress)
        may_come = (
            token_id not in state.banned_token_ids if state.forced_token_id is None else False
        )
        if may_come:
            progress.output_token_ids.append(token_id)
            observe(progress, token_id)
        return may_come

    for token_id in output:
        take(token_id)
    if not holds_for(progress, len(following)):
        return
    state = sampling_state(progress)
    for token_id in following:
        if not take(token_id):
            return
        assert sampling_state(progress) == state


@pytest.mark.parametrize(("num_thinking", "most"), [(0, 4), (3, 1), (4, 0), (5, -1)], ids=str)
def test_a_budget_leaves_tokens_free_up_to_its_soft_zone(num_thinking: int, most: int) -> None:
    tracker = ThinkingTracker(
        ThinkingParams(
            begin_token_id=BEGIN,
            end_token_id=END,
            budget_tokens=6,
            soft_zone_tokens=2,
            starts_open=True,
        )
    )
    for _ in range(num_thinking):
        tracker.observe(7)
    assert [tracker.leaves_free(count) for count in range(6)] == [
        count <= most for count in range(6)
    ]


def test_penalties_and_grammars_take_their_tokens_one_by_one() -> None:
    plain = make_request()
    penalised = msgspec.structs.replace(plain, sampling=SamplingParams(presence_penalty=1.0))
    held = make_request(grammar=GrammarParams(text="start: /.+/"))
    assert [holds_for(make_progress(r), 1) for r in (plain, penalised, held)] == [
        True,
        False,
        False,
    ]
