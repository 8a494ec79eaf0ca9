"""Predictions change when tokens come, never which; the right one saves steps."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from engine_fakes import VOCABULARY, FakeDevice, make_progress, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.actors.drafter import Drafting, NgramDrafter, draft_predicted
from ostro.actors.engine.followed_text import TOKEN_BYTES, packed
from ostro.actors.engine.request import (
    GenerationRequest,
    GrammarParams,
    RequestProgress,
    ThinkingParams,
    TokenEvent,
)
from ostro.actors.engine.scheduler import Scheduler
from ostro.configs.deployment import EngineConfig
from ostro.configs.speculation import DraftMethod, SpeculationConfig

_BEGIN, _END = 3, 4
_NGRAM = SpeculationConfig(method=DraftMethod.NGRAM, num_draft_tokens=5, adaptive=False)
_LONG = {"max_tokens": 40, "ignore_eos": True}


def _serve(
    requests: Sequence[GenerationRequest],
    speculation: SpeculationConfig | None,
    *,
    num_pages: int = 64,
    resumed_with: Sequence[int] = (),
) -> tuple[dict[str, TokenEvent], int]:
    """All events of each request as one, and the number of steps."""
    config = EngineConfig(
        page_size=2, max_tokens_per_step=32, max_running_requests=4, speculation=speculation
    )
    scheduler, device = Scheduler(config, num_pages, 100, clock=lambda: 1.0), FakeDevice(2)
    drafting = None if speculation is None else Drafting(NgramDrafter(speculation), speculation)
    for request in requests:
        scheduler.add(make_progress(request, *resumed_with))
    events: list[TokenEvent] = []
    num_steps = 0
    while scheduler.has_work():
        step = scheduler.schedule()
        assert step is not None
        device.run(step, scheduler)
        events += scheduler.complete(step)
        scheduler.check_integrity()
        num_steps += 1
        if drafting is not None:
            drafting.after(step, ())
    told: dict[str, TokenEvent] = {}
    for event in [*events, *scheduler.take_events()]:
        before = told.get(event.request_id)
        joined = event if before is None else before.joined(event)
        assert joined is not None
        told[event.request_id] = msgspec.structs.replace(joined, seconds=None)
    return told, num_steps


def _predicting(request: GenerationRequest, prediction: Sequence[int]) -> GenerationRequest:
    return msgspec.structs.replace(request, prediction=packed([*prediction]))


def _plain(told: dict[str, TokenEvent]) -> dict[str, TokenEvent]:
    return {
        name: msgspec.structs.replace(event, num_predicted_tokens=0, num_cached_tokens=0)
        for name, event in told.items()
    }


@given(
    requests=st.lists(
        st.builds(
            make_request,
            prompt=st.lists(st.integers(5, 11), min_size=1, max_size=6),
            max_tokens=st.integers(1, 20),
            min_tokens=st.integers(0, 4),
            stop_token_ids=st.sampled_from([(), (9,)]),
            ignore_eos=st.booleans(),
            thinking=st.sampled_from(
                [
                    None,
                    ThinkingParams(begin_token_id=_BEGIN, end_token_id=_END),
                    ThinkingParams(
                        begin_token_id=_BEGIN,
                        end_token_id=_END,
                        budget_tokens=4,
                        closing_token_ids=(5, _END),
                        starts_open=True,
                    ),
                ]
            ),
            grammar=st.none() | st.just(GrammarParams(text="start: /[a-d]{2,9}/")),
        ),
        min_size=1,
        max_size=3,
    ),
    predictions=st.lists(
        st.none()  # the right one
        | st.lists(st.integers(0, VOCABULARY - 1), max_size=40)
        | st.builds(lambda run, times: run * times, st.lists(st.integers(5, 8)), st.just(200)),
        min_size=3,
        max_size=3,
    ),
    num_pages=st.sampled_from([16, 64]),
)
@settings(max_examples=50, deadline=None)
def test_any_prediction_gives_the_events_that_none_gives(
    requests: list[GenerationRequest], predictions: list[list[int] | None], num_pages: int
) -> None:
    named = [msgspec.structs.replace(one, request_id=f"r{i}") for i, one in enumerate(requests)]
    wanted, _ = _serve(named, None, num_pages=num_pages)
    predicted = [
        _predicting(one, wanted[one.request_id].token_ids if prediction is None else prediction)
        for one, prediction in zip(named, predictions, strict=False)
    ]
    told, _ = _serve(predicted, _NGRAM, num_pages=num_pages)
    assert _plain(told) == _plain(wanted)
    for one in predicted:
        num_met = told[one.request_id].num_predicted_tokens
        assert 0 <= num_met <= len(one.prediction) // TOKEN_BYTES
        assert num_met <= len(told[one.request_id].token_ids)


def test_the_right_prediction_takes_as_many_tokens_a_step_as_are_configured() -> None:
    request = make_request(**_LONG)
    wanted, num_plain_steps = _serve([request], None)
    told, num_steps = _serve([_predicting(request, wanted["r"].token_ids)], _NGRAM)
    assert told["r"].token_ids == wanted["r"].token_ids
    assert told["r"].num_predicted_tokens == 40
    assert num_plain_steps == 40
    assert num_steps == 1 + -(-39 // 6)  # the prompt's step brings the first, the others six each


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_an_edit_is_passed_and_costs_a_few_steps(most: int) -> None:
    request = make_request(**_LONG)
    wanted = _serve([request], None)[0]["r"].token_ids
    edited = [*wanted[:15], 1, 1, *wanted[17:30], *wanted[33:]]
    speculation = SpeculationConfig(
        method=DraftMethod.NGRAM, num_draft_tokens=most, min_ngram=4, adaptive=False
    )
    _, num_steps = _serve([_predicting(request, edited)], speculation)
    assert num_steps <= 1 + -(-39 // (most + 1)) + 2 * 4


def test_an_answer_that_goes_on_elsewhere_tells_of_as_many_predicted_tokens() -> None:
    request = make_request(**_LONG)
    wanted = _serve([request], None)[0]["r"].token_ids
    predicted = _predicting(request, [*wanted[:9], 1, 1, *wanted[12:33]])
    told, _ = _serve([predicted], _NGRAM)
    resumed, _ = _serve([predicted], _NGRAM, resumed_with=wanted[:20])
    assert resumed["r"].token_ids == wanted[20:]
    assert resumed["r"].num_predicted_tokens == told["r"].num_predicted_tokens > 20


def _drafted(prediction: list[int], *output: int, num_guesses: int = 3) -> list[int]:
    """What is drafted after a step that brought the last token of the output, and guesses."""
    request = _predicting(make_request(**_LONG), prediction)
    progress = RequestProgress(request, arrived_s=0.0, output_token_ids=output[:-1])
    config = EngineConfig(page_size=2, speculation=_NGRAM)
    scheduler = Scheduler(config, 64, 100, clock=lambda: 1.0)
    scheduler.add(progress)
    step = scheduler.schedule()
    assert step is not None
    progress.output_token_ids.append(output[-1])
    progress.draft_token_ids = [99] * num_guesses
    draft_predicted(step, 5, num_guesses)
    return progress.draft_token_ids


def test_the_prediction_is_drafted_first_and_what_is_not_sure_last() -> None:
    text = [*range(20, 40)]
    assert _drafted(text, 20, 21) == text[2:7]
    assert _drafted(text, 20, 7) == [99] * 3  # the next place is a mere guess
    assert _drafted(text, 7, 8, 9) == [99] * 3
    assert _drafted([], 20) == [99] * 3


def test_where_no_guess_pays_only_what_is_likely_is_drafted() -> None:
    text = [*range(20, 60)]
    assert _drafted(text, 20, 21, num_guesses=0) == text[2:7]
    assert _drafted(text, 20, 7, num_guesses=0) == []
    edited = [7 if token % 8 == 0 else token for token in text[:24]]
    assert _drafted(text, *edited, num_guesses=0) == text[24:27]
    assert _drafted(text, *edited, num_guesses=4) == text[24:28]
