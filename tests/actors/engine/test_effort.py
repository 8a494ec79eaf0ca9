"""Thinking ends by the model, by its budget or by the caller, always through the closing phrase."""

from __future__ import annotations

from ostro.actors.engine.effort import ThinkingTracker
from ostro.actors.engine.request import ThinkingParams

BEGIN, END, FIRST, SECOND, OTHER = 3, 4, 5, 6, 9


def _tracker(
    budget: int | None = None,
    *,
    zone: int = 0,
    closing: tuple[int, ...] = (FIRST, SECOND, END),
    starts_open: bool = False,
) -> ThinkingTracker:
    return ThinkingTracker(
        ThinkingParams(
            begin_token_id=BEGIN,
            end_token_id=END,
            budget_tokens=budget,
            soft_zone_tokens=zone,
            closing_token_ids=closing,
            starts_open=starts_open,
        )
    )


def _observe(tracker: ThinkingTracker, *token_ids: int) -> ThinkingTracker:
    for token_id in token_ids:
        tracker.observe(token_id)
    return tracker


def _close_as_told(tracker: ThinkingTracker) -> list[int]:
    forced = []
    while (token_id := tracker.next_token()) is not None:
        forced.append(token_id)
        tracker.observe(token_id)
    return forced


def test_tracker_counts_what_is_between_the_marks() -> None:
    tracker = _observe(_tracker(), OTHER, BEGIN, OTHER, OTHER, END, OTHER)
    assert tracker.num_thinking_tokens == 2
    assert tracker.ended_by == "model"
    assert not tracker.is_open


def test_tracker_counts_from_the_first_token_when_the_prompt_ends_in_thinking() -> None:
    tracker = _observe(_tracker(starts_open=True), OTHER)
    assert (tracker.is_open, tracker.num_thinking_tokens) == (True, 1)
    assert tracker.ended_by is None


def test_tracker_forces_the_closing_phrase_when_the_budget_is_spent() -> None:
    tracker = _observe(_tracker(budget=4), BEGIN, OTHER)
    assert tracker.next_token() is None
    tracker.observe(OTHER)
    assert _close_as_told(tracker) == [FIRST, SECOND, END]
    assert tracker.ended_by == "budget"
    assert tracker.num_thinking_tokens == 4
    assert not tracker.is_open


def test_tracker_forces_the_end_mark_alone_when_there_is_no_phrase() -> None:
    tracker = _observe(_tracker(budget=1, closing=()), BEGIN, OTHER)
    assert _close_as_told(tracker) == [END]
    assert tracker.ended_by == "budget"


def test_tracker_adds_the_end_mark_to_a_phrase_without_it() -> None:
    tracker = _observe(_tracker(budget=2, closing=(FIRST,)), BEGIN, OTHER)
    assert _close_as_told(tracker) == [FIRST, END]


def test_tracker_stops_forcing_when_the_model_closes_first() -> None:
    tracker = _observe(_tracker(), BEGIN, OTHER)
    assert tracker.end_now()
    tracker.observe(END)
    assert tracker.next_token() is None
    assert tracker.ended_by == "model"


def test_tracker_bans_the_begin_mark_when_the_budget_is_zero() -> None:
    assert _tracker(budget=0).banned_token_ids == (BEGIN,)
    assert _tracker(budget=1).banned_token_ids == ()


def test_tracker_closes_at_once_when_the_budget_is_zero_and_thinking_is_open() -> None:
    tracker = _tracker(budget=0, starts_open=True)
    assert _close_as_told(tracker) == [END]


def test_tracker_leaves_the_phrase_out_when_the_budget_has_no_room_for_it() -> None:
    tracker = _observe(_tracker(budget=2), BEGIN, OTHER, OTHER)
    assert _close_as_told(tracker) == [END]
    assert tracker.num_thinking_tokens == 2


def test_tracker_bans_thinking_again_once_the_budget_is_spent() -> None:
    tracker = _observe(_tracker(budget=1), BEGIN, OTHER)
    _close_as_told(tracker)
    assert tracker.banned_token_ids == (BEGIN,)


def test_tracker_lets_the_model_think_again_within_its_budget() -> None:
    tracker = _observe(_tracker(budget=5), BEGIN, OTHER, END)
    assert tracker.banned_token_ids == ()
    _observe(tracker, BEGIN, OTHER)
    assert tracker.ended_by is None
    tracker.observe(OTHER)
    assert tracker.next_token() == FIRST


def test_tracker_closes_when_the_caller_says_so() -> None:
    tracker = _observe(_tracker(), BEGIN, OTHER)
    assert tracker.end_now()
    assert not tracker.end_now()
    assert _close_as_told(tracker) == [FIRST, SECOND, END]
    assert tracker.ended_by == "caller"
    assert tracker.banned_token_ids == (BEGIN,)


def test_tracker_forces_the_phrase_whole_when_a_token_slipped_in_before_it() -> None:
    tracker = _observe(_tracker(), BEGIN)
    tracker.end_now()
    tracker.observe(OTHER)
    assert _close_as_told(tracker) == [FIRST, SECOND, END]


def test_tracker_forbids_thinking_that_has_not_begun_when_the_caller_ends_it() -> None:
    tracker = _tracker()
    assert tracker.end_now()
    assert tracker.banned_token_ids == (BEGIN,)
    assert tracker.next_token() is None
    assert not tracker.end_now()


def test_tracker_has_nothing_to_end_once_thinking_has_ended() -> None:
    assert not _observe(_tracker(), BEGIN, END).end_now()


def test_tracker_raises_the_end_mark_linearly_over_the_soft_zone() -> None:
    tracker = _observe(_tracker(budget=8, zone=4), BEGIN)
    biases = []
    for _ in range(6):
        biases.append(tracker.end_bias())
        tracker.observe(OTHER)
    assert biases == [0.0, 0.0, 0.0, 2.0, 4.0, 6.0]
    assert tracker.end_bias() == 0.0


def test_tracker_raises_nothing_without_a_budget_or_outside_of_thinking() -> None:
    assert _observe(_tracker(zone=4), BEGIN, OTHER).end_bias() == 0.0
    assert _tracker(budget=2, zone=4).end_bias() == 0.0


def test_a_caller_s_end_goes_on_from_wherever_its_output_was_lost() -> None:
    whole = _observe(_tracker(), BEGIN, OTHER, FIRST)
    assert whole.end_now()
    output = [BEGIN, OTHER, FIRST, *_close_as_told(whole), OTHER]
    assert output == [BEGIN, OTHER, FIRST, FIRST, SECOND, END, OTHER]
    for known in range(4, len(output) + 1):
        lost = _observe(_tracker(budget=8), *output[:known])
        lost.end_again(output[:known])
        assert output[:known] + _close_as_told(lost) == output[: max(known, 6)]
        assert lost.ended_by == "caller"
        assert lost.num_thinking_tokens == 4
        assert lost.banned_token_ids == (BEGIN,)


def test_a_caller_s_end_holds_though_no_token_has_shown_it() -> None:
    open_still = _observe(_tracker(closing=()), BEGIN, OTHER)
    open_still.end_again([BEGIN, OTHER])
    assert _close_as_told(open_still) == [END]
    not_begun = _tracker()
    not_begun.end_again([])
    assert (not_begun.banned_token_ids, not_begun.ended_by) == ((BEGIN,), None)
