"""What the next step computes, one situation at a time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from engine_fakes import EOS, make_progress, make_request

from ostro.actors.engine.choices import each_choice
from ostro.actors.engine.page_pool import PageLeakError
from ostro.actors.engine.request import (
    GRAMMAR_FAILED,
    FinishReason,
    GenerationRequest,
    GrammarParams,
    RequestProgress,
    RequestState,
    ThinkingParams,
    TokenEvent,
    TokenLogprob,
)
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import SampledToken, ScheduledStep
from ostro.actors.engine.stopwatch import ShardSeconds
from ostro.actors.engine.token_rules import sampling_state
from ostro.actors.errors import InvalidRequestError, OverloadedError
from ostro.configs.deployment import EngineConfig


def _scheduler(
    num_pages: int = 64,
    *,
    page_size: int = 2,
    max_context: int = 100,
    max_tokens_per_step: int = 16,
    max_running_requests: int = 8,
    max_waiting_requests: int = 1024,
    now_s: float = 10.0,
) -> Scheduler:
    config = EngineConfig(
        page_size=page_size,
        max_tokens_per_step=max_tokens_per_step,
        max_running_requests=max_running_requests,
        max_waiting_requests=max_waiting_requests,
    )
    return Scheduler(config, num_pages, max_context, clock=lambda: now_s)


def _add(scheduler: Scheduler, request: GenerationRequest, *output: int) -> RequestProgress:
    progress = RequestProgress(request, arrived_s=7.5, output_token_ids=output or None)
    scheduler.add(progress)
    return progress


def _plan(scheduler: Scheduler) -> ScheduledStep:
    step = scheduler.schedule()
    assert step is not None
    return step


def _complete(scheduler: Scheduler, step: ScheduledStep, token_id: int = 9) -> list[TokenEvent]:
    for entry in step.entries:
        if entry.samples:
            scheduler.accept(entry, SampledToken(token_id))
    events = scheduler.complete(step)
    scheduler.check_integrity()
    return events


def _turn(scheduler: Scheduler, token_id: int = 9) -> list[TokenEvent]:
    return _complete(scheduler, _plan(scheduler), token_id)


def _parts(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(entry.progress.request_id, entry.start, entry.num_tokens) for entry in step.entries]


# ---- one rule


def test_prompt_is_computed_whole_when_the_budget_allows() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request(prompt=[5, 6, 7]))
    step = _plan(scheduler)
    assert _parts(step) == [("r", 0, 3)]
    assert step.entries[0].token_ids == [5, 6, 7]
    assert step.entries[0].samples


def test_prompt_is_computed_in_chunks_and_only_the_last_samples() -> None:
    scheduler = _scheduler(max_tokens_per_step=3, max_running_requests=1)
    _add(scheduler, make_request(prompt=range(5, 12)))
    steps = [_plan(scheduler) for _ in range(3)]
    assert [_parts(step)[0][1:] for step in steps] == [(0, 3), (3, 3), (6, 1)]
    assert [step.entries[0].samples for step in steps] == [False, False, True]


def test_decodes_come_before_prefills_and_the_rest_of_the_budget_is_theirs() -> None:
    scheduler = _scheduler(max_tokens_per_step=4, max_running_requests=4)
    _add(scheduler, make_request("long", range(5, 15)))
    _complete(scheduler, _plan(scheduler))
    _add(scheduler, make_request("next", [5, 6]))
    assert _parts(_plan(scheduler)) == [("long", 4, 4)]
    assert _parts(_plan(scheduler)) == [("long", 8, 2), ("next", 0, 2)]
    assert _parts(_plan(scheduler)) == [("long", 10, 1), ("next", 2, 1)]


def test_younger_decode_comes_before_an_older_prefill() -> None:
    scheduler = _scheduler(max_tokens_per_step=4, max_running_requests=4)
    _add(scheduler, make_request("short", [5], scheduling_class=0))
    _add(scheduler, make_request("long", range(5, 15)))
    assert _parts(_plan(scheduler)) == [("short", 0, 1), ("long", 0, 3)]
    _add(scheduler, make_request("late", [5, 6]))
    assert _parts(_plan(scheduler)) == [("short", 1, 1), ("long", 3, 3)]


def test_waiting_requests_start_by_class_and_then_by_arrival() -> None:
    scheduler = _scheduler(max_running_requests=3)
    for request_id, scheduling_class in (("a", 2), ("b", 0), ("c", 1), ("d", 0)):
        _add(scheduler, make_request(request_id, scheduling_class=scheduling_class))
    assert [part[0] for part in _parts(_plan(scheduler))] == ["b", "d", "c"]


def test_no_more_requests_run_than_allowed() -> None:
    scheduler = _scheduler(max_running_requests=2)
    for request_id in "abc":
        _add(scheduler, make_request(request_id, max_tokens=1))
    step = _plan(scheduler)
    assert [part[0] for part in _parts(step)] == ["a", "b"]
    _complete(scheduler, step)
    assert [part[0] for part in _parts(_plan(scheduler))] == ["c"]


def test_request_that_goes_on_computes_prompt_and_output_again() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request(prompt=[5, 6]), 7, 8)
    step = _plan(scheduler)
    assert step.entries[0].token_ids == [5, 6, 7, 8]
    (event,) = _complete(scheduler, step)
    assert (event.first_index, event.token_ids) == (2, [9])


def test_request_that_had_ended_already_ends_again_without_a_step() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request(max_tokens=2), 7, 8)
    (event,) = scheduler.take_events()
    assert (event.first_index, event.finish_reason) == (2, FinishReason.LENGTH)
    assert scheduler.schedule() is None
    assert scheduler.is_idle()


# ---- one step ahead


def test_next_step_takes_the_token_that_is_still_being_sampled() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request(prompt=[5, 6]))
    first, second = _plan(scheduler), _plan(scheduler)
    assert _parts(second) == [("r", 2, 1)]
    assert second.entries[0].token_ids == [None]
    _complete(scheduler, first)
    assert _plan(scheduler).entries[0].token_ids == [None]


def test_nothing_is_planned_beyond_max_tokens_counting_pending_outputs() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request(max_tokens=2))
    first, second = _plan(scheduler), _plan(scheduler)
    assert scheduler.schedule() is None
    assert scheduler.has_work()
    _complete(scheduler, first)
    (event,) = _complete(scheduler, second)
    assert event.finish_reason is FinishReason.LENGTH
    assert scheduler.is_idle()


def test_nothing_is_planned_beyond_the_models_context() -> None:
    scheduler = _scheduler(max_context=4)
    _add(scheduler, make_request(prompt=[5, 6], max_tokens=9))
    first, second = _plan(scheduler), _plan(scheduler)
    assert scheduler.schedule() is None
    _complete(scheduler, first)
    (event,) = _complete(scheduler, second)
    assert event.finish_reason is FinishReason.MODEL_LENGTH


def test_token_sampled_after_the_end_is_dropped_and_pages_wait_for_it() -> None:
    scheduler = _scheduler(num_pages=4)
    progress = _add(scheduler, make_request(prompt=[5, 6, 7]))
    first, second = _plan(scheduler), _plan(scheduler)
    (event,) = _complete(scheduler, first, EOS)
    assert (event.finish_reason, event.stop_token_id) == (FinishReason.STOP, EOS)
    assert len(progress.pages) == 2
    assert not scheduler.is_idle()
    assert _complete(scheduler, second, 8) == []
    assert not progress.pages
    assert progress.output_token_ids == [EOS]
    assert scheduler.is_idle()


def test_steps_must_come_in_in_order() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request())
    _plan(scheduler)
    second = _plan(scheduler)
    with pytest.raises(RuntimeError, match="step 1 came in before its turn"):
        _complete(scheduler, second)


# ---- prefix cache


def test_second_request_computes_only_what_the_first_did_not() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request("a", range(5, 12)))
    _turn(scheduler)
    _add(scheduler, make_request("b", [*range(5, 11), 3, 4]))
    step = _plan(scheduler)
    assert _parts(step) == [("a", 7, 1), ("b", 6, 2)]
    events = _complete(scheduler, step)
    assert [event.num_cached_tokens for event in events] == [0, 6]
    assert scheduler.load().prefix_hits_tokens == 6


def test_pages_that_a_planned_step_fills_are_shared_by_later_ones() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request("a", range(5, 12)))
    _plan(scheduler)
    _add(scheduler, make_request("b", range(5, 12)))
    assert _parts(_plan(scheduler)) == [("a", 7, 1), ("b", 6, 1)]


def test_prompts_that_come_together_are_computed_once() -> None:
    scheduler = _scheduler()
    for name in "abc":
        _add(scheduler, make_request(name, range(5, 12)))
    assert _parts(_plan(scheduler)) == [("a", 0, 7), ("b", 6, 1), ("c", 6, 1)]


def test_a_long_prompt_is_shared_once_its_last_chunk_is_planned() -> None:
    scheduler = _scheduler(max_tokens_per_step=4, max_running_requests=4)
    for name in "ab":
        _add(scheduler, make_request(name, range(5, 12)))
    assert _parts(_plan(scheduler)) == [("a", 0, 4)]
    assert _parts(_plan(scheduler)) == [("a", 4, 3), ("b", 6, 1)]


def test_a_page_with_an_unknown_token_is_not_shared_yet() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request("a", [5, 6, 7]))
    _plan(scheduler)
    _plan(scheduler)  # its second page holds 7 and a token that is not sampled yet
    _add(scheduler, make_request("b", [5, 6, 7, 9, 8]))
    assert _parts(_plan(scheduler))[1] == ("b", 2, 3)


def test_choices_of_one_prompt_compute_it_once_and_draw_by_their_own_seeds() -> None:
    scheduler = _scheduler()
    request = msgspec.structs.replace(make_request("a#1.4", range(5, 12)), choice=4, num_choices=3)
    choices = [RequestProgress(choice, arrived_s=0.0) for choice in each_choice(request)]
    scheduler.add(*choices)
    step = _plan(scheduler)
    assert _parts(step) == [("a#1.4", 0, 7), ("a#1.5", 6, 1), ("a#1.6", 6, 1)]
    events = _complete(scheduler, step)
    assert [(event.choice, event.num_cached_tokens) for event in events] == [(4, 0), (5, 6), (6, 6)]
    assert len({choice.request.sampling.seed for choice in choices}) == 3


def test_choices_are_admitted_as_one_request() -> None:
    scheduler = _scheduler(max_waiting_requests=2)

    def choices(name: str, num_choices: int) -> list[RequestProgress]:
        request = msgspec.structs.replace(make_request(name), num_choices=num_choices)
        return [RequestProgress(choice, arrived_s=0.0) for choice in each_choice(request)]

    scheduler.add(*choices("a#1.0", 4))
    assert (scheduler.load().num_waiting, scheduler.load().num_waiting_tokens) == (4, 4)
    with pytest.raises(OverloadedError):
        scheduler.add(*choices("b#1.0", 2))
    assert scheduler.load().num_waiting == 4


def test_pages_of_a_finished_request_are_found_again_with_its_output() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request("a", [5, 6, 7], max_tokens=2))
    _turn(scheduler)
    _turn(scheduler)
    _add(scheduler, make_request("b", [5, 6, 7, 9, 9, 4]))
    assert _parts(_plan(scheduler)) == [("b", 4, 2)]


def test_cache_changes_are_told_once() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request(prompt=range(5, 10)))
    _turn(scheduler)
    added, dropped = scheduler.cache_changes()
    assert (len(added), dropped) == (2, [])
    assert scheduler.cache_changes() == ([], [])


# ---- when pages run out


def test_youngest_request_is_preempted_when_pages_run_out() -> None:
    scheduler = _scheduler(num_pages=5)
    old = _add(scheduler, make_request("old", [5, 6, 7, 8], max_tokens=5))
    young = _add(scheduler, make_request("young", [8, 7, 6, 5], max_tokens=5))
    _turn(scheduler)
    step = _plan(scheduler)
    assert _parts(step) == [("old", 4, 1)]
    assert step.preempted == ["young"]
    assert (old.state, young.state) == (RequestState.RUNNING, RequestState.PREEMPTED)
    assert young.num_computed_tokens == 0
    assert scheduler.load().num_preemptions == 1


def test_preempted_request_runs_again_before_younger_ones_and_says_nothing_twice() -> None:
    scheduler = _scheduler(num_pages=5)
    _add(scheduler, make_request("old", [5, 6, 7, 8], max_tokens=3))
    _add(scheduler, make_request("young", [8, 7, 6, 5], max_tokens=3))
    _turn(scheduler)
    _turn(scheduler)
    _add(scheduler, make_request("late", [7]))
    _turn(scheduler)
    step = _plan(scheduler)
    assert [part[0] for part in _parts(step)] == ["young", "late"]
    events = _complete(scheduler, step)
    assert (events[0].first_index, events[0].seconds) == (1, None)


def test_preempted_request_keeps_the_token_that_was_on_its_way() -> None:
    scheduler = _scheduler(num_pages=5)
    _add(scheduler, make_request("old", [5, 6, 7, 8], max_tokens=5))
    young = _add(scheduler, make_request("young", [8, 7, 6, 5], max_tokens=5))
    first = _plan(scheduler)
    second = _plan(scheduler)
    assert second.preempted == ["young"]
    assert scheduler.schedule() is not None
    assert young.state is RequestState.PREEMPTED
    _complete(scheduler, first, 9)
    assert young.output_token_ids == [9]
    assert young.num_in_flight == 0


def test_preempted_request_does_not_run_again_while_its_token_is_on_its_way() -> None:
    scheduler = _scheduler(num_pages=6)
    _add(scheduler, make_request("brief", [5, 6, 7, 8], max_tokens=1))
    _add(scheduler, make_request("old", [6, 7, 8], max_tokens=5))
    _add(scheduler, make_request("young", [7, 8], max_tokens=5))
    first, second, third = _plan(scheduler), _plan(scheduler), _plan(scheduler)
    assert third.preempted == ["young"]
    _complete(scheduler, first)
    assert scheduler.load().num_free_pages == 3
    assert _parts(_plan(scheduler)) == [("old", 5, 1)]
    _complete(scheduler, second)
    assert _parts(_plan(scheduler)) == [("old", 6, 1), ("young", 0, 4)]


def test_request_waits_for_pages_that_a_finished_one_is_about_to_free() -> None:
    scheduler = _scheduler(num_pages=5, page_size=4)
    _add(scheduler, make_request("a", range(20, 31), max_tokens=5))
    _add(scheduler, make_request("b", range(5, 10), max_tokens=5))
    _turn(scheduler)
    step = _plan(scheduler)
    scheduler.cancel("b")
    assert scheduler.schedule() is None
    assert scheduler.load().num_preemptions == 0
    _complete(scheduler, step)
    assert _parts(_plan(scheduler)) == [("a", 12, 1)]


def test_older_prefill_keeps_what_it_has_until_a_younger_decode_yields() -> None:
    scheduler = _scheduler(num_pages=4, max_tokens_per_step=3, max_running_requests=2)
    _add(scheduler, make_request("old", range(20, 26), scheduling_class=1))
    _add(scheduler, make_request("young", [5], max_tokens=9))
    steps = []
    for _ in range(5):
        steps.append(_plan(scheduler))
        _complete(scheduler, steps[-1])
    assert [_parts(step) for step in steps] == [
        [("young", 0, 1), ("old", 0, 2)],
        [("young", 1, 1), ("old", 2, 2)],
        [("young", 2, 1)],
        [("young", 3, 1)],
        [("old", 4, 2)],
    ]
    assert [step.preempted for step in steps] == [[], [], [], [], ["young"]]


def test_request_starts_only_when_there_are_pages_for_it_beside_those_that_started() -> None:
    scheduler = _scheduler(num_pages=4)
    _add(scheduler, make_request("a", [5, 6, 7, 8]))
    _add(scheduler, make_request("b", [8, 7, 6, 5]))
    assert _parts(_plan(scheduler)) == [("a", 0, 4)]


def test_request_that_waits_for_pages_is_not_overtaken() -> None:
    scheduler = _scheduler(num_pages=4)
    _add(scheduler, make_request("a", [5, 6, 7]))
    _add(scheduler, make_request("large", range(20, 26)))
    _add(scheduler, make_request("small", [8]))
    assert _parts(_plan(scheduler)) == [("a", 0, 3)]
    scheduler.cancel("large")
    assert _parts(_plan(scheduler)) == [("a", 3, 1), ("small", 0, 1)]


def test_request_that_fills_all_pages_alone_ends_as_at_its_longest() -> None:
    scheduler = _scheduler(num_pages=2)
    _add(scheduler, make_request(prompt=[5, 6, 7], max_tokens=9))
    (event,) = _turn(scheduler)
    assert event.finish_reason is FinishReason.MODEL_LENGTH
    assert scheduler.is_idle()
    scheduler.check_integrity()


# ---- ends


def test_waiting_request_is_cancelled_at_once() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request())
    assert scheduler.cancel("r")
    (event,) = scheduler.take_events()
    assert (event.finish_reason, event.token_ids) == (FinishReason.CANCELLED, [])
    assert scheduler.is_idle()
    assert not scheduler.cancel("r")


def test_running_request_gives_its_pages_back_when_cancelled() -> None:
    scheduler = _scheduler(num_pages=4)
    progress = _add(scheduler, make_request())
    _turn(scheduler)
    scheduler.cancel("r")
    assert not progress.pages
    scheduler.check_integrity()
    (event,) = scheduler.take_events()
    assert event.first_index == 1


def test_cancelled_request_in_flight_gives_its_pages_back_after_its_step() -> None:
    scheduler = _scheduler(num_pages=4)
    progress = _add(scheduler, make_request())
    step = _plan(scheduler)
    scheduler.cancel("r")
    assert progress.pages
    (event,) = _complete(scheduler, step)
    assert (event.finish_reason, event.token_ids) == (FinishReason.CANCELLED, [])
    assert not progress.pages
    assert scheduler.is_idle()


def test_id_may_be_used_again_while_a_cancelled_request_is_still_in_flight() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request())
    first = _plan(scheduler)
    scheduler.cancel("r")
    again = _add(scheduler, make_request())
    second = _plan(scheduler)
    _complete(scheduler, first, 8)
    _complete(scheduler, second, 9)
    assert again.output_token_ids == [9]


def test_stop_token_is_part_of_the_output() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request(stop_token_ids=(9,)))
    (event,) = _turn(scheduler, 9)
    assert (event.token_ids, event.stop_token_id) == ([9], 9)
    assert event.finish_reason is FinishReason.STOP


# ---- events


def test_first_event_tells_how_long_the_request_queued() -> None:
    scheduler = _scheduler(now_s=10.0)
    _add(scheduler, make_request())
    (first,), (second,) = _turn(scheduler), _turn(scheduler)
    assert (first.seconds, second.seconds) == (ShardSeconds(2.5, 0.0), None)


def test_last_event_tells_where_the_time_went() -> None:
    now_s = iter(range(10, 100))
    attention_s = iter((1.0, 3.5))
    scheduler = Scheduler(
        EngineConfig(page_size=2),
        64,
        100,
        clock=lambda: float(next(now_s)),
        stages=lambda: {"attention": next(attention_s)},
    )
    _add(scheduler, make_request(max_tokens=2))
    _turn(scheduler)
    (last,) = _turn(scheduler)
    assert last.seconds is not None
    assert last.seconds.stages == {"attention": 2.5}
    assert last.seconds.decode_s is not None
    assert last.seconds.decode_s > 0.0


def test_a_request_that_never_ran_has_no_times() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request())
    scheduler.cancel("r")
    (event,) = scheduler.take_events()
    assert event.seconds is None


def test_events_told_together_keep_the_times_of_either() -> None:
    first = TokenEvent("r", 0, [5], seconds=ShardSeconds(1.0, 2.0))
    later = TokenEvent("r", 1, [6])
    last = TokenEvent(
        "r", 1, [6], seconds=ShardSeconds(1.0, 2.0, 3.0), finish_reason=FinishReason.LENGTH
    )
    for second, told in ((later, first.seconds), (last, last.seconds)):
        joined = first.joined(second)
        assert joined is not None
        assert joined.seconds == told


def test_events_carry_logprobs_where_the_sampler_gave_them() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request())
    logprob = TokenLogprob(9, -0.5, [(9, -0.5)])
    step = _plan(scheduler)
    scheduler.accept(step.entries[0], SampledToken(9, logprob))
    (event,) = scheduler.complete(step)
    assert event.logprobs == [logprob]


def test_events_follow_the_thinking_and_the_caller_may_end_it() -> None:
    scheduler = _scheduler()
    thinking = ThinkingParams(
        begin_token_id=3, end_token_id=4, closing_token_ids=(5, 4), starts_open=True
    )
    progress = _add(scheduler, make_request(max_tokens=9, thinking=thinking))
    _turn(scheduler)
    assert scheduler.end_thinking("r")
    events = []
    for _ in range(2):
        forced = sampling_state(progress).forced_token_id
        assert forced is not None
        events += _turn(scheduler, forced)
    assert [event.token_ids for event in events] == [[5], [4]]
    assert [event.num_thinking_tokens for event in events] == [2, 2]
    assert [event.thinking_ended_by for event in events] == [None, "caller"]
    assert not scheduler.end_thinking("r")


def test_thinking_goes_on_where_it_was_when_a_request_goes_on() -> None:
    scheduler = _scheduler()
    thinking = ThinkingParams(
        begin_token_id=3, end_token_id=4, budget_tokens=2, closing_token_ids=(5, 4)
    )
    progress = _add(scheduler, make_request(max_tokens=9, thinking=thinking), 3, 8, 8, 5)
    assert sampling_state(progress).forced_token_id == 4


def test_ending_the_thinking_of_a_request_that_does_not_think_does_nothing() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request())
    assert not scheduler.end_thinking("r")
    assert not scheduler.end_thinking("unknown")


# ---- grammars; tokens from 5 on are the letters from a on


def _add_held(scheduler: Scheduler, text: str, *output: int, **fields: Any) -> RequestProgress:
    request = make_request(max_tokens=9, grammar=GrammarParams(text=text), **fields)
    progress = make_progress(request, *output)
    scheduler.add(progress)
    return progress


def test_a_whole_answer_ends_with_its_last_token() -> None:
    scheduler = _scheduler()
    _add_held(scheduler, 'start: "a" "b"', min_tokens=4)
    (first,), (last,) = _turn(scheduler, 5), _turn(scheduler, 6)
    assert first.finish_reason is None
    assert (last.token_ids, last.finish_reason) == ([6], FinishReason.STOP)
    assert last.stop_token_id is None
    assert scheduler.is_idle()


def test_an_answer_that_may_go_on_ends_with_eos() -> None:
    scheduler = _scheduler()
    _add_held(scheduler, "start: /a+/", 5)
    (last,) = _turn(scheduler, EOS)
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, EOS)


def test_an_answer_that_was_whole_before_a_failure_ends_at_once() -> None:
    scheduler = _scheduler()
    _add_held(scheduler, 'start: "a" "b"', 5, 6)
    (last,) = scheduler.take_events()
    assert (last.token_ids, last.finish_reason) == ([], FinishReason.STOP)


def test_an_answer_that_cannot_go_on_fails_its_request_alone() -> None:
    scheduler = _scheduler()
    stuck = _add_held(scheduler, 'start: "a" "e"', 5, stop_token_ids=(9,), min_tokens=3)
    other = _add(scheduler, make_request("other", max_tokens=9))
    step = _plan(scheduler)
    assert sampling_state(stuck).forced_token_id == EOS
    events = {event.request_id: event for event in _complete(scheduler, step)}
    assert events["r"].finish_reason is FinishReason.ERROR
    assert events["r"].error_code == GRAMMAR_FAILED
    assert (events["r"].first_index, events["r"].token_ids) == (1, [])
    assert events["other"].token_ids == [9]
    assert other.state is RequestState.RUNNING


# ---- the door


def test_prompt_longer_than_the_context_is_refused() -> None:
    scheduler = _scheduler(max_context=4)
    with pytest.raises(InvalidRequestError) as caught:
        _add(scheduler, make_request(prompt=[5] * 4))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_prompt_longer_than_all_pages_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="must fit into 4"):
        _add(_scheduler(num_pages=2), make_request(prompt=[5] * 4))


def test_id_in_use_is_refused() -> None:
    scheduler = _scheduler()
    _add(scheduler, make_request())
    with pytest.raises(InvalidRequestError, match="in use"):
        _add(scheduler, make_request())


def test_request_is_refused_when_too_many_wait_unless_it_was_let_in_before() -> None:
    scheduler = _scheduler(max_waiting_requests=1)
    _add(scheduler, make_request("a"))
    with pytest.raises(OverloadedError):
        _add(scheduler, make_request("b"))
    _add(scheduler, make_request("c"), 7)
    assert scheduler.load().num_waiting == 2


# ---- integrity


def test_load_tells_how_busy_the_shard_is() -> None:
    scheduler = _scheduler(num_pages=8, max_running_requests=1)
    for request_id in "ab":
        _add(scheduler, make_request(request_id, [5, 6, 7]))
    _turn(scheduler)
    load = scheduler.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 1, 3)
    assert (load.num_free_pages, load.num_pages) == (6, 8)
    assert (load.num_prompt_tokens, load.num_output_tokens) == (3, 1)


def test_integrity_check_finds_a_page_that_a_request_lost() -> None:
    scheduler = _scheduler()
    progress = _add(scheduler, make_request())
    _turn(scheduler)
    progress.pages.pop()
    with pytest.raises(PageLeakError, match="1 references counted, 0 held"):
        scheduler.check_integrity()
